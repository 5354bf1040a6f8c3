//! How much memory this machine lets a program have: a container may have less than the machine.

use std::fmt;

use serde::Serialize;

use crate::number::bytes;

/// Limits on memory, as far as the system tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Of the machine.
    machine: Option<u64>,
    /// Of the control group that this process is in (`memory.max`).
    container: Option<u64>,
    /// Of /dev/shm, where processes share memory.
    shared: Option<u64>,
}

impl Memory {
    /// Asks the system.
    pub(crate) fn of_this_machine() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let machine = read("/proc/meminfo").and_then(|text| total(&text));
        let container = read("/proc/self/cgroup")
            .and_then(|text| Some(format!("/sys/fs/cgroup{}/memory.max", group(&text)?)))
            .and_then(|path| read(&path))
            .or_else(|| read("/sys/fs/cgroup/memory.max"))
            .or_else(|| read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
            .and_then(|text| text.trim().parse().ok())
            // Version 1 says how much there is by a number that no machine has.
            .filter(|&limit: &u64| limit < 1 << 60);
        let shared = rustix::fs::statvfs("/dev/shm").ok().map(|found| found.f_blocks * found.f_frsize);
        Self { machine, container, shared }
    }

    /// What a program may have.
    pub(crate) fn usable(&self) -> Option<u64> {
        match (self.machine, self.container) {
            (Some(machine), Some(container)) => Some(machine.min(container)),
            (one, other) => one.or(other),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |size: Option<u64>| size.map_or("unknown".to_owned(), bytes);
        write!(f, "memory of the machine {}", size(self.machine))?;
        match self.container {
            Some(limit) => write!(f, ", limit of its container {}", bytes(limit))?,
            None => f.write_str(", no limit of a container")?,
        }
        write!(f, ", /dev/shm {}", size(self.shared))
    }
}

/// `MemTotal` of /proc/meminfo, in bytes.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// The process's group of version 2 in /proc/self/cgroup.
fn group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::")).map(|path| path.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_words_are_understood() {
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       24584528 kB\n"), Some(24_584_528 * 1024));
        assert_eq!(total("nothing"), None);
        assert_eq!(group("12:cpu:/x\n0::/user.slice/a.scope\n"), Some("/user.slice/a.scope"));
        assert_eq!(group("0::/\n"), Some(""));
    }

    #[test]
    fn the_smaller_limit_counts() {
        let memory = |machine, container| Memory { machine, container, shared: None };
        assert_eq!(memory(Some(10), Some(3)).usable(), Some(3));
        assert_eq!(memory(Some(10), None).usable(), Some(10));
        assert_eq!(memory(None, None).usable(), None);
        assert!(memory(Some(1 << 30), Some(1 << 29)).to_string().contains("limit of its container 512 MiB"));
    }
}
