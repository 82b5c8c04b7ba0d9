//! Kernels on random inputs beside what they should give in f64. Outputs hold poison before, and have more of it behind them:
//! what is not to be written must hold it after. So must inputs hold what they held.

use crate::device::{Device, Fault, Held};
use crate::inputs::{self, Buffer};
use crate::kernel::{Asked, Packed, Ready};
use crate::parts::{Part, Verdict};
use crate::random::Random;
use crate::report::Table;
use crate::{reference, table};
use quantc::ir::diag::Result;
use quantc_codegen::cuda::tile::Access;

/// What outputs hold before a kernel runs.
pub const POISON: u8 = 0xa5;

/// Bytes behind an output that nothing may write.
const BEHIND: usize = 4096;

/// Odd numbers of rows for calls of up to so many.
fn rows_of_calls(asked: &Asked) -> Vec<u32> {
    let most = match asked {
        Asked::Skinny(s) => s.m.max,
        Asked::Decode { rows, .. } => *rows,
        // More than a tile, and not a whole number of them.
        Asked::Group { .. } | Asked::Mixed(_) => return vec![33, 130],
        _ => 256,
    };
    match most {
        1 => vec![1],
        2..=8 => vec![1, 7],
        9..=64 => vec![33],
        _ => vec![100],
    }
}

/// Checks every kernel of the table.
pub fn run(part: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let note = "The error is the largest one, as a part of the largest number that should come out. Some kernels have the last rows \
                of a call alone.";
    let mut table = Table::new(part, "Kernels", note, &["kernel", "rows", "largest error", ""]);
    let mut device = Device::open(packed)?;
    let wanted = table::kernels(part.small);
    let kernels = packed.kernels.iter().filter(|k| wanted.contains(&k.asked));
    let calls = kernels.flat_map(|k| rows_of_calls(&k.asked).into_iter().map(move |m| (k, m)));
    // Fresh numbers every time, which the report tells.
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = seed.map_or(1, |d| d.as_nanos() as u64);
    for (i, (kernel, m)) in calls.enumerate() {
        let seed = seed.wrapping_add(i as u64);
        table.each(i, |say| {
            let symbol = &kernel.entry.symbol;
            match one(&mut device, kernel, m, &mut Random(seed)) {
                Ok(error) => {
                    let rows = match kernel.asked.tokens(m) {
                        tokens if tokens > m => format!("{m} of {tokens}"),
                        _ => m.to_string(),
                    };
                    say(vec![format!("`{symbol}`"), rows, format!("{error:.1e}"), "right".into()])
                }
                Err(fault) => {
                    let named = |what: String| format!("`{symbol}`, {m} rows, seed {seed}: {what}");
                    return Err(match fault {
                        Fault::Wrong(what) => Fault::Wrong(named(what)),
                        Fault::Lost(what) => Fault::Lost(named(what)),
                    });
                }
            }
            Ok(())
        })?;
    }
    Ok(table.finish())
}

/// The largest error of a kernel's outputs, as a part of their largest number.
fn one(
    device: &mut Device<'_>,
    kernel: &Ready,
    m: u32,
    random: &mut Random,
) -> std::result::Result<f64, Fault> {
    let case = inputs::of(&kernel.asked, m, random)?;
    let mut held = Held::load(device, kernel)?;
    let mut at = vec![];
    for buffer in &case.buffers {
        at.push(match buffer {
            Buffer::Given(bytes) => held.upload(bytes)?,
            // The interpreter knows where buffers end by itself.
            Buffer::Made { bytes, .. } if crate::interpreted() => held.filled(*bytes as u64, POISON)?,
            Buffer::Made { bytes, .. } => held.filled((bytes + BEHIND) as u64, POISON)?,
        });
    }
    let tokens = kernel.asked.tokens(m);
    at.extend(workspace(&mut held, kernel, tokens)?);
    held.launch(kernel, &at, tokens, m)?;
    held.wait()?;
    let wanted = reference::of(&kernel.asked, &case, m)?;
    let mut worst = 0.0f64;
    let mut outputs = wanted.iter();
    for ((buffer, &at), desc) in case.buffers.iter().zip(&at).zip(&kernel.kernel.buffers) {
        let name = &desc.name;
        let wrong = |what: String| Fault::Wrong(format!("`{name}`: {what}"));
        match buffer {
            Buffer::Given(bytes) => {
                if held.download(at, bytes.len())? != *bytes {
                    return Err(wrong("an input was written".into()));
                }
            }
            Buffer::Made { bytes, num } => {
                let behind = if crate::interpreted() { 0 } else { BEHIND };
                let got = held.download(at, bytes + behind)?;
                if got[*bytes..].iter().any(|&b| b != POISON) {
                    return Err(wrong("what is behind it was written".into()));
                }
                let size = num.bytes();
                let touched = |i: usize| got[i * size..(i + 1) * size].iter().any(|&b| b != POISON);
                let Some(wanted) = outputs.next() else {
                    return Err(wrong("nothing to compare with".into()));
                };
                let numbers = num.all(&got[..*bytes]);
                worst = worst.max(wanted.compare(&numbers, touched).map_err(wrong)?);
            }
        }
    }
    Ok(worst)
}

/// What blocks of a launch hand each other, in the order in which a kernel takes it.
pub fn workspace(held: &mut Held<'_, '_>, kernel: &Ready, t: u32) -> std::result::Result<Vec<u64>, Fault> {
    let mut list = vec![];
    for access in kernel.kernel.buffers.iter().map(|b| b.access) {
        let each = match access {
            Access::Scratch => kernel.launch.scratch_each,
            Access::Counters => kernel.launch.counters_each,
            _ => continue,
        };
        list.push(held.filled(each * u64::from(t), 0)?);
    }
    Ok(list)
}
