//! Tables of rows, and gathering from them.

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::cache_line::{prefetch, rows_ahead};
use crate::copy_rows::copy_rows;
use crate::error::{Result, StoreError, check_rows};
use crate::memory::{Region, Storage, page_bytes};
use crate::origin::TableOrigin;
#[cfg(all(unix, feature = "mapped"))]
use crate::resident::ResidentPages;
use crate::row_format::{DecodeLoop, RowFormat};
use crate::row_source::{RowSource, check_gather, check_read, with_scratch, worth_sharing};
use crate::table_file::{BLOCK_BYTES, TableFile, TableHeader};
use crate::table_reader::CheckedBlocks;
#[cfg(feature = "write")]
use crate::table_writer::TableWriter;

/// How to map a table.
#[cfg(feature = "mapped")]
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapOptions {
    checked: bool,
    guarded: bool,
    #[cfg(unix)]
    resident: Option<u64>,
}

#[cfg(feature = "mapped")]
impl Default for MapOptions {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(feature = "mapped")]
impl MapOptions {
    /// Not checked; guarded, if the feature `sigbus` is on; no limit on what is in memory.
    pub const fn new() -> Self {
        Self {
            checked: false,
            guarded: true,
            #[cfg(unix)]
            resident: None,
        }
    }

    /// Whether a block (1 MiB) is read and checked before the first of its rows is looked up. A damaged row is then an
    /// error, never a wrong row, and the table opens at once; the price is that cold lookups read 1 MiB each until most
    /// blocks are checked.
    pub const fn checked(self, checked: bool) -> Self {
        Self { checked, ..self }
    }

    /// Whether a file that is shortened, or whose disk fails, is an error. For this a handler of SIGBUS is installed in the
    /// whole process, which passes faults elsewhere on to the handler before it; a library that later installs its own
    /// without passing faults on takes the protection away. Otherwise, and without the feature `sigbus`, such a file ends
    /// the process.
    pub const fn guarded(self, guarded: bool) -> Self {
        Self { guarded, ..self }
    }

    /// About how many bytes of the file may be in memory, at least 1 MiB: pages that were not used lately are given back to
    /// the system, as its own page cache does when memory is short, and read again when they are needed. Without a limit a
    /// table that is looked up in for long comes to be in memory whole, as far as there is room.
    ///
    /// A fault on a page may map its neighbours as well, where the system has them in its page cache. On Linux they are
    /// counted, and clean pages of the file leave the page cache when the limit is set, so that there are few; elsewhere
    /// such a table can hold several times the limit.
    #[cfg(unix)]
    pub const fn resident(self, bytes: u64) -> Self {
        Self { resident: Some(bytes), ..self }
    }

    #[cfg(unix)]
    fn resident_pages(&self, mapped: usize) -> Result<Option<ResidentPages>> {
        match self.resident {
            Some(bytes) if bytes < 1 << 20 => {
                Err(StoreError::setting("resident bytes", bytes, "at least 1 MiB"))
            }
            bytes => Ok(bytes.map(|bytes| ResidentPages::at_most(bytes, mapped, page_bytes()))),
        }
    }
}

/// Bytes of rows that a thread builds at a time, and that are copied at a time.
const FILLED_BYTES: usize = 1 << 18;

/// A table that is read, not trained: built in place, read from a file, or mapped from one.
#[derive(Debug)]
pub struct Table {
    /// Says nothing about training: state that a file may hold behind the rows belongs to `TrainableTable`.
    header: TableHeader,
    region: Region,
    /// Where the rows begin in the region.
    start: usize,
    /// The file that the region maps, held open: its path may meanwhile name another.
    file: Option<TableFile>,
    /// Which blocks have been checked, if rows are to be checked when they are first read.
    checked: Option<CheckedBlocks>,
    /// Which pages of the mapped file are in memory, if there is a limit.
    #[cfg(all(unix, feature = "mapped"))]
    resident: Option<ResidentPages>,
}

impl Table {
    /// Builds a table by calling `fill(id, row)` for every row, from several threads; `row` starts zeroed and
    /// is then encoded in `format`.
    ///
    /// # Errors
    /// If the table cannot exist (no rows, no width) or its memory cannot be allocated.
    pub fn from_fn(
        rows: u64,
        width: usize,
        format: RowFormat,
        origin: TableOrigin,
        storage: &Storage,
        fill: impl Fn(u64, &mut [f32]) + Sync,
    ) -> Result<Self> {
        let header = TableHeader { rows, width, format, origin, training: None };
        header.check()?;
        let mut region = Region::zeroed(header.section_bytes()[0], storage)?;
        let row_bytes = format.bytes_per_row(width);
        let rows_at_a_time = (FILLED_BYTES / row_bytes).max(1);
        region.fill(rows_at_a_time * row_bytes, |start, bytes| {
            let mut row = vec![0.0; width];
            for (id, bytes) in ((start / row_bytes) as u64..).zip(bytes.chunks_exact_mut(row_bytes)) {
                row.fill(0.0);
                fill(id, &mut row);
                format.encode_row(&row, bytes);
            }
            Ok(())
        })?;
        region.check()?;
        Ok(Self::new(header, region, 0, None))
    }

    /// Maps the table file at `path`, a trained table's too, without reading its rows: memory is used only
    /// for what is looked up, and the system may take it back. Header, length and list of checksums are
    /// checked here, the rows by [`verify`](Self::verify).
    ///
    /// While mapped, the file may be replaced by renaming another over it: this table keeps the old one. If it
    /// is rewritten or shortened in place, or its disk fails, reading fails from then on; the process is not
    /// harmed. See [`MapOptions::guarded`] for what this takes.
    ///
    /// # Errors
    /// If the file cannot be read, is not a table, is damaged, or belongs to another origin than `expected`.
    #[cfg(feature = "mapped")]
    pub fn open(path: impl AsRef<Path>, expected: &TableOrigin) -> Result<Self> {
        Self::open_with(path, expected, &MapOptions::default())
    }

    /// [`open`](Self::open), checked: see [`MapOptions::checked`].
    ///
    /// # Errors
    /// As [`open`](Self::open).
    #[cfg(feature = "mapped")]
    pub fn open_checked(path: impl AsRef<Path>, expected: &TableOrigin) -> Result<Self> {
        Self::open_with(path, expected, &MapOptions::new().checked(true))
    }

    /// [`open`](Self::open), as `options` say.
    ///
    /// A fault on a page may map its neighbours as well, where the system has them in its page cache. On Linux they are
    /// counted, and clean pages of the file leave the page cache when the limit is set, so that there are few; elsewhere
    /// such a table can hold several times the limit.
    ///
    /// # Errors
    /// As [`open`](Self::open), and if an option is outside its range.
    #[cfg(feature = "mapped")]
    pub fn open_with(path: impl AsRef<Path>, expected: &TableOrigin, options: &MapOptions) -> Result<Self> {
        let file = TableFile::open(path.as_ref())?;
        file.require(expected)?;
        let region = Region::map(&file.file, &file.path, options.guarded)?;
        let header = TableHeader { training: None, ..file.header.clone() };
        let (start, checked) =
            (file.sections[0].offset as usize, options.checked.then(|| CheckedBlocks::none(&file)));
        #[cfg(unix)]
        let resident = options.resident_pages(region.len())?;
        #[cfg(unix)]
        if resident.is_some() {
            ResidentPages::forget(&file.file);
        }
        let table = Self::new(header, region, start, Some(file));
        Ok(Self {
            checked,
            #[cfg(unix)]
            resident,
            ..table
        })
    }

    /// Bytes of the mapped file in memory, as far as this table brought them there; `None` without a
    /// [limit](MapOptions::resident).
    #[cfg(all(unix, feature = "mapped"))]
    pub fn resident_bytes(&self) -> Option<u64> {
        self.resident.as_ref().map(ResidentPages::bytes)
    }

    fn new(header: TableHeader, region: Region, start: usize, file: Option<TableFile>) -> Self {
        Self {
            header,
            region,
            start,
            file,
            checked: None,
            #[cfg(all(unix, feature = "mapped"))]
            resident: None,
        }
    }

    /// Notes that the rows `ids`, all inside the table, are about to be touched; gives places where none were in memory.
    fn touch(&self, ids: &[u64]) -> Vec<usize> {
        let mut fresh = Vec::new();
        #[cfg(all(unix, feature = "mapped"))]
        if let Some(resident) = &self.resident {
            let row_bytes = self.bytes_per_row();
            for &id in ids {
                let row = self.start + id as usize * row_bytes;
                resident.touch(row..row + row_bytes, &mut fresh);
            }
        }
        let _ = (ids, &mut fresh);
        fresh
    }

    /// Counts what has come into memory around the places `fresh`, and gives pages back, if too many are there.
    fn trim(&self, fresh: Vec<usize>) {
        #[cfg(all(unix, feature = "mapped"))]
        if let (Some(resident), Some(file), Region::File(map)) = (&self.resident, &self.file, &self.region) {
            resident.survey(map.map(), fresh);
            return resident.trim(map.map(), &file.file);
        }
        drop(fresh);
    }

    /// Lets `work` touch the rows `ids` for their parts of `out` \[ids, per id\], in pieces that the limit on pages in memory
    /// holds.
    fn within_limit<T>(
        &self,
        ids: &[u64],
        out: &mut [T],
        per_id: usize,
        mut work: impl FnMut(&[u64], &mut [T]),
    ) {
        let Some(most) = self.ids_at_a_time() else { return work(ids, out) };
        let mut rest = out;
        for ids in ids.chunks(most) {
            let (out, later) = rest.split_at_mut(ids.len() * per_id);
            let fresh = self.touch(ids);
            work(ids, out);
            self.trim(fresh);
            rest = later;
        }
    }

    /// Rows that are touched before pages are given back: those of an eighth of the limit; `None` without a limit.
    fn ids_at_a_time(&self) -> Option<usize> {
        #[cfg(all(unix, feature = "mapped"))]
        return self.resident.as_ref().map(|resident| {
            let row = self.bytes_per_row() + 2 * page_bytes();
            (resident.limit() / 8 / row).max(1)
        });
        #[cfg(not(all(unix, feature = "mapped")))]
        None
    }

    /// Reads the rows of the table file at `path`, a trained table's too, into `storage`, from several threads, checking
    /// every block of them.
    ///
    /// # Errors
    /// As [`open`](Self::open), and if the memory cannot be allocated.
    pub fn read(path: impl AsRef<Path>, expected: &TableOrigin, storage: &Storage) -> Result<Self> {
        let file = TableFile::open(path.as_ref())?;
        file.require(expected)?;
        let mut region = Region::zeroed(file.sections[0].bytes, storage)?;
        let section = file.sections[0];
        region.fill(BLOCK_BYTES as usize, |start, block| {
            file.read_block(&section, start as u64 / BLOCK_BYTES, block)
        })?;
        region.check()?;
        let header = TableHeader { training: None, ..file.header };
        Ok(Self::new(header, region, 0, None))
    }

    /// Writes the table to `path`: streamed, checksummed, and put in place in one step when complete.
    ///
    /// # Errors
    /// If the file system refuses, or the table's own file fails; `path` then is as it was.
    #[cfg(feature = "write")]
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut writer = TableWriter::with_header(path.as_ref(), self.header.clone())?;
        let bytes = self.header.section_bytes()[0] as usize;
        let mut some = Vec::new();
        for start in (0..bytes).step_by(FILLED_BYTES) {
            some.resize(FILLED_BYTES.min(bytes - start), 0);
            self.region.copy(self.start + start, &mut some);
            writer.put(0, &some)?;
        }
        // What a failing mapping gives must never be found under the final name.
        self.check()?;
        writer.finish().map(drop)
    }

    /// Checks every block of the mapped file, state included, against its checksum. A table that is not
    /// mapped was checked when it was read.
    ///
    /// # Errors
    /// If a block differs (named with its offset), or the file cannot be read.
    pub fn verify(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| file.verify(&mut |_| Continue(())))
    }

    /// Checks the blocks of rows (all inside the table) that are looked up for the first time, if asked to.
    fn check_blocks(&self, ids: &[u64]) -> Result<()> {
        let (Some(file), Some(checked)) = (&self.file, &self.checked) else { return Ok(()) };
        checked.check(file, ids)
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.header.origin
    }

    /// Row `id` as it is stored.
    ///
    /// # Errors
    /// If the table has no such row, if the row cannot be read, or if its block is damaged (where blocks are checked).
    pub fn row_bytes(&self, id: u64) -> Result<Vec<u8>> {
        let mut row = vec![0; self.bytes_per_row()];
        self.read(&[id], &mut row)?;
        Ok(row)
    }

    /// All rows as they are stored, one after another; `None` if they are in a mapped file, which may change or
    /// fail at any moment.
    pub fn stored_rows(&self) -> Option<&[u8]> {
        self.region.ram()
    }

    /// Its rows, to look up.
    fn stored(&self) -> StoredRows<'_> {
        let row_bytes = self.bytes_per_row();
        StoredRows { region: &self.region, start: self.start, row_bytes, stride: row_bytes }
    }

    /// Fails if what was read until now may be wrong.
    fn check(&self) -> Result<()> {
        let Some(file) = &self.file else {
            return self.region.check();
        };
        // Of a file that was changed and faulted, the change is the cause.
        file.check_unchanged()?;
        match self.region.fault() {
            None => Ok(()),
            Some(offset) => {
                let row = offset.saturating_sub(self.start as u64) / self.bytes_per_row() as u64;
                let problem = "the disk failed to deliver it, or the file was shortened for a while".into();
                Err(StoreError::RowUnreadable { path: file.path.clone(), row, offset, problem })
            }
        }
    }
}

impl RowSource for Table {
    fn rows(&self) -> u64 {
        self.header.rows
    }

    fn width(&self) -> usize {
        self.header.width
    }

    fn format(&self) -> RowFormat {
        self.header.format
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        self.check_blocks(ids)?;
        let row_bytes = self.bytes_per_row();
        self.within_limit(ids, out, row_bytes, |ids, out| self.stored().read(ids, out));
        self.check()
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_gather(self, ids, out)?;
        self.check_blocks(ids)?;
        let (format, width) = (self.format(), self.width());
        self.within_limit(ids, out, width, |ids, out| self.stored().gather(format, width, ids, out));
        self.check()
    }

    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        check_rows(ids, self.rows())?;
        self.within_limit(ids, &mut [(); 0], 0, |ids, _| self.stored().prefetch(ids));
        Ok(())
    }
}

/// Bytes of rows that a thread takes at a time.
const BYTES_PER_PART: usize = 1 << 17;

/// Rows that lie one after another in a region, from its byte `start` on and `stride` bytes apart.
pub(crate) struct StoredRows<'a> {
    pub(crate) region: &'a Region,
    pub(crate) start: usize,
    pub(crate) row_bytes: usize,
    pub(crate) stride: usize,
}

impl StoredRows<'_> {
    /// Copies the rows `ids`, all inside the table, to `out` \[ids, bytes per row\].
    pub(crate) fn read(&self, ids: &[u64], out: &mut [u8]) {
        self.share(ids, out, self.row_bytes, |ids, out| {
            // Where the rows are is asked once for all of them, not at each.
            match self.region {
                Region::Ram(rows) => copy_rows(&rows[self.start..], self.stride, self.row_bytes, ids, out),
                Region::Scratch(map) | Region::File(map) => {
                    self.visit(ids, out, self.row_bytes, |start, out| map.copy(start, out));
                }
                Region::Empty => {}
            }
        });
    }

    /// Decodes the rows `ids`, all inside the table, to `out` \[ids, width\].
    pub(crate) fn gather(&self, format: RowFormat, width: usize, ids: &[u64], out: &mut [f32]) {
        if format == RowFormat::F32 {
            // What is stored is what is wanted.
            return self.read(ids, bytemuck::cast_slice_mut(out));
        }
        self.share(ids, out, width, |ids, out| {
            with_scratch(self.row_bytes, |scratch| {
                format.decode_loop(GatherHere { stored: self, ids, width, out, scratch });
            });
        });
    }

    /// Asks the system for the pages of the rows `ids`, all inside the table, where they are not in memory.
    pub(crate) fn prefetch(&self, ids: &[u64]) {
        if matches!(self.region, Region::Ram(_) | Region::Empty) {
            return;
        }
        // Rows that share or adjoin pages are asked for together.
        let (page, mut start, mut end) = (page_bytes(), 0usize, 0usize);
        for &id in ids {
            let row = self.start + id as usize * self.stride;
            let adjoins = row >= start && row <= end.next_multiple_of(page);
            if !adjoins {
                self.region.will_need(start, end - start);
                start = row;
            }
            end = row + self.row_bytes;
        }
        self.region.will_need(start, end - start);
    }

    /// Shares large batches with other threads. This one takes parts of them, too: others sleep, and to wake them takes
    /// as long as some hundred rows.
    fn share<T: Send>(
        &self,
        ids: &[u64],
        out: &mut [T],
        per_id: usize,
        here: impl Fn(&[u64], &mut [T]) + Sync,
    ) {
        if worth_sharing(ids.len() * self.row_bytes) {
            let rows = (BYTES_PER_PART / self.row_bytes).max(1);
            let parts = ids.len().div_ceil(rows);
            let rest = Mutex::new(ids.chunks(rows).zip(out.chunks_mut(rows * per_id)));
            let take = || rest.lock().unwrap_or_else(PoisonError::into_inner).next();
            let work = || {
                while let Some((ids, out)) = take() {
                    here(ids, out);
                }
            };
            rayon::in_place_scope(|scope| {
                for _ in 1..parts.min(rayon::current_num_threads()) {
                    scope.spawn(|_| work());
                }
                work();
            });
        } else {
            here(ids, out);
        }
    }

    /// Calls `each(start, part)` with every row's place in the region and its part of `out`.
    ///
    /// This is the loop everything waits for. A random row is a miss in every cache; asking for rows well ahead
    /// keeps many such misses in flight at once instead of one after another.
    #[inline(always)]
    fn visit<T>(&self, ids: &[u64], out: &mut [T], per_id: usize, mut each: impl FnMut(usize, &mut [T])) {
        let Self { region, start, row_bytes, stride } = *self;
        let (first, ahead) = (region.address(0), rows_ahead(row_bytes));
        let place = |id: u64| start + id as usize * stride;
        for &id in ids.iter().take(ahead) {
            prefetch(first.wrapping_add(place(id)), row_bytes);
        }
        for (i, (&id, out)) in ids.iter().zip(out.chunks_exact_mut(per_id)).enumerate() {
            if let Some(&next) = ids.get(i + ahead) {
                prefetch(first.wrapping_add(place(next)), row_bytes);
            }
            each(place(id), out);
        }
    }
}

struct GatherHere<'a> {
    stored: &'a StoredRows<'a>,
    ids: &'a [u64],
    width: usize,
    out: &'a mut [f32],
    scratch: &'a mut [u8],
}

impl DecodeLoop for GatherHere<'_> {
    #[inline(always)]
    fn run(self, decode: impl Fn(&[u8], &mut [f32])) {
        let Self { stored, ids, width, out, scratch } = self;
        // Where the rows are is asked once for all of them, not at each.
        match stored.region {
            Region::Ram(rows) => stored.visit(
                ids,
                out,
                width,
                #[inline(always)]
                |start, out| decode(&rows[start..][..stored.row_bytes], out),
            ),
            Region::Scratch(map) | Region::File(map) => stored.visit(
                ids,
                out,
                width,
                #[inline(always)]
                |start, out| {
                    map.copy(start, scratch);
                    decode(scratch, out);
                },
            ),
            Region::Empty => {}
        }
    }
}
