//! Where a table's bytes live: RAM on huge pages, or a mapped file.

use std::fs::File;
use std::marker::PhantomData;
use std::path::Path;
#[cfg(feature = "write")]
use std::path::PathBuf;

use memmap2::{Mmap, MmapMut, MmapOptions, MmapRaw};
use rayon::prelude::*;

use crate::error::{Result, StoreError};
use crate::mapping::Watched;

/// Where to put a table that is built or read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Storage {
    /// Anonymous memory, on huge pages where the system has them: a random row then costs one miss of the
    /// processor's address cache fewer, which is most of its price.
    Ram,
    /// A file without a name, in this folder, mapped into memory: for tables larger than RAM. The system
    /// writes it back as it needs room and frees it when the table is dropped, even if the process is killed;
    /// nobody else can open, replace or shorten it. It is working space: keep a table with its `save`.
    #[cfg(feature = "write")]
    MappedIn(PathBuf),
}

/// A stretch of bytes that starts on a page boundary.
#[derive(Debug)]
pub(crate) enum Region {
    /// RAM of this process; zeroed on first touch.
    Ram(MmapMut),
    /// A file without a name; zeroed at first.
    Scratch(Watched),
    /// A finished file, from its first byte; read only.
    File(Watched),
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
            #[cfg(feature = "write")]
            Storage::MappedIn(folder) => {
                unnamed_file(bytes, folder).and_then(|map| Ok(Self::Scratch(Watched::new(map)?)))
            }
        };
        region.map_err(|source| StoreError::Memory { bytes, place: storage.to_string(), source })
    }

    /// The whole of `file`, read-only; `guarded` by the handler of SIGBUS, where there is one.
    pub(crate) fn map(file: &File, path: &Path, guarded: bool) -> Result<Self> {
        // SAFETY: rows are copied out of the mapping before they are looked at (`Watched::copy`), so that a
        // file that is rewritten meanwhile cannot break what the compiler believes of `&[u8]`; one that is
        // shortened becomes a fault that is reported.
        let map = unsafe { Mmap::map(file) }.map_err(StoreError::io(path, "map the table", 0))?;
        #[cfg(unix)]
        map.advise(memmap2::Advice::Random).map_err(StoreError::io(path, "advise on the mapping", 0))?;
        if !guarded {
            return Ok(Self::File(Watched::unguarded(map)));
        }
        Watched::new(map).map(Self::File).map_err(StoreError::io(path, "guard the mapping", 0))
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Ram(map) => map.len(),
            Self::Scratch(map) | Self::File(map) => map.map().len(),
            Self::Empty => 0,
        }
    }

    /// The bytes, if they are RAM: those of a mapped file may change at any moment.
    pub(crate) fn ram(&self) -> Option<&[u8]> {
        match self {
            Self::Ram(map) => Some(map),
            Self::Empty => Some(&[]),
            Self::Scratch(_) | Self::File(_) => None,
        }
    }

    /// Where byte `at` is, to ask the processor for it; not to be read.
    #[inline]
    pub(crate) fn address(&self, at: usize) -> *const u8 {
        let start = match self {
            Self::Ram(map) => map.as_ptr(),
            Self::Scratch(map) | Self::File(map) => map.map().as_ptr(),
            Self::Empty => std::ptr::null(),
        };
        start.wrapping_add(at)
    }

    /// Copies the bytes from `start` on to `out`.
    ///
    /// # Panics
    /// If they are not inside the region.
    #[inline]
    pub(crate) fn copy(&self, start: usize, out: &mut [u8]) {
        match self {
            Self::Ram(map) => out.copy_from_slice(&map[start..][..out.len()]),
            Self::Scratch(map) | Self::File(map) => map.copy(start, out),
            Self::Empty => assert!(out.is_empty(), "bytes of an empty region"),
        }
    }

    /// All bytes, to write to; none where the region is read-only.
    pub(crate) fn stretch(&mut self) -> Stretch<'_> {
        match self {
            Self::Ram(map) => Stretch::Ram(map),
            Self::Scratch(map) => Stretch::Mapped(MappedStretch::of(map)),
            Self::File(_) | Self::Empty => Stretch::Ram(&mut []),
        }
    }

    /// Calls `each(start, bytes)` for every `chunk` bytes, of which the last may be fewer, from several threads. `bytes`
    /// are zero and become the region's.
    pub(crate) fn fill(
        &mut self,
        chunk: usize,
        each: impl Fn(usize, &mut [u8]) -> Result<()> + Sync,
    ) -> Result<()> {
        let (mut rest, mut chunks) = (self.stretch(), Vec::new());
        while rest.len() > chunk {
            let (first, others) = rest.split_at(chunk);
            chunks.push(first);
            rest = others;
        }
        chunks.push(rest);
        chunks.into_par_iter().enumerate().try_for_each_init(Buffer::default, |buffer, (number, mut part)| {
            let bytes = part.len();
            part.replace(bytes, buffer, |bytes| each(number * chunk, bytes))
        })
    }

    /// The first byte that the disk or a shortened file failed to deliver, once there was one. To be asked
    /// after reading and before using what was read.
    pub(crate) fn fault(&self) -> Option<u64> {
        match self {
            Self::Ram(_) | Self::Empty => None,
            Self::Scratch(map) | Self::File(map) => map.fault(),
        }
    }

    /// Begins to read the pages that hold these bytes from disk, and does not wait for them.
    pub(crate) fn will_need(&self, start: usize, bytes: usize) {
        #[cfg(unix)]
        if let Self::Scratch(map) | Self::File(map) = self
            && bytes > 0
        {
            // Advice: if the system does not take it, the pages are read when they are touched.
            let _ = map.map().advise_range(memmap2::Advice::WillNeed, start, bytes);
        }
        #[cfg(not(unix))]
        let _ = (start, bytes);
    }

    /// Fails if a scratch file's disk did.
    pub(crate) fn check(&self) -> Result<()> {
        match self.fault() {
            None => Ok(()),
            Some(offset) => Err(StoreError::LostMemory { offset }),
        }
    }
}

/// Bytes of a region that one thread may write to.
pub(crate) enum Stretch<'a> {
    /// Written in place.
    Ram(&'a mut [u8]),
    /// Copied to a buffer, changed there, and copied back: a disk that fails may change them at any moment.
    Mapped(MappedStretch<'a>),
}

pub(crate) struct MappedStretch<'a> {
    start: *mut u8,
    bytes: usize,
    region: PhantomData<&'a mut Watched>,
}

// SAFETY: a stretch is the only one that its bytes belong to, as a `&mut [u8]` would be, and bytes may be written from
// any thread.
unsafe impl Send for MappedStretch<'_> {}

impl<'a> MappedStretch<'a> {
    fn of(map: &'a mut Watched) -> Self {
        let map: &MmapRaw = map.map();
        Self { start: map.as_mut_ptr(), bytes: map.len(), region: PhantomData }
    }

    /// # Panics
    /// If `bytes` bytes from `at` on are not inside.
    fn place(&self, at: usize, bytes: usize) -> *mut u8 {
        assert!(at <= self.bytes && bytes <= self.bytes - at, "bytes inside the stretch");
        self.start.wrapping_add(at)
    }
}

/// Memory that records of a mapped file are changed in, aligned as `f32`s are.
#[derive(Debug, Default)]
pub(crate) struct Buffer(Vec<u64>);

impl Buffer {
    fn bytes(&mut self, bytes: usize) -> &mut [u8] {
        self.0.resize(bytes.div_ceil(8), 0);
        &mut bytemuck::cast_slice_mut(&mut self.0)[..bytes]
    }
}

impl<'a> Stretch<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Ram(bytes) => bytes.len(),
            Self::Mapped(stretch) => stretch.bytes,
        }
    }

    /// The first `at` bytes, and the rest.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::Ram(bytes) => {
                let (before, after) = bytes.split_at_mut(at);
                (Self::Ram(before), Self::Ram(after))
            }
            Self::Mapped(stretch) => {
                let after = stretch.place(at, 0);
                let part = |start, bytes| Self::Mapped(MappedStretch { start, bytes, region: PhantomData });
                (part(stretch.start, at), part(after, stretch.bytes - at))
            }
        }
    }

    /// The same bytes, for a while.
    pub(crate) fn reborrow(&mut self) -> Stretch<'_> {
        match self {
            Self::Ram(bytes) => Stretch::Ram(bytes),
            Self::Mapped(MappedStretch { start, bytes, .. }) => {
                Stretch::Mapped(MappedStretch { start: *start, bytes: *bytes, region: PhantomData })
            }
        }
    }

    /// Where byte `at` is, to ask the processor for it; not to be read.
    #[inline]
    pub(crate) fn address(&self, at: usize) -> *const u8 {
        match self {
            Self::Ram(bytes) => bytes.as_ptr().wrapping_add(at),
            Self::Mapped(stretch) => stretch.start.wrapping_add(at).cast_const(),
        }
    }

    /// Lets `work` change `bytes` bytes from `at` on.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    pub(crate) fn change<R>(
        &mut self,
        at: usize,
        bytes: usize,
        buffer: &mut Buffer,
        work: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        match self {
            Self::Ram(all) => work(&mut all[at..][..bytes]),
            Self::Mapped(stretch) => {
                let (place, buffer) = (stretch.place(at, bytes), buffer.bytes(bytes));
                // SAFETY: the bytes are inside the mapping, as `place` asserts, and nobody else writes to them;
                // `buffer`, a unique reference, does not overlap them. Pages that are not delivered become zeros.
                unsafe { std::ptr::copy_nonoverlapping(place, buffer.as_mut_ptr(), bytes) };
                let result = work(buffer);
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(buffer.as_ptr(), place, bytes) };
                result
            }
        }
    }

    /// Lets `work` write the first `bytes` bytes, which were zero.
    fn replace<R>(&mut self, bytes: usize, buffer: &mut Buffer, work: impl FnOnce(&mut [u8]) -> R) -> R {
        match self {
            Self::Ram(all) => work(&mut all[..bytes]),
            Self::Mapped(stretch) => {
                let (place, buffer) = (stretch.place(0, bytes), buffer.bytes(bytes));
                buffer.fill(0);
                let result = work(buffer);
                // SAFETY: as in `change`.
                unsafe { std::ptr::copy_nonoverlapping(buffer.as_ptr(), place, bytes) };
                result
            }
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ram => f.write_str("RAM"),
            #[cfg(feature = "write")]
            Self::MappedIn(folder) => write!(f, "a mapped file in {}", folder.display()),
        }
    }
}

/// Bytes of a page of memory: 4 KiB, or 16 or 64 KiB on some ARM machines.
pub(crate) fn page_bytes() -> usize {
    #[cfg(unix)]
    return rustix::param::page_size();
    #[cfg(not(unix))]
    4096
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

#[cfg(feature = "write")]
fn unnamed_file(bytes: u64, folder: &Path) -> std::io::Result<MmapMut> {
    let file = tempfile::tempfile_in(folder)?;
    claim(&file, bytes)?;
    // SAFETY: the file has no name, so that no other process can change or shorten it, and this is its only
    // mapping; the map keeps it alive.
    let map = unsafe { MmapOptions::new().len(length(bytes)?).map_mut(&file) }?;
    // Rows are random; a sequential reader asks for pages ahead (`Region::will_need`).
    #[cfg(unix)]
    map.advise(memmap2::Advice::Random)?;
    Ok(map)
}

/// Gives `file` its length and its blocks on disk.
#[cfg(feature = "write")]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_start_zeroed_and_hold_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        for storage in [Storage::Ram, Storage::MappedIn(folder.path().to_owned())] {
            let mut region = Region::zeroed(10_000, &storage).unwrap();
            let mut found = vec![1; 10_000];
            region.copy(0, &mut found);
            assert!(region.len() == 10_000 && found.iter().all(|&byte| byte == 0));
            let fill = |start: usize, bytes: &mut [u8]| {
                bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte += ((start + i) % 251) as u8);
                Ok(())
            };
            region.fill(777, fill).unwrap();
            let mut buffer = Buffer::default();
            let (before, mut after) = region.stretch().split_at(4000);
            assert_eq!((before.len(), after.len()), (4000, 6000));
            after.reborrow().change(96, 8, &mut buffer, |bytes| bytes[2] = 255);
            region.copy(0, &mut found);
            for (i, &byte) in found.iter().enumerate() {
                assert_eq!(usize::from(byte), if i == 4098 { 255 } else { i % 251 }, "byte {i}");
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the mapped file has no name");
        assert_eq!(Region::zeroed(0, &Storage::Ram).unwrap().len(), 0);
    }

    #[test]
    fn a_region_without_room_names_its_size_and_place() {
        let refused = Region::zeroed(1 << 60, &Storage::Ram).unwrap_err().to_string();
        assert!(refused.contains("1152921504606846976 bytes of RAM"), "{refused}");
        let refused =
            Region::zeroed(8, &Storage::MappedIn("/no/such/folder".into())).unwrap_err().to_string();
        assert!(refused.contains("/no/such/folder"), "{refused}");
    }
}
