//! Figures about this process and machine, from `/proc`.

use std::fs;

/// Most memory this process has held at once, in bytes; `None` when the system does not tell.
pub fn peak_rss_bytes() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory this process holds now, in bytes; `None` when the system does not tell.
pub fn rss_bytes() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// Memory that can be taken without swapping, in bytes: the system's estimate, or less when a control group limits
/// this process. `None` when the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    let system = kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(group_headroom().map_or(system, |group| system.min(group)))
}

/// CPUs this process may use; at least 1.
pub fn available_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the innermost control group (version 2) leaves of its limit.
fn group_headroom() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = format!("/sys/fs/cgroup/{path}");
    let read = |name: &str| fs::read_to_string(format!("{folder}/{name}")).ok()?.trim().parse::<u64>().ok();
    let limit = read("memory.max")?;
    let used = read("memory.current")?;
    // Cached file pages count as used but are given back on demand.
    let stat = fs::read_to_string(format!("{folder}/memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some(limit.saturating_sub(used).saturating_add(cached.unwrap_or(0)).min(limit))
}

/// The value of a `name:   123 kB` line, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_plausible() {
        let peak = peak_rss_bytes().expect("Linux tells VmHWM");
        let now = rss_bytes().expect("Linux tells VmRSS");
        assert!(now > 100_000 && peak > 100_000);
        assert!(available_memory_bytes().expect("Linux tells MemAvailable") > 1 << 20);
        assert!(available_cpus() >= 1);
    }

    #[test]
    fn lines_are_read() {
        assert_eq!(kilobytes("A:\t 5 kB\nVmHWM:\t   12 kB\n", "VmHWM:"), Some(12288));
        assert_eq!(kilobytes("A: 5 kB\n", "B:"), None);
        assert_eq!(kilobytes("A: five kB\n", "A:"), None);
    }
}
