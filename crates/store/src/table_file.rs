//! A table on disk: one file, checked to the last bit, replaced in one step.
//!
//! ```text
//! 0      header, 4096 bytes, little-endian:
//!          0  magic "ENGRAMTB"    8  version u32        12  row format u32
//!         16  rows u64           24  width u64          32  layer u64           40  identity, 32 bytes
//!         72  step u64           80  optimiser u32 (0 none, 1 Adam, 2 row-wise Adam, 3 balanced momentum,
//!                                    4 frozen)          84  K u32 (3), or zero
//!         88  β1 (1), β (3) f64  96  β2 (1, 2), floor (3) f64   104  ε (1, 2), scale (3) f64
//!        112  bytes per checksum block u64             120  BLAKE3 of the list of checksums, 32 bytes
//!        152  the table's scale f32, or zero           156  zeros
//!       4064  BLAKE3 of the header's first 4064 bytes: the file's ContentHash
//! 4096   sections, each padded with zeros to a multiple of 4096 bytes: the rows one after another;
//!        with an optimiser, its first and (Adam) second kind of state
//! then   the list of checksums: BLAKE3 of every block of every section with its padding, 32 bytes each
//! ```
//!
//! The header's checksum covers the list's, the list covers every block: no bit and no length can change
//! unseen. A trained table is thus also a read-only one, whose state is simply not looked at.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engram_identity::AddressIdentity;
use rayon::prelude::*;

use crate::error::{Result, StoreError};
use crate::file_stamp::FileStamp;
use crate::header_page::{FieldReader, FieldWriter, HEADER_BYTES, HeaderPage, Start, content, is_sealed};
use crate::origin::{ContentHash, TableOrigin};
use crate::positioned::read_exact_at;
use crate::progress::{Progress, report};
use crate::row_format::RowFormat;
use crate::row_optimizer::RowOptimizer;
use crate::until_error::UntilError;

/// The version of the layout that this crate writes and reads.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"ENGRAMTB";
const PAGE: u64 = 4096;
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;

/// What a table file says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct TableHeader {
    /// Number of rows.
    pub rows: u64,
    /// Values per row.
    pub width: usize,
    /// Layout of a row.
    pub format: RowFormat,
    /// The addressing and layer that the rows belong to.
    pub origin: TableOrigin,
    /// The optimiser whose state follows the rows, and the updates it has made; `None` without state.
    pub training: Option<(RowOptimizer, u64)>,
}

impl TableHeader {
    /// Reads and checks the header, length and list of checksums of the table file at `path`, but no rows.
    ///
    /// # Errors
    /// If the file cannot be read, is not a table of this [`VERSION`], or is damaged in these parts.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        TableFile::open(path.as_ref()).map(|file| file.header)
    }

    /// Fails unless the table can exist: rows, width, settings, and a size that 63 bits can count.
    pub(crate) fn check(&self) -> Result<()> {
        if self.rows == 0 {
            return Err(StoreError::setting("rows", self.rows, "at least 1"));
        }
        if self.width == 0 {
            return Err(StoreError::setting("width", self.width, "at least 1"));
        }
        if let Some((optimizer, _)) = &self.training {
            optimizer.check()?;
        }
        let too_many =
            || StoreError::setting("rows", self.rows, "few enough that the table has less than 2^60 bytes");
        let state = self.training.map_or([0, 0], |(optimizer, _)| optimizer.state_widths(1));
        let values_per_row = 1 + state[0] as u128 + state[1] as u128;
        // At most 2^64 · 2^67 without saturating: more than u128 counts.
        let bytes = u128::from(self.rows).saturating_mul(4 * self.width as u128 * values_per_row);
        if bytes < 1 << 60 { Ok(()) } else { Err(too_many()) }
    }

    /// Bytes of the rows and of each kind of state.
    pub(crate) fn section_bytes(&self) -> Vec<u64> {
        let states = self.training.map_or([0, 0], |(optimizer, _)| optimizer.state_widths(self.width));
        let states = states.into_iter().filter(|&width| width > 0).map(|width| 4 * width);
        let per_row = std::iter::once(self.format.bytes_per_row(self.width)).chain(states);
        per_row.map(|bytes| self.rows * bytes as u64).collect()
    }

    pub(crate) fn to_bytes(&self, list_hash: &[u8; 32]) -> HeaderPage {
        let (kind, count, settings) = match self.training.map(|(optimizer, _)| optimizer) {
            None => (0u32, 0u32, [0.0; 3]),
            Some(RowOptimizer::Adam { beta1, beta2, epsilon }) => (1, 0, [beta1, beta2, epsilon]),
            Some(RowOptimizer::RowWiseAdam { beta2, epsilon }) => (2, 0, [0.0, beta2, epsilon]),
            Some(RowOptimizer::BalancedMomentum { momentum, iterations, floor, scale }) => {
                (3, iterations, [momentum, floor, scale])
            }
            Some(RowOptimizer::Frozen) => (4, 0, [0.0; 3]),
            Some(RowOptimizer::AdamByRow { beta1, beta2, epsilon }) => (5, 0, [beta1, beta2, epsilon]),
        };
        let (format, scale) = self.format.to_code();
        let step = self.training.map_or(0, |(_, step)| step);
        let mut fields = FieldWriter::new(&Start {
            magic: MAGIC,
            version: VERSION,
            format,
            rows: self.rows,
            width: self.width as u64,
            layer: self.origin.layer,
            identity: *self.origin.identity.as_bytes(),
        });
        fields.put(step.to_le_bytes()).put(kind.to_le_bytes()).put(count.to_le_bytes());
        for setting in settings {
            fields.put(setting.to_le_bytes());
        }
        fields.put(BLOCK_BYTES.to_le_bytes()).put(*list_hash).put(scale.to_le_bytes());
        fields.seal()
    }

    /// The header and the hash of the list of checksums.
    pub(crate) fn from_bytes(page: &HeaderPage, path: &Path) -> Result<(Self, [u8; 32])> {
        let refuse = |at: usize, problem: String| Err(StoreError::not_a_table(path, at as u64, problem));
        let (start, mut fields) = FieldReader::new(page);
        if start.magic != MAGIC {
            return refuse(
                0,
                "it does not begin with ENGRAMTB; pass a file that a table was saved to".into(),
            );
        }
        if start.version != VERSION {
            let problem = format!(
                "version {}, but this program reads version {VERSION}; use a matching one",
                start.version
            );
            return refuse(8, problem);
        }
        if !is_sealed(page) {
            return Err(StoreError::damaged(path, 0, "the header does not match its checksum"));
        }
        // From here on the bytes are those that were written, but not necessarily by a sane program.
        let step = u64::from_le_bytes(fields.take());
        let [kind, count] = [fields.take(), fields.take()].map(u32::from_le_bytes);
        let settings = [fields.take(), fields.take(), fields.take()].map(f64::from_le_bytes);
        let (block, list_hash) = (u64::from_le_bytes(fields.take()), fields.take());
        let scale = f32::from_le_bytes(fields.take());
        let format = match RowFormat::from_code(start.format, scale) {
            Ok(format) => format,
            Err(problem) => return refuse(12, problem),
        };
        let optimizer = match (kind, settings) {
            (0, _) => None,
            (1, [beta1, beta2, epsilon]) => Some(RowOptimizer::Adam { beta1, beta2, epsilon }),
            (2, [_, beta2, epsilon]) => Some(RowOptimizer::RowWiseAdam { beta2, epsilon }),
            (3, [momentum, floor, scale]) => {
                Some(RowOptimizer::BalancedMomentum { momentum, iterations: count, floor, scale })
            }
            (4, _) => Some(RowOptimizer::Frozen),
            (5, [beta1, beta2, epsilon]) => Some(RowOptimizer::AdamByRow { beta1, beta2, epsilon }),
            _ => return refuse(80, format!("unknown optimiser {kind}; use the program that wrote it")),
        };
        let Ok(width) = usize::try_from(start.width) else {
            return refuse(24, format!("rows of {} values do not fit this machine", start.width));
        };
        let origin =
            TableOrigin { identity: AddressIdentity::from_bytes(start.identity), layer: start.layer };
        let training = optimizer.map(|optimizer| (optimizer, step));
        let header = Self { rows: start.rows, width, format, origin, training };
        if let Err(impossible) = header.check() {
            return refuse(16, impossible.to_string());
        }
        if block != BLOCK_BYTES {
            return refuse(112, format!("checksum blocks of {block} bytes, but version 1 has {BLOCK_BYTES}"));
        }
        Ok((header, list_hash))
    }
}

/// A section's place in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    pub(crate) offset: u64,
    /// Without padding.
    pub(crate) bytes: u64,
    first_block: u64,
}

impl Section {
    fn padded(&self) -> u64 {
        self.bytes.next_multiple_of(PAGE)
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.padded().div_ceil(BLOCK_BYTES)
    }
}

/// Where everything lies in a file with this header: the sections, and the checksums (offset, entries).
pub(crate) fn layout(header: &TableHeader) -> (Vec<Section>, u64, u64) {
    let (mut offset, mut first_block) = (HEADER_BYTES as u64, 0);
    let place = |bytes| {
        let section = Section { offset, bytes, first_block };
        offset += section.padded();
        first_block += section.blocks();
        section
    };
    (header.section_bytes().into_iter().map(place).collect(), offset, first_block)
}

/// The zeros that follow `bytes` bytes up to the next page.
pub(crate) fn padding(bytes: usize) -> &'static [u8] {
    &[0; PAGE as usize][..bytes.next_multiple_of(PAGE as usize) - bytes]
}

pub(crate) fn hash_block(block: &[u8], padding: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(block).update(padding).finalize()
}

/// An open table file whose header, length and list of checksums are right.
#[derive(Debug)]
pub(crate) struct TableFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) header: TableHeader,
    pub(crate) sections: Vec<Section>,
    pub(crate) content: ContentHash,
    opened: FileStamp,
    /// BLAKE3 of every block, section after section.
    list: Vec<u8>,
}

impl TableFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let read = |offset| StoreError::io(path, "read the table", offset);
        let file = File::open(path).map_err(StoreError::io(path, "open the table", 0))?;
        let opened = FileStamp::of(&file, path)?;
        let found = opened.bytes;
        if found < HEADER_BYTES as u64 {
            let problem =
                format!("it ends within the header of {HEADER_BYTES} bytes: truncated, or no table");
            return Err(StoreError::not_a_table(path, found, problem));
        }
        let mut head = [0; HEADER_BYTES];
        read_exact_at(&file, &mut head, 0).map_err(read(0))?;
        let (header, list_hash) = TableHeader::from_bytes(&head, path)?;
        let (sections, list_offset, blocks) = layout(&header);
        let expected = list_offset + 32 * blocks;
        if found != expected {
            let problem = format!("the file has {found} bytes, but its header promises {expected}");
            return Err(StoreError::damaged(path, found.min(expected), problem));
        }
        let mut list = vec![0; 32 * blocks as usize];
        read_exact_at(&file, &mut list, list_offset).map_err(read(list_offset))?;
        if blake3::hash(&list) != list_hash {
            return Err(StoreError::damaged(
                path,
                list_offset,
                "the list of checksums does not match the header",
            ));
        }
        let content = content(&head);
        Ok(Self { path: path.to_owned(), file, header, sections, content, opened, list })
    }

    /// The hash of the list of checksums.
    #[cfg(feature = "redis")]
    pub(crate) fn list_hash(&self) -> [u8; 32] {
        *blake3::hash(&self.list).as_bytes()
    }

    /// Fails unless the file's rows belong to `expected`.
    pub(crate) fn require(&self, expected: &TableOrigin) -> Result<()> {
        let found = self.header.origin;
        if found == *expected {
            return Ok(());
        }
        Err(StoreError::WrongOrigin { path: self.path.clone(), expected: *expected, found })
    }

    /// Fails if the file was written to or changed its length since it was opened: what was read until now may
    /// be wrong.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        self.opened.check(&self.file, &self.path)
    }

    /// Reads section `index` from its beginning.
    pub(crate) fn section(&self, index: usize) -> SectionReader<'_> {
        let ahead = Ahead { section: self.sections[index], block: 0, buffer: Vec::new(), taken: 0 };
        SectionReader { file: self, ahead: UntilError::new(ahead) }
    }

    /// Reads everything from several threads, checking every block and keeping nothing.
    pub(crate) fn verify(&self, progress: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        /// Blocks between reports of progress.
        const BLOCKS_AT_A_TIME: u64 = 64;
        let total = self.sections.iter().map(|section| section.bytes).sum();
        let mut done = 0;
        for section in &self.sections {
            for first in (0..section.blocks()).step_by(BLOCKS_AT_A_TIME as usize) {
                let end = section.blocks().min(first + BLOCKS_AT_A_TIME);
                (first..end)
                    .into_par_iter()
                    .try_for_each_init(Vec::new, |buffer, i| self.check_block(section, i, buffer))?;
                let bytes = section.bytes.min(end * BLOCK_BYTES) - first * BLOCK_BYTES;
                done += bytes;
                report(progress, Progress { done, total })?;
            }
        }
        Ok(())
    }

    /// Checks a section's block number `i`, reading it through `buffer`.
    pub(crate) fn check_block(&self, section: &Section, i: u64, buffer: &mut Vec<u8>) -> Result<()> {
        buffer.resize(BLOCK_BYTES.min(section.bytes - i * BLOCK_BYTES) as usize, 0);
        self.read_block(section, i, buffer)
    }

    /// Reads a section's block number `i`, which has `block.len()` bytes without its padding, and checks it.
    pub(crate) fn read_block(&self, section: &Section, i: u64, block: &mut [u8]) -> Result<()> {
        let offset = section.offset + i * BLOCK_BYTES;
        let mut zeros = [0; PAGE as usize];
        let zeros = &mut zeros[..padding(block.len()).len()];
        read_exact_at(&self.file, block, offset)
            .and_then(|()| read_exact_at(&self.file, zeros, offset + block.len() as u64))
            .map_err(|error| self.read_failed(offset, error))?;
        let at = 32 * (section.first_block + i) as usize;
        if hash_block(block, zeros).as_bytes()[..] != self.list[at..at + 32] {
            let end = offset + (block.len() + zeros.len()) as u64;
            let what = self.content_of(section, i, block.len() as u64);
            let problem = format!("the block up to byte {end}, {what}, does not match its checksum");
            return Err(StoreError::damaged(&self.path, offset, problem));
        }
        Ok(())
    }

    /// The file had its right length when it was opened.
    fn read_failed(&self, offset: u64, error: std::io::Error) -> StoreError {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return StoreError::damaged(&self.path, offset, "the file was shortened after it was opened");
        }
        StoreError::io(&self.path, "read the table", offset)(error)
    }

    /// What a block holds, in words.
    fn content_of(&self, section: &Section, i: u64, bytes: u64) -> String {
        let row_bytes = section.bytes / self.header.rows;
        let rows = i * BLOCK_BYTES / row_bytes..=(i * BLOCK_BYTES + bytes - 1) / row_bytes;
        let kind = if section.first_block == 0 { "rows" } else { "the state of rows" };
        format!("which holds {kind} {} to {}", rows.start(), rows.end())
    }
}

/// A section that is read through, every block checked before any of it is handed out.
pub(crate) struct SectionReader<'a> {
    file: &'a TableFile,
    ahead: UntilError<Ahead>,
}

/// What a [`SectionReader`] has read.
struct Ahead {
    section: Section,
    /// The next block to read.
    block: u64,
    /// Bytes read; those before `taken` were handed out.
    buffer: Vec<u8>,
    taken: usize,
}

impl SectionReader<'_> {
    /// The next `bytes` bytes, which the section must have.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<&[u8]> {
        let Self { file, ahead } = self;
        ahead.run(&file.path, |ahead| ahead.read_on(file, bytes))?;
        Ok(ahead.get().map_or(&[], |ahead| &ahead.buffer[..bytes]))
    }
}

impl Ahead {
    /// Puts the next `bytes` bytes at the beginning of the buffer.
    fn read_on(&mut self, file: &TableFile, bytes: usize) -> Result<()> {
        self.buffer.drain(..self.taken);
        while self.buffer.len() < bytes {
            let start = self.buffer.len();
            let own = BLOCK_BYTES.min(self.section.bytes - self.block * BLOCK_BYTES) as usize;
            self.buffer.resize(start + own, 0);
            file.read_block(&self.section, self.block, &mut self.buffer[start..])?;
            self.block += 1;
        }
        self.taken = bytes;
        Ok(())
    }
}
