//! Errors on the way from a corpus to a batch of tokens.

use std::path::{Path, PathBuf};

/// A result whose error is [`Error`].
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of corpora, tokenizers, token shards or samplers: what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system failed to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file system failed to write (such as a full disk).
    #[error("cannot write {}: {source}; no incomplete file remains", path.display())]
    Write {
        /// The file or folder that was being written.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The name of the output is taken.
    #[error("{} already exists; remove it or choose another name", path.display())]
    Exists {
        /// The name that is taken.
        path: PathBuf,
    },
    /// Another process works at the same output.
    #[error(
        "{}: another process is preparing this output; wait for it, or choose another name",
        path.display()
    )]
    Busy {
        /// The folder of unfinished output, which the other process has locked.
        path: PathBuf,
    },
    /// A preparation ended early. Repeating it resumes after its last checkpoint.
    #[error("{what}; the finished part is in {}: repeat the command to resume", folder.display())]
    Paused {
        /// What ended it.
        what: String,
        /// The folder of unfinished output.
        folder: PathBuf,
        /// The error that ended it.
        cause: Box<Error>,
    },
    /// The unfinished output beside the requested one comes from another request.
    #[error(
        "{}: holds an unfinished preparation with other settings: {what}; repeat the first command to finish it, or \
         remove this folder to start again",
        folder.display()
    )]
    OtherPreparation {
        /// The folder of unfinished output.
        folder: PathBuf,
        /// What differs.
        what: String,
    },
    /// An input has changed since the preparation that is to be resumed read it.
    #[error(
        "{}: has changed since the unfinished preparation in {} began: {what}; remove that folder to start again",
        path.display(), folder.display()
    )]
    ChangedInput {
        /// The input.
        path: PathBuf,
        /// The folder of unfinished output.
        folder: PathBuf,
        /// What differs.
        what: String,
    },
    /// An unfinished preparation that cannot be resumed, because its files are damaged.
    #[error("{}: cannot resume: {reason}; remove the folder {} to start again", path.display(), folder.display())]
    DamagedState {
        /// The damaged file.
        path: PathBuf,
        /// The folder of unfinished output.
        folder: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The progress callback asked to stop; no output remains.
    #[error("interrupted; no incomplete output remains")]
    Interrupted,

    /// A file whose name gives no known format.
    #[error(
        "{}: unknown format; a corpus consists of .txt, .jsonl (each also .zst or .gz) and .parquet files",
        path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// No document, or only documents without text.
    #[error("the corpus is empty: {what}")]
    EmptyCorpus {
        /// Where documents were looked for.
        what: String,
    },
    /// Bytes that are not UTF-8.
    #[error("{}: {place}invalid UTF-8 at byte {offset}; convert the text to UTF-8", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// "line 3: " or "row group 0, row 7: "; empty when the document is the file.
        place: String,
        /// Offset of the first invalid byte in the file's (decompressed) text, or in the text of a Parquet row.
        offset: u64,
    },
    /// A file in UTF-16.
    #[error(
        "{}: the text is UTF-16, as its byte order mark says; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
        path.display()
    )]
    Utf16 {
        /// The file.
        path: PathBuf,
    },
    /// Half of a UTF-16 pair in the text of a JSON record, which is not a character.
    #[error(
        "{}: line {line}: the text holds half of a UTF-16 pair, an escape such as \\ud83d without its other half; write \
         the file with whole characters",
        path.display()
    )]
    HalfPair {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: u64,
    },
    /// A document that does not fit in memory together with its tokens.
    #[error(
        "{}: {place}more than {limit} bytes of text in one document; split it into several \
         documents, one JSON object per line",
        path.display()
    )]
    LongDocument {
        /// The file.
        path: PathBuf,
        /// "line 3: "; empty when the document is the file.
        place: String,
        /// Maximum bytes of a document.
        limit: u64,
    },
    /// A Parquet file without a text column of the requested name.
    #[error("{}: schema: {reason}", path.display())]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// A line that is not JSON.
    #[error("{}: line {line}: malformed JSON: {reason}", path.display())]
    MalformedJson {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: u64,
        /// The parser's reason, with the column.
        reason: String,
    },
    /// A record without the text field, or whose field is not text.
    #[error("{}: {place}: {reason}", path.display())]
    MissingText {
        /// The file.
        path: PathBuf,
        /// "line 3" or "row group 0, row 7".
        place: String,
        /// What was found in place of the text.
        reason: String,
    },
    /// A compressed file that is cut off.
    #[error("{}: compressed data is cut off after {offset} bytes of text: it is incomplete", path.display())]
    TruncatedCompression {
        /// The file.
        path: PathBuf,
        /// Decompressed bytes that were still readable.
        offset: u64,
    },
    /// A compressed file with damaged contents.
    #[error("{}: compressed data is damaged after {offset} bytes of text: {source}", path.display())]
    DamagedCompression {
        /// The file.
        path: PathBuf,
        /// Decompressed bytes that were still readable.
        offset: u64,
        /// The decoder's error.
        source: std::io::Error,
    },
    /// A Parquet file that cannot be read.
    #[error("{}: {place}: {reason}", path.display())]
    MalformedParquet {
        /// The file.
        path: PathBuf,
        /// "footer" or "row group 0, row 7".
        place: String,
        /// The reader's error.
        reason: String,
    },

    /// A `tokenizer.json` that cannot be used.
    #[error("{origin}: not a usable tokenizer.json: {reason}")]
    MalformedTokenizer {
        /// The file.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer failed to encode a text or decode tokens.
    #[error("the tokenizer failed: {reason}")]
    Tokenize {
        /// The tokenizer's error.
        reason: String,
    },

    /// A file that is not a token shard, or an incomplete one.
    #[error("{}: {reason}", path.display())]
    MalformedShard {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// Token shards made with another tokenizer.
    #[error(
        "{}: made with tokenizer {found}, not with {expected}; prepare the data again",
        path.display()
    )]
    WrongTokenizer {
        /// The shards.
        path: PathBuf,
        /// Hash of the tokenizer in use.
        expected: String,
        /// Hash of the tokenizer that made the shards.
        found: String,
    },

    /// An option out of range.
    #[error("{key} = {value}: {reason}")]
    InvalidOption {
        /// Name of the option, as in the configuration.
        key: &'static str,
        /// Its value.
        value: String,
        /// The range, and why.
        reason: String,
    },
}

/// Whether a path does not exist or is of the wrong kind, so that the input is at fault and not the machine.
fn names_nothing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{
        AlreadyExists, DirectoryNotEmpty, InvalidFilename, IsADirectory, NotADirectory, NotFound,
        PermissionDenied, ReadOnlyFilesystem,
    };
    matches!(
        error.kind(),
        NotFound
            | NotADirectory
            | IsADirectory
            | PermissionDenied
            | ReadOnlyFilesystem
            | InvalidFilename
            | AlreadyExists
            | DirectoryNotEmpty
    )
}

impl Error {
    /// Whether the input (usage, configuration, data) is at fault, not the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Interrupted => false,
            Self::Paused { cause, .. } => cause.is_input(),
            Self::Read { source, .. } | Self::Write { source, .. } => names_nothing(source),
            _ => true,
        }
    }

    /// This error as the end of a preparation that can be resumed in `folder`. The same error if repeating the
    /// preparation would fail in the same way.
    pub(crate) fn paused(self, folder: &Path) -> Self {
        let what = match &self {
            Self::Interrupted => "interrupted".to_owned(),
            Self::Read { path, source } => format!("cannot read {}: {source}", path.display()),
            Self::Write { path, source } => format!("cannot write {}: {source}", path.display()),
            _ => return self,
        };
        Self::Paused { what, folder: folder.to_owned(), cause: Box::new(self) }
    }

    /// Whether only one record is at fault, so that reading can continue.
    pub(crate) fn is_of_one_record(&self) -> bool {
        use Error::{HalfPair, InvalidUtf8, MalformedJson, MissingText};
        matches!(self, InvalidUtf8 { .. } | HalfPair { .. } | MalformedJson { .. } | MissingText { .. })
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn option(key: &'static str, value: impl ToString, reason: impl Into<String>) -> Self {
        Self::InvalidOption { key, value: value.to_string(), reason: reason.into() }
    }
}
