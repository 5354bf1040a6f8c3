//! What can be wrong with a model file from outside.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// An error that names the file and what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file that is damaged, or holds what this reader does not know.
    #[error("{}: {problem}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        problem: String,
    },
    /// A checkpoint that cannot be made of it.
    #[error(transparent)]
    Checkpoint(#[from] engram_train::Error),
    /// A tokenizer that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] engram_train::DataError),
}

impl Error {
    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn model(path: &Path, problem: impl Into<String>) -> Self {
        Self::Model { path: path.to_owned(), problem: problem.into() }
    }
}
