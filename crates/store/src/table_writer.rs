//! Writing a table file as a stream of rows.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::error::{Result, StoreError, check_length};
use crate::header_page::content;
use crate::new_file::NewFile;
use crate::origin::{ContentHash, TableOrigin};
use crate::progress::{Progress, report};
use crate::row_format::RowFormat;
use crate::table_file::{BLOCK_BYTES, Section, TableHeader, hash_block, layout, padding};
use crate::until_error::UntilError;

/// Writes a [table file](crate::table_file) from its first row to its last, in memory that does not depend on
/// the table's size. The file appears at its path when [`finish`](Self::finish) succeeds, whole and flushed to
/// disk; dropped before, nothing is left of it. So too after an error of the file system: the writer then takes no
/// more rows, and `finish` fails.
///
/// ```
/// # use engram_store::{AddressIdentity, RowFormat, RowSource, Table, TableOrigin, TableWriter};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("table");
/// let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
/// let mut writer = TableWriter::create(&path, 1000, 4, RowFormat::Bf16, origin)?;
/// for id in 0..1000 {
///     writer.push(&[id as f32; 4])?;
/// }
/// writer.finish()?;
///
/// let mut row = [0.0; 4];
/// Table::open(&path, &origin)?.gather(&[256], &mut row)?;
/// assert_eq!(row, [256.0; 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TableWriter {
    path: PathBuf,
    header: TableHeader,
    /// Bytes of rows taken so far.
    taken: u64,
    written: UntilError<Written>,
    /// Where the list of checksums will be.
    list_offset: u64,
    /// Encoded rows on their way to blocks.
    encoded: Vec<u8>,
}

/// What is in the file so far. After an error it is dropped, and the file with it.
#[derive(Debug)]
struct Written {
    file: NewFile,
    /// The rows, and each kind of state.
    sections: Vec<SectionWriter>,
}

/// A section being written.
#[derive(Debug)]
struct SectionWriter {
    section: Section,
    /// Its bytes so far.
    written: u64,
    /// The block being filled.
    block: Vec<u8>,
    /// Where it begins in the file.
    offset: u64,
    /// BLAKE3 of every block before it.
    list: Vec<u8>,
}

impl TableWriter {
    /// Begins a table of `rows` rows of `width` values. `path` is not touched before [`finish`](Self::finish).
    ///
    /// # Errors
    /// If the table cannot exist (no rows, no width), or its folder takes no new file.
    pub fn create(
        path: impl AsRef<Path>,
        rows: u64,
        width: usize,
        format: RowFormat,
        origin: TableOrigin,
    ) -> Result<Self> {
        Self::with_header(path.as_ref(), TableHeader { rows, width, format, origin, training: None })
    }

    pub(crate) fn with_header(path: &Path, header: TableHeader) -> Result<Self> {
        header.check()?;
        let file = NewFile::create(path)?;
        let (sections, list_offset, _) = layout(&header);
        let sections = sections.into_iter().map(SectionWriter::new).collect();
        let written = UntilError::new(Written { file, sections });
        Ok(Self { path: path.to_owned(), header, taken: 0, written, list_offset, encoded: Vec::new() })
    }

    /// What the table will say about itself.
    pub fn header(&self) -> &TableHeader {
        &self.header
    }

    /// Rows written so far: the id of the next.
    pub fn rows_written(&self) -> u64 {
        let row_bytes = self.header.format.bytes_per_row(self.header.width) as u64;
        self.taken / row_bytes
    }

    /// Writes the next rows, `rows` \[any number, width\], encoding them in the table's format. Returns them as
    /// they are stored.
    ///
    /// # Errors
    /// If `rows` are not whole rows or are more than the table has left: nothing is then written. If the file
    /// system refuses, or refused before: the table can then no longer be finished.
    pub fn push(&mut self, rows: &[f32]) -> Result<&[u8]> {
        let TableHeader { width, format, .. } = self.header;
        check_length("values of rows to write", rows.len().next_multiple_of(width), rows.len())?;
        let row_bytes = format.bytes_per_row(width);
        let mut encoded = std::mem::take(&mut self.encoded);
        encoded.resize(rows.len() / width * row_bytes, 0);
        let pairs = rows.par_chunks_exact(width).zip(encoded.par_chunks_exact_mut(row_bytes));
        pairs.with_min_len(64).for_each(|(row, bytes)| format.encode_row(row, bytes));
        let result = self.push_encoded(&encoded);
        self.encoded = encoded;
        result.map(|()| self.encoded.as_slice())
    }

    /// Writes the next rows, which are already encoded in the table's format, one after another.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_encoded(&mut self, rows: &[u8]) -> Result<()> {
        let row_bytes = self.header.format.bytes_per_row(self.header.width);
        check_length("bytes of rows to write", rows.len().next_multiple_of(row_bytes), rows.len())?;
        if rows.len() as u64 > self.header.section_bytes()[0] - self.taken {
            let found = self.rows_written() + (rows.len() / row_bytes) as u64;
            return Err(StoreError::setting(
                "rows written",
                found,
                "no more than the table was created with",
            ));
        }
        self.put(0, rows)?;
        self.taken += rows.len() as u64;
        Ok(())
    }

    /// Writes all rows that are left by calling `fill(id, row)` for each, from several threads; `row` starts
    /// zeroed. Progress is in rows.
    ///
    /// # Errors
    /// If the file system refuses, or `progress` stops it.
    pub fn fill(
        &mut self,
        fill: impl Fn(u64, &mut [f32]) + Sync,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let TableHeader { rows: total, width, format, .. } = self.header;
        let row_bytes = format.bytes_per_row(width);
        let rows = rows_per_chunk(width);
        let mut encoded = vec![0; rows * row_bytes];
        while self.rows_written() < total {
            let first = self.rows_written();
            let count = (total - first).min(rows as u64) as usize;
            let encode = |row: &mut Vec<f32>, (id, bytes): (usize, &mut [u8])| {
                row.fill(0.0);
                fill(first + id as u64, row);
                format.encode_row(row, bytes);
            };
            let chunk = &mut encoded[..count * row_bytes];
            let rows = chunk.par_chunks_exact_mut(row_bytes).enumerate().with_min_len(64);
            rows.for_each_init(|| vec![0.0; width], encode);
            self.push_encoded(chunk)?;
            report(progress, Progress { done: first + count as u64, total })?;
        }
        Ok(())
    }

    /// Completes the file: the list of checksums, then the header, then the disk, and last its name.
    ///
    /// # Errors
    /// If rows are missing, or the file system refuses or refused before; the path then is as it was.
    pub fn finish(self) -> Result<ContentHash> {
        let rows = self.rows_written();
        let Written { file, sections } = self.written.into_inner(&self.path)?;
        if !sections.iter().all(SectionWriter::is_complete) {
            let rule = "all rows of the table before it is finished";
            return Err(StoreError::setting("rows written", rows, rule));
        }
        let list = sections.into_iter().map(|section| section.list).collect::<Vec<_>>().concat();
        file.write_all_at(&list, self.list_offset)?;
        let head = self.header.to_bytes(blake3::hash(&list).as_bytes());
        file.write_all_at(&head, 0)?;
        file.persist()?;
        Ok(content(&head))
    }

    /// The next bytes of a section, no more than it has left. Sections may be written in turns.
    pub(crate) fn put(&mut self, section: usize, bytes: &[u8]) -> Result<()> {
        self.written.run(&self.path, |Written { file, sections }| sections[section].put(file, bytes))
    }
}

impl SectionWriter {
    fn new(section: Section) -> Self {
        Self { section, written: 0, block: Vec::new(), offset: section.offset, list: Vec::new() }
    }

    fn left(&self) -> u64 {
        self.section.bytes - self.written
    }

    /// Whether every byte was taken, and every block is in the file.
    fn is_complete(&self) -> bool {
        self.left() == 0 && self.list.len() as u64 == 32 * self.section.blocks()
    }

    fn put(&mut self, file: &NewFile, mut bytes: &[u8]) -> Result<()> {
        debug_assert!(bytes.len() as u64 <= self.left());
        while !bytes.is_empty() {
            let room = BLOCK_BYTES as usize - self.block.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.extend_from_slice(now);
            self.written += now.len() as u64;
            bytes = later;
            if self.left() == 0 || self.block.len() as u64 == BLOCK_BYTES {
                self.flush_block(file)?;
            }
        }
        Ok(())
    }

    fn flush_block(&mut self, file: &NewFile) -> Result<()> {
        let padding = padding(self.block.len());
        self.list.extend_from_slice(hash_block(&self.block, padding).as_bytes());
        self.block.extend_from_slice(padding);
        file.write_all_at(&self.block, self.offset)?;
        self.offset += self.block.len() as u64;
        self.block.clear();
        Ok(())
    }
}

/// Rows that are worked on at a time where a table is streamed: about 4 MiB of `f32`, and at least one.
pub(crate) fn rows_per_chunk(width: usize) -> usize {
    ((1 << 20) / width.max(1)).max(1)
}
