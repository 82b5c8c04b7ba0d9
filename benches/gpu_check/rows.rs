//! Times of kernels that are bound by the bytes of rows: norms, quantization, rotations and rows into caches.

use crate::ceilings::Ceilings;
use crate::correctness::workspace;
use crate::device::{Device, Held};
use crate::inputs::{self, Buffer};
use crate::kernel::{Asked, Packed};
use crate::parts::{Part, Verdict};
use crate::random::Random;
use crate::report::{Table, judged, percent};
use quantc::ir::diag::Result;
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle};
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::cache::{AppendSpec, Rotation};
use quantc_codegen::cuda::group::Scales;
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::rows::{From, RowTilesSpec};
use quantc_codegen::eexpr::{MemTy, UnaryOp};
use quantc_codegen::spec::Rows;

/// A kernel that is timed.
struct Row {
    name: String,
    asked: Asked,
}

/// Columns of rows, and heads of 128 columns.
const WIDTH: u32 = 4096;

/// Rows of a call: no cache of a GPU holds what it reads and writes.
const ROWS: u32 = 8192;

/// Rows of a call that puts keys or values into a cache, which has two slots of as many.
const APPENDED: u32 = 32768;

/// What is timed.
fn table(small: bool) -> Vec<Row> {
    use MemTy::{Bf16, F32};
    let mut list = vec![];
    let mut add = |name: String, asked: Asked| list.push(Row { name, asked });
    let width = if small { 256 } else { WIDTH };
    add("RMS norm, f32 to bf16".into(), Asked::Row(RowSpec::rms_norm(width, 1e-5, F32, F32, Bf16)));
    if small {
        return list;
    }
    let norm = RowSpec::rms_norm_quantize(width, 1e-5, F32, F32, Some(128));
    add("RMS norm, f32 to int8 with sums of groups".into(), Asked::Row(norm));
    add("layer norm, f32".into(), Asked::Row(RowSpec::layer_norm(width, 1e-5, F32, F32, Some(F32), F32)));
    add("quantize, f32 to int8".into(), Asked::Row(RowSpec::quantize_token(width, F32, Some(128))));
    add("quantize, bf16 to int8".into(), Asked::Row(RowSpec::quantize_token(width, Bf16, None)));
    add(
        "silu of a row times another, bf16".into(),
        Asked::Row(RowSpec::gated(UnaryOp::Silu, width, Bf16, Bf16)),
    );
    for (kind, scales, name) in [
        (GroupKind::E4m3, Scales::Rows, "f32 to tiles of fp8"),
        (GroupKind::S8, Scales::Rows, "f32 to tiles of int8"),
        (GroupKind::E4m3, Scales::Blocks, "f32 to tiles of fp8, scales of blocks"),
        (GroupKind::Bf16, Scales::None, "f32 to tiles of bf16"),
    ] {
        let from = From::Floats { ty: F32, stride: width, scales, sums: false };
        add(name.into(), Asked::Tiles(RowTilesSpec { k: width, rows: Rows::T, kind, from, span: 0 }));
    }
    add("rotate 32 heads".into(), Asked::Rope(RopeSpec::new(32, 128, RopeStyle::Half)));
    for ty in [CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3] {
        for role in [Role::Keys, Role::Values] {
            let rows = CacheAppendSpec {
                heads: 8,
                head_dim: 128,
                x_stride: 1024,
                ty,
                role,
                fixed_scales: false,
                slot_rows: APPENDED,
            };
            let rotation =
                (role == Role::Keys).then_some(Rotation { rotary_dim: 128, style: RopeStyle::Half });
            let what = if role == Role::Keys { "rotated keys" } else { "values" };
            let name = format!("{what} into a cache of {}", ty.name());
            add(name, Asked::Append(AppendSpec { rows, rotation, paged: true }));
        }
    }
    list
}

/// What of the copy's rate is wanted.
const WANTED: f64 = 0.9;

/// Its kernels.
pub fn kernels(small: bool) -> Vec<Asked> {
    table(small).into_iter().map(|row| row.asked).collect()
}

/// Times the kernels of the table.
pub fn run(part: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let ceilings = Ceilings::read(part.scratch, &packed.target.gpu);
    let mut device = Device::open(packed)?;
    let note = format!(
        "{ROWS} rows, and {APPENDED} into caches; the share is of the copy's rate. {}",
        ceilings.note()
    );
    let columns = ["kernel", "us", "±", "GB/s", "share", "wanted", ""];
    let mut table = Table::new(part, "Rows", &note, &columns);
    for (i, row) in self::table(part.small).into_iter().enumerate() {
        let Some(kernel) = packed.find(&row.asked) else { continue };
        let rows = if matches!(row.asked, Asked::Append(_)) { APPENDED } else { ROWS };
        table.each(i, |say| {
            let piece = inputs::of(&row.asked, rows, &mut Random(11 + i as u64))?;
            let mut held = Held::load(&mut device, kernel)?;
            let (mut at, mut bytes) = (vec![], 0);
            for buffer in &piece.buffers {
                at.push(match buffer {
                    Buffer::Given(given) => {
                        bytes += given.len() as u64;
                        held.upload(given)?
                    }
                    Buffer::Made { bytes: made, .. } => {
                        bytes += *made as u64;
                        held.filled(*made as u64, 0)?
                    }
                });
            }
            // Of a cache's two slots half is written.
            if let Asked::Append(spec) = &row.asked {
                bytes -= unwritten(&piece.buffers, spec);
            }
            let extra = workspace(&mut held, kernel, rows)?;
            at.extend(extra);
            let time = held.time(8, &mut |held, _| held.launch(kernel, &at, rows, rows))?;
            let rate = bytes as f64 / time.us / 1e3;
            let share = rate / ceilings.copy;
            say(vec![
                row.name,
                format!("{:.1}", time.us),
                percent(time.spread),
                format!("{rate:.0}"),
                percent(share),
                percent(WANTED),
                judged(share >= WANTED),
            ]);
            Ok(())
        })?;
    }
    Ok(table.finish())
}

/// Bytes of a cache that a call does not write.
fn unwritten(buffers: &[Buffer], spec: &AppendSpec) -> u64 {
    let made = buffers.iter().map(|b| if let Buffer::Made { bytes, .. } = b { *bytes as u64 } else { 0 });
    let all: u64 = made.sum();
    all - all * u64::from(APPENDED) / (2 * u64::from(spec.rows.slot_rows))
}
