//! What can go wrong between a row id and its row, said so that a person can act on it.

use std::path::{Path, PathBuf};

use crate::origin::{ContentHash, TableOrigin};

/// The store's result.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// A failure of the store. No variant is ever softened into a default.
///
/// A refused argument changes nothing. A reader or writer that fails in the middle of its work is
/// [poisoned](Self::Poisoned): what it had done so far is not to be relied on, and no later call succeeds.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A batch names a row that the table does not have.
    #[error(
        "row {row}, at position {position} of the batch, is outside the table of {rows} rows; these ids were \
         made for another table: compare the identity of the addressing with the table's"
    )]
    RowOutOfRange {
        /// The id that was asked for.
        row: u64,
        /// Its index in the batch.
        position: usize,
        /// How many rows the table has.
        rows: u64,
    },

    /// Rows to update were repeated or out of order.
    #[error(
        "row {row}, at position {position} of the update, does not come after row {before} before it; rows \
         to update must be distinct and ascending: pass DistinctRows::ids"
    )]
    RowsNotAscending {
        /// The offending id.
        row: u64,
        /// Its index in the batch.
        position: usize,
        /// The id before it.
        before: u64,
    },

    /// A gradient would have poisoned its row for good.
    #[error(
        "the gradient of row {row}, at position {position} of the update, holds {value}; a row would keep it \
         forever: find out where it arose, or skip this step"
    )]
    GradientNotFinite {
        /// The row's id.
        row: u64,
        /// Its index in the update.
        position: usize,
        /// The first such value of the row.
        value: f32,
    },

    /// A gradient is finite, but its square is not, or not in sum over the row.
    #[error(
        "the gradient of row {row}, at position {position} of the update, holds {value:e}, but the optimiser squares \
         gradients, which overflows above {largest:e}; clip gradients, or skip this step"
    )]
    GradientTooLarge {
        /// The row's id.
        row: u64,
        /// Its index in the update.
        position: usize,
        /// The first such value of the row.
        value: f32,
        /// The largest magnitude that a table of this width takes.
        largest: f32,
    },

    /// A row, or its optimiser state, is NaN or infinite.
    #[error(
        "{what} of row {row} holds {value}, which training would keep forever; resume from an older checkpoint with a \
         lower rate"
    )]
    StateNotFinite {
        /// Values, or which state.
        what: &'static str,
        /// The row's id.
        row: u64,
        /// The first such value of the row.
        value: f32,
    },

    /// A buffer does not have the length that its rows need.
    #[error("{what}: {found} values where {expected} are needed; size it as rows times width")]
    WrongLength {
        /// Which buffer.
        what: &'static str,
        /// Values needed.
        expected: usize,
        /// Values found.
        found: usize,
    },

    /// A setting is outside what it may be.
    #[error("{setting} is {value}, but must be {rule}")]
    InvalidSetting {
        /// The setting's name.
        setting: &'static str,
        /// What it was.
        value: String,
        /// What it must be.
        rule: &'static str,
    },

    /// The system would not give the memory that a table needs.
    #[error(
        "cannot reserve {bytes} bytes of {place} for a table: {source}; use fewer or narrower rows, or \
         another Storage"
    )]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// RAM, or the directory of the mapped file.
        place: String,
        /// The system's answer.
        source: std::io::Error,
    },

    /// The file system refused an operation.
    #[error("{}: cannot {action} at byte {offset}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// Where in the file.
        offset: u64,
        /// The system's answer.
        source: std::io::Error,
    },

    /// A row could not be read.
    #[error(
        "{}: cannot read row {row}, at byte {offset}: {problem}; restore the file from a copy and open it again",
        path.display()
    )]
    RowUnreadable {
        /// The file.
        path: PathBuf,
        /// The row, or the first of several that are read together.
        row: u64,
        /// Where in the file.
        offset: u64,
        /// What is wrong.
        problem: String,
    },

    /// The file is no longer the one that was opened.
    #[error(
        "{}: changed while it was in use ({change}); rows read from it are not to be trusted: put the file back \
         and open it again. Replace tables by renaming a new file over them",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different.
        change: String,
    },

    /// A reader or writer was used after it failed.
    #[error(
        "{}: an earlier error ended this reading or writing; begin it again from the start",
        path.display()
    )]
    Poisoned {
        /// The file that was read, or was to be written.
        path: PathBuf,
    },

    /// The disk under a scratch file failed.
    #[error(
        "the disk no longer holds byte {offset} of a table in a mapped scratch file; load the last checkpoint, \
         with Storage::MappedIn on another disk"
    )]
    LostMemory {
        /// Where in the scratch file.
        offset: u64,
    },

    /// Something took longer than it may.
    #[error("{what}: not there within {limit:?}; find out what is slow, or allow it more time")]
    TooSlow {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: std::time::Duration,
    },

    /// The code that reads rows panicked on a thread that fetched ahead.
    #[error("reading rows panicked: {message}; this is an error in the program, not in its data")]
    SourcePanicked {
        /// What the panic said.
        message: String,
    },

    /// Rows were still waiting to be fetched when their prefetcher went.
    #[error("the prefetcher was dropped before these rows were fetched; keep it as long as its tickets")]
    PrefetcherDropped,

    /// The file is not a table that this version can read.
    #[error("{}: not a readable table, at byte {offset}: {problem}", path.display())]
    NotATable {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong, and what to do.
        problem: String,
    },

    /// The file was a table, and some of its bytes changed or went missing.
    #[error(
        "{}: damaged at byte {offset}: {problem}; restore it from a copy or an older checkpoint",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the damage, or the block that holds it, begins.
        offset: u64,
        /// What is wrong.
        problem: String,
    },

    /// The file is not an overlay that this version can read, or not one for this table.
    #[error("{}: not a readable overlay, at byte {offset}: {problem}", path.display())]
    NotAnOverlay {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong, and what to do.
        problem: String,
    },

    /// The overlay was made for another table, or for another overlay below it.
    #[error(
        "{}: an overlay for the content {found}, but what lies below has the content {expected}; use the table \
         that it was made for, and overlays in the order in which they were made",
        path.display()
    )]
    WrongBase {
        /// The overlay.
        path: PathBuf,
        /// The content of what it was put on.
        expected: ContentHash,
        /// The content that it was made for.
        found: ContentHash,
    },

    /// The safetensors file or its index is malformed, or has not the tensors that are needed.
    #[error("{}: not a readable checkpoint, at byte {offset}: {problem}", path.display())]
    NotACheckpoint {
        /// The file or folder.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What is wrong, and what is needed.
        problem: String,
    },

    /// A cluster that holds rows, or one of its nodes, did not do its part.
    #[error("{place}: {problem}")]
    Cluster {
        /// The node, or the nodes that were named when the cluster was opened.
        place: String,
        /// What is wrong, with the row and key if there is one, and what to do.
        problem: String,
    },

    /// Whoever was told of the progress asked to stop.
    #[error("interrupted")]
    Interrupted,

    /// The table's rows were placed by another addressing, or belong to another layer.
    #[error(
        "{}: holds rows of {found}, but {expected} is needed; use the table that was made with this \
         tokenizer, seed and configuration",
        path.display()
    )]
    WrongOrigin {
        /// The file.
        path: PathBuf,
        /// What the caller asked for.
        expected: TableOrigin,
        /// What the file holds.
        found: TableOrigin,
    },
}

impl StoreError {
    pub(crate) fn io(path: &Path, action: &'static str, offset: u64) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, offset, source }
    }

    pub(crate) fn not_a_table(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::NotATable { path: path.to_owned(), offset, problem: problem.into() }
    }

    pub(crate) fn not_a_checkpoint(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::NotACheckpoint { path: path.to_owned(), offset, problem: problem.into() }
    }

    pub(crate) fn not_an_overlay(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::NotAnOverlay { path: path.to_owned(), offset, problem: problem.into() }
    }

    pub(crate) fn damaged(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), offset, problem: problem.into() }
    }

    #[cfg(feature = "redis")]
    pub(crate) fn cluster(place: impl ToString, problem: impl Into<String>) -> Self {
        Self::Cluster { place: place.to_string(), problem: problem.into() }
    }

    pub(crate) fn setting(setting: &'static str, value: impl ToString, rule: &'static str) -> Self {
        Self::InvalidSetting { setting, value: value.to_string(), rule }
    }
}

/// Fails unless `found == expected`, naming the buffer.
pub(crate) fn check_length(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(StoreError::WrongLength { what, expected, found }) }
}

/// Fails on the first id that is not a row of a table of `rows` rows.
pub(crate) fn check_rows(ids: &[u64], rows: u64) -> Result<()> {
    // One branch-free pass finds that all is well, which it nearly always is.
    if ids.iter().fold(0, |largest, &id| largest.max(id)) < rows {
        return Ok(());
    }
    match ids.iter().position(|&id| id >= rows) {
        Some(position) => Err(StoreError::RowOutOfRange { row: ids[position], position, rows }),
        None => Ok(()),
    }
}
