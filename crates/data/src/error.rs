//! What can go wrong between a corpus on disk and a batch of tokens, said so that it can be acted on.

use std::path::{Path, PathBuf};

/// A result whose error is [`Error`].
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of corpora, tokenizers, token shards, samplers or schedules: what was wrong, where, and what to
/// do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The operating system refused to write (a full disk, for one).
    #[error("cannot write {}: {source}; nothing was left under that name", path.display())]
    Write {
        /// The file or folder that was to be written.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Something already has the name of the output.
    #[error("{} already exists; remove it or choose another name", path.display())]
    Exists {
        /// The name that is taken.
        path: PathBuf,
    },
    /// The progress callback asked to stop; nothing was left behind.
    #[error("interrupted; nothing was left half-written")]
    Interrupted,

    /// A file whose name says nothing about its format.
    #[error(
        "{}: unknown format; a corpus is made of .txt, .jsonl (each also .zst or .gz) and .parquet files",
        path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// No document, or only documents without text.
    #[error("the corpus is empty: {what}")]
    EmptyCorpus {
        /// What was looked through.
        what: String,
    },
    /// Bytes that are not UTF-8.
    #[error("{}: {place}invalid UTF-8 at byte {offset}; convert the text to UTF-8", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// "line 3: " or "row group 0, row 7: "; empty when the document is the file.
        place: String,
        /// Offset of the first bad byte in the file's text (after decompression), or in the text of a Parquet
        /// row.
        offset: u64,
    },
    /// A file in UTF-16.
    #[error(
        "{}: the text is UTF-16, by the mark it begins with; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
        path.display()
    )]
    Utf16 {
        /// The file.
        path: PathBuf,
    },
    /// Half of a UTF-16 pair in the text of a JSON record: no character.
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
    /// A document that does not fit memory together with its tokens.
    #[error(
        "{}: {place}more than {limit} bytes of text in one document; split it into documents, one a line of JSON",
        path.display()
    )]
    LongDocument {
        /// The file.
        path: PathBuf,
        /// "line 3: "; empty when the document is the file.
        place: String,
        /// Most bytes of a document.
        limit: u64,
    },
    /// A Parquet file without a column of text under the name asked for.
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
    /// A record without the text field, or with something that is not text in it.
    #[error("{}: {place}: {reason}", path.display())]
    MissingText {
        /// The file.
        path: PathBuf,
        /// "line 3" or "row group 0, row 7".
        place: String,
        /// What was found in place of the text.
        reason: String,
    },
    /// A compressed file that ends before its contents do.
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
        /// The decoder's reason.
        source: std::io::Error,
    },
    /// A Parquet file that cannot be read.
    #[error("{}: {place}: {reason}", path.display())]
    MalformedParquet {
        /// The file.
        path: PathBuf,
        /// "footer" or "row group 0, row 7".
        place: String,
        /// The reader's reason.
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
    /// Tokens, or a text, that the tokenizer cannot turn into the other.
    #[error("the tokenizer failed: {reason}")]
    Tokenize {
        /// The tokenizer's reason.
        reason: String,
    },

    /// A file that is not a token shard, or not a whole one.
    #[error("{}: {reason}", path.display())]
    MalformedShard {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// Token shards made with another tokenizer.
    #[error(
        "{}: its tokens were made with tokenizer {found}, not with {expected}; prepare the data again",
        path.display()
    )]
    WrongTokenizer {
        /// The shards.
        path: PathBuf,
        /// Hash of the tokenizer at hand.
        expected: String,
        /// Hash of the tokenizer that made the shards.
        found: String,
    },

    /// An option outside its range.
    #[error("{key} = {value}: {reason}")]
    InvalidOption {
        /// Name of the option, as in the configuration.
        key: &'static str,
        /// The value given.
        value: String,
        /// The range, and why.
        reason: String,
    },
}

/// Whether the system refused because a name leads to nothing that can be used as asked: the name is at fault, not
/// the machine.
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
    /// Whether the cause is in what was given (usage, configuration, input), not in the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Interrupted => false,
            Self::Read { source, .. } | Self::Write { source, .. } => names_nothing(source),
            _ => true,
        }
    }

    /// Whether one record is at fault, so that those after it can still be read.
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
