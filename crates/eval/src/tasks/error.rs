//! What can go wrong between a task file and an answer, with the file and line where it did.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// An error that says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line of a task file, of a file of records, or of a file of results that cannot be used.
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong there, and what to do.
        problem: String,
    },
    /// Values that do not fit each other.
    #[error("{0}")]
    Mismatch(String),
    /// A kind of record that cannot have a length: others can.
    #[error("{0}")]
    Length(String),
    /// It was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A checkpoint or a tokenizer refused.
    #[error(transparent)]
    Model(#[from] engram_train::Error),
    /// What else computes a model's answers refused.
    #[error(transparent)]
    Answers(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    pub(crate) fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn line(path: &Path, line: usize, problem: impl Into<String>) -> Self {
        Self::Line { path: path.to_owned(), line, problem: problem.into() }
    }
}
