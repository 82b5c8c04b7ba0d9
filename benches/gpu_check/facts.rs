//! What the device is.

use crate::device::{Device, lost};
use crate::kernel::Packed;
use crate::parts::{Part, Verdict};
use crate::report::WRONG;
use quantc::ir::diag::{Diag, Result};

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Prints it.
pub fn run(_: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let device = Device::open(packed)?.driver.device();
    let device = device.map_err(|e| Diag::system(format!("{:?}", lost(e))))?;
    let (major, minor) = device.capability;
    let arch = packed.target.gpu.arch;
    let runs = arch.trim_start_matches("sm_").trim_end_matches('a') == format!("{major}{minor}")
        || (arch == "sm_80" && major == 8);
    println!("## Facts\n\n| fact | |\n|---|---|");
    println!("| device | {} |", device.name);
    println!("| compute capability | {major}.{minor} |");
    println!("| kernels are for | {arch} {} |", if runs { "" } else { WRONG });
    println!("| driver knows CUDA | {}.{} |", device.cuda / 1000, device.cuda % 1000 / 10);
    println!("| multiprocessors | {} |", device.multiprocessors);
    println!("| memory, free of all | {:.1} of {:.1} GiB |", gib(device.free), gib(device.total));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("| processors of the host | {cores} |\n");
    Ok(if runs { Verdict::Right } else { Verdict::Wrong })
}
