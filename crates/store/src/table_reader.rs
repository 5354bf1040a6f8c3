//! Reading a table file from its first row to its last.

use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;

use crate::error::Result;
use crate::origin::{ContentHash, TableOrigin};
use crate::progress::Progress;
use crate::row_format::RowFormat;
use crate::table_file::{BLOCK_BYTES, TableFile, TableHeader};
use crate::until_error::UntilError;

/// Blocks that are read and checked at a time.
const BLOCKS_AT_A_TIME: u64 = 8;

/// A table file that is read through, not looked up in: rows come in ascending order, every block is checked
/// before its rows are handed out, and memory does not depend on the table's size. (A mapped table read
/// through would count as resident whole.)
///
/// After an error it hands out nothing more: open the file again. For random rows see [`Table`](crate::Table).
#[derive(Debug)]
pub struct TableReader {
    file: TableFile,
    passage: UntilError<Passage>,
}

/// How far a reader has come.
#[derive(Debug, Default)]
struct Passage {
    /// The next block to read, and the next row to hand out.
    block: u64,
    row: u64,
    /// Read bytes: first the rows handed out last, from `rest` on the beginning of the next row.
    buffer: Vec<u8>,
    rest: usize,
}

impl TableReader {
    /// Opens the table file at `path`, a trained table's too, whatever it belongs to: compare
    /// [`header`](Self::header) with what is needed.
    ///
    /// # Errors
    /// If the file cannot be read, is not a table, or is damaged in its header, length or list of checksums.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let file = TableFile::open(path.as_ref())?;
        Ok(Self { file, passage: UntilError::new(Passage::default()) })
    }

    /// Opens the table file at `path` if its rows belong to `expected`.
    ///
    /// # Errors
    /// As [`open`](Self::open), and if the rows belong to something else.
    pub fn open_for(path: impl AsRef<Path>, expected: &TableOrigin) -> Result<Self> {
        let reader = Self::open(path)?;
        reader.file.require(expected)?;
        Ok(reader)
    }

    /// What the file says about itself.
    pub fn header(&self) -> &TableHeader {
        &self.file.header
    }

    /// The hash of all that the file holds.
    pub fn content(&self) -> ContentHash {
        self.file.content
    }

    /// The header as the file has it.
    #[cfg(feature = "redis")]
    pub(crate) fn header_bytes(&self) -> crate::header_page::HeaderPage {
        self.file.header.to_bytes(&self.file.list_hash())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Checks every block of the file, state included, against its checksum, from several threads. Progress is
    /// in bytes.
    ///
    /// # Errors
    /// If a block differs (named with its offset and its rows), or the file cannot be read.
    pub fn verify(&self, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        self.file.verify(progress)
    }

    /// The next rows as they are stored, one after another, and the id of the first; `None` after the last.
    ///
    /// # Errors
    /// If a block differs from its checksum, the file cannot be read, or an earlier call failed.
    #[expect(clippy::should_implement_trait, reason = "it lends its buffer, which an iterator cannot")]
    pub fn next(&mut self) -> Result<Option<(u64, &[u8])>> {
        let Self { file, passage } = self;
        let first = passage.run(&file.path, |passage| passage.read_on(file))?;
        let rows = passage.get().map_or(&[][..], |passage| &passage.buffer[..passage.rest]);
        Ok((!rows.is_empty()).then_some((first, rows)))
    }

    /// The next rows decoded to `values` \[rows, width\], and the id of the first; `None` after the last.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn next_values(&mut self, values: &mut Vec<f32>) -> Result<Option<u64>> {
        let TableHeader { width, format, .. } = self.file.header;
        let Some((first, bytes)) = self.next()? else { return Ok(None) };
        decode(format, width, bytes, values);
        Ok(Some(first))
    }
}

impl Passage {
    /// Puts the next rows at the beginning of the buffer, up to `rest`; the id of the first.
    fn read_on(&mut self, file: &TableFile) -> Result<u64> {
        let section = file.sections[0];
        let row_bytes = file.header.format.bytes_per_row(file.header.width);
        self.buffer.drain(..self.rest);
        // A row may be longer than all blocks that are read at a time.
        while self.buffer.len() < row_bytes && self.block < section.blocks() {
            let first = self.block;
            let blocks = (section.blocks() - first).min(BLOCKS_AT_A_TIME);
            let end = section.bytes.min((first + blocks) * BLOCK_BYTES);
            let start = self.buffer.len();
            self.buffer.resize(start + (end - first * BLOCK_BYTES) as usize, 0);
            let chunks = self.buffer[start..].par_chunks_mut(BLOCK_BYTES as usize).enumerate();
            chunks.try_for_each(|(i, block)| file.read_block(&section, first + i as u64, block))?;
            self.block += blocks;
        }
        let (first, rows) = (self.row, self.buffer.len() / row_bytes);
        self.rest = rows * row_bytes;
        self.row += rows as u64;
        Ok(first)
    }
}

/// Decodes whole rows, from several threads.
pub(crate) fn decode(format: RowFormat, width: usize, bytes: &[u8], values: &mut Vec<f32>) {
    const ROWS: usize = 256;
    let row_bytes = format.bytes_per_row(width);
    values.resize(bytes.len() / row_bytes * width, 0.0);
    let chunks = bytes.par_chunks(ROWS * row_bytes).zip(values.par_chunks_mut(ROWS * width));
    chunks.for_each(|(bytes, values)| format.decode_rows(bytes, width, values));
}

/// Which blocks of a table's rows have been found whole: rows are then checked when they are first read, at
/// one read of a block each, instead of all at once or never.
#[derive(Debug)]
pub(crate) struct CheckedBlocks {
    /// One bit per block.
    checked: Vec<std::sync::atomic::AtomicU64>,
}

impl CheckedBlocks {
    pub(crate) fn none(file: &TableFile) -> Self {
        let words = file.sections[0].blocks().div_ceil(64) as usize;
        Self { checked: std::iter::repeat_with(Default::default).take(words).collect() }
    }

    /// Checks the blocks that hold the rows `ids` (all inside the table), as far as they are not yet checked.
    pub(crate) fn check(&self, file: &TableFile, ids: &[u64]) -> Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        let row_bytes = file.header.format.bytes_per_row(file.header.width) as u64;
        let blocks_of = |id: u64| id * row_bytes / BLOCK_BYTES..=((id + 1) * row_bytes - 1) / BLOCK_BYTES;
        // The bit publishes no memory: the bytes are the file's, and were found right by whoever set it.
        let is_new = |block: &u64| self.checked[(block / 64) as usize].load(Relaxed) >> (block % 64) & 1 == 0;
        let mut new: Vec<u64> = ids.iter().flat_map(|&id| blocks_of(id)).filter(is_new).collect();
        if new.is_empty() {
            return Ok(());
        }
        new.sort_unstable();
        new.dedup();
        new.par_iter().try_for_each_init(Vec::new, |buffer, &block| {
            file.check_block(&file.sections[0], block, buffer)?;
            self.checked[(block / 64) as usize].fetch_or(1 << (block % 64), Relaxed);
            Ok(())
        })
    }
}
