//! Whether a run fits this machine's memory.

use engram_config::{RunConfig, TrainingMemory};
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::error::{Error, Result};

/// The most memory that this process can get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MemoryLimit {
    bytes: u64,
    /// What sets it.
    cause: &'static str,
}

impl MemoryLimit {
    /// The smallest limit that this machine tells of; none where it tells none.
    fn of_this_process() -> Option<Self> {
        let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::everything());
        let system = System::new_with_specifics(kind);
        let machine = system.total_memory().saturating_add(system.total_swap());
        let group = system.cgroup_limits().map(|limits| limits.total_memory);
        let limits = [
            (Some(machine), "this machine, its swap included, has"),
            (group, "the control group of this process has"),
            (address_space(), "the limit of this process (`ulimit -v`) is"),
        ];
        let told = limits.into_iter().filter_map(|(bytes, cause)| Some(Self { bytes: bytes?, cause }));
        told.filter(|limit| limit.bytes > 0).min_by_key(|limit| limit.bytes)
    }
}

/// Bytes of address space that this process may have, where that is limited and the system, Linux, tells it.
fn address_space() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let soft = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    // "unlimited" is not a number.
    soft.split_whitespace().next()?.parse().ok()
}

/// Refuses a run that cannot fit this machine, before anything is made.
///
/// # Errors
/// With the bytes needed, by part.
pub(crate) fn check(config: &RunConfig) -> Result<()> {
    let advice = "take a smaller model, keep tables on disk (`train.memory.storage = \"mapped\"`), or compute fewer \
                  sequences at once (`train.micro_batch`)";
    refuse_beyond("the training", &TrainingMemory::of(config)?.parts(), advice)
}

/// Refuses `what`, which needs at least these bytes, by part, where this machine has fewer.
///
/// # Errors
/// With the bytes needed, by part, and with what to do, which is `advice`.
pub(crate) fn refuse_beyond(what: &str, parts: &[(&str, u64)], advice: &str) -> Result<()> {
    let needed = parts.iter().map(|(_, bytes)| *bytes).fold(0, u64::saturating_add);
    match MemoryLimit::of_this_process() {
        Some(limit) if needed > limit.bytes => {
            Err(Error::Mismatch(format!("{}: {advice}", problem(what, parts, limit))))
        }
        _ => Ok(()),
    }
}

fn problem(what: &str, parts: &[(&str, u64)], limit: MemoryLimit) -> String {
    let needed = parts.iter().map(|(_, bytes)| *bytes).fold(0, u64::saturating_add);
    let parts = parts.iter().filter(|(_, bytes)| *bytes > 0);
    let parts: Vec<_> = parts.map(|(name, bytes)| format!("{} of {name}", gibibytes(*bytes))).collect();
    format!(
        "{what} needs at least {} of memory ({}), but {} {}",
        gibibytes(needed),
        parts.join(", "),
        limit.cause,
        gibibytes(limit.bytes)
    )
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_limit() {
        let limit = MemoryLimit::of_this_process().unwrap();
        assert!(limit.bytes > 1 << 20, "{limit:?}");
    }

    #[test]
    fn the_message_has_the_numbers() {
        let (weights, gradients, optimizer) = (3 << 30, 3 << 30, 4 << 30);
        let needed = TrainingMemory { weights, gradients, optimizer, tables: 0, states: 1 << 29 };
        let limit = MemoryLimit { bytes: 4 << 30, cause: "this machine has" };
        let text = problem("the training", &needed.parts(), limit);
        assert!(text.starts_with(
            "the training needs at least 10.50 GiB of memory (3.00 GiB of weights, 3.00 GiB of gradients, 4.00 GiB of \
             optimiser, 0.50 GiB of states between blocks), but this machine has 4.00 GiB"
        ), "{text}");
    }

    #[test]
    fn what_no_machine_has_is_refused_with_the_numbers() {
        let parts = [("weights", 1 << 30), ("memory tables", u64::MAX)];
        let error = refuse_beyond("the graft", &parts, "take fewer rows").unwrap_err();
        assert!(error.is_input());
        let text = error.to_string();
        assert!(text.contains("1.00 GiB of weights") && text.ends_with(": take fewer rows"), "{text}");
        refuse_beyond("the graft", &[("weights", 1 << 10)], "").unwrap();
    }
}
