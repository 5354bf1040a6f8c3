//! Token shards: a corpus as tokens in memory-mapped files, with the boundaries of its documents.
//!
//! [`prepare`] turns a corpus into a folder:
//!
//! ```text
//! data/train/00000.tokens 00001.tokens …
//! data/valid/00000.tokens …                 where a share of the documents is held out
//! ```
//!
//! # The format, version 1
//!
//! All numbers are little-endian.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `ENGRTOKS` |
//! | 8 | 4 | version: 1; 2 if the shard has a [loss mask](crate::prepare_conversations) beside it |
//! | 12 | 4 | bytes per token: 2 if the vocabulary is at most 65,536, else 4 |
//! | 16 | 4 | number of this shard, from 0 |
//! | 20 | 4 | number of shards of the split |
//! | 24 | 8 | vocabulary: every token is below it |
//! | 32 | 8 | tokens |
//! | 40 | 8 | documents |
//! | 48 | 8 | bytes of text in the documents |
//! | 56 | 4 | id of the end-of-text token, the last token of every document |
//! | 60 | 4 | zero |
//! | 64 | 32 | blake3 of the `tokenizer.json` |
//! | 96 | 32 | blake3 of everything after the header |
//! | 128 | 32 | blake3 of the 128 bytes before |
//! | 160 | tokens · width | the tokens, documents one after another |
//! | then | up to 7 | zeros, to a multiple of 8 |
//! | then | documents · 16 | per document: its first token's place in this shard, and its bytes of text |

use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;

use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, Documents, Position};
use crate::damage::DamageReport;
use crate::error::{Error, Result};
use crate::files::{sync_folder, write_file};
use crate::loss_mask::LossMask;
use crate::packing::Packing;
use crate::preparation_state::{Progress, Request, ShardProgress, SplitProgress, resumed, to_json};
use crate::tokenizer::{Tokenizer, TokenizerHash};
use crate::work_folder::WorkFolder;

const MAGIC: [u8; 8] = *b"ENGRTOKS";
const VERSION: u32 = 1;
/// The version of shards with a loss mask, so that no program trains on them without it.
const MASKED: u32 = 2;
const HEADER: usize = 160;
const DOCUMENT: usize = 16;

/// The tokens of one split of a corpus, over all its shards, as one sequence.
pub struct TokenShards {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Position of each shard's first token, followed by the number of tokens.
    starts: Vec<u64>,
}

/// A document of [`TokenShards`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardDocument {
    /// Its tokens, ending with end-of-text.
    pub tokens: Range<u64>,
    /// Its bytes of text.
    pub bytes: u64,
}

/// Identifies a prepared data set: a hash over the headers of its shards, which hash the rest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DataIdentity(pub [u8; 32]);

struct Shard {
    path: PathBuf,
    header: Header,
    map: Mmap,
    mask: Option<LossMask>,
}

#[derive(Debug, Clone, PartialEq)]
struct Header {
    width: u32,
    shard: u32,
    shards: u32,
    vocabulary: u64,
    tokens: u64,
    documents: u64,
    text_bytes: u64,
    end_of_text: u32,
    tokenizer: TokenizerHash,
    body: [u8; 32],
    /// Whether there is a loss mask beside the shard.
    masked: bool,
}

impl TokenShards {
    /// Opens a shard, or the folder of all shards of a split. Checks the header's own hash and the file's length of
    /// every file, and that no shard is missing. [`verify`](Self::verify) checks the rest.
    ///
    /// The files are mapped, not read. If another process truncates them while they are open, the operating system ends
    /// this program.
    ///
    /// # Errors
    /// [`Error::MalformedShard`], naming the file and what is wrong with it, and [`Error::Read`].
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(Error::read(path))?;
        let paths = if kind.is_dir() { shard_files(path)? } else { vec![path.to_owned()] };
        let mut shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>>>()?;
        shards.sort_by_key(|shard| shard.header.shard);
        if kind.is_dir() {
            complete(path, &shards)?;
        }
        let mut starts = vec![0];
        starts.extend(shards.iter().scan(0, |sum, shard| {
            *sum += shard.header.tokens;
            Some(*sum)
        }));
        Ok(Self { path: path.to_owned(), shards, starts })
    }

    /// Reads everything and compares it with the stored checksums. Also checks that every token is in the vocabulary
    /// and that documents follow each other without gaps.
    ///
    /// # Errors
    /// [`Error::MalformedShard`] with the first file that differs.
    pub fn verify(&self) -> Result<()> {
        self.shards.iter().try_for_each(Shard::verify)
    }

    /// Checks that these tokens were made with this tokenizer.
    ///
    /// # Errors
    /// [`Error::WrongTokenizer`] naming both.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        let (expected, found) = (tokenizer.hash(), self.tokenizer());
        if expected == found {
            return Ok(());
        }
        let path = self.path.clone();
        Err(Error::WrongTokenizer { path, expected: expected.to_string(), found: found.to_string() })
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.starts[self.shards.len()]
    }

    /// Whether there are no tokens. Shards written by [`prepare`] have some.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the text of these tokens.
    pub fn text_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.header.text_bytes).sum()
    }

    /// Number of documents.
    pub fn document_count(&self) -> u64 {
        self.shards.iter().map(|shard| shard.header.documents).sum()
    }

    /// Number of token ids of the tokenizer.
    pub fn vocabulary(&self) -> usize {
        self.shards[0].header.vocabulary as usize
    }

    /// Id of the token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.shards[0].header.end_of_text
    }

    /// Hash of the tokenizer.
    pub fn tokenizer(&self) -> TokenizerHash {
        self.shards[0].header.tokenizer
    }

    /// Identifies this data set. A checkpoint stores it with the position in the data.
    pub fn identity(&self) -> DataIdentity {
        let mut hash = blake3::Hasher::new();
        self.shards.iter().for_each(|shard| _ = hash.update(&shard.map[..HEADER]));
        let masks = self.shards.iter().filter_map(|shard| shard.mask.as_ref());
        masks.for_each(|mask| _ = hash.update(mask.header()));
        DataIdentity(*hash.finalize().as_bytes())
    }

    /// The documents, in order.
    pub fn documents(&self) -> impl Iterator<Item = ShardDocument> + '_ {
        self.shards.iter().zip(&self.starts).flat_map(|(shard, first)| {
            (0..shard.header.documents).map(move |index| {
                let (range, bytes) = shard.document(index);
                ShardDocument { tokens: first + range.start..first + range.end, bytes }
            })
        })
    }

    /// The tokens of a range.
    ///
    /// # Errors
    /// A range beyond the end, or a damaged file.
    pub fn tokens(&self, range: Range<u64>) -> Result<Vec<u32>> {
        let count = range.end.saturating_sub(range.start);
        self.check_range(range.start, count)?;
        let mut tokens = vec![0; count as usize];
        self.read(range.start, &mut tokens)?;
        Ok(tokens)
    }

    /// Copies the tokens from `start` on into `out`.
    ///
    /// # Errors
    /// A range beyond the end, or a token outside the vocabulary (a damaged file).
    pub fn read(&self, start: u64, out: &mut [u32]) -> Result<()> {
        self.check_range(start, out.len() as u64)?;
        let (mut position, mut out) = (start, out);
        while !out.is_empty() {
            // The last shard that starts at or before the position. Shards are not empty.
            let index = self.starts.partition_point(|first| *first <= position) - 1;
            let count = (self.starts[index + 1] - position).min(out.len() as u64);
            let (now, later) = out.split_at_mut(count as usize);
            self.shards[index].read(position - self.starts[index], now)?;
            (position, out) = (position + count, later);
        }
        Ok(())
    }

    /// Inputs of the windows that conversations are packed into, which begin at its multiples; none of a corpus, whose
    /// windows may begin anywhere.
    pub fn window(&self) -> Option<usize> {
        self.shards[0].mask.as_ref().map(LossMask::window)
    }

    /// Number of tokens that a loss counts: all without a loss mask.
    pub fn counted_tokens(&self) -> u64 {
        self.shards.iter().map(|shard| shard.mask.as_ref().map_or(shard.header.tokens, LossMask::count)).sum()
    }

    /// Whether a loss counts each token of a range as a target.
    ///
    /// # Errors
    /// A range beyond the end.
    pub fn counted(&self, range: Range<u64>) -> Result<Vec<bool>> {
        self.check_range(range.start, range.end.saturating_sub(range.start))?;
        let counted = |position: u64| {
            let (shard, place) = self.find(position);
            shard.mask.as_ref().is_none_or(|mask| mask.counts(place))
        };
        Ok(range.map(counted).collect())
    }

    /// Lengths of the sequences in a window of `inputs` that starts at `start`. The documents of conversations are those
    /// that were prepared: an end-of-text token may end a turn.
    ///
    /// # Panics
    /// When there are no inputs.
    pub fn lengths(&self, packing: Packing, start: u64, inputs: &[u32]) -> Vec<usize> {
        if packing == Packing::Together || self.window().is_none() {
            return packing.lengths(inputs, 1);
        }
        let ends = (1..inputs.len()).filter(|&at| self.ends_document(start + at as u64));
        let bounds: Vec<usize> = std::iter::once(0).chain(ends).chain([inputs.len()]).collect();
        bounds.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Whether the token at `position` is the last of its document.
    fn ends_document(&self, position: u64) -> bool {
        let (shard, place) = self.find(position);
        place + 1 == shard.header.tokens || shard.starts_document(place + 1)
    }

    /// The shard of a token, and its place in it.
    fn find(&self, position: u64) -> (&Shard, u64) {
        let index = self.starts.partition_point(|first| *first <= position) - 1;
        (&self.shards[index], position - self.starts[index])
    }

    fn check_range(&self, start: u64, count: u64) -> Result<()> {
        if start.checked_add(count).is_some_and(|end| end <= self.len()) {
            return Ok(());
        }
        let reason = format!("{count} tokens from {start} on exceed its {} tokens", self.len());
        Err(Error::MalformedShard { path: self.path.clone(), reason })
    }
}

impl fmt::Debug for TokenShards {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "TokenShards({}, {} tokens, {} shards)",
            self.path.display(),
            self.len(),
            self.shards.len()
        )
    }
}

impl fmt::Display for DataIdentity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for DataIdentity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// The shards of a folder, by name.
fn shard_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries: std::io::Result<Vec<_>> =
        std::fs::read_dir(folder).map_err(Error::read(folder))?.map(|entry| Ok(entry?.path())).collect();
    let mut paths = entries.map_err(Error::read(folder))?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "tokens"));
    paths.sort();
    if paths.is_empty() {
        let reason =
            "no .tokens file in this folder; give the folder of one split (train or valid)".to_owned();
        return Err(Error::MalformedShard { path: folder.to_owned(), reason });
    }
    Ok(paths)
}

/// Checks that the shards of a folder belong to one split and one preparation.
fn complete(folder: &Path, shards: &[Shard]) -> Result<()> {
    let first = &shards[0].header;
    for (index, Shard { path, header, .. }) in shards.iter().enumerate() {
        let malformed = |reason| Err(Error::MalformedShard { path: path.clone(), reason });
        if (header.shards, header.tokenizer, header.width, header.end_of_text, header.masked)
            != (first.shards, first.tokenizer, first.width, first.end_of_text, first.masked)
        {
            return malformed(
                "comes from a different preparation than the other shards in its folder".to_owned(),
            );
        }
        if header.shard as usize != index {
            return malformed(format!("is shard {}, and shard {index} is missing", header.shard));
        }
    }
    if shards.len() != first.shards as usize {
        let reason = format!("has {} of {} shards", shards.len(), first.shards);
        return Err(Error::MalformedShard { path: folder.to_owned(), reason });
    }
    Ok(())
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read(path))?;
        let length = file.metadata().map_err(Error::read(path))?.len();
        let malformed = |reason| Error::MalformedShard { path: path.to_owned(), reason };
        if length < HEADER as u64 {
            return Err(malformed(format!(
                "{length} bytes are too few for a token shard's header of {HEADER}"
            )));
        }
        // SAFETY: the map is only read, and only within `length`, the file's current length. A change by another
        // process would change the values read, all of which are checked or harmless. A truncation would end this
        // process, as `TokenShards::open` states.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::read(path))?;
        let header = Header::read(&map[..HEADER]).map_err(malformed)?;
        match header.file_length() {
            Some(expected) if expected == length => {
                let open = || LossMask::open(path, &map[..HEADER], header.tokens);
                let mask = header.masked.then(open).transpose()?;
                Ok(Self { path: path.to_owned(), header, map, mask })
            }
            Some(expected) => {
                Err(malformed(format!("has {length} bytes instead of {expected}; it is cut off or damaged")))
            }
            None => Err(malformed("its header states an impossible size".to_owned())),
        }
    }

    fn verify(&self) -> Result<()> {
        let malformed =
            |reason: &str| Err(Error::MalformedShard { path: self.path.clone(), reason: reason.to_owned() });
        if *blake3::hash(&self.map[HEADER..]).as_bytes() != self.header.body {
            return malformed("its contents do not match its checksum; prepare the data again");
        }
        let mut next = 0;
        for index in 0..self.header.documents {
            let (range, _) = self.document(index);
            if range.start != next || range.is_empty() || range.end > self.header.tokens {
                return malformed(&format!("document {index} does not follow the previous one"));
            }
            next = range.end;
        }
        let mut buffer = [0; 4096];
        for start in (0..self.header.tokens).step_by(buffer.len()) {
            let count = (self.header.tokens - start).min(buffer.len() as u64) as usize;
            self.read(start, &mut buffer[..count])?;
        }
        Ok(())
    }

    /// Copies tokens; the caller has checked the range.
    fn read(&self, start: u64, out: &mut [u32]) -> Result<()> {
        let width = self.header.width as usize;
        let first = HEADER + start as usize * width;
        let bytes = &self.map[first..first + out.len() * width];
        let mut largest = 0;
        let token = |bytes: &[u8]| bytes.iter().rev().fold(0, |token, byte| token << 8 | u32::from(*byte));
        for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(width)) {
            *out = token(bytes);
            largest = largest.max(*out);
        }
        if u64::from(largest) < self.header.vocabulary {
            return Ok(());
        }
        let reason = format!(
            "token {largest} between {start} and {} is outside the vocabulary of {}: the file is damaged",
            start + out.len() as u64,
            self.header.vocabulary
        );
        Err(Error::MalformedShard { path: self.path.clone(), reason })
    }

    /// Whether a document starts at this place in the shard.
    fn starts_document(&self, place: u64) -> bool {
        let (mut low, mut high) = (0, self.header.documents);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.document(middle).0.start.cmp(&place) {
                std::cmp::Ordering::Equal => return true,
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        false
    }

    /// A document's tokens in this shard, and its bytes of text.
    fn document(&self, index: u64) -> (Range<u64>, u64) {
        let entry = |index: u64| {
            let at = self.header.documents_at() as usize + index as usize * DOCUMENT;
            (number(&self.map, at), number(&self.map, at + 8))
        };
        let (start, bytes) = entry(index);
        let end = if index + 1 == self.header.documents { self.header.tokens } else { entry(index + 1).0 };
        (start..end, bytes)
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Header {
    fn write(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        let version = if self.masked { MASKED } else { VERSION };
        [version, self.width, self.shard, self.shards].iter().for_each(|field| put(&field.to_le_bytes()));
        let counts = [self.vocabulary, self.tokens, self.documents, self.text_bytes];
        counts.iter().for_each(|field| put(&field.to_le_bytes()));
        put(&u64::from(self.end_of_text).to_le_bytes());
        put(&self.tokenizer.0);
        put(&self.body);
        let hash = blake3::hash(&bytes[..128]);
        bytes[128..].copy_from_slice(hash.as_bytes());
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Self, String> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let hash = |at: usize| <[u8; 32]>::try_from(&bytes[at..at + 32]).expect("32 bytes");
        if bytes[..8] != MAGIC {
            return Err("is not a token shard: it does not start with ENGRTOKS".to_owned());
        }
        if ![VERSION, MASKED].contains(&word(8)) {
            return Err(format!(
                "has version {} of the format; this program reads versions {VERSION} and {MASKED}",
                word(8)
            ));
        }
        if *blake3::hash(&bytes[..128]).as_bytes() != hash(128) {
            return Err("its header does not match its checksum; prepare the data again".to_owned());
        }
        let header = Self {
            width: word(12),
            shard: word(16),
            shards: word(20),
            vocabulary: number(bytes, 24),
            tokens: number(bytes, 32),
            documents: number(bytes, 40),
            text_bytes: number(bytes, 48),
            end_of_text: word(56),
            tokenizer: TokenizerHash(hash(64)),
            body: hash(96),
            masked: word(8) == MASKED,
        };
        if !matches!(header.width, 2 | 4) || header.tokens == 0 || header.documents == 0 {
            return Err("its header states no tokens, no documents or no token width".to_owned());
        }
        Ok(header)
    }

    /// What a checkpoint stores of this shard.
    fn progress(&self, hash: [u8; 32]) -> ShardProgress {
        let Self { tokens, documents, text_bytes, .. } = *self;
        ShardProgress { tokens, documents, text_bytes, hash }
    }

    fn documents_at(&self) -> u64 {
        (HEADER as u64 + self.tokens * u64::from(self.width)).next_multiple_of(8)
    }

    fn file_length(&self) -> Option<u64> {
        let tokens = self.tokens.checked_mul(u64::from(self.width))?.checked_add(HEADER as u64)?;
        tokens.checked_next_multiple_of(8)?.checked_add(self.documents.checked_mul(DOCUMENT as u64)?)
    }
}

/// Options for preparing token shards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrepareOptions {
    /// Share of the documents held out for validation, 0 ≤ share < 1. A document's text alone decides whether it is
    /// held out, so two copies are never on both sides, and a growing corpus keeps its split. If a share above 0
    /// selects none of a few documents, the nearest one is held out.
    pub hold_out: f64,
    /// A shard ends with the document that reaches this number of tokens.
    pub shard_tokens: u64,
    /// Bytes of text between two checkpoints, from which a killed preparation resumes. They do not change the result.
    #[serde(skip)]
    pub checkpoint_bytes: u64,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self { hold_out: 0.0, shard_tokens: 1 << 28, checkpoint_bytes: 256 << 20 }
    }
}

/// The progress of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareProgress {
    /// Stored bytes of the corpus read.
    pub done: u64,
    /// Stored bytes of the corpus.
    pub total: u64,
    /// Bytes of text turned into tokens.
    pub text_bytes: u64,
    /// Tokens made.
    pub tokens: u64,
    /// Bytes of text that an earlier process had turned into tokens; 0 if there was none.
    pub resumed: u64,
}

/// The result of a preparation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PrepareSummary {
    /// The training split, in the folder `train`.
    pub train: SplitSummary,
    /// The held-out split, in the folder `valid`; all zero if there is none.
    pub valid: SplitSummary,
    /// Empty documents, which were left out.
    pub empty_documents: u64,
    /// Damaged records.
    pub damage: DamageReport,
    /// Whether the share to hold out selected no document, so that the nearest one was held out; or none, if all
    /// documents are equal.
    pub share_missed: bool,
}

/// Counts of one split.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SplitSummary {
    /// Documents.
    pub documents: u64,
    /// Tokens, including one end-of-text per document.
    pub tokens: u64,
    /// Bytes of text.
    pub text_bytes: u64,
    /// Files.
    pub shards: u32,
}

/// Turns a corpus into token shards in the new folder `out`, which appears when everything is written and flushed.
///
/// Documents keep their order. All threads of rayon's pool make tokens, and the result does not depend on their number.
/// Memory holds the documents of one round (a few MiB, or one longer document) and their tokens. A document longer than
/// 256 KiB is encoded in pieces, if this is known not to change its tokens.
///
/// A preparation that was killed, interrupted or failed to read or write resumes when it is repeated, after its last
/// checkpoint. The result is that of an uninterrupted one. The unfinished output is in the folder `.preparing-NAME`
/// beside `out`, where NAME is the name of `out`. One that ended before its first checkpoint begins again.
///
/// # Errors
/// An `out` that exists, a share outside [0, 1) or that leaves nothing to train on, errors of reading the corpus and of
/// writing, and [`Error::Interrupted`] if `progress` breaks. After these errors no output remains, except that
/// [`Error::Paused`] stands for those that can be resumed. An unfinished preparation with another request, or of inputs
/// that have changed, is refused ([`Error::OtherPreparation`], [`Error::ChangedInput`]) and left as it is.
pub fn prepare(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    out: &Path,
    options: &PrepareOptions,
    progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
) -> Result<PrepareSummary> {
    options.validate()?;
    let work = WorkFolder::claim(out)?;
    let request = Request::of(corpus, tokenizer, options)?;
    let before = unfinished(&work, &request)?;
    if before.is_none() {
        begin(&work, &request)?;
    }
    match prepare_in(&work, corpus, tokenizer, options, before, progress) {
        Ok(summary) => work.stand().map(|()| summary),
        Err(error) => {
            let error = if work.has_state() { error.paused(work.path()) } else { error };
            if !matches!(error, Error::Paused { .. } | Error::DamagedState { .. }) {
                work.clear()?;
            }
            Err(error)
        }
    }
}

/// How far an earlier process came with the same request; None if it left nothing to resume from.
fn unfinished(work: &WorkFolder, request: &Request) -> Result<Option<Progress>> {
    let Some(state) = work.state()? else { return Ok(None) };
    let path = work.path().join(Request::FILE);
    let stored = std::fs::read(&path).map_err(Error::read(&path))?;
    resumed(&stored, &state, request, work.path()).map(Some)
}

/// Clears the folder and stores the request, to which a state belongs.
fn begin(work: &WorkFolder, request: &Request) -> Result<()> {
    work.clear()?;
    write_file(&work.path().join(Request::FILE), &to_json(request))
}

fn prepare_in(
    work: &WorkFolder,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    options: &PrepareOptions,
    before: Option<Progress>,
    progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
) -> Result<PrepareSummary> {
    let mut first = match before {
        None => Preparation::new(work, tokenizer, options, options.hold_out),
        Some(before) => Preparation::resume(work, tokenizer, options, before)?,
    };
    first.run(corpus, progress)?;
    let preparation = match first.share_of_one(options.hold_out) {
        None => first,
        // The share selected none of a few documents. A second pass holds out the nearest one.
        Some(share) => {
            drop(first);
            begin(work, &Request::of(corpus, tokenizer, options)?)?;
            let mut second = Preparation::new(work, tokenizer, options, share);
            second.run(corpus, progress)?;
            second
        }
    };
    preparation.finish(corpus, options.hold_out)
}

impl PrepareOptions {
    fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.hold_out) {
            return Err(Error::option("hold_out", self.hold_out, "must be at least 0 and below 1"));
        }
        if self.shard_tokens == 0 {
            return Err(Error::option("shard_tokens", self.shard_tokens, "must be at least 1"));
        }
        if self.checkpoint_bytes == 0 {
            return Err(Error::option("checkpoint_bytes", self.checkpoint_bytes, "must be at least 1"));
        }
        Ok(())
    }
}

struct Preparation<'a> {
    work: &'a WorkFolder,
    tokenizer: &'a Tokenizer,
    train: SplitWriter,
    valid: SplitWriter,
    hold_out: f64,
    empty_documents: u64,
    damage: DamageReport,
    /// The documents' smallest and largest value of the hash that decides the split.
    places: Option<(f64, f64)>,
    /// The place in the corpus up to which everything is written, and the stored bytes before it.
    position: Position,
    bytes_read: u64,
    checkpoint_bytes: u64,
    /// Bytes of text written since the last checkpoint.
    since_checkpoint: u64,
    /// Bytes of text that an earlier process wrote.
    resumed: u64,
}

/// Number of documents encoded at once.
struct Round {
    documents: Vec<String>,
    empty_documents: u64,
    /// The place in the corpus after this round.
    position: Position,
    /// Stored bytes of the corpus read up to the end of this round.
    bytes_read: u64,
}

impl Round {
    /// Text of a round.
    const BYTES: usize = 4 << 20;

    /// The next documents with `least` bytes of text, and the rest of the last one; none at the end.
    fn read(documents: &mut Documents<'_>, least: usize) -> Result<Option<Self>> {
        let position = Position::default();
        let mut round = Self { documents: Vec::new(), empty_documents: 0, position, bytes_read: 0 };
        let mut bytes = 0;
        while bytes < least
            && let Some(document) = documents.next().transpose()?
        {
            bytes += document.len();
            match document.is_empty() {
                true => round.empty_documents += 1,
                false => round.documents.push(document),
            }
        }
        (round.position, round.bytes_read) = (documents.reached(), documents.bytes_read());
        Ok((bytes > 0 || round.empty_documents > 0).then_some(round))
    }
}

/// A round with its tokens.
struct Encoded {
    round: Round,
    /// Stretches of the documents' tokens in order, each with its document's place in the round.
    stretches: Vec<(usize, Vec<u32>)>,
}

impl Encoded {
    /// Encodes with all threads of rayon's pool.
    fn of(round: Round, tokenizer: &Tokenizer) -> Result<Self> {
        let documents = round.documents.iter().enumerate();
        let pieces: Vec<(usize, &str)> = documents
            .flat_map(|(index, document)| tokenizer.pieces(document).map(move |piece| (index, piece)))
            .collect();
        let encode = |(index, piece): &(usize, &str)| Ok((*index, tokenizer.encode(piece)?));
        let stretches = pieces.par_iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { round, stretches })
    }

    /// Adds this round to what is reached.
    fn count(&self, reached: &mut PrepareProgress) {
        let documents = &self.round.documents;
        reached.done = self.round.bytes_read;
        reached.text_bytes += documents.iter().map(|document| document.len() as u64).sum::<u64>();
        let tokens: usize = self.stretches.iter().map(|(_, tokens)| tokens.len()).sum();
        reached.tokens += (tokens + documents.len()) as u64;
    }
}

/// Sends the documents after `position` in rounds of `least` bytes. Returns the damaged records.
fn read_rounds(
    corpus: &Corpus,
    position: &Position,
    least: usize,
    rounds: &SyncSender<Round>,
) -> Result<DamageReport> {
    let mut documents = corpus.documents_after(position)?;
    while let Some(round) = Round::read(&mut documents, least)? {
        if rounds.send(round).is_err() {
            // The receiver has failed, and reports why.
            break;
        }
    }
    Ok(documents.damage().clone())
}

/// Encodes rounds and sends them on, in order.
fn encode_rounds(
    rounds: Receiver<Round>,
    tokenizer: &Tokenizer,
    encoded: &SyncSender<Encoded>,
    mut reached: PrepareProgress,
    progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
) -> Result<()> {
    for round in rounds {
        let round = Encoded::of(round, tokenizer)?;
        round.count(&mut reached);
        if encoded.send(round).is_err() {
            // The writer has failed, and reports why.
            break;
        }
        if progress(reached).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(())
}

/// The result of a thread, or its panic.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl<'a> Preparation<'a> {
    fn new(work: &'a WorkFolder, tokenizer: &'a Tokenizer, options: &PrepareOptions, share: f64) -> Self {
        Self {
            work,
            tokenizer,
            train: SplitWriter::new(work, "train", tokenizer, options),
            valid: SplitWriter::new(work, "valid", tokenizer, options),
            hold_out: share,
            empty_documents: 0,
            damage: DamageReport::default(),
            places: None,
            position: Position::default(),
            bytes_read: 0,
            checkpoint_bytes: options.checkpoint_bytes,
            since_checkpoint: 0,
            resumed: 0,
        }
    }

    /// A preparation that an earlier process left in `work`. Drops its output after the checkpoint.
    fn resume(
        work: &'a WorkFolder,
        tokenizer: &'a Tokenizer,
        options: &PrepareOptions,
        progress: Progress,
    ) -> Result<Self> {
        let mut this = Self::new(work, tokenizer, options, progress.share);
        this.train.resume(progress.train)?;
        this.valid.resume(progress.valid)?;
        this.resumed = this.train.summary.text_bytes + this.valid.summary.text_bytes;
        Ok(Self {
            empty_documents: progress.empty_documents,
            places: progress.places,
            position: progress.position,
            bytes_read: progress.bytes_read,
            ..this
        })
    }

    /// Flushes the output and stores how far it came.
    fn checkpoint(&mut self) -> Result<()> {
        let (train, valid) = (self.train.checkpoint()?, self.valid.checkpoint()?);
        sync_folder(&self.work.output())?;
        let progress = Progress {
            position: self.position.clone(),
            bytes_read: self.bytes_read,
            empty_documents: self.empty_documents,
            share: self.hold_out,
            places: self.places,
            train,
            valid,
        };
        self.work.save_state(&to_json(&progress))?;
        self.since_checkpoint = 0;
        Ok(())
    }

    /// What is reached before the next round.
    fn reached(&self, corpus: &Corpus) -> PrepareProgress {
        PrepareProgress {
            done: self.bytes_read,
            total: corpus.bytes(),
            text_bytes: self.resumed,
            tokens: self.train.summary.tokens + self.valid.summary.tokens,
            resumed: self.resumed,
        }
    }

    /// Reads in a thread of its own and writes in another, so that all other cores always have documents to encode.
    fn run(
        &mut self,
        corpus: &Corpus,
        progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
    ) -> Result<()> {
        let (tokenizer, reached, position) = (self.tokenizer, self.reached(corpus), self.position.clone());
        if self.resumed > 0 && progress(reached).is_break() {
            return Err(Error::Interrupted);
        }
        let least = Round::BYTES.min(usize::try_from(self.checkpoint_bytes).unwrap_or(usize::MAX));
        let (damage, written) = std::thread::scope(|scope| {
            let (rounds, read) = sync_channel(1);
            let reader = scope.spawn(move || read_rounds(corpus, &position, least, &rounds));
            let (encoded, to_write) = sync_channel(1);
            let this = &mut *self;
            let writer = scope.spawn(move || to_write.into_iter().try_for_each(|round| this.write(round)));
            let outcome = encode_rounds(read, tokenizer, &encoded, reached, progress);
            drop(encoded);
            let (written, damage) = (joined(writer), joined(reader));
            outcome.map(|()| (damage, written))
        })?;
        written?;
        self.damage = damage?;
        Ok(())
    }

    /// The share that holds out the nearest document, if a share was requested that holds out none. None if no other
    /// share is needed, or if it would leave nothing to train on.
    fn share_of_one(&self, asked: f64) -> Option<f64> {
        let (least, greatest) = self.places?;
        let none_held_out = asked > 0.0 && self.valid.summary.documents == 0;
        (none_held_out && least < greatest).then(|| least.next_up())
    }

    fn write(&mut self, round: Encoded) -> Result<()> {
        self.empty_documents += round.round.empty_documents;
        for stretches in round.stretches.chunk_by(|(one, _), (other, _)| one == other) {
            let document = &round.round.documents[stretches[0].0];
            let place = place(document);
            let (least, greatest) = self.places.unwrap_or((place, place));
            self.places = Some((least.min(place), greatest.max(place)));
            let split = if place < self.hold_out { &mut self.valid } else { &mut self.train };
            split.write(document.len() as u64, stretches.iter().map(|(_, tokens)| tokens.as_slice()))?;
            self.since_checkpoint += document.len() as u64;
        }
        (self.position, self.bytes_read) = (round.round.position, round.round.bytes_read);
        if self.since_checkpoint >= self.checkpoint_bytes { self.checkpoint() } else { Ok(()) }
    }

    /// `asked` is the requested share.
    fn finish(self, corpus: &Corpus, asked: f64) -> Result<PrepareSummary> {
        let (train, valid) = (self.train.finish()?, self.valid.finish()?);
        let all = train.documents + valid.documents;
        if all == 0 {
            return Err(corpus.empty(&self.damage));
        }
        if train.documents == 0 {
            let reason =
                format!("leaves none of the corpus's {all} documents for training; choose another share");
            return Err(Error::option("hold_out", self.hold_out, reason));
        }
        let share_missed = asked > 0.0 && (valid.documents == 0 || asked != self.hold_out);
        Ok(PrepareSummary {
            train,
            valid,
            empty_documents: self.empty_documents,
            damage: self.damage,
            share_missed,
        })
    }
}

/// Writes a split of one shard with a loss mask in the new folder `folder`: documents given by their tokens and bytes of
/// text, and whether a loss counts each token.
///
/// # Errors
/// When the file system fails.
pub(crate) fn write_masked_split(
    folder: &Path,
    tokenizer: &Tokenizer,
    documents: &[(Vec<u32>, u64)],
    counted: &[bool],
    window: u32,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
    let path = folder.join("00000.tokens");
    let blank = Header {
        width: if tokenizer.vocabulary() <= 1 << 16 { 2 } else { 4 },
        shard: 0,
        shards: 1,
        vocabulary: tokenizer.vocabulary() as u64,
        tokens: 0,
        documents: 0,
        text_bytes: 0,
        end_of_text: tokenizer.end_of_text(),
        tokenizer: tokenizer.hash(),
        body: [0; 32],
        masked: true,
    };
    let mut shard = ShardWriter::create(path.clone(), blank)?;
    for (tokens, bytes) in documents {
        shard.start_document(*bytes);
        shard.write(tokens)?;
    }
    let header = shard.finish()?.write();
    let write = || {
        let mut file = File::options().write(true).open(&path)?;
        file.write_all(&header)?;
        file.sync_all()
    };
    write().map_err(Error::write(&path))?;
    write_file(&LossMask::path(&path), &LossMask::to_bytes(&header, window, counted))
}

/// The document's hash as a number in [0, 1). The document is held out if it is below the share.
pub(crate) fn place(document: &str) -> f64 {
    let hash = number(blake3::hash(document.as_bytes()).as_bytes(), 0);
    // The upper 53 bits fit a double: the division is exact, and the quotient below 1.
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// The shards of one split. Their headers are written last, when the number of shards is known.
struct SplitWriter {
    folder: PathBuf,
    /// The part that all headers share.
    blank: Header,
    shard_tokens: u64,
    done: Vec<Header>,
    /// Number of shards in `done` that are flushed to disk.
    flushed: usize,
    open: Option<ShardWriter>,
    summary: SplitSummary,
    /// Where checkpoints store the entries of an open shard's documents, without the shard's number.
    entries: PathBuf,
}

struct ShardWriter {
    path: PathBuf,
    file: BufWriter<File>,
    header: Header,
    hash: blake3::Hasher,
    /// For each document, its first token and its bytes.
    documents: Vec<[u64; 2]>,
    /// Number of documents whose entries a checkpoint has stored.
    stored: usize,
}

impl SplitWriter {
    fn new(work: &WorkFolder, name: &str, tokenizer: &Tokenizer, options: &PrepareOptions) -> Self {
        let blank = Header {
            width: if tokenizer.vocabulary() <= 1 << 16 { 2 } else { 4 },
            shard: 0,
            shards: 0,
            vocabulary: tokenizer.vocabulary() as u64,
            tokens: 0,
            documents: 0,
            text_bytes: 0,
            end_of_text: tokenizer.end_of_text(),
            tokenizer: tokenizer.hash(),
            body: [0; 32],
            masked: false,
        };
        Self {
            folder: work.output().join(name),
            blank,
            shard_tokens: options.shard_tokens,
            done: Vec::new(),
            flushed: 0,
            open: None,
            summary: SplitSummary::default(),
            entries: work.path().join(format!("{name}-documents")),
        }
    }

    fn shard_path(&self, number: usize) -> PathBuf {
        self.folder.join(format!("{number:05}.tokens"))
    }

    fn entries_path(&self, number: usize) -> PathBuf {
        self.entries.with_extension(number.to_string())
    }

    /// Takes up what a checkpoint stored, and drops what was written after it.
    fn resume(&mut self, progress: SplitProgress) -> Result<()> {
        for shard in progress.shards() {
            self.summary.documents += shard.documents;
            self.summary.tokens += shard.tokens;
            self.summary.text_bytes += shard.text_bytes;
        }
        let header = |number: usize, shard: &ShardProgress, blank: &Header| Header {
            shard: number as u32,
            tokens: shard.tokens,
            documents: shard.documents,
            text_bytes: shard.text_bytes,
            body: shard.hash,
            ..blank.clone()
        };
        let done = progress.done.iter().enumerate();
        self.done = done.map(|(number, shard)| header(number, shard, &self.blank)).collect();
        self.flushed = self.done.len();
        for header in &self.done {
            check_length(&self.shard_path(header.shard as usize), header)?;
        }
        let number = self.done.len();
        if let Some(shard) = &progress.open {
            let header = header(number, shard, &self.blank);
            self.open =
                Some(ShardWriter::resume(self.shard_path(number), header, &self.entries_path(number))?);
        }
        let kept = number + usize::from(self.open.is_some());
        for number in kept.. {
            let path = self.shard_path(number);
            if !path.exists() {
                break;
            }
            std::fs::remove_file(&path).map_err(Error::write(&path))?;
        }
        if kept == 0 && self.folder.exists() {
            std::fs::remove_dir(&self.folder).map_err(Error::write(&self.folder))?;
        }
        Ok(())
    }

    /// Flushes everything, and returns what to resume from.
    fn checkpoint(&mut self) -> Result<SplitProgress> {
        for number in self.flushed..self.done.len() {
            let path = self.shard_path(number);
            let file = File::options().write(true).open(&path);
            file.and_then(|file| file.sync_all()).map_err(Error::write(&path))?;
        }
        let number = self.done.len();
        self.flushed = number;
        let entries = self.entries_path(number);
        let open = self.open.as_mut().map(|shard| shard.checkpoint(&entries)).transpose()?;
        if self.folder.exists() {
            sync_folder(&self.folder)?;
        }
        Ok(SplitProgress {
            done: self.done.iter().map(|header| header.progress(header.body)).collect(),
            open,
        })
    }

    fn write<'a>(&mut self, bytes: u64, stretches: impl Iterator<Item = &'a [u32]>) -> Result<()> {
        let shard = match &mut self.open {
            Some(shard) => shard,
            None => {
                std::fs::create_dir_all(&self.folder).map_err(Error::write(&self.folder))?;
                let path = self.shard_path(self.done.len());
                let header = Header { shard: self.done.len() as u32, ..self.blank.clone() };
                self.open.insert(ShardWriter::create(path, header)?)
            }
        };
        let before = shard.header.tokens;
        shard.start_document(bytes);
        for tokens in stretches {
            shard.write(tokens)?;
        }
        shard.write(&[self.blank.end_of_text])?;
        self.summary.documents += 1;
        self.summary.text_bytes += bytes;
        self.summary.tokens += shard.header.tokens - before;
        if shard.header.tokens >= self.shard_tokens
            && let Some(shard) = self.open.take()
        {
            self.done.push(shard.finish()?);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<SplitSummary> {
        if let Some(shard) = self.open.take() {
            self.done.push(shard.finish()?);
        }
        self.summary.shards = self.done.len() as u32;
        for header in &self.done {
            let header = Header { shards: self.summary.shards, ..header.clone() };
            let path = self.shard_path(header.shard as usize);
            let write = || {
                let mut file = File::options().write(true).open(&path)?;
                file.write_all(&header.write())?;
                file.sync_all()
            };
            write().map_err(Error::write(&path))?;
        }
        if !self.done.is_empty() {
            sync_folder(&self.folder)?;
        }
        Ok(self.summary)
    }
}

impl ShardWriter {
    fn create(path: PathBuf, header: Header) -> Result<Self> {
        let create = || {
            let mut file = File::create(&path)?;
            file.seek(SeekFrom::Start(HEADER as u64))?;
            Ok(BufWriter::with_capacity(1 << 18, file))
        };
        let file = create().map_err(Error::write(&path))?;
        Ok(Self { path, file, header, hash: blake3::Hasher::new(), documents: Vec::new(), stored: 0 })
    }

    /// Takes up the shard of `header` after a checkpoint stored its documents' entries, and checks that its tokens are
    /// those of the checkpoint.
    fn resume(path: PathBuf, header: Header, entries: &Path) -> Result<Self> {
        let documents = read_entries(entries, header.documents).map_err(Error::read(entries))?;
        let end = HEADER as u64 + header.tokens * u64::from(header.width);
        let open = || {
            let mut file = File::options().read(true).write(true).open(&path)?;
            let mut hash = blake3::Hasher::new();
            file.seek(SeekFrom::Start(HEADER as u64))?;
            let hashed =
                hash.update_reader((&mut file).take(end - HEADER as u64)).map(|hash| hash.count())?;
            file.set_len(end)?;
            file.seek(SeekFrom::Start(end))?;
            Ok((BufWriter::with_capacity(1 << 18, file), hash, hashed))
        };
        let (file, hash, hashed) = open().map_err(Error::read(&path))?;
        let stored = documents.len();
        let shard = Self { path, file, header, hash, documents, stored };
        if hashed != end - HEADER as u64 || shard.hash_here() != shard.header.body {
            return Err(damaged(&shard.path, "its tokens or documents are not those of the last checkpoint"));
        }
        Ok(shard)
    }

    /// Flushes what is written, stores the entries of new documents, and returns what to resume from.
    fn checkpoint(&mut self, entries: &Path) -> Result<ShardProgress> {
        self.file.flush().map_err(Error::write(&self.path))?;
        self.file.get_ref().sync_data().map_err(Error::write(&self.path))?;
        let new = bytes_of(&self.documents[self.stored..]);
        append(entries, (self.stored * DOCUMENT) as u64, &new).map_err(Error::write(entries))?;
        self.stored = self.documents.len();
        self.header.documents = self.documents.len() as u64;
        Ok(self.header.progress(self.hash_here()))
    }

    /// blake3 of the tokens so far and the entries of their documents.
    fn hash_here(&self) -> [u8; 32] {
        let mut hash = self.hash.clone();
        hash.update(&bytes_of(&self.documents));
        *hash.finalize().as_bytes()
    }

    fn start_document(&mut self, bytes: u64) {
        self.documents.push([self.header.tokens, bytes]);
        self.header.text_bytes += bytes;
    }

    fn write(&mut self, tokens: &[u32]) -> Result<()> {
        self.header.tokens += tokens.len() as u64;
        match self.header.width {
            2 => {
                let bytes: Vec<[u8; 2]> = tokens.iter().map(|token| (*token as u16).to_le_bytes()).collect();
                self.put(bytes.as_flattened())
            }
            _ => {
                let bytes: Vec<[u8; 4]> = tokens.iter().map(|token| token.to_le_bytes()).collect();
                self.put(bytes.as_flattened())
            }
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(Error::write(&self.path))
    }

    /// Writes everything but the header, which needs the number of shards.
    fn finish(mut self) -> Result<Header> {
        self.header.documents = self.documents.len() as u64;
        let end = HEADER as u64 + self.header.tokens * u64::from(self.header.width);
        self.put(&[0; 8][..(self.header.documents_at() - end) as usize])?;
        for document in std::mem::take(&mut self.documents) {
            self.put(document.map(u64::to_le_bytes).as_flattened())?;
        }
        self.file.flush().map_err(Error::write(&self.path))?;
        self.header.body = *self.hash.finalize().as_bytes();
        Ok(self.header)
    }
}

/// The entries of documents as in the file.
fn bytes_of(documents: &[[u64; 2]]) -> Vec<u8> {
    documents.iter().flatten().flat_map(|number| number.to_le_bytes()).collect()
}

/// The first `count` entries of documents that checkpoints stored.
fn read_entries(path: &Path, count: u64) -> std::io::Result<Vec<[u64; 2]>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(count * DOCUMENT as u64).read_to_end(&mut bytes)?;
    Ok(bytes.chunks_exact(DOCUMENT).map(|entry| [number(entry, 0), number(entry, 8)]).collect())
}

/// Writes `bytes` at `offset` and flushes them.
fn append(path: &Path, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(false).open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Checks that the file of a complete shard has all its bytes.
fn check_length(path: &Path, header: &Header) -> Result<()> {
    let length = std::fs::metadata(path).map_err(Error::read(path))?.len();
    if Some(length) == header.file_length() {
        return Ok(());
    }
    Err(damaged(path, "it has not the length that the last checkpoint states"))
}

/// A damaged shard of an unfinished preparation.
fn damaged(path: &Path, reason: &str) -> Error {
    // The shard is in `.preparing-NAME/output/train`.
    let folder = path.ancestors().nth(3).unwrap_or(path).to_owned();
    Error::DamagedState { path: path.to_owned(), folder, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::tokenizer::TokenizerTraining;

    fn texts() -> Vec<String> {
        (0..60)
            .map(|number| format!("Document {number}: the whale, the whale!\n").repeat(1 + number % 5))
            .collect()
    }

    fn corpus(texts: &[String]) -> Corpus {
        let lines: String =
            texts.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n").collect();
        Corpus::embedded("test.jsonl", lines.leak().as_bytes()).unwrap()
    }

    fn tokenizer() -> &'static Tokenizer {
        static ONCE: OnceLock<Tokenizer> = OnceLock::new();
        ONCE.get_or_init(|| train(290))
    }

    fn train(vocabulary: usize) -> Tokenizer {
        let options = TokenizerTraining { vocabulary, byte_budget: 1 << 20 };
        Tokenizer::train(&corpus(&texts()), &options, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    /// A tokenizer whose ids need four bytes: ours, with one more token far away.
    fn wide() -> Tokenizer {
        let mut json: serde_json::Value = serde_json::from_slice(tokenizer().json()).unwrap();
        let mut token = json["added_tokens"][0].clone();
        (token["id"], token["content"]) = (70_000.into(), "<|far|>".into());
        json["added_tokens"].as_array_mut().unwrap().push(token);
        json["model"]["vocab"]["<|far|>"] = 70_000.into();
        Tokenizer::from_json(json.to_string().as_bytes(), "wide", None).unwrap()
    }

    fn go_on(_: PrepareProgress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn prepared(options: &PrepareOptions) -> (TempDir, PathBuf, PrepareSummary) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let summary = prepare(&corpus(&texts()), tokenizer(), &out, options, &mut go_on).unwrap();
        (folder, out, summary)
    }

    fn expected(tokenizer: &Tokenizer, texts: &[String]) -> Vec<u32> {
        let document =
            |text: &String| [tokenizer.encode(text).unwrap(), vec![tokenizer.end_of_text()]].concat();
        texts.iter().flat_map(document).collect()
    }

    #[test]
    fn shards_hold_the_documents_in_order() {
        let everything = PrepareOptions::default();
        let several = PrepareOptions { shard_tokens: 300, ..Default::default() };
        for (options, least) in [(everything, 1), (several, 5)] {
            let (_folder, out, summary) = prepared(&options);
            let shards = TokenShards::open(&out.join("train")).unwrap();
            shards.verify().unwrap();
            shards.check_tokenizer(tokenizer()).unwrap();
            let tokens = expected(tokenizer(), &texts());
            assert_eq!(shards.tokens(0..shards.len()).unwrap(), tokens);
            assert!(summary.train.shards >= least && summary.train.shards as usize == shards.shards.len());
            let bytes: usize = texts().iter().map(String::len).sum();
            assert_eq!((shards.text_bytes(), summary.train.text_bytes), (bytes as u64, bytes as u64));
            assert_eq!((shards.document_count(), summary.train.documents), (60, 60));
            assert_eq!((shards.vocabulary(), shards.end_of_text()), (290, 0));
            assert!(!out.join("valid").exists() && summary.valid == SplitSummary::default());
            let mut next = 0;
            for (document, text) in shards.documents().zip(texts()) {
                assert_eq!((document.tokens.start, document.bytes), (next, text.len() as u64));
                next = document.tokens.end;
                let tokens = shards.tokens(document.tokens).unwrap();
                assert_eq!(tokenizer().decode(&tokens).unwrap(), text);
                assert_eq!(tokens.last(), Some(&0));
            }
            assert_eq!(next, shards.len());
        }
    }

    #[test]
    fn a_large_vocabulary_takes_four_bytes_a_token() {
        let (folder, tokenizer) = (tempfile::tempdir().unwrap(), wide());
        let out = folder.path().join("data");
        prepare(&corpus(&texts()), &tokenizer, &out, &Default::default(), &mut go_on).unwrap();
        let shards = TokenShards::open(&out.join("train/00000.tokens")).unwrap();
        shards.verify().unwrap();
        assert_eq!((shards.shards[0].header.width, shards.vocabulary()), (4, 70_001));
        assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected(&tokenizer, &texts()));
    }

    #[test]
    fn held_out_documents_are_the_same_at_every_preparation() {
        let options = PrepareOptions { hold_out: 0.3, ..Default::default() };
        let (_folder, out, summary) = prepared(&options);
        assert_eq!(summary.train.documents + summary.valid.documents, 60);
        assert!((8..28).contains(&summary.valid.documents), "{}", summary.valid.documents);
        let (held, kept): (Vec<_>, Vec<_>) = texts().into_iter().partition(|text| place(text) < 0.3);
        for (name, texts) in [("train", kept), ("valid", held)] {
            let shards = TokenShards::open(&out.join(name)).unwrap();
            assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected(tokenizer(), &texts));
        }
    }

    /// Every file below a folder, by name.
    fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        for split in ["train", "valid"] {
            for entry in std::fs::read_dir(folder.join(split)).into_iter().flatten() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                files.push((name, std::fs::read(path).unwrap()));
            }
        }
        files.sort();
        files
    }

    /// Enough documents for several rounds, each different.
    fn rounds(parts: &[String]) -> Corpus {
        let document = |number: usize| {
            let part = &parts[number % parts.len()];
            format!("{number} {part}\n").repeat(1 + number % 7 * 100)
        };
        let mut bytes = 0;
        let long = (0..).map(document).take_while(|text| {
            bytes += text.len();
            bytes < 3 * Round::BYTES
        });
        corpus(&long.collect::<Vec<_>>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]
        #[test]
        fn the_bytes_are_the_same_at_any_number_of_threads(parts in proptest::collection::vec("\\PC{0,60}|[a-e '.0-9]{9,60}", 1..9)) {
            let corpus = rounds(&parts);
            let options = PrepareOptions { hold_out: 0.2, shard_tokens: 1 << 20, ..Default::default() };
            let bytes = |threads| {
                let folder = tempfile::tempdir().unwrap();
                let out = folder.path().join("data");
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let summary = pool.install(|| prepare(&corpus, tokenizer(), &out, &options, &mut go_on)).unwrap();
                (files(&out), summary)
            };
            let (one, summary) = bytes(1);
            prop_assert!(one.len() > 2 && one.len() == (summary.train.shards + summary.valid.shards) as usize);
            for threads in [2, 4] {
                prop_assert!(bytes(threads) == (one.clone(), summary.clone()), "{threads} threads");
            }
        }
    }

    #[test]
    fn a_document_longer_than_a_piece_has_the_tokens_of_the_whole() {
        let text = texts().concat().repeat(100);
        assert!(text.len() > 2 * crate::cut::PIECE);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let documents = [text, "short".to_owned()];
        prepare(&corpus(&documents), tokenizer(), &out, &Default::default(), &mut go_on).unwrap();
        let shards = TokenShards::open(&out.join("train")).unwrap();
        assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected(tokenizer(), &documents));
        assert_eq!(shards.document_count(), 2);
    }

    #[test]
    fn progress_is_reported_and_stops_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let corpus = corpus(&texts());
        let mut last = None;
        let mut stop = |progress| {
            last = Some(progress);
            ControlFlow::Break(())
        };
        let stopped = prepare(&corpus, tokenizer(), &out, &Default::default(), &mut stop);
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let last = last.unwrap();
        assert_eq!((last.done, last.total), (corpus.bytes(), corpus.bytes()));
        assert_eq!(last.text_bytes, texts().iter().map(|text| text.len() as u64).sum::<u64>());
    }

    #[test]
    fn errors_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let run = |corpus: &Corpus, options: &PrepareOptions| {
            prepare(corpus, tokenizer(), &out, options, &mut go_on).unwrap_err().to_string()
        };
        let usual = PrepareOptions::default();
        let hold_out = |hold_out| PrepareOptions { hold_out, ..Default::default() };
        let bad = Corpus::embedded("bad.jsonl", b"{\"text\": \"x\"}\n{\"tex\": \"x\"}\n").unwrap();
        assert!(run(&bad, &usual).contains("bad.jsonl: line 2: no field \"text\""));
        let empty = Corpus::embedded("empty.jsonl", b"{\"text\": \"\"}\n").unwrap();
        assert_eq!(run(&empty, &usual), "the corpus is empty: no text in 1 file(s): empty.jsonl");
        assert!(run(&bad, &hold_out(1.0)).starts_with("hold_out = 1: "));
        assert!(run(&bad, &hold_out(f64::NAN)).starts_with("hold_out = NaN: "));
        let one = corpus(&texts()[..1]);
        assert!(
            run(&one, &hold_out(0.999999)).contains("leaves none of the corpus's 1 documents for training")
        );
        let none = PrepareOptions { shard_tokens: 0, ..Default::default() };
        assert!(run(&one, &none).starts_with("shard_tokens = 0: "));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        std::fs::create_dir(&out).unwrap();
        assert!(run(&one, &usual).contains("already exists; remove it"));
    }

    #[test]
    fn a_share_between_the_documents_holds_out_the_nearest() {
        let small = PrepareOptions { hold_out: 1e-9, ..Default::default() };
        let (_folder, out, summary) = prepared(&small);
        assert_eq!((summary.train.documents, summary.valid.documents), (59, 1));
        assert!(summary.share_missed);
        let mut sorted = texts();
        sorted.sort_by(|one, other| place(one).total_cmp(&place(other)));
        let valid = TokenShards::open(&out.join("valid")).unwrap();
        assert_eq!(valid.tokens(0..valid.len()).unwrap(), expected(tokenizer(), &sorted[..1]));
        // With one document, or only copies of it, all are needed for training.
        let folder = tempfile::tempdir().unwrap();
        let copies = corpus(&[texts()[0].clone(), texts()[0].clone()]);
        let out = folder.path().join("data");
        let summary = prepare(&copies, tokenizer(), &out, &small, &mut go_on).unwrap();
        assert_eq!((summary.train.documents, summary.valid.documents, summary.share_missed), (2, 0, true));
        assert!(!out.join("valid").exists());
    }

    #[test]
    fn damaged_records_are_counted() {
        let lines =
            b"{\"text\": \"one\"}\n{\"text\": null}\n{\"text\": \"t\xffwo\"}\n{\"text\": \"three\"}\n";
        let corpus = Corpus::embedded("a.jsonl", lines).unwrap();
        let run = |replace, skip| {
            let folder = tempfile::tempdir().unwrap();
            let corpus = corpus.clone().with_damage(crate::OnDamage { replace, skip });
            prepare(&corpus, tokenizer(), &folder.path().join("data"), &Default::default(), &mut go_on)
        };
        let counts = |replace, skip| {
            let summary = run(replace, skip).unwrap();
            (summary.train.documents, summary.damage.skipped, summary.damage.replaced)
        };
        assert_eq!(counts(false, true), (2, 2, 0));
        assert_eq!(counts(true, true), (3, 1, 1));
        assert!(run(true, false).is_err() && run(false, false).is_err());
    }

    #[test]
    fn documents_without_text_are_counted() {
        let (folder, mut texts) = (tempfile::tempdir().unwrap(), texts());
        texts[3].clear();
        let out = folder.path().join("data");
        let summary = prepare(&corpus(&texts), tokenizer(), &out, &Default::default(), &mut go_on).unwrap();
        assert_eq!((summary.empty_documents, summary.train.documents), (1, 59));
    }

    #[test]
    fn another_tokenizer_is_refused_by_name() {
        let (_folder, out, _) = prepared(&PrepareOptions::default());
        let other = train(289);
        let message =
            TokenShards::open(&out.join("train")).unwrap().check_tokenizer(&other).unwrap_err().to_string();
        assert!(message.contains(&format!(
            "made with tokenizer {}, not with {}",
            tokenizer().hash(),
            other.hash()
        )));
    }

    #[test]
    fn a_changed_bit_or_a_missing_end_is_found() {
        let (folder, out, _) = prepared(&PrepareOptions { shard_tokens: u64::MAX, ..Default::default() });
        let whole = std::fs::read(out.join("train/00000.tokens")).unwrap();
        let path = folder.path().join("damaged.tokens");
        let try_all = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            TokenShards::open(&path).and_then(|shards| shards.verify())
        };
        try_all(&whole).unwrap();
        for at in (0..whole.len()).step_by(7).chain(0..HEADER) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            let message = try_all(&damaged).unwrap_err().to_string();
            assert!(message.contains("damaged.tokens: "), "byte {at}: {message}");
            // Reading without verifying may give other tokens, but only valid ones, and never fails otherwise.
            if let Ok(shards) = TokenShards::open(&path) {
                let tokens = shards.tokens(0..shards.len());
                assert!(
                    tokens.is_err() || tokens.is_ok_and(|tokens| tokens.iter().all(|token| *token < 290))
                );
            }
        }
        for length in [0, 1, HEADER - 1, HEADER, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(TokenShards::open(&path), Err(Error::MalformedShard { .. })), "{length} bytes");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        let message = TokenShards::open(&path).unwrap_err().to_string();
        let expected = format!("has {} bytes instead of {}", whole.len() + 1, whole.len());
        assert!(message.contains(&expected), "{message}");
    }

    #[test]
    fn other_files_and_incomplete_folders_are_refused() {
        let (_folder, out, _) = prepared(&PrepareOptions { shard_tokens: 300, ..Default::default() });
        let refused = |path: &Path, expected: &str| {
            let message = TokenShards::open(path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        refused(&out, "no .tokens file in this folder");
        refused(&out.join("nothing"), "cannot read ");
        let train = out.join("train");
        let (second, hidden) = (train.join("00001.tokens"), train.join("hidden"));
        std::fs::rename(&second, &hidden).unwrap();
        refused(&train, "is shard 2, and shard 1 is missing");
        let (_other_folder, other, _) = prepared(&PrepareOptions::default());
        std::fs::copy(other.join("train/00000.tokens"), &second).unwrap();
        refused(&train, "comes from a different preparation");
        std::fs::write(&second, b"{}".repeat(200)).unwrap();
        refused(&train, "00001.tokens: is not a token shard");
        std::fs::rename(&hidden, &second).unwrap();
        let count = std::fs::read_dir(&train).unwrap().count();
        std::fs::remove_file(train.join(format!("{:05}.tokens", count - 1))).unwrap();
        refused(&train, &format!("has {} of {count} shards", count - 1));
    }

    #[test]
    fn a_range_beyond_the_end_is_refused() {
        let (_folder, out, _) = prepared(&PrepareOptions::default());
        let shards = TokenShards::open(&out.join("train")).unwrap();
        let end = shards.len();
        assert!(shards.tokens(end - 1..end).is_ok());
        let message = shards.tokens(end - 1..end + 1).unwrap_err().to_string();
        assert!(
            message.contains(&format!("2 tokens from {} on exceed its {end} tokens", end - 1)),
            "{message}"
        );
        assert!(shards.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(shards.tokens(0..u64::MAX).is_err());
    }

    #[test]
    fn sampled_batches_hold_the_tokens_of_their_windows() {
        let (_folder, out, _) = prepared(&PrepareOptions { shard_tokens: 300, ..Default::default() });
        let shards = TokenShards::open(&out.join("train")).unwrap();
        let mut sampler = crate::Sampler::new(3, 32, 5, shards.len()).unwrap();
        let batch = sampler.next_batch(&shards).unwrap();
        assert_eq!((batch.len(), batch.tokens.len()), (5, 5 * 33));
        for (start, window) in batch.starts.iter().zip(batch.tokens.chunks(33)) {
            assert_eq!(window, shards.tokens(*start..start + 33).unwrap());
        }
        let message = crate::Sampler::new(3, 32, 5, 99).unwrap().next_batch(&shards).unwrap_err().to_string();
        assert!(message.starts_with("tokens = 99: "), "{message}");
    }

    #[test]
    fn other_data_have_another_identity() {
        let identity = |out: &Path| TokenShards::open(&out.join("train")).unwrap().identity();
        let (_one, one, _) = prepared(&PrepareOptions::default());
        let (_same, same, _) = prepared(&PrepareOptions::default());
        let (_other, other, _) = prepared(&PrepareOptions { hold_out: 0.3, ..Default::default() });
        assert_eq!(identity(&one), identity(&same));
        assert_ne!(identity(&one), identity(&other));
    }

    proptest! {
        #[test]
        fn any_range_over_any_shards_is_the_slice(start in 0..2000usize, count in 0..1500usize) {
            static DATA: OnceLock<(TempDir, TokenShards, Vec<u32>)> = OnceLock::new();
            let (_, shards, tokens) = DATA.get_or_init(|| {
                let (folder, out, _) = prepared(&PrepareOptions { shard_tokens: 200, ..Default::default() });
                (folder, TokenShards::open(&out.join("train")).unwrap(), expected(tokenizer(), &texts()))
            });
            let start = start.min(tokens.len());
            let end = (start + count).min(tokens.len());
            prop_assert_eq!(&shards.tokens(start as u64..end as u64).unwrap(), &tokens[start..end]);
        }
    }
}
