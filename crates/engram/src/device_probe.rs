//! Measures the disk under a file: random reads past the page cache.

use std::fs::File;
use std::path::Path;
use std::time::Duration;
#[cfg(target_os = "linux")]
use std::time::Instant;

use anyhow::Context;

#[cfg(target_os = "linux")]
use crate::random::Random;

/// Bytes per read; offsets and buffers must be multiples of it.
#[cfg(any(target_os = "linux", test))]
const PAGE: usize = 4096;

/// What one random read of 4096 bytes of a disk takes that does nothing else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadLatency {
    /// Seconds that half of the reads take at most, and 99 % of them.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Latency of random reads of 4096 bytes over the file at `path`, one after another for `time`. None where the system or
/// the file system does not read past its cache.
#[cfg(not(target_os = "linux"))]
pub(crate) fn read_latency(_path: &Path, _time: Duration) -> anyhow::Result<Option<ReadLatency>> {
    Ok(None)
}

/// Latency of random reads of 4096 bytes over the file at `path`, one after another for `time`. None where the system or
/// the file system does not read past its cache.
#[cfg(target_os = "linux")]
pub(crate) fn read_latency(path: &Path, time: Duration) -> anyhow::Result<Option<ReadLatency>> {
    let Some((file, pages)) = open_direct(path)? else { return Ok(None) };
    let mut random = Random::new(u64::MAX);
    let mut room = vec![0; 2 * PAGE];
    let start = room.as_ptr().align_offset(PAGE);
    let (begun, mut times) = (Instant::now(), Vec::new());
    while begun.elapsed() < time || times.is_empty() {
        let asked = Instant::now();
        if read_page(&file, &mut room[start..start + PAGE], random.below(pages)).is_err() {
            return Ok(None);
        }
        times.push(asked.elapsed().as_secs_f64());
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(Some(ReadLatency { p50: times[times.len() / 2], p99: times[times.len() * 99 / 100] }))
}

/// Random reads of 4096 bytes a second over the file at `path`, from `depth` threads of one read each,
/// measured for `time`. None where the system or the file system does not read past its cache.
#[cfg(not(target_os = "linux"))]
pub(crate) fn random_reads(_path: &Path, _depth: usize, _time: Duration) -> anyhow::Result<Option<f64>> {
    Ok(None)
}

/// Random reads of 4096 bytes per second over the file at `path`, from `depth` threads with one read each, measured for
/// `time`. None if the system or the file system cannot read past its cache.
#[cfg(target_os = "linux")]
pub(crate) fn random_reads(path: &Path, depth: usize, time: Duration) -> anyhow::Result<Option<f64>> {
    let Some((file, pages)) = open_direct(path)? else { return Ok(None) };
    let begun = Instant::now();
    let reader = |seed: u64| {
        let mut random = Random::new(seed);
        let mut room = vec![0; 2 * PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let mut reads = 0u64;
        // One read at least, however late the thread begins.
        while reads == 0 || begun.elapsed() < time {
            read_page(&file, &mut room[start..start + PAGE], random.below(pages)).ok()?;
            reads += 1;
        }
        Some(reads)
    };
    let reads: Option<u64> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..depth as u64).map(|seed| scope.spawn(move || reader(seed))).collect();
        readers.into_iter().map(|reader| reader.join().ok().flatten()).sum()
    });
    Ok(reads.map(|reads| reads as f64 / begun.elapsed().as_secs_f64()))
}

/// The file at `path`, read past the system's cache, and its pages. None where that is refused.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> anyhow::Result<Option<(File, u64)>> {
    use std::os::unix::fs::OpenOptionsExt;
    let failed = || format!("cannot read {}", path.display());
    let length = std::fs::metadata(path).with_context(failed)?.len();
    let direct = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    Ok(direct.ok().map(|file| (file, (length / PAGE as u64).max(1))))
}

#[cfg(target_os = "linux")]
fn read_page(file: &File, page: &mut [u8], number: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    // A table's last page is whole, so short reads do not count.
    file.read_exact_at(page, number * PAGE as u64)
}

/// Bytes that this process has read from disks; none if the system does not tell.
pub(crate) fn bytes_read() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/io").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: "))?;
    line.trim().parse().ok()
}

/// Flushes the file at `path` and asks the system to drop it from the page cache. Returns whether it did; only Linux
/// can.
pub(crate) fn forget(path: &Path) -> anyhow::Result<bool> {
    let failed = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(failed)?;
    file.sync_all().with_context(failed)?;
    #[cfg(target_os = "linux")]
    return Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).is_ok());
    #[cfg(not(target_os = "linux"))]
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![7; 64 * PAGE + 100]).unwrap();
        assert_eq!(forget(&path).unwrap(), cfg!(target_os = "linux"));
        let reads = random_reads(&path, 2, Duration::from_millis(30)).unwrap();
        // Some file systems, such as tmpfs of older kernels, have no such reads.
        assert!(reads.is_none_or(|reads| reads > 0.0));
        let latency = read_latency(&path, Duration::from_millis(30)).unwrap();
        assert!(latency.is_none_or(|latency| latency.p50 > 0.0 && latency.p50 <= latency.p99));
        assert_eq!(latency.is_some(), reads.is_some());
        assert!(read_latency(&folder.path().join("nowhere"), Duration::ZERO).is_err());
        assert!(forget(&folder.path().join("nowhere")).is_err());
    }
}
