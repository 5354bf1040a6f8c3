//! Tables of rows, and gathering from them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::{Result, StoreError, check_length, check_rows};
use crate::file_stamp::FileStamp;
use crate::memory::{Region, Storage, prefetch, rows_ahead};
use crate::row_format::RowFormat;
use crate::row_source::{BYTES_PER_TASK, RowSource, check_read, with_scratch, worth_sharing};
use crate::table_file::{self, TableFile, TableHeader, TableOrigin};

/// A table that is read, not trained: built in place, read from a file, or mapped from one.
#[derive(Debug)]
pub struct Table {
    /// Says nothing about training: state that a file may hold behind the rows is not this type's matter.
    header: TableHeader,
    region: Region,
    /// Where the rows begin in the region.
    start: usize,
    /// The file that the region maps.
    source: Option<Source>,
}

/// A mapped file, held open: its path may meanwhile name another.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    file: File,
    opened: FileStamp,
    /// For verifying, which seeks.
    table: Mutex<TableFile>,
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
        Ok(Self { header, region, start: 0, source: None })
    }

    /// Maps the table file at `path`, a trained table's too, without reading its rows: memory is used only
    /// for what is looked up, and the system may take it back. Header, length and list of checksums are
    /// checked here, the rows by [`verify`](Self::verify).
    ///
    /// While mapped, the file may be replaced by renaming another over it: this table keeps the old one. If it
    /// is rewritten or shortened in place, or its disk fails, reading fails from then on; the process is not
    /// harmed.
    ///
    /// # Errors
    /// If the file cannot be read, is no table, is damaged, or belongs to another origin than `expected`.
    pub fn open(path: impl AsRef<Path>, expected: &TableOrigin) -> Result<Self> {
        let table = TableFile::open(path.as_ref())?;
        table.require(expected)?;
        let path = table.path.clone();
        let file = table.file.try_clone().map_err(StoreError::io(&path, "open the table", 0))?;
        let opened = FileStamp::of(&file, &path)?;
        let region = Region::map(&file, &path)?;
        let header = TableHeader { training: None, ..table.header.clone() };
        let start = table.sections[0].offset as usize;
        let source = Some(Source { path, file, opened, table: Mutex::new(table) });
        Ok(Self { header, region, start, source })
    }

    /// Reads the rows of the table file at `path`, a trained table's too, into `storage`, checking every
    /// block of them.
    ///
    /// # Errors
    /// As [`open`](Self::open), and if the memory cannot be had.
    pub fn read(path: impl AsRef<Path>, expected: &TableOrigin, storage: &Storage) -> Result<Self> {
        let mut file = TableFile::open(path.as_ref())?;
        file.require(expected)?;
        let mut region = Region::zeroed(file.sections[0].bytes, storage)?;
        file.read_section(0, region.bytes_mut())?;
        Ok(Self { header: TableHeader { training: None, ..file.header }, region, start: 0, source: None })
    }

    /// Writes the table to `path`: streamed, checksummed, and put in place in one step when complete.
    ///
    /// # Errors
    /// If the file system refuses, or the table's own file fails; `path` then is as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if self.source.is_none() {
            table_file::write(path, &self.header, &[self.bytes()])?;
            return self.check();
        }
        // What a failing mapping gives must never be found under the final name.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let staged = tempfile::Builder::new()
            .prefix(".table-")
            .suffix(".tmp")
            .tempfile_in(folder.unwrap_or(Path::new(".")))
            .map_err(StoreError::io(path, "create a file", 0))?
            .into_temp_path();
        table_file::write(&staged, &self.header, &[self.bytes()])?;
        self.check()?;
        staged
            .persist(path)
            .map_err(|refused| StoreError::io(path, "put the table in place", 0)(refused.error))
    }

    /// Checks every block of the mapped file, state included, against its checksum. A table that is not
    /// mapped was checked when it was read.
    ///
    /// # Errors
    /// If a block differs (named with its offset), or the file cannot be read.
    pub fn verify(&self) -> Result<()> {
        match &self.source {
            // A panic in between cannot have left the file in a bad state: every read says where.
            Some(source) => source.table.lock().unwrap_or_else(PoisonError::into_inner).verify(),
            None => Ok(()),
        }
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.header.origin
    }

    /// Row `id` as it is stored.
    ///
    /// # Errors
    /// If there is no such row, or it cannot be had.
    pub fn row_bytes(&self, id: u64) -> Result<Vec<u8>> {
        let mut row = vec![0; self.bytes_per_row()];
        self.read(&[id], &mut row)?;
        Ok(row)
    }

    fn bytes(&self) -> &[u8] {
        let bytes = self.header.section_bytes()[0] as usize;
        &self.region.bytes()[self.start..self.start + bytes]
    }

    /// Fails if what was read until now may be wrong.
    fn check(&self) -> Result<()> {
        let Some(source) = &self.source else {
            return self.region.check();
        };
        // Of a file that was changed and faulted, the change is the cause.
        source.opened.check(&source.file, &source.path)?;
        match self.region.fault() {
            None => Ok(()),
            Some(offset) => {
                let row = offset.saturating_sub(self.start as u64) / self.bytes_per_row() as u64;
                let problem = "the disk failed to deliver it, or the file was shortened for a while";
                Err(StoreError::RowUnreadable {
                    path: source.path.clone(),
                    row,
                    offset,
                    problem: problem.into(),
                })
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
        let (rows, row_bytes) = (self.bytes(), self.bytes_per_row());
        match &self.region {
            Region::File(map) => visit(rows, row_bytes, ids, out, row_bytes, |id, out| {
                map.copy(self.start + id * row_bytes, out);
            }),
            _ => visit(rows, row_bytes, ids, out, row_bytes, |id, out| {
                out.copy_from_slice(&rows[id * row_bytes..][..row_bytes]);
            }),
        }
        self.check()
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_length("gathered rows", ids.len() * self.width(), out.len())?;
        check_rows(ids, self.rows())?;
        let (rows, row_bytes, format) = (self.bytes(), self.bytes_per_row(), self.format());
        match &self.region {
            // Copied before it is looked at: see `Watched::copy`.
            Region::File(map) => visit(rows, row_bytes, ids, out, self.width(), |id, out| {
                with_scratch(row_bytes, |row| {
                    map.copy(self.start + id * row_bytes, row);
                    format.decode_row(row, out);
                });
            }),
            _ => visit(rows, row_bytes, ids, out, self.width(), |id, out| {
                format.decode_row(&rows[id * row_bytes..][..row_bytes], out);
            }),
        }
        self.check()
    }
}

/// Calls `each(id, part)` for every id of a batch and its part of `out`, `per_id` long, sharing large batches
/// between threads.
///
/// This is the loop everything waits for. A random row of `table`, which holds nothing but rows, is a miss in
/// every cache; asking for rows well ahead keeps many such misses in flight at once instead of one after
/// another.
#[inline(always)]
pub(crate) fn visit<T: Send>(
    table: &[u8],
    row_bytes: usize,
    ids: &[u64],
    out: &mut [T],
    per_id: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
) {
    let ahead = rows_ahead(row_bytes);
    let here = |(ids, out): (&[u64], &mut [T])| {
        for &id in ids.iter().take(ahead) {
            prefetch(table, id as usize * row_bytes, row_bytes);
        }
        for (i, (&id, out)) in ids.iter().zip(out.chunks_exact_mut(per_id)).enumerate() {
            if let Some(&next) = ids.get(i + ahead) {
                prefetch(table, next as usize * row_bytes, row_bytes);
            }
            each(id as usize, out);
        }
    };
    if worth_sharing(ids.len() * row_bytes) {
        let rows = (BYTES_PER_TASK / row_bytes).max(1);
        ids.par_chunks(rows).zip(out.par_chunks_mut(rows * per_id)).for_each(here);
    } else {
        here((ids, out));
    }
}
