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

/// Random reads of 4096 bytes per second over the file at `path`, from `depth` threads with one read each, measured for
/// `time`. None if the system or the file system cannot read past its cache.
#[cfg(not(target_os = "linux"))]
pub(crate) fn random_reads(_path: &Path, _depth: usize, _time: Duration) -> anyhow::Result<Option<f64>> {
    Ok(None)
}

/// Random reads of 4096 bytes per second over the file at `path`, from `depth` threads with one read each, measured for
/// `time`. None if the system or the file system cannot read past its cache.
#[cfg(target_os = "linux")]
pub(crate) fn random_reads(path: &Path, depth: usize, time: Duration) -> anyhow::Result<Option<f64>> {
    use std::os::unix::fs::OpenOptionsExt;
    let Ok(file) = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) else {
        return Ok(None);
    };
    let length = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    let pages = (length / PAGE as u64).max(1);
    let begun = Instant::now();
    let reader = |seed: u64| {
        let mut random = Random::new(seed);
        let mut room = vec![0; 2 * PAGE];
        let start = room.as_ptr().align_offset(PAGE);
        let mut reads = 0u64;
        while begun.elapsed() < time {
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
        assert!(forget(&folder.path().join("nowhere")).is_err());
    }
}
