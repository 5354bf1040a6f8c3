//! Token shards: a corpus as tokens in memory-mapped files, with the boundaries of its documents.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::loss_mask::LossMask;
use crate::packing::Packing;
use crate::shard_file::{DOCUMENT, HEADER, Header, number};
use crate::tokenizer::{Tokenizer, TokenizerHash};

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
