//! Errors of tasks, with file and line.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// What is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system failed.
    #[error("{}: cannot {action}: {source}", path.display())]
    File {
        /// The attempted action.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// An invalid line of a task file, of a file of records, or of a file of results.
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong there, and what to do.
        problem: String,
    },
    /// Values that do not fit together.
    #[error("{0}")]
    Mismatch(String),
    /// A kind of record cannot have the requested length; other kinds may.
    #[error("{0}")]
    Length(String),
    /// It was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// An error of a checkpoint or a tokenizer.
    #[error(transparent)]
    Model(#[from] engram_train::Error),
    /// An error of the model that computes answers.
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
