//! How much memory this machine lets a program use: a container may have less than the machine.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::number::bytes;

/// Limits on memory, as far as the system tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// The machine's.
    machine: Option<u64>,
    /// The smallest limit of the control groups that this process is in, in bytes.
    container: Option<u64>,
    /// The file that the limit stands in.
    container_file: Option<String>,
    /// The size of /dev/shm, where processes share memory.
    shared: Option<u64>,
}

impl Memory {
    /// Asks the system.
    pub(crate) fn of_this_machine() -> Self {
        Self { shared: shared(), ..Self::below(Path::new("/")) }
    }

    /// What the files of Linux below `root` say.
    fn below(root: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let machine = read("proc/meminfo").and_then(|text| total(&text));
        let groups = read("proc/self/cgroup").unwrap_or_default();
        let stated = |file: String| Some((limit(&read(&file)?)?, format!("/{file}")));
        let smallest = limit_files(&groups).into_iter().filter_map(stated).min();
        let (container, container_file) = smallest.unzip();
        Self { machine, container, container_file, shared: None }
    }

    /// What a program may use.
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
        match (self.container, &self.container_file) {
            (Some(limit), Some(file)) => write!(f, ", limit of its container {} ({file})", bytes(limit))?,
            _ => f.write_str(", no limit of a container")?,
        }
        write!(f, ", /dev/shm {}", size(self.shared))
    }
}

/// Size of /dev/shm.
fn shared() -> Option<u64> {
    #[cfg(target_os = "linux")]
    return rustix::fs::statvfs("/dev/shm").ok().map(|found| found.f_blocks * found.f_frsize);
    #[cfg(not(target_os = "linux"))]
    None
}

/// `MemTotal` of /proc/meminfo, in bytes.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// The limit that a control group's file states. `max`, and in version 1 a number that no machine has, mean none.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|&limit: &u64| limit < 1 << 60)
}

/// Files with a limit on the memory of this process: of its groups in /proc/self/cgroup and of every group above them.
/// Version 2 has one line, `0::PATH`; version 1 one line per controller, `4:memory:PATH`.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (roots, file): (&[&str], _) = if controllers.is_empty() {
            // Beside version 1, version 2 is mounted at `unified`.
            (&["sys/fs/cgroup", "sys/fs/cgroup/unified"], "memory.max")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (&["sys/fs/cgroup/memory"], "memory.limit_in_bytes")
        } else {
            continue;
        };
        // Inside a container the path may be that of the host, of which only the root is visible.
        for group in Path::new(path).ancestors() {
            let group = group.to_string_lossy();
            let group = group.trim_matches('/');
            let separator = if group.is_empty() { "" } else { "/" };
            files.extend(roots.iter().map(|root| format!("{root}{separator}{group}/{file}")));
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemFree: 1 kB\nMemTotal:       24584528 kB\n");

    #[test]
    fn the_smallest_limit_of_the_groups_above_counts() {
        let root = system(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/user.slice/a.scope\n"),
            ("sys/fs/cgroup/user.slice/a.scope/memory.max", "max\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "1073741824\n"),
        ]);
        let memory = Memory::below(root.path());
        assert_eq!(memory.container, Some(1 << 30));
        assert_eq!(memory.container_file.as_deref(), Some("/sys/fs/cgroup/user.slice/memory.max"));
        assert_eq!((memory.machine, memory.usable()), (Some(24_584_528 * 1024), Some(1 << 30)));
        let text = memory.to_string();
        assert!(text.contains("limit of its container 1.00 GiB (/sys/fs/cgroup/user.slice"), "{text}");
    }

    #[test]
    fn version_1_is_understood_and_its_largest_number_is_no_limit() {
        let groups = ("proc/self/cgroup", "9:cpu:/x\n4:cpuset,memory:/job/one\n0::/\n");
        let file = "sys/fs/cgroup/memory/job/one/memory.limit_in_bytes";
        let limited = system(&[MEMINFO, groups, (file, "536870912\n")]);
        assert_eq!(Memory::below(limited.path()).container, Some(512 << 20));
        // In a container the group's path is the host's: its limit stands at the root.
        let root_file = "sys/fs/cgroup/memory/memory.limit_in_bytes";
        let inside = system(&[MEMINFO, groups, (root_file, "268435456\n")]);
        assert_eq!(Memory::below(inside.path()).container, Some(256 << 20));
        let free = system(&[MEMINFO, groups, (file, "9223372036854771712\n")]);
        assert_eq!(Memory::below(free.path()).container, None);
        assert_eq!(Memory::below(free.path()).usable(), Some(24_584_528 * 1024));
    }

    #[test]
    fn a_system_that_says_nothing_is_unknown() {
        let root = system(&[("proc/meminfo", "nothing"), ("proc/self/cgroup", "nonsense\n")]);
        let memory = Memory::below(root.path());
        assert_eq!(memory.usable(), None);
        assert!(memory.to_string().starts_with("memory of the machine unknown, no limit"), "{memory}");
    }
}
