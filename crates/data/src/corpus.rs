//! Corpora: documents from text files and folders, streamed one at a time.
//!
//! | name ends in | documents |
//! |---|---|
//! | `.txt` | the file is one document |
//! | `.jsonl`, `.ndjson` | one JSON object a line, the text in its field `text`; blank lines are skipped, lines end in
//! LF, CRLF or CR |
//! | the above with `.zst` or `.gz` after it | the same, compressed |
//! | `.parquet` | one per row, the text in its column `text` |
//!
//! A folder stands for the files in it and in its sub-folders, in the order of their paths, so that a corpus is the
//! same sequence of documents on every machine. Names that begin with a dot are left out, because systems and programs
//! keep notes of their own in such files.
//!
//! Texts are UTF-8. A byte order mark before a file's text or a JSON record is removed. [`OnDamage`] decides what
//! happens to damaged records. By default the first is an error that names its place.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::UNIX_EPOCH;
use std::vec::IntoIter;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use serde::{Deserialize, Serialize};

use crate::damage::{self, DamageReport, OnDamage};
use crate::error::{Error, Result};
use crate::json_text::{JsonProblem, JsonText, text_of};

/// The files of a corpus, and the field that holds a record's text.
#[derive(Debug, Clone)]
pub struct Corpus {
    files: Vec<Source>,
    skipped: Vec<PathBuf>,
    field: String,
    on_damage: OnDamage,
}

/// One file: its name, which gives its format, and its bytes if they are embedded in the program.
#[derive(Debug, Clone)]
struct Source {
    path: PathBuf,
    format: Format,
    size: u64,
    embedded: Option<&'static [u8]>,
}

/// A file of a corpus, as it was at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileStamp {
    /// The absolute path. Bytes that are not UTF-8 are replaced.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    /// When it was last changed, in nanoseconds since 1970, or the blake3 of bytes that are embedded in the program.
    pub(crate) version: String,
}

/// A place between two documents of a corpus.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Position {
    /// Index of the file.
    file: usize,
    /// Row group of a Parquet file.
    group: usize,
    /// Lines or rows (of the group) before this place.
    record: u64,
    /// Bytes of the file's decompressed text before this place.
    offset: u64,
    /// The damaged records before this place.
    pub(crate) damage: DamageReport,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Text(Compression),
    JsonLines(Compression),
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Compression {
    None,
    Zstd,
    Gzip,
}

impl Corpus {
    /// The corpus of these files and folders, in the given order. Reads only the folders' lists.
    ///
    /// # Errors
    /// A path that does not exist, a named file of unknown format, or no file at all. Files of unknown format inside a
    /// folder are left out and listed by [`skipped`](Self::skipped).
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let mut corpus = Self::of(Vec::new());
        for path in paths {
            let path = path.as_ref();
            let kind = std::fs::metadata(path).map_err(Error::read(path))?;
            if kind.is_dir() {
                corpus.add_folder(path, &mut BTreeSet::new())?;
            } else {
                let format =
                    Format::of(path).ok_or_else(|| Error::UnknownFormat { path: path.to_owned() })?;
                corpus.add_file(path, format, kind.len());
            }
        }
        if corpus.files.is_empty() {
            let named: Vec<_> = paths.iter().map(|path| path.as_ref().display().to_string()).collect();
            let what = format!("no .txt, .jsonl or .parquet file in [{}]", named.join(", "));
            return Err(Error::EmptyCorpus { what });
        }
        Ok(corpus)
    }

    /// A corpus of one file whose bytes are embedded in the program. `name` gives the format and appears in messages.
    ///
    /// # Errors
    /// A name of unknown format.
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let path = PathBuf::from(name);
        let format = Format::of(&path).ok_or_else(|| Error::UnknownFormat { path: path.clone() })?;
        let source = Source { path, format, size: bytes.len() as u64, embedded: Some(bytes) };
        Ok(Self::of(vec![source]))
    }

    fn of(files: Vec<Source>) -> Self {
        Self { files, skipped: Vec::new(), field: "text".to_owned(), on_damage: OnDamage::default() }
    }

    /// Sets what happens to damaged records.
    #[must_use]
    pub fn with_damage(mut self, on_damage: OnDamage) -> Self {
        self.on_damage = on_damage;
        self
    }

    /// Reads the text of a JSON object or of a Parquet row from this field instead of `text`.
    #[must_use]
    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// The files, in reading order.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Files in folders that are left out because their names give no known format.
    pub fn skipped(&self) -> &[PathBuf] {
        &self.skipped
    }

    /// Stored bytes of all files: the total for [`Documents::bytes_read`].
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// The documents, from the first. Only one is in memory at a time.
    pub fn documents(&self) -> Documents<'_> {
        self.documents_of(0, DamageReport::default())
    }

    /// The documents after `position`, which [`Documents::reached`] gave for the same files.
    ///
    /// # Errors
    /// When the file of the position cannot be read up to it.
    pub(crate) fn documents_after(&self, position: &Position) -> Result<Documents<'_>> {
        let mut documents = self.documents_of(position.file, position.damage.clone());
        let source = self.files.get(position.file);
        if let Some(source) = source.filter(|_| position.record > 0 || position.group > 0) {
            documents.next += 1;
            documents.current = Some(Reader::open_after(source, &self.field, &documents.read, position)?);
        }
        Ok(documents)
    }

    fn documents_of(&self, next: usize, damage: DamageReport) -> Documents<'_> {
        let done = self.files.iter().take(next).map(|file| file.size).sum();
        Documents { corpus: self, next, current: None, done, read: Arc::new(AtomicU64::new(0)), damage }
    }

    /// The field of a record that holds its text, and what happens to damaged records.
    pub(crate) fn reading(&self) -> (&str, OnDamage) {
        (&self.field, self.on_damage)
    }

    /// The files with what identifies their contents, in reading order.
    ///
    /// # Errors
    /// A file that is gone.
    pub(crate) fn stamps(&self) -> Result<Vec<FileStamp>> {
        self.files.iter().map(Source::stamp).collect()
    }

    /// Bytes of text in all documents. Reads them once.
    ///
    /// # Errors
    /// Those of [`Documents`], and a corpus without any text.
    pub fn text_bytes(&self) -> Result<u64> {
        self.measured().map(|(bytes, _)| bytes)
    }

    /// Bytes of text in all documents, and the damaged records.
    pub(crate) fn measured(&self) -> Result<(u64, DamageReport)> {
        let mut documents = self.documents();
        let bytes = documents.try_fold(0, |sum, text| text.map(|text| sum + text.len() as u64))?;
        let damage = documents.damage;
        if bytes == 0 { Err(self.empty(&damage)) } else { Ok((bytes, damage)) }
    }

    pub(crate) fn empty(&self, damage: &DamageReport) -> Error {
        let names: Vec<_> = self.files().take(3).map(|path| path.display().to_string()).collect();
        let more = if self.files.len() > 3 { ", …" } else { "" };
        let skipped = match damage.first.first() {
            Some(first) => format!("; {} records were left out, the first for: {first}", damage.skipped),
            None => String::new(),
        };
        let files = self.files.len();
        Error::EmptyCorpus {
            what: format!("no text in {files} file(s): {}{more}{skipped}", names.join(", ")),
        }
    }

    fn add_file(&mut self, path: &Path, format: Format, size: u64) {
        self.files.push(Source { path: path.to_owned(), format, size, embedded: None });
    }

    /// `above` holds the real paths of the folders above, so that links back to one of them are not followed.
    fn add_folder(&mut self, folder: &Path, above: &mut BTreeSet<PathBuf>) -> Result<()> {
        let real = folder.canonicalize().map_err(Error::read(folder))?;
        if !above.insert(real.clone()) {
            self.skipped.push(folder.to_owned());
            return Ok(());
        }
        let entries: std::io::Result<Vec<_>> =
            std::fs::read_dir(folder).map_err(Error::read(folder))?.map(|entry| Ok(entry?.path())).collect();
        let mut entries = entries.map_err(Error::read(folder))?;
        entries.sort();
        for path in entries {
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                self.skipped.push(path);
                continue;
            }
            let kind = std::fs::metadata(&path).map_err(Error::read(&path))?;
            match Format::of(&path) {
                _ if kind.is_dir() => self.add_folder(&path, above)?,
                Some(format) if kind.is_file() => self.add_file(&path, format, kind.len()),
                _ => self.skipped.push(path),
            }
        }
        above.remove(&real);
        Ok(())
    }
}

impl Source {
    fn stamp(&self) -> Result<FileStamp> {
        let path = &self.path;
        if let Some(bytes) = self.embedded {
            let version = blake3::hash(bytes).to_string();
            return Ok(FileStamp { path: path.to_string_lossy().into(), bytes: bytes.len() as u64, version });
        }
        let data = std::fs::metadata(path).map_err(Error::read(path))?;
        let modified = data.modified().map_err(Error::read(path))?;
        let version = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_nanos().to_string(),
            Err(before) => format!("-{}", before.duration().as_nanos()),
        };
        let absolute = std::path::absolute(path).map_err(Error::read(path))?;
        Ok(FileStamp { path: absolute.to_string_lossy().into(), bytes: data.len(), version })
    }
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        // The ending is ASCII, whatever precedes it.
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let (stem, compression) = match name.rsplit_once('.')? {
            (stem, "zst") => (stem, Compression::Zstd),
            (stem, "gz") => (stem, Compression::Gzip),
            _ => (name.as_str(), Compression::None),
        };
        match stem.rsplit_once('.')?.1 {
            "txt" => Some(Self::Text(compression)),
            "jsonl" | "ndjson" => Some(Self::JsonLines(compression)),
            "parquet" if compression == Compression::None => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// The documents of a [`Corpus`], in order. The first error ends the iteration.
pub struct Documents<'a> {
    corpus: &'a Corpus,
    next: usize,
    current: Option<Reader>,
    /// Stored bytes of the files before the current one.
    done: u64,
    /// Stored bytes read of the current file.
    read: Arc<AtomicU64>,
    damage: DamageReport,
}

enum Reader {
    Text(TextReader),
    JsonLines(LineReader),
    Parquet(Box<ParquetReader>),
}

impl Documents<'_> {
    /// Stored bytes read so far, out of [`Corpus::bytes`].
    pub fn bytes_read(&self) -> u64 {
        self.done + self.read.load(Relaxed)
    }

    /// The damaged records so far.
    pub fn damage(&self) -> &DamageReport {
        &self.damage
    }

    /// The place after the document that was returned last.
    pub(crate) fn reached(&self) -> Position {
        let current = self.next.saturating_sub(1);
        let (file, group, record, offset) = match &self.current {
            None => (self.next, 0, 0, 0),
            Some(Reader::Text(TextReader { stream: None })) => (self.next, 0, 0, 0),
            Some(Reader::Text(TextReader { stream: Some(_) })) => (current, 0, 0, 0),
            Some(Reader::JsonLines(lines)) => (current, 0, lines.line, lines.stream.offset),
            Some(Reader::Parquet(rows)) => (current, rows.group, rows.row, 0),
        };
        Position { file, group, record, offset, damage: self.damage.clone() }
    }

    fn step(&mut self) -> Result<Option<String>> {
        loop {
            match self.read() {
                Err(error) if self.corpus.on_damage.skip && error.is_of_one_record() => {
                    self.damage.skip(&error)
                }
                other => return other,
            }
        }
    }

    fn read(&mut self) -> Result<Option<String>> {
        let (field, on_damage) = (&self.corpus.field, self.corpus.on_damage);
        loop {
            let found = match &mut self.current {
                None => None,
                Some(Reader::Text(reader)) => reader.next(on_damage, &mut self.damage)?,
                Some(Reader::JsonLines(reader)) => reader.next(field, on_damage, &mut self.damage)?,
                Some(Reader::Parquet(reader)) => reader.next(&self.read, on_damage, &mut self.damage)?,
            };
            if found.is_some() {
                return Ok(found);
            }
            if self.current.take().is_some() {
                self.done += self.corpus.files[self.next - 1].size;
                self.read = Arc::new(AtomicU64::new(0));
            }
            let Some(source) = self.corpus.files.get(self.next) else { return Ok(None) };
            self.next += 1;
            self.current = Some(Reader::open(source, field, &self.read)?);
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        let item = self.step().transpose();
        if matches!(item, Some(Err(_))) {
            (self.current, self.next) = (None, self.corpus.files.len());
        }
        item
    }
}

impl Reader {
    fn open(source: &Source, field: &str, count: &Arc<AtomicU64>) -> Result<Self> {
        Ok(match source.format {
            Format::Text(compression) => {
                Self::Text(TextReader { stream: Some(Stream::open(source, compression, count)?) })
            }
            Format::JsonLines(compression) => {
                let stream = Stream::open(source, compression, count)?;
                Self::JsonLines(LineReader { stream, line: 0, buffer: Vec::new() })
            }
            Format::Parquet => Self::Parquet(Box::new(ParquetReader::open(source, field)?)),
        })
    }

    /// Opens a file and skips what is before `position`.
    fn open_after(source: &Source, field: &str, count: &Arc<AtomicU64>, position: &Position) -> Result<Self> {
        let mut reader = Self::open(source, field, count)?;
        match &mut reader {
            // Its only document comes before every other position.
            Self::Text(text) => text.stream = None,
            Self::JsonLines(lines) => {
                lines.stream.skip(position.offset)?;
                lines.line = position.record;
            }
            Self::Parquet(rows) => rows.skip(position, count)?,
        }
        Ok(reader)
    }
}

/// A file's text as bytes, decompressed, with errors that name the file and the offset in the text.
struct Stream {
    path: PathBuf,
    compressed: bool,
    reader: Box<dyn BufRead + Send>,
    offset: u64,
}

/// Counts the stored bytes that pass through.
struct Counted<R>(R, Arc<AtomicU64>);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.0.read(buffer)?;
        self.1.fetch_add(read as u64, Relaxed);
        Ok(read)
    }
}

impl Stream {
    /// zstd's `--long` goes up to windows of 2^31 bytes. Memory is used only as a file needs it.
    const WINDOW_LOG: u32 = 31;

    fn open(source: &Source, compression: Compression, count: &Arc<AtomicU64>) -> Result<Self> {
        let path = &source.path;
        let stored: Box<dyn Read + Send> = match source.embedded {
            Some(bytes) => Box::new(Counted(bytes, count.clone())),
            None => Box::new(Counted(File::open(path).map_err(Error::read(path))?, count.clone())),
        };
        let reader: Box<dyn BufRead + Send> = match compression {
            Compression::None => Box::new(BufReader::with_capacity(1 << 16, stored)),
            Compression::Gzip => Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(stored))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::new(stored).map_err(Error::read(path))?;
                decoder.window_log_max(Self::WINDOW_LOG).map_err(Error::read(path))?;
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
        };
        Ok(Self { path: path.clone(), compressed: compression != Compression::None, reader, offset: 0 })
    }

    /// Reads and drops the next `bytes` bytes of text.
    fn skip(&mut self, bytes: u64) -> Result<()> {
        let mut buffer = Vec::new();
        while self.offset < bytes {
            let rest = (bytes - self.offset).min(1 << 20);
            let read = self.read(|reader, to| reader.take(rest).read_to_end(to), &mut buffer)?;
            if read == 0 {
                let source = std::io::ErrorKind::UnexpectedEof.into();
                return Err(Error::Read { path: self.path.clone(), source });
            }
        }
        Ok(())
    }

    fn read(
        &mut self,
        read: impl FnOnce(&mut dyn BufRead, &mut Vec<u8>) -> std::io::Result<usize>,
        to: &mut Vec<u8>,
    ) -> Result<usize> {
        to.clear();
        let outcome = read(&mut *self.reader, to);
        let (path, offset) = (self.path.clone(), self.offset + to.len() as u64);
        match outcome {
            Ok(read) => {
                self.offset += read as u64;
                Ok(read)
            }
            Err(source) if !self.compressed || source.raw_os_error().is_some() => {
                Err(Error::Read { path, source })
            }
            Err(source) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(Error::TruncatedCompression { path, offset })
            }
            Err(source) => Err(Error::DamagedCompression { path, offset, source }),
        }
    }
}

/// Maximum bytes of text in a document: it must fit in memory with its tokens.
const LONGEST: u64 = 4 << 30;

/// The byte order mark that some programs write before UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Refuses text in UTF-16, which would otherwise be reported as invalid UTF-8 at byte 0.
fn refuse_utf16(path: &Path, bytes: &[u8]) -> Result<()> {
    match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Err(Error::Utf16 { path: path.to_owned() }),
        _ => Ok(()),
    }
}

/// One file, one document.
struct TextReader {
    stream: Option<Stream>,
}

impl TextReader {
    fn next(&mut self, on_damage: OnDamage, report: &mut DamageReport) -> Result<Option<String>> {
        let Some(mut stream) = self.stream.take() else { return Ok(None) };
        let mut bytes = Vec::new();
        stream.read(|reader, to| reader.take(LONGEST + 1).read_to_end(to), &mut bytes)?;
        let path = stream.path;
        if bytes.len() as u64 > LONGEST {
            return Err(Error::LongDocument { path, place: String::new(), limit: LONGEST });
        }
        refuse_utf16(&path, &bytes)?;
        let mut start = 0;
        if bytes.starts_with(BYTE_ORDER_MARK) {
            start = BYTE_ORDER_MARK.len();
            bytes.drain(..start);
        }
        let invalid =
            |offset| Error::InvalidUtf8 { offset: start as u64 + offset, path, place: String::new() };
        damage::text(bytes, on_damage, report, invalid).map(Some)
    }
}

/// One line, one document.
struct LineReader {
    stream: Stream,
    line: u64,
    buffer: Vec<u8>,
}

impl LineReader {
    fn next(
        &mut self,
        field: &str,
        on_damage: OnDamage,
        report: &mut DamageReport,
    ) -> Result<Option<String>> {
        loop {
            let start = self.stream.offset;
            if self.stream.read(read_line, &mut self.buffer)? == 0 {
                return Ok(None);
            }
            self.line += 1;
            if self.line == 1 {
                refuse_utf16(&self.stream.path, &self.buffer)?;
            }
            if self.buffer.len() as u64 > LONGEST {
                let place = format!("line {}: ", self.line);
                return Err(Error::LongDocument { path: self.stream.path.clone(), place, limit: LONGEST });
            }
            // Concatenated files keep their marks, so marks occur within a file, too.
            let mark = if self.buffer.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
            if !self.buffer[mark..].iter().all(u8::is_ascii_whitespace) {
                let line = self.buffer.split_off(mark);
                return self.text(line, start + mark as u64, field, on_damage, report).map(Some);
            }
        }
    }

    /// The text of a line that starts at byte `start` of the file's text.
    fn text(
        &self,
        line: Vec<u8>,
        start: u64,
        field: &str,
        on_damage: OnDamage,
        report: &mut DamageReport,
    ) -> Result<String> {
        let (path, number) = (|| self.stream.path.clone(), self.line);
        let mut damaged = DamageReport::default();
        let json = damage::text(line, on_damage, &mut damaged, |offset| Error::InvalidUtf8 {
            path: path(),
            place: format!("line {number}: "),
            offset: start + offset,
        })?;
        let text = match text_of(json.trim_ascii_end(), field) {
            Ok(JsonText::Text(text)) => text,
            Ok(JsonText::Halves(bytes)) => damage::text(bytes, on_damage, &mut damaged, |_| {
                Error::HalfPair { path: path(), line: number }
            })?,
            Err(JsonProblem::Malformed(reason)) => {
                return Err(Error::MalformedJson { path: path(), line: number, reason });
            }
            Err(JsonProblem::Missing(reason)) => {
                return Err(Error::MissingText { path: path(), place: format!("line {number}"), reason });
            }
        };
        report.replace(damaged);
        Ok(text)
    }
}

/// Reads a line with its end: LF, CRLF or CR. In JSON, neither stands inside a string. Stops after the maximum length
/// of a document.
fn read_line(reader: &mut dyn BufRead, to: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut ended = false;
    while !ended && to.len() as u64 <= LONGEST {
        let ready = match reader.fill_buf() {
            Ok(ready) => ready,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let end = memchr::memchr2(b'\n', b'\r', ready);
        let take = end.map_or(ready.len(), |end| end + 1);
        to.extend_from_slice(&ready[..take]);
        ended = end.is_some() || ready.is_empty();
        reader.consume(take);
    }
    if to.ends_with(b"\r") && reader.fill_buf()?.first() == Some(&b'\n') {
        to.push(b'\n');
        reader.consume(1);
    }
    Ok(to.len())
}

/// One row, one document. Reads only the text column, a few rows at a time.
struct ParquetReader {
    path: PathBuf,
    file: Box<dyn FileReader>,
    field: String,
    column: usize,
    nullable: bool,
    /// The row group of `rows`, and the next one to open.
    group: usize,
    next_group: usize,
    /// The number of the next row within its group.
    row: u64,
    rows: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Rows read but not yet returned.
    ready: IntoIter<Option<ByteArray>>,
}

impl ParquetReader {
    const ROWS_AT_ONCE: usize = 64;

    fn open(source: &Source, field: &str) -> Result<Self> {
        match source.embedded {
            Some(bytes) => Self::new(&source.path, Bytes::from_static(bytes), field),
            None => {
                Self::new(&source.path, File::open(&source.path).map_err(Error::read(&source.path))?, field)
            }
        }
    }

    fn new<R: ChunkReader + 'static>(path: &Path, bytes: R, field: &str) -> Result<Self> {
        let file = unpanicked(|| SerializedFileReader::new(bytes)).map_err(|reason| {
            Error::MalformedParquet { path: path.to_owned(), place: "footer".to_owned(), reason }
        })?;
        let columns = file.metadata().file_metadata().schema_descr().columns();
        let missing = |reason| Error::MissingColumn { path: path.to_owned(), reason };
        let Some(column) = columns.iter().position(|column| column.path().parts() == [field]) else {
            let names: Vec<_> = columns.iter().map(|column| column.path().string()).collect();
            return Err(missing(format!("no column {field:?}; the columns are [{}]", names.join(", "))));
        };
        let found = &columns[column];
        if found.physical_type() != PhysicalType::BYTE_ARRAY || found.max_rep_level() != 0 {
            return Err(missing(format!("column {field:?} holds {}, not text", found.physical_type())));
        }
        let nullable = found.max_def_level() > 0;
        Ok(Self {
            path: path.to_owned(),
            file: Box::new(file),
            field: field.to_owned(),
            column,
            nullable,
            group: 0,
            next_group: 0,
            row: 0,
            rows: None,
            ready: Vec::new().into_iter(),
        })
    }

    fn next(
        &mut self,
        read: &AtomicU64,
        on_damage: OnDamage,
        report: &mut DamageReport,
    ) -> Result<Option<String>> {
        loop {
            if let Some(value) = self.ready.next() {
                let text = self.text(value, on_damage, report);
                self.row += 1;
                return text.map(Some);
            }
            if !self.fill()? && !self.open_group(read)? {
                return Ok(None);
            }
        }
    }

    fn text(
        &self,
        value: Option<ByteArray>,
        on_damage: OnDamage,
        report: &mut DamageReport,
    ) -> Result<String> {
        let Some(value) = value else {
            let reason = format!("column {:?} is null", self.field);
            return Err(Error::MissingText { path: self.path.clone(), place: self.place(), reason });
        };
        damage::text(value.data().to_vec(), on_damage, report, |offset| Error::InvalidUtf8 {
            path: self.path.clone(),
            place: format!("{}: ", self.place()),
            offset,
        })
    }

    /// Skips the row groups and rows before `position`.
    fn skip(&mut self, position: &Position, read: &AtomicU64) -> Result<()> {
        let groups = self.file.metadata().row_groups().iter().take(position.group);
        let sizes = groups.map(|group| u64::try_from(group.compressed_size()).unwrap_or(0));
        read.fetch_add(sizes.sum(), Relaxed);
        self.next_group = position.group;
        self.open_group(read)?;
        if let Some(rows) = &mut self.rows {
            let skipped = unpanicked(|| rows.skip_records(position.record as usize));
            self.row = skipped.map_err(|reason| self.malformed(reason))? as u64;
        }
        if (self.group, self.row) != (position.group, position.record) {
            return Err(self.malformed(format!("row {} is missing", position.record)));
        }
        Ok(())
    }

    /// Opens the next row group; false if there is none.
    fn open_group(&mut self, read: &AtomicU64) -> Result<bool> {
        if self.rows.take().is_some() {
            let size = self.file.metadata().row_group(self.group).compressed_size();
            read.fetch_add(u64::try_from(size).unwrap_or(0), Relaxed);
        }
        if self.next_group == self.file.num_row_groups() {
            return Ok(false);
        }
        (self.group, self.row) = (self.next_group, 0);
        let reader = unpanicked(|| self.file.get_row_group(self.group)?.get_column_reader(self.column))
            .map_err(|reason| self.malformed(reason))?;
        let ColumnReader::ByteArrayColumnReader(rows) = reader else {
            return Err(
                self.malformed("the stored type of its text column differs from the schema".to_owned())
            );
        };
        self.rows = Some(rows);
        self.next_group += 1;
        Ok(true)
    }

    /// Reads the next few rows of the open group; false if there are none.
    fn fill(&mut self) -> Result<bool> {
        let Some(rows) = &mut self.rows else { return Ok(false) };
        let (mut values, mut levels) = (Vec::new(), Vec::new());
        let levels_to = self.nullable.then_some(&mut levels);
        let outcome = unpanicked(|| rows.read_records(Self::ROWS_AT_ONCE, levels_to, None, &mut values));
        let (records, ..) = outcome.map_err(|reason| self.malformed(reason))?;
        let ready: Vec<_> = if self.nullable {
            // A row with definition level 0 is null and has no value.
            let mut values = values.into_iter();
            levels.iter().map(|level| if *level == 0 { None } else { values.next() }).collect()
        } else {
            values.into_iter().map(Some).collect()
        };
        debug_assert_eq!(ready.len(), records);
        self.ready = ready.into_iter();
        Ok(records > 0)
    }

    fn place(&self) -> String {
        format!("row group {}, row {}", self.group, self.row)
    }

    fn malformed(&self, reason: String) -> Error {
        Error::MalformedParquet { path: self.path.clone(), place: self.place(), reason }
    }
}

/// Runs a part of the crate `parquet`, some of whose decoders panic on damaged bytes. After a failure the reader is not
/// used again, so a half-changed state does no harm.
fn unpanicked<T>(run: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(_) => Err("its data is damaged: the decoder failed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use parquet::data_type::Int64Type;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    const LINES: &str =
        "{\"text\": \"One\\nline \\u00e9\", \"source\": \"a\"}\n\n{\"id\": 7, \"text\": \"zwei\"}";

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        folder
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zst(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 3).unwrap()
    }

    /// A file with two row groups, a column of numbers before the text.
    fn parquet(schema: &str, groups: &[&[Option<&[u8]>]]) -> Vec<u8> {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut bytes = Vec::new();
        let properties = Arc::new(WriterProperties::builder().build());
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let mut ids = group.next_column().unwrap().unwrap();
            let numbers: Vec<_> = (0..rows.len() as i64).collect();
            ids.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
            ids.close().unwrap();
            let values: Vec<_> = rows.iter().flatten().map(|text| ByteArray::from(text.to_vec())).collect();
            let levels: Vec<_> = rows.iter().map(|text| i16::from(text.is_some())).collect();
            let mut texts = group.next_column().unwrap().unwrap();
            texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            texts.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
        bytes
    }

    const SCHEMA: &str = "message schema { required int64 id; optional binary text (UTF8); }";

    fn read(corpus: &Corpus) -> Result<Vec<String>> {
        corpus.documents().collect()
    }

    fn read_one(name: &str, bytes: &[u8]) -> Result<Vec<String>> {
        let folder = folder(&[(name, bytes)]);
        read(&Corpus::open(&[folder.path().join(name)])?)
    }

    /// The message with the name of the file in place of its path.
    fn failure(name: &str, bytes: &[u8]) -> String {
        let message = read_one(name, bytes).unwrap_err().to_string();
        let at = message.find(name).unwrap_or_else(|| panic!("no file name in: {message}"));
        message[at..].to_owned()
    }

    #[test]
    fn every_format_gives_its_documents() {
        let two = ["One\nline é", "zwei"];
        for (name, bytes) in [
            ("a.jsonl", LINES.as_bytes().to_vec()),
            ("a.ndjson", LINES.as_bytes().to_vec()),
            ("A.JSONL.zst", zst(LINES.as_bytes())),
            ("a.jsonl.gz", gzip(LINES.as_bytes())),
            // Two compressed streams in one file are one text.
            ("b.jsonl.gz", [gzip(&LINES.as_bytes()[..20]), gzip(&LINES.as_bytes()[20..])].concat()),
            ("b.jsonl.zst", [zst(&LINES.as_bytes()[..20]), zst(&LINES.as_bytes()[20..])].concat()),
            ("a.parquet", parquet(SCHEMA, &[&[Some("One\nline é".as_bytes())], &[Some(b"zwei")]])),
        ] {
            assert_eq!(read_one(name, &bytes).unwrap(), two, "{name}");
        }
        let text = "a\r\n\n b\n";
        for (name, bytes) in [
            ("a.txt", text.as_bytes().to_vec()),
            ("a.txt.zst", zst(text.as_bytes())),
            ("a.txt.gz", gzip(text.as_bytes())),
        ] {
            assert_eq!(read_one(name, &bytes).unwrap(), [text], "{name}");
        }
    }

    #[test]
    fn many_parquet_rows_keep_their_order() {
        let texts: Vec<_> = (0..300).map(|row| format!("row {row}")).collect();
        let rows: Vec<_> = texts.iter().map(|text| Some(text.as_bytes())).collect();
        let bytes = parquet(SCHEMA, &[&rows[..130], &rows[130..130], &rows[130..]]);
        assert_eq!(read_one("a.parquet", &bytes).unwrap(), texts);
        let folder = folder(&[("a.parquet", &bytes)]);
        let corpus = Corpus::open(&[folder.path()]).unwrap();
        assert_eq!(corpus.text_bytes().unwrap(), texts.iter().map(|text| text.len() as u64).sum::<u64>());
    }

    #[test]
    fn a_folder_is_its_files_in_the_order_of_their_paths() {
        let folder = folder(&[
            ("b.txt", b"2"),
            ("a/z.txt", b"1"),
            ("c.jsonl", b"{\"text\":\"3\"}"),
            ("README.md", b""),
        ]);
        let corpus = Corpus::open(&[folder.path()]).unwrap();
        assert_eq!(read(&corpus).unwrap(), ["1", "2", "3"]);
        assert_eq!(corpus.skipped(), [folder.path().join("README.md")]);
        assert_eq!(corpus.files().count(), 3);
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_holds_itself_ends() {
        let folder = folder(&[("a/b.txt", b"1")]);
        std::os::unix::fs::symlink(folder.path(), folder.path().join("a/loop")).unwrap();
        let corpus = Corpus::open(&[folder.path()]).unwrap();
        assert_eq!(read(&corpus).unwrap(), ["1"]);
        assert_eq!(corpus.skipped(), [folder.path().join("a/loop")]);
    }

    #[test]
    fn the_bytes_read_end_at_the_bytes_there_are() {
        let table = parquet(SCHEMA, &[&[Some(b"x")]]);
        let folder = folder(&[
            ("a.txt", b"12"),
            ("b.jsonl.zst", &zst(LINES.as_bytes())),
            ("c.parquet", &table),
            ("d.txt", b"34"),
        ]);
        let corpus = Corpus::open(&[folder.path()]).unwrap();
        let mut documents = corpus.documents();
        let mut last = 0;
        while documents.next().is_some() {
            assert!((last..=corpus.bytes()).contains(&documents.bytes_read()));
            last = documents.bytes_read();
        }
        assert_eq!(documents.bytes_read(), corpus.bytes());
    }

    #[test]
    fn embedded_bytes_and_another_field() {
        let corpus = Corpus::embedded("built-in.jsonl", br#"{"body": "x", "text": "y"}"#).unwrap();
        assert_eq!(read(&corpus.clone().with_field("body")).unwrap(), ["x"]);
        assert_eq!(read(&corpus).unwrap(), ["y"]);
        assert!(Corpus::embedded("built-in", b"").is_err());
        let table: &'static [u8] = parquet(SCHEMA, &[&[Some(b"z")]]).leak();
        assert_eq!(read(&Corpus::embedded("built-in.parquet", table).unwrap()).unwrap(), ["z"]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let message = Corpus::open(&["no/such/file.txt"]).unwrap_err().to_string();
        assert!(message.starts_with("cannot read no/such/file.txt: "), "{message}");
        let folder = folder(&[("notes.md", b"x")]);
        let message = Corpus::open(&[folder.path()]).unwrap_err().to_string();
        assert!(
            message.starts_with("the corpus is empty: no .txt, .jsonl or .parquet file in ["),
            "{message}"
        );
        let message = Corpus::open(&[folder.path().join("notes.md")]).unwrap_err().to_string();
        assert!(message.contains("notes.md: unknown format"), "{message}");
        let nothing = Corpus::embedded("a.jsonl", b"{\"text\": \"\"}\n").unwrap();
        let message = nothing.text_bytes().unwrap_err().to_string();
        assert_eq!(message, "the corpus is empty: no text in 1 file(s): a.jsonl");
    }

    #[test]
    fn malformed_lines_are_named_with_their_number() {
        let json = |line: &str| failure("a.jsonl", format!("{{\"text\": \"x\"}}\n{line}\n").as_bytes());
        assert_eq!(
            json("{\"text\": \"x\""),
            "a.jsonl: line 2: malformed JSON: EOF while parsing an object at column 12"
        );
        assert_eq!(
            json("{\"body\": 1, \"id\": 2}"),
            "a.jsonl: line 2: no field \"text\"; the fields are [body, id]"
        );
        assert_eq!(json("{\"text\": null}"), "a.jsonl: line 2: field \"text\" holds null, not a string");
        assert_eq!(json("[1]"), "a.jsonl: line 2: an array in place of an object with a field \"text\"");
        assert!(
            json("{\"text\": \"\\ud800\"}")
                .starts_with("a.jsonl: line 2: the text holds half of a UTF-16 pair")
        );
    }

    #[test]
    fn invalid_utf8_is_named_with_its_offset() {
        assert_eq!(failure("a.txt", b"abc\xff"), "a.txt: invalid UTF-8 at byte 3; convert the text to UTF-8");
        let bytes = b"{\"text\": \"x\"}\n{\"text\": \"\xe9t\xe9\"}\n";
        let expected = "line 2: invalid UTF-8 at byte 24; convert the text to UTF-8";
        assert_eq!(failure("a.jsonl", bytes), format!("a.jsonl: {expected}"));
        assert_eq!(failure("a.jsonl.zst", &zst(bytes)), format!("a.jsonl.zst: {expected}"));
        let table = parquet(SCHEMA, &[&[Some(b"x")], &[Some(b"x"), Some(b"ab\xc3")]]);
        assert_eq!(
            failure("a.parquet", &table),
            "a.parquet: row group 1, row 1: invalid UTF-8 at byte 2; convert the text to UTF-8"
        );
    }

    #[test]
    fn a_byte_order_mark_is_left_out() {
        let marked = |text: &[u8]| [BYTE_ORDER_MARK, text].concat();
        let lines =
            [marked(b"{\"text\": \"a\"}\r\n"), marked(b"{\"text\": \"b\"}\n"), marked(b"\n")].concat();
        for (name, bytes) in
            [("a.jsonl", lines.clone()), ("a.jsonl.zst", zst(&lines)), ("a.jsonl.gz", gzip(&lines))]
        {
            assert_eq!(read_one(name, &bytes).unwrap(), ["a", "b"], "{name}");
        }
        assert_eq!(read_one("a.txt", &marked("é".as_bytes())).unwrap(), ["é"]);
        assert!(failure("a.txt", &marked(b"abc\xff")).contains("at byte 6"), "offsets are those of the file");
        assert!(failure("a.jsonl", &marked(b"{\"text\": \"\xff\"}")).contains("at byte 13"));
        for mark in [b"\xff\xfeh\0", b"\xfe\xff\0h"] {
            assert!(failure("a.txt", mark).contains("UTF-16"));
            assert!(failure("a.jsonl.gz", &gzip(mark)).contains("iconv -f UTF-16"));
        }
    }

    #[test]
    fn lines_end_in_any_of_the_usual_ways() {
        for end in ["\n", "\r\n", "\r"] {
            let lines = ["{\"text\": \"a\"}", "", "{\"text\": \"b\\r\\n\"}", "  ", ""].join(end);
            assert_eq!(read_one("a.jsonl", lines.as_bytes()).unwrap(), ["a", "b\r\n"], "{end:?}");
            assert!(
                failure("a.jsonl", (lines + end + "{").as_bytes()).contains("line 6: malformed"),
                "{end:?}"
            );
        }
        // A line end across two reads.
        let mut text = std::io::BufReader::with_capacity(1, &b"a\r\nb\r\rc"[..]);
        let mut line = |expected: &[u8]| {
            let mut bytes = Vec::new();
            assert_eq!(read_line(&mut text, &mut bytes).unwrap(), expected.len());
            assert_eq!(bytes, expected);
        };
        [&b"a\r\n"[..], b"b\r", b"\r", b"c", b""].into_iter().for_each(&mut line);
    }

    #[test]
    fn notes_of_systems_in_a_folder_are_left_out() {
        let folder = folder(&[
            ("a.jsonl", b"{\"text\":\"1\"}"),
            ("._a.jsonl", b"\0\x05\x16\x07"),
            (".git/b.txt", b"2"),
        ]);
        let corpus = Corpus::open(&[folder.path()]).unwrap();
        assert_eq!(read(&corpus).unwrap(), ["1"]);
        assert_eq!(corpus.skipped(), [folder.path().join("._a.jsonl"), folder.path().join(".git")]);
        assert_eq!(read_one(".hidden.txt", b"2").unwrap(), ["2"], "but not where they are named");
    }

    #[cfg(unix)]
    #[test]
    fn a_name_that_is_not_utf8_is_a_name() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.txt"));
        std::fs::write(path, "x").unwrap();
        assert_eq!(read(&Corpus::open(&[folder.path()]).unwrap()).unwrap(), ["x"]);
    }

    #[test]
    fn damaged_records_are_left_out_or_mended_and_counted() {
        let lines = b"{\"text\": \"a\"}\n{\"text\": \"\\ud83d!\"}\n{\n{\"text\": \"\xff?\xff\"}\n{\"text\": null}\n\xef{\"text\": \"b\"}";
        let table = parquet(SCHEMA, &[&[Some(b"a"), None, Some(b"\xff?")], &[Some(b"b")]]);
        let run = |name: &str, bytes: &[u8], replace, skip| {
            let folder = folder(&[(name, bytes)]);
            let corpus = Corpus::open(&[folder.path()]).unwrap().with_damage(OnDamage { replace, skip });
            let mut documents = corpus.documents();
            let texts = documents.by_ref().collect::<Result<Vec<_>>>().map_err(|error| error.to_string());
            let DamageReport { skipped, replaced, first } = documents.damage();
            assert_eq!(first.len() as u64, skipped + replaced);
            assert!(first.iter().all(|message| message.contains(name)), "{first:?}");
            (texts, *skipped, *replaced)
        };
        let texts = |texts: &[&str]| Ok(texts.iter().map(|&text| text.to_owned()).collect());
        assert_eq!(run("a.jsonl", lines, false, true), (texts(&["a"]), 5, 0));
        let mended = texts(&["a", "\u{fffd}!", "\u{fffd}?\u{fffd}"]);
        assert_eq!(run("a.jsonl", lines, true, true), (mended, 3, 2));
        let (refused, ..) = run("a.jsonl", lines, true, false);
        assert!(refused.unwrap_err().contains("line 3: malformed JSON"));
        assert_eq!(run("a.parquet", &table, false, true), (texts(&["a", "b"]), 2, 0));
        assert_eq!(run("a.parquet", &table, true, true), (texts(&["a", "\u{fffd}?", "b"]), 1, 1));
        assert_eq!(run("a.txt", b"a\xff", true, false), (texts(&["a\u{fffd}"]), 0, 1));
        // Files are not records: damage in them ends the reading.
        assert!(run("a.jsonl.gz", &gzip(lines)[..30], true, true).0.is_err());
        assert!(run("b.txt", b"\xff\xfea\0", true, true).0.is_err());
        let skipped = Corpus::embedded("a.jsonl", b"{\"body\": 1}\n").unwrap();
        let nothing = skipped.with_damage(OnDamage { replace: false, skip: true }).text_bytes();
        let message = nothing.unwrap_err().to_string();
        assert!(
            message.contains("1 records were left out, the first for: a.jsonl: line 1: no field"),
            "{message}"
        );
    }

    proptest! {
        #[test]
        fn any_texts_come_back_in_any_packing(
            texts in proptest::collection::vec(".{0,40}", 1..12),
            end in prop_oneof![Just("\n"), Just("\r\n"), Just("\r"), Just("\n\n")],
            mark: bool,
            split in 0..200usize,
        ) {
            let lines: Vec<_> = texts.iter().map(|text| serde_json::json!({"id": 1, "text": text}).to_string()).collect();
            let mut bytes = if mark { BYTE_ORDER_MARK.to_vec() } else { Vec::new() };
            bytes.extend((lines.join(end) + end).into_bytes());
            let (one, other) = bytes.split_at(split.min(bytes.len()));
            prop_assert_eq!(&read_one("a.jsonl", &bytes).unwrap(), &texts);
            prop_assert_eq!(&read_one("a.jsonl.gz", &[gzip(one), gzip(other)].concat()).unwrap(), &texts);
            prop_assert_eq!(&read_one("a.jsonl.zst", &[zst(one), zst(other)].concat()).unwrap(), &texts);
        }

        #[test]
        fn a_damaged_byte_costs_one_record_at_most(at in 0..2000usize, to: u8) {
            let texts: Vec<_> = (0..40).map(|number| format!("text né {number}")).collect();
            let mut lines: Vec<u8> =
                texts.iter().flat_map(|text| format!("{{\"text\": \"{text}\"}}\n").into_bytes()).collect();
            let at = at % lines.len();
            prop_assume!(lines[at] != b'\n' && !b"\n\r".contains(&to));
            lines[at] = to;
            let corpus = Corpus::embedded("a.jsonl", lines.leak()).unwrap();
            let corpus = corpus.with_damage(OnDamage { replace: false, skip: true });
            let mut documents = corpus.documents();
            let read = documents.by_ref().collect::<Result<Vec<_>>>().unwrap();
            prop_assert_eq!(read.len() as u64 + documents.damage().skipped, 40);
            prop_assert!(read.iter().filter(|text| texts.contains(text)).count() >= 39);
        }
    }

    #[test]
    fn reading_resumes_after_every_document_of_every_format() {
        let rows: Vec<_> = (0..140).map(|row| format!("row {row}").into_bytes()).collect();
        let rows: Vec<_> =
            rows.iter().enumerate().map(|(row, text)| (row % 9 != 4).then_some(text.as_slice())).collect();
        let lines =
            "\u{feff}{\"text\": \"a\"}\r\n\n{\"text\": 7}\r{\"text\": \"né\"}\n{\"text\": \"c\"}".as_bytes();
        let folder = folder(&[
            ("a.txt", b"whole"),
            ("b.jsonl", lines),
            ("c.jsonl.gz", &[gzip(&lines[..20]), gzip(&lines[20..])].concat()),
            ("d.parquet", &parquet(SCHEMA, &[&rows[..70], &rows[70..]])),
            ("e.jsonl", b""),
            ("f.txt.zst", &zst(b"zst")),
            ("g.jsonl.zst", &zst(lines)),
        ]);
        let corpus = Corpus::open(&[folder.path()]).unwrap();
        let corpus = corpus.with_damage(OnDamage { replace: false, skip: true });
        let whole = read(&corpus).unwrap();
        let mut documents = corpus.documents();
        let mut positions = vec![documents.reached()];
        while documents.next().is_some() {
            positions.push(documents.reached());
        }
        assert_eq!((positions.len(), documents.damage().skipped), (whole.len() + 1, 3 + 16));
        for (count, position) in positions.iter().enumerate() {
            let json = serde_json::to_vec(position).unwrap();
            let mut rest = corpus.documents_after(&serde_json::from_slice(&json).unwrap()).unwrap();
            let texts: Vec<String> = rest.by_ref().map(Result::unwrap).collect();
            assert_eq!(texts, whole[count..], "{position:?}");
            assert_eq!(rest.damage(), documents.damage());
            assert_eq!(rest.bytes_read(), documents.bytes_read());
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_not_resumed() {
        let folder = folder(&[("a.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n")]);
        let path = folder.path().join("a.jsonl");
        let corpus = Corpus::open(&[&path]).unwrap();
        let mut documents = corpus.documents();
        documents.next();
        let (position, stamp) = (documents.reached(), corpus.stamps().unwrap());
        assert_eq!(corpus.stamps().unwrap(), stamp);
        std::fs::write(&path, "{\"text\"").unwrap();
        assert_ne!(corpus.stamps().unwrap(), stamp);
        let message = corpus.documents_after(&position).err().unwrap().to_string();
        assert!(message.starts_with("cannot read ") && message.contains("a.jsonl"), "{message}");
    }

    #[test]
    fn cut_or_damaged_compression_is_refused() {
        let text: String =
            (0..20_000).map(|number| format!("{{\"text\": \"{}\"}}\n", number * 7919)).collect();
        for (name, bytes) in [("a.jsonl.zst", zst(text.as_bytes())), ("a.jsonl.gz", gzip(text.as_bytes()))] {
            let message = failure(name, &bytes[..bytes.len() / 2]);
            assert!(message.contains("compressed data is cut off after "), "{message}");
            let mut damaged = bytes.clone();
            damaged[0] ^= 0xff;
            let message = failure(name, &damaged);
            assert!(message.contains("compressed data is damaged after 0 bytes of text: "), "{message}");
        }
        // gzip's checksum reveals a change that the decoder cannot see.
        let mut bytes = gzip(text.as_bytes());
        let end = bytes.len();
        bytes[end - 6] ^= 1;
        assert!(failure("a.jsonl.gz", &bytes).contains("compressed data is damaged"));
    }

    #[test]
    fn the_first_error_ends_the_documents() {
        let corpus = Corpus::embedded("a.jsonl", b"{\"text\": \"x\"}\n{\n{\"text\": \"y\"}\n").unwrap();
        let found: Vec<_> = corpus.documents().map(|document| document.is_ok()).collect();
        assert_eq!(found, [true, false]);
    }

    #[test]
    fn unfit_parquet_is_named_with_its_place() {
        let table = |schema, text| parquet(schema, &[&[text]]);
        let null = table(SCHEMA, None);
        assert_eq!(failure("a.parquet", &null), "a.parquet: row group 0, row 0: column \"text\" is null");
        let other = table("message schema { required int64 id; optional binary body (UTF8); }", Some(b"x"));
        let message = failure("a.parquet", &other);
        assert_eq!(message, "a.parquet: schema: no column \"text\"; the columns are [id, body]");
        let corpus =
            Corpus::embedded("a.parquet", table(SCHEMA, Some(b"x")).leak()).unwrap().with_field("id");
        let message = read(&corpus).unwrap_err().to_string();
        assert_eq!(message, "a.parquet: schema: column \"id\" holds INT64, not text");
        assert!(failure("a.parquet", b"PAR1 and no more").starts_with("a.parquet: footer: "));
        assert!(failure("a.parquet", b"").starts_with("a.parquet: footer: "));
    }

    #[test]
    fn damaged_parquet_is_refused_without_a_panic() {
        let texts: Vec<_> = (0..100).map(|row| format!("text of row {row}")).collect();
        let rows: Vec<_> = texts.iter().map(|text| Some(text.as_bytes())).collect();
        let whole = parquet(SCHEMA, &[&rows]);
        let read = |bytes: Vec<u8>| read(&Corpus::embedded("a.parquet", bytes.leak()).unwrap());
        let mut refused = 0;
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            refused += usize::from(read(damaged).is_err());
            assert!(read(whole[..at].to_vec()).is_err());
        }
        assert!(refused > 0);
    }
}
