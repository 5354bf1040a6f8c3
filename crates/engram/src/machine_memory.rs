//! The memory of this machine.

/// Bytes of memory that a process may use: the machine's, or the limit of its control group. None if the system does
/// not tell.
pub(crate) fn machine_memory() -> Option<u64> {
    let total = total(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|limit| limit.trim().parse().ok());
    Some(limit.map_or(total, |limit: u64| limit.min(total)))
}

/// Of `/proc/meminfo`.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(1024 * line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_words() {
        assert_eq!(total("MemTotal:       24616212 kB\nMemFree: 1 kB\n"), Some(24_616_212 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
    }
}
