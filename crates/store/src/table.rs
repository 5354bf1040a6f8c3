//! Tables of rows, and gathering from them.

use std::path::Path;

use rayon::prelude::*;

use crate::error::{Result, check_length, check_rows};
use crate::memory::{Region, Storage, prefetch, rows_ahead};
use crate::row_format::{DecodeLoop, RowFormat};
use crate::table_file::{self, TableFile, TableHeader, TableOrigin};
use crate::table_reader::CheckedBlocks;

/// Anything that turns row ids into rows.
pub trait RowSource: Send + Sync {
    /// Number of rows: ids run from 0 to one less.
    fn rows(&self) -> u64;

    /// Values per row.
    fn width(&self) -> usize;

    /// The layout in which rows are kept.
    fn format(&self) -> RowFormat;

    /// Reads row `ids[i]` into `out[i * width..][..width]`, decoded to `f32`. Ids may repeat and have any
    /// order.
    ///
    /// Large batches are shared between the threads of the current rayon pool; the result is the same.
    ///
    /// # Errors
    /// If an id is not a row (named with its position), or `out` is not \[ids, width\]. `out` is then
    /// untouched.
    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()>;
}

/// A table that is read, not trained: built in place, read from a file, or mapped from one.
#[derive(Debug)]
pub struct Table {
    /// Says nothing about training: state that a file may hold behind the rows is not this type's matter.
    header: TableHeader,
    region: Region,
    /// Where the rows begin in the region.
    start: usize,
    /// The file that the region maps, held open: its path may meanwhile name another.
    file: Option<TableFile>,
    /// Which blocks have been checked, if rows are to be checked when they are first read.
    checked: Option<CheckedBlocks>,
}

impl Table {
    /// Builds a table by calling `fill(id, row)` for every row, from several threads; `row` starts zeroed and
    /// is then encoded in `format`.
    ///
    /// # Errors
    /// If the table cannot exist (no rows, no width) or its memory cannot be had.
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
        let encode = |row: &mut Vec<f32>, (id, bytes): (usize, &mut [u8])| {
            row.fill(0.0);
            fill(id as u64, row);
            format.encode_row(row, bytes);
        };
        let rows = region.bytes_mut().par_chunks_exact_mut(row_bytes).enumerate().with_min_len(256);
        rows.for_each_init(|| vec![0.0; width], encode);
        Ok(Self { header, region, start: 0, file: None, checked: None })
    }

    /// Maps the table file at `path`, a trained table's too, without reading its rows: memory is used only
    /// for what is looked up, and the system may take it back. Header, length and list of checksums are
    /// checked here, the rows by [`verify`](Self::verify).
    ///
    /// While mapped, the file may be replaced by renaming another over it (this table keeps the old one), but
    /// must not be rewritten or shortened in place.
    ///
    /// # Errors
    /// If the file cannot be read, is no table, is damaged, or belongs to another origin than `expected`.
    pub fn open(path: impl AsRef<Path>, expected: &TableOrigin) -> Result<Self> {
        let file = TableFile::open(path.as_ref())?;
        file.require(expected)?;
        let region = Region::map(&file.file, &file.path)?;
        let header = TableHeader { training: None, ..file.header.clone() };
        let start = file.sections[0].offset as usize;
        Ok(Self { header, region, start, file: Some(file), checked: None })
    }

    /// As [`open`](Self::open); and whenever a row is looked up in a block of which none was before, that block
    /// (1 MiB) is read and checked first. A damaged row is then an error, never a wrong row, and the table
    /// opens at once; the price is that cold lookups read 1 MiB each until most blocks are checked.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_checked(path: impl AsRef<Path>, expected: &TableOrigin) -> Result<Self> {
        let table = Self::open(path, expected)?;
        let checked = table.file.as_ref().map(CheckedBlocks::none);
        Ok(Self { checked, ..table })
    }

    /// Reads the rows of the table file at `path`, a trained table's too, into `storage`, checking every
    /// block of them.
    ///
    /// # Errors
    /// As [`open`](Self::open), and if the memory cannot be had.
    pub fn read(path: impl AsRef<Path>, expected: &TableOrigin, storage: &Storage) -> Result<Self> {
        let file = TableFile::open(path.as_ref())?;
        file.require(expected)?;
        let mut region = Region::zeroed(file.sections[0].bytes, storage)?;
        file.read_section(0, region.bytes_mut())?;
        let header = TableHeader { training: None, ..file.header };
        Ok(Self { header, region, start: 0, file: None, checked: None })
    }

    /// Writes the table to `path`: streamed, checksummed, and put in place in one step when complete.
    ///
    /// # Errors
    /// If the file system refuses; `path` then is as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        table_file::write(path.as_ref(), &self.header, &[self.bytes()])
    }

    /// Checks every block of the mapped file, state included, against its checksum. A table that is not
    /// mapped was checked when it was read.
    ///
    /// # Errors
    /// If a block differs (named with its offset), or the file cannot be read.
    pub fn verify(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| file.verify(&mut |_| ()))
    }

    /// Checks the blocks of rows that are looked up for the first time, if asked to.
    fn check_blocks(&self, ids: &[u64]) -> Result<()> {
        let (Some(file), Some(checked)) = (&self.file, &self.checked) else { return Ok(()) };
        check_rows(ids, self.header.rows)?;
        checked.check(file, ids)
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.header.origin
    }

    /// Row `id` as it is stored.
    ///
    /// # Errors
    /// If there is no such row, or its block is damaged (if opened to be checked).
    pub fn row_bytes(&self, id: u64) -> Result<&[u8]> {
        check_rows(&[id], self.header.rows)?;
        self.check_blocks(&[id])?;
        let row_bytes = self.header.format.bytes_per_row(self.header.width);
        Ok(&self.bytes()[id as usize * row_bytes..][..row_bytes])
    }

    fn bytes(&self) -> &[u8] {
        let bytes = self.header.section_bytes()[0] as usize;
        &self.region.bytes()[self.start..self.start + bytes]
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

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        self.check_blocks(ids)?;
        gather(self.bytes(), self.header.format, self.header.width, ids, out)
    }
}

/// Bytes of rows below which handing work to another thread costs more than it saves.
const BYTES_PER_TASK: usize = 1 << 18;

/// Gathers rows of `table`, which holds nothing but rows.
pub(crate) fn gather(
    table: &[u8],
    format: RowFormat,
    width: usize,
    ids: &[u64],
    out: &mut [f32],
) -> Result<()> {
    let row_bytes = format.bytes_per_row(width);
    check_length("gathered rows", ids.len() * width, out.len())?;
    check_rows(ids, (table.len() / row_bytes) as u64)?;
    let here =
        |(ids, out): (&[u64], &mut [f32])| format.decode_loop(GatherHere { table, row_bytes, ids, out });
    let rows = (BYTES_PER_TASK / row_bytes).max(1);
    if ids.len() <= rows || rayon::current_num_threads() == 1 {
        here((ids, out));
    } else {
        ids.par_chunks(rows).zip(out.par_chunks_mut(rows * width)).for_each(here);
    }
    Ok(())
}

/// The loop everything waits for. A random row is a miss in every cache; asking for rows well ahead keeps
/// many such misses in flight at once instead of one after another.
struct GatherHere<'a> {
    table: &'a [u8],
    row_bytes: usize,
    ids: &'a [u64],
    out: &'a mut [f32],
}

impl DecodeLoop for GatherHere<'_> {
    #[inline(always)]
    fn run(self, decode: impl Fn(&[u8], &mut [f32])) {
        let Self { table, row_bytes, ids, out } = self;
        let width = out.len() / ids.len().max(1);
        let ahead = rows_ahead(row_bytes);
        for &id in ids.iter().take(ahead) {
            prefetch(table, id as usize * row_bytes, row_bytes);
        }
        for (i, (&id, out)) in ids.iter().zip(out.chunks_exact_mut(width.max(1))).enumerate() {
            if let Some(&next) = ids.get(i + ahead) {
                prefetch(table, next as usize * row_bytes, row_bytes);
            }
            decode(&table[id as usize * row_bytes..][..row_bytes], out);
        }
    }
}
