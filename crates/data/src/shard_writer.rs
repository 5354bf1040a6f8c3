//! Writers of token shards. A killed preparation resumes after their last checkpoint.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::{sync_folder, write_file};
use crate::loss_mask::LossMask;
use crate::preparation_state::{ShardProgress, SplitProgress};
use crate::shard_file::{DOCUMENT, HEADER, Header, number};
use crate::tokenizer::Tokenizer;
use crate::work_folder::WorkFolder;

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

/// The shards of one split. Their headers are written last, when the number of shards is known.
pub(crate) struct SplitWriter {
    folder: PathBuf,
    /// The part that all headers share.
    blank: Header,
    shard_tokens: u64,
    done: Vec<Header>,
    /// Number of shards in `done` that are flushed to disk.
    flushed: usize,
    open: Option<ShardWriter>,
    pub(crate) summary: SplitSummary,
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
    pub(crate) fn new(work: &WorkFolder, name: &str, tokenizer: &Tokenizer, shard_tokens: u64) -> Self {
        Self {
            folder: work.output().join(name),
            blank: blank(tokenizer),
            shard_tokens,
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
    pub(crate) fn resume(&mut self, progress: SplitProgress) -> Result<()> {
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
    pub(crate) fn checkpoint(&mut self) -> Result<SplitProgress> {
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

    pub(crate) fn write<'a>(&mut self, bytes: u64, stretches: impl Iterator<Item = &'a [u32]>) -> Result<()> {
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

    pub(crate) fn finish(mut self) -> Result<SplitSummary> {
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

/// The header of an empty shard of these tokens.
fn blank(tokenizer: &Tokenizer) -> Header {
    Header {
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
    let header = Header { shards: 1, masked: true, ..blank(tokenizer) };
    let mut shard = ShardWriter::create(path.clone(), header)?;
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
