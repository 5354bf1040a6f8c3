//! Where a table's bytes live: RAM on huge pages, or a mapped file.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::error::{Result, StoreError};
use crate::mapping::Watched;

/// Bytes of a page on disk: mappings begin at a multiple of it.
pub(crate) const PAGE: usize = 4096;

/// Where to put a table that is built or read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Anonymous memory, on huge pages where the system has them: a random row then costs one miss of the
    /// processor's address cache fewer, which is most of its price.
    Ram,
    /// A file without a name, in this folder, mapped into memory: for tables larger than RAM. The system
    /// writes it back as it needs room and frees it when the table is dropped, even if the process is killed;
    /// nobody else can open, replace or shorten it. It is working space: keep a table with its `save`.
    MappedIn(PathBuf),
}

/// A stretch of bytes that starts on a page boundary.
#[derive(Debug)]
pub(crate) enum Region {
    /// RAM of this process; zeroed on first touch.
    Ram(MmapMut),
    /// A file without a name; zeroed at first.
    Scratch(Watched<MmapMut>),
    /// A finished file, from its first byte.
    File(Watched<Mmap>),
    /// No bytes at all, which no system maps.
    Empty,
}

impl Region {
    /// `bytes` zero bytes. Pages are only found when they are first touched (in RAM), but a mapped file's
    /// blocks are claimed at once, so that a full disk is an error here and not a crash later.
    pub(crate) fn zeroed(bytes: u64, storage: &Storage) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self::Empty);
        }
        let region = match storage {
            Storage::Ram => anonymous(bytes).map(Self::Ram),
            Storage::MappedIn(folder) => {
                unnamed_file(bytes, folder).and_then(|map| Ok(Self::Scratch(Watched::new(map)?)))
            }
        };
        region.map_err(|source| StoreError::Memory { bytes, place: storage.to_string(), source })
    }

    /// The whole of `file`, read-only.
    pub(crate) fn map(file: &File, path: &Path) -> Result<Self> {
        // SAFETY: rows are copied out of the mapping before they are looked at (`Watched::copy`), so that a
        // file that is rewritten meanwhile cannot break what the compiler believes of `&[u8]`; one that is
        // shortened becomes a fault that is reported.
        let map = unsafe { Mmap::map(file) }.map_err(StoreError::io(path, "map the table", 0))?;
        #[cfg(unix)]
        map.advise(memmap2::Advice::Random).map_err(StoreError::io(path, "advise on the mapping", 0))?;
        Watched::new(map).map(Self::File).map_err(StoreError::io(path, "guard the mapping", 0))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Ram(map) => map,
            Self::Scratch(map) => map,
            Self::File(map) => map,
            Self::Empty => &[],
        }
    }

    /// Copies the bytes from `start` on to `out`.
    #[inline]
    pub(crate) fn copy(&self, start: usize, out: &mut [u8]) {
        match self {
            Self::File(map) => map.copy(start, out),
            _ => out.copy_from_slice(&self.bytes()[start..][..out.len()]),
        }
    }

    /// The bytes to write to; none where the region is read-only.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Ram(map) => map,
            Self::Scratch(map) => map,
            Self::File(_) | Self::Empty => &mut [],
        }
    }

    /// The first byte that the disk or a shortened file failed to deliver, once there was one. To be asked
    /// after reading and before using what was read.
    pub(crate) fn fault(&self) -> Option<u64> {
        match self {
            Self::Ram(_) | Self::Empty => None,
            Self::Scratch(map) => map.fault(),
            Self::File(map) => map.fault(),
        }
    }

    /// Begins to read the pages that hold these bytes from disk, and does not wait for them.
    pub(crate) fn will_need(&self, start: usize, bytes: usize) {
        #[cfg(target_os = "linux")]
        if matches!(self, Self::Scratch(_) | Self::File(_)) && bytes > 0 {
            let within = &self.bytes()[start..start + bytes];
            let before = start % PAGE;
            // SAFETY: the range lies in this mapping, which begins at a page. Advice changes no byte, and if the
            // system does not take it, the pages are read when they are touched.
            unsafe {
                let page = within.as_ptr().sub(before).cast_mut();
                libc::madvise(page.cast(), before + bytes, libc::MADV_WILLNEED);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (start, bytes);
    }

    /// Fails if a scratch file's disk did.
    pub(crate) fn check(&self) -> Result<()> {
        match self.fault() {
            None => Ok(()),
            Some(offset) => Err(StoreError::LostMemory { offset }),
        }
    }

    /// The region as `f32`s, which its page alignment allows. Its length is a multiple of four.
    pub(crate) fn values(&self) -> &[f32] {
        match self {
            Self::Empty => &[],
            _ => bytemuck::cast_slice(self.bytes()),
        }
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Empty | Self::File(_) => &mut [],
            _ => bytemuck::cast_slice_mut(self.bytes_mut()),
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ram => f.write_str("RAM"),
            Self::MappedIn(folder) => write!(f, "a mapped file in {}", folder.display()),
        }
    }
}

fn length(bytes: u64) -> std::io::Result<usize> {
    usize::try_from(bytes).map_err(|_| std::io::ErrorKind::OutOfMemory.into())
}

fn anonymous(bytes: u64) -> std::io::Result<MmapMut> {
    let map = MmapOptions::new().len(length(bytes)?).map_anon()?;
    // Advice: a kernel built without huge pages refuses it, and the table works on small ones.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

fn unnamed_file(bytes: u64, folder: &Path) -> std::io::Result<MmapMut> {
    let file = tempfile::tempfile_in(folder)?;
    claim(&file, bytes)?;
    // SAFETY: the file has no name, so that no other process can change or shorten it, and this is its only
    // mapping; the map keeps it alive.
    let map = unsafe { MmapOptions::new().len(length(bytes)?).map_mut(&file) }?;
    // Rows are random; whoever reads on asks for pages ahead (`Region::will_need`).
    #[cfg(unix)]
    map.advise(memmap2::Advice::Random)?;
    Ok(map)
}

/// Gives `file` its length and its blocks on disk.
fn claim(file: &File, bytes: u64) -> std::io::Result<()> {
    file.set_len(bytes)?;
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        Err(refusal) => return Err(refusal.into()),
    }
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), bytes), &mut &*file).map(drop)
}

/// How many bytes of rows to ask for ahead of the row being read: enough to keep the memory system's queue of
/// outstanding misses full, little enough to stay in the second-level cache until used.
const AHEAD_BYTES: usize = 16 << 10;

/// How many rows of `row_bytes` to prefetch ahead. More than 40 made Zen 4 slower again (`docs/log.md`).
#[inline]
pub(crate) fn rows_ahead(row_bytes: usize) -> usize {
    (AHEAD_BYTES / row_bytes.max(1)).clamp(4, 40)
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks the processor to fetch every cache line of `data[start..start + bytes]`. A hint: it reads nothing.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T], start: usize, bytes: usize) {
    let row = data.as_ptr().wrapping_add(start).cast::<i8>();
    let end = row.wrapping_add(bytes);
    // Each line once: asking again for one that is on its way takes as much time as another would.
    let mut line = row.wrapping_sub(row.addr() % LINE);
    while line < end {
        prefetch_line(line);
        line = line.wrapping_add(LINE);
    }
}

/// [`prefetch`] of `bytes` bytes that are at least `LINES` lines, and less than one more.
#[inline(always)]
pub(crate) fn prefetch_lines<const LINES: usize>(data: &[u8], start: usize, bytes: usize) {
    let row = data.as_ptr().wrapping_add(start).cast::<i8>();
    for line in 0..LINES {
        prefetch_line(row.wrapping_add(line * LINE));
    }
    if !bytes.is_multiple_of(LINE) || !row.addr().is_multiple_of(LINE) {
        prefetch_line(row.wrapping_add(bytes - 1));
    }
}

/// To the second cache: that one can wait for more lines at once than the first, and random rows then come half as
/// fast again (`docs/log.md`).
#[inline(always)]
fn prefetch_line(line: *const i8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: prefetching is in the base instruction set and does not access memory: an address that is not mapped
        // is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_start_zeroed_and_hold_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        for storage in [Storage::Ram, Storage::MappedIn(folder.path().to_owned())] {
            let mut region = Region::zeroed(10_000, &storage).unwrap();
            assert!(region.bytes().iter().all(|&byte| byte == 0) && region.bytes().len() == 10_000);
            region.values_mut()[2_499] = 7.0;
            assert_eq!(region.values()[2_499], 7.0);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the mapped file has no name");
        assert!(Region::zeroed(0, &Storage::Ram).unwrap().bytes().is_empty());
    }

    #[test]
    fn a_region_that_cannot_be_had_names_its_size_and_place() {
        let refused = Region::zeroed(1 << 60, &Storage::Ram).unwrap_err().to_string();
        assert!(refused.contains("1152921504606846976 bytes of RAM"), "{refused}");
        let refused =
            Region::zeroed(8, &Storage::MappedIn("/no/such/folder".into())).unwrap_err().to_string();
        assert!(refused.contains("/no/such/folder"), "{refused}");
    }
}
