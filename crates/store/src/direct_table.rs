//! Rows straight from the disk, for tables larger than memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::distinct_rows::DistinctRows;
use crate::error::{Result, StoreError};
use crate::origin::TableOrigin;
use crate::progress::Progress;
use crate::read_queue::{ReadQueue, ReadThreads, Reader};
use crate::row_format::RowFormat;
use crate::row_source::{RowSource, check_gather, check_read};
use crate::span::{Failed, Span};
use crate::table_file::{TableFile, TableHeader};
use crate::table_reader::CheckedBlocks;
#[cfg(all(target_os = "linux", feature = "io-uring"))]
use crate::uring::Uring;

/// What disks read at once, and what reads that pass the page cache must begin and end at.
const PAGE: u64 = 4096;
/// Neighbouring pages are read together up to here.
const SPAN_BYTES: usize = 16 << 10;
/// Threads that read where the kernel has no io_uring, at most.
const MOST_THREADS: usize = 32;
/// Queues that may wait for a disk that does not answer, before no more are sent after them.
const MOST_STUCK: usize = 4;
/// Ids that are planned at a time.
const IDS_AT_A_TIME: usize = 1 << 20;

/// How to read a table from disk.
///
/// ```
/// use engram_store::DirectOptions;
///
/// let options = DirectOptions::default().depth(32).checked(true);
/// assert_eq!(options.depth, 32);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirectOptions {
    /// Reads in flight at once, per thread that looks rows up: from 1 to 4096. Each holds at least 16 KiB.
    pub depth: usize,
    /// How long the disk may complete nothing before a lookup fails.
    pub time_limit: Duration,
    /// Whether a block (1 MiB) is read and checked when a row in it is first looked up, as
    /// [`Table::open_checked`](crate::Table::open_checked) does.
    pub checked: bool,
    /// The queue to try.
    pub queue: QueueKind,
}

impl Default for DirectOptions {
    fn default() -> Self {
        Self { depth: 128, time_limit: Duration::from_secs(30), checked: false, queue: QueueKind::IoUring }
    }
}

impl DirectOptions {
    /// With so many reads in flight.
    #[must_use]
    pub const fn depth(self, depth: usize) -> Self {
        Self { depth, ..self }
    }

    /// With this limit on the time in which the disk completes nothing.
    #[must_use]
    pub const fn time_limit(self, time_limit: Duration) -> Self {
        Self { time_limit, ..self }
    }

    /// With blocks checked when a row in them is first looked up, or not.
    #[must_use]
    pub const fn checked(self, checked: bool) -> Self {
        Self { checked, ..self }
    }

    /// With this queue.
    #[must_use]
    pub const fn queue(self, queue: QueueKind) -> Self {
        Self { queue, ..self }
    }
}

/// Who keeps many reads in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueKind {
    /// The kernel (Linux, 5.11 or later): the thread that looks rows up submits them and waits, without handing
    /// anything to another thread.
    IoUring,
    /// Threads, up to 32, one for each read in flight.
    Threads,
}

/// How a [`DirectTable`] really reads, which the system may have restricted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPath {
    /// Who keeps reads in flight.
    pub queue: QueueKind,
    /// Whether the kernel knows buffers and file beforehand.
    pub registered: bool,
    /// Whether reads pass the page cache (`O_DIRECT`, `F_NOCACHE`, `FILE_FLAG_NO_BUFFERING`).
    pub direct: bool,
    /// What the system refused, in its words.
    pub refused: Vec<String>,
}

/// What reads past the page cache are called here.
const PAST_CACHE: &str = if cfg!(target_os = "linux") {
    ", O_DIRECT"
} else if cfg!(windows) {
    ", NO_BUFFERING"
} else {
    ", F_NOCACHE"
};

impl fmt::Display for ReadPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.queue {
            QueueKind::IoUring => "io_uring",
            QueueKind::Threads => "threads",
        })?;
        f.write_str(if self.registered { ", registered buffers and file" } else { "" })?;
        f.write_str(if self.direct { PAST_CACHE } else { ", through the page cache" })?;
        self.refused.iter().try_for_each(|refused| write!(f, "; {refused}"))
    }
}

/// A table file whose rows are read from disk for every lookup, past the page cache, with many reads in flight.
/// Put a [`Cached`](crate::Cached) in front to keep what is asked for often.
///
/// A batch is read in ascending order. Rows that it repeats are read once, and so are pages and runs of pages that
/// several of its rows share. Any number of threads can look rows up; each has a queue of its own meanwhile.
#[derive(Debug)]
pub struct DirectTable {
    file: TableFile,
    /// The same file, to be read past the page cache if possible.
    direct: Arc<File>,
    threads: Option<Arc<ReadThreads>>,
    checked: Option<CheckedBlocks>,
    options: DirectOptions,
    buffer_bytes: usize,
    path: ReadPath,
    lanes: Mutex<Lanes>,
}

#[derive(Debug, Default)]
struct Lanes {
    idle: Vec<Lane>,
    /// Those whose reads were given up on.
    stuck: Vec<Lane>,
}

/// What one lookup uses at a time.
#[derive(Debug)]
struct Lane {
    queue: ReadQueue,
    plan: Plan,
}

impl DirectTable {
    /// Opens the table file at `path`, a trained table's too, checking its header, length and list of checksums.
    ///
    /// If the system refuses io_uring, threads read instead; if the file system refuses to be read past the page
    /// cache, reads go through it. [`path_in_use`](Self::path_in_use) tells.
    ///
    /// # Errors
    /// If the file cannot be read, is not a table, is damaged, or belongs to another origin than `expected`; if an
    /// option is outside its range.
    pub fn open(path: impl AsRef<Path>, expected: &TableOrigin, options: &DirectOptions) -> Result<Self> {
        if !(1..=4096).contains(&options.depth) {
            return Err(StoreError::setting("depth", options.depth, "from 1 to 4096"));
        }
        let path = path.as_ref();
        let file = TableFile::open(path)?;
        file.require(expected)?;
        let row_bytes = file.header.format.bytes_per_row(file.header.width);
        // A row may begin at the end of a page.
        let buffer_bytes = SPAN_BYTES.max((row_bytes + PAGE as usize).next_multiple_of(PAGE as usize));
        let checked = options.checked.then(|| CheckedBlocks::none(&file));
        let mut refused = Vec::new();
        let direct = match open_direct(&file) {
            Ok(direct) => Some(direct),
            Err(error) => {
                refused.push(format!("reads past the page cache were refused: {error}"));
                None
            }
        };
        let mut table = Self {
            path: ReadPath {
                queue: QueueKind::Threads,
                registered: false,
                direct: direct.is_some(),
                refused,
            },
            direct: Arc::new(match direct {
                Some(direct) => direct,
                None => file.file.try_clone().map_err(StoreError::io(path, "open the table", 0))?,
            }),
            file,
            threads: None,
            checked,
            options: options.clone(),
            buffer_bytes,
            lanes: Mutex::default(),
        };
        table.choose_queue()?;
        Ok(table)
    }

    /// Finds out what works, by reading.
    fn choose_queue(&mut self) -> Result<()> {
        if self.options.queue == QueueKind::IoUring {
            match self.try_uring() {
                Ok(()) => return Ok(()),
                Err(error) => self.path.refused.push(format!("io_uring was refused: {error}")),
            }
        }
        self.path.queue = QueueKind::Threads;
        self.try_threads().map_err(StoreError::io(&self.file.path, "start reading the table", 0))
    }

    fn try_threads(&mut self) -> io::Result<()> {
        let threads = ReadThreads::start(self.options.depth.min(MOST_THREADS))?;
        self.threads = Some(Arc::new(threads));
        let lane = self.new_lane()?;
        self.try_out(lane)
    }

    #[cfg(all(target_os = "linux", feature = "io-uring"))]
    fn try_uring(&mut self) -> io::Result<()> {
        self.path.queue = QueueKind::IoUring;
        let lane = self.new_lane()?;
        let ReadQueue::Uring(ring) = &lane.queue else { unreachable!("the queue that was asked for") };
        self.path.registered = ring.is_registered();
        self.try_out(lane).inspect_err(|_| self.path.registered = false)
    }

    #[cfg(not(all(target_os = "linux", feature = "io-uring")))]
    fn try_uring(&mut self) -> io::Result<()> {
        let why = "available only on Linux, with the feature io-uring of engram-store";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    /// Reads the header's page; keeps the lane if that works.
    fn try_out(&mut self, mut lane: Lane) -> io::Result<()> {
        let header = [Span { offset: 0, bytes: PAGE as usize }];
        lane.queue
            .read_all(&header, self.options.time_limit, &mut |_, _| ())
            .map_err(|failed| failed.source)?;
        self.lanes.get_mut().unwrap_or_else(PoisonError::into_inner).idle.push(lane);
        Ok(())
    }

    fn new_lane(&self) -> io::Result<Lane> {
        let (file, depth) = (Arc::clone(&self.direct), self.options.depth);
        let queue = match &self.threads {
            #[cfg(all(target_os = "linux", feature = "io-uring"))]
            None => ReadQueue::Uring(Box::new(Uring::new(file, depth, self.buffer_bytes)?)),
            #[cfg(not(all(target_os = "linux", feature = "io-uring")))]
            None => return Err(io::ErrorKind::Unsupported.into()),
            Some(threads) => {
                let depth = depth.min(MOST_THREADS);
                ReadQueue::Threads(Reader::new(file, Arc::clone(threads), depth, self.buffer_bytes)?)
            }
        };
        Ok(Lane { queue, plan: Plan::default() })
    }

    /// How rows are read: what was asked for, or what the system allowed instead.
    pub fn path_in_use(&self) -> &ReadPath {
        &self.path
    }

    /// What the file says about itself.
    pub fn header(&self) -> &TableHeader {
        &self.file.header
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.file.header.origin
    }

    /// Checks every block of the file, state included, against its checksum. Progress is in bytes.
    ///
    /// # Errors
    /// If a block differs (named with its offset), or the file cannot be read.
    pub fn verify(&self, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        self.file.verify(progress)
    }

    /// Reads the rows `ids`, all inside the table, and calls `each` with every distinct one and the positions in
    /// the batch that want it.
    fn fetch(&self, ids: &[u64], mut each: impl FnMut(&[u8], &mut dyn Iterator<Item = usize>)) -> Result<()> {
        if let Some(checked) = &self.checked {
            checked.check(&self.file, ids)?;
        }
        let mut lane = self.lane()?;
        let mut result = Ok(());
        for (chunk, ids) in ids.chunks(IDS_AT_A_TIME).enumerate() {
            let first = chunk * IDS_AT_A_TIME;
            result = self.fetch_with(&mut lane, ids, |row, positions| {
                each(row, &mut positions.iter().map(|&position| first + position as usize));
            });
            if result.is_err() {
                break;
            }
        }
        self.put_back(lane);
        // Of a file that was changed and failed, the change is the cause.
        self.file.check_unchanged()?;
        result
    }

    fn fetch_with(&self, lane: &mut Lane, ids: &[u64], mut each: impl FnMut(&[u8], &[u32])) -> Result<()> {
        let Lane { queue, plan } = lane;
        let row_bytes = self.bytes_per_row();
        let start = self.file.sections[0].offset;
        plan.make(ids, start, row_bytes, self.buffer_bytes);
        let (distinct, rows, spans) = (&plan.distinct, &plan.rows, &plan.spans);
        let read = queue.read_all(spans, self.options.time_limit, &mut |span, bytes| {
            for row in rows[span].clone() {
                let at = start + distinct.ids()[row] * row_bytes as u64 - spans[span].offset;
                each(&bytes[at as usize..][..row_bytes], distinct.occurrences(row));
            }
        });
        read.map_err(|Failed { span, source }| {
            let problem = match source.kind() {
                io::ErrorKind::TimedOut => format!("no answer within {:?}", self.options.time_limit),
                io::ErrorKind::UnexpectedEof => "the file ends before it".to_owned(),
                _ => source.to_string(),
            };
            let row = distinct.ids()[rows[span].start];
            let offset = start + row * row_bytes as u64;
            StoreError::RowUnreadable { path: self.file.path.clone(), row, offset, problem }
        })
    }

    /// A lane that nobody uses.
    fn lane(&self) -> Result<Lane> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let Lanes { idle, stuck } = &mut *lanes;
        idle.extend(stuck.extract_if(.., |lane| !lane.queue.is_stuck()));
        if let Some(lane) = idle.pop() {
            return Ok(lane);
        }
        if stuck.len() >= MOST_STUCK {
            let source = io::Error::new(
                io::ErrorKind::TimedOut,
                "the disk still does not answer reads that were given up on",
            );
            return Err(StoreError::io(&self.file.path, "read the table", 0)(source));
        }
        drop(lanes);
        self.new_lane().map_err(StoreError::io(&self.file.path, "queue reads of the table", 0))
    }

    fn put_back(&self, mut lane: Lane) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if lane.queue.is_stuck() {
            lanes.stuck.push(lane);
        } else {
            lanes.idle.push(lane);
        }
    }
}

impl RowSource for DirectTable {
    fn rows(&self) -> u64 {
        self.file.header.rows
    }

    fn width(&self) -> usize {
        self.file.header.width
    }

    fn format(&self) -> RowFormat {
        self.file.header.format
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        let row_bytes = self.bytes_per_row();
        self.fetch(ids, |row, positions| {
            positions.for_each(|position| out[position * row_bytes..][..row_bytes].copy_from_slice(row));
        })
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_gather(self, ids, out)?;
        let (format, width) = (self.format(), self.width());
        self.fetch(ids, |row, positions| {
            positions.for_each(|position| format.decode_row(row, &mut out[position * width..][..width]));
        })
    }
}

/// Opens an open file once more, to be read past the page cache (`O_DIRECT`).
#[cfg(target_os = "linux")]
fn open_direct(file: &TableFile) -> io::Result<File> {
    use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&file.path)?;
    let (one, other) = (file.file.metadata()?, direct.metadata()?);
    if (one.dev(), one.ino()) != (other.dev(), other.ino()) {
        return Err(io::Error::other("another file was just renamed over it; open it again"));
    }
    // Some file systems take the flag and refuse the reads.
    let mut page = memmap2::MmapMut::map_anon(PAGE as usize)?;
    direct.read_exact_at(&mut page, 0)?;
    Ok(direct)
}

/// Opens an open file once more, to be read past the system's cache.
#[cfg(target_vendor = "apple")]
fn open_direct(file: &TableFile) -> io::Result<File> {
    // On the same file: its path may meanwhile name another.
    let direct = file.file.try_clone()?;
    rustix::fs::fcntl_nocache(&direct, true)?;
    Ok(direct)
}

/// Opens the file of this path once more, to be read past the system's cache.
#[cfg(windows)]
fn open_direct(file: &TableFile) -> io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    /// `FILE_FLAG_NO_BUFFERING`.
    const NO_BUFFERING: u32 = 0x2000_0000;
    let direct = File::options().read(true).custom_flags(NO_BUFFERING).open(&file.path)?;
    if direct.metadata()?.len() != file.file.metadata()?.len() {
        return Err(io::Error::other("another file was just renamed over it; open it again"));
    }
    Ok(direct)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple", windows)))]
fn open_direct(_file: &TableFile) -> io::Result<File> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "not available on this system"))
}

/// Which pages to read for a batch.
#[derive(Debug, Default)]
struct Plan {
    distinct: DistinctRows,
    spans: Vec<Span>,
    /// For each span, the places in `distinct` of its rows.
    rows: Vec<Range<usize>>,
}

impl Plan {
    /// Rows begin at byte `start` of the file; no span is larger than `most`, which any row's pages fit.
    fn make(&mut self, ids: &[u64], start: u64, row_bytes: usize, most: usize) {
        let Self { distinct, spans, rows } = self;
        distinct.assign(ids);
        spans.clear();
        rows.clear();
        for (row, &id) in distinct.ids().iter().enumerate() {
            let from = start + id * row_bytes as u64;
            let to = (from + row_bytes as u64).next_multiple_of(PAGE);
            let from = from - from % PAGE;
            if let (Some(span), Some(rows)) = (spans.last_mut(), rows.last_mut())
                && from <= span.offset + span.bytes as u64
                && to - span.offset <= most as u64
            {
                span.bytes = (to - span.offset) as usize;
                rows.end = row + 1;
            } else {
                spans.push(Span { offset: from, bytes: (to - from) as usize });
                rows.push(row..row + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_share_or_touch_pages_are_read_together_up_to_the_buffer() {
        let mut plan = Plan::default();
        // Rows of 264 bytes from byte 4096: row 15 is the first to cross a page boundary.
        plan.make(&[15, 0, 0, 14, 300], 4096, 264, 16 << 10);
        assert_eq!(plan.spans, [Span { offset: 4096, bytes: 8192 }, Span { offset: 81920, bytes: 4096 }]);
        assert_eq!(plan.rows, [0..3, 3..4]);
        assert_eq!(plan.distinct.occurrences(0), [1, 2]);
        let all: Vec<u64> = (0..1000).collect();
        plan.make(&all, 4096, 264, 16 << 10);
        assert!(plan.spans.iter().all(|span| span.bytes <= 16 << 10));
        assert_eq!(plan.rows.iter().map(Range::len).sum::<usize>(), 1000);
        for (span, rows) in plan.spans.iter().zip(&plan.rows) {
            let bytes = 4096 + 264 * rows.start as u64..4096 + 264 * rows.end as u64;
            assert!(bytes.start - span.offset < 4096 && bytes.end <= span.offset + span.bytes as u64);
        }
    }
}
