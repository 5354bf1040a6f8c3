//! What can be wrong with a model file from outside.

use std::fmt::Display;
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
    /// The file system refused something else.
    #[error("{}: cannot {action}: {source}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file of a checkpoint that is not as it was written.
    #[error(
        "{}: damaged: {problem}; restore it from a copy, or move its folder {} away: the run then goes on from \
         the checkpoint before it, if there is one",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How one can tell.
        problem: String,
    },
    /// Values that nothing can go on from, and that are therefore not written.
    #[error(
        "{}: not written: `{tensor}` has a value that is not finite ({value}, number {at}); earlier checkpoints stay",
        path.display()
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The value's number in it, from 0.
        at: usize,
        /// The value.
        value: f32,
    },
    /// No checkpoint where one was looked for.
    #[error("{}: no complete checkpoint here; train first, or name the folder of a run", path.display())]
    NoCheckpoint {
        /// Where.
        path: PathBuf,
    },
    /// The hub cannot be reached, or refuses.
    #[error("{url}: {problem}")]
    Hub {
        /// What was asked for.
        url: String,
        /// Why it does not come.
        problem: String,
        /// Whether the cause is in what was asked for.
        is_input: bool,
    },
    /// Writing was interrupted.
    #[error("interrupted")]
    Interrupted,
    /// A configuration file that cannot be used.
    #[error(transparent)]
    Config(#[from] engram_config::Error),
    /// A tokenizer that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] engram_data::Error),
    /// A memory that does not fit the tokenizer.
    #[error("{}: {source}", path.display())]
    Address {
        /// Where the memory is described.
        path: PathBuf,
        /// Why it does not fit.
        source: engram_address::AddressError,
    },
    /// A table or an overlay that cannot be used.
    #[error(transparent)]
    Store(#[from] engram_store::StoreError),
}

impl Error {
    /// Whether the cause is in what was given (usage, configuration, input), not in the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::File { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Interrupted | Self::NotFinite { .. } => false,
            Self::Hub { is_input, .. } => *is_input,
            Self::Config(error) => error.is_input(),
            Self::Tokenizer(error) => error.is_input(),
            Self::Store(engram_store::StoreError::Io { source, .. }) => {
                source.kind() == io::ErrorKind::NotFound
            }
            Self::Store(engram_store::StoreError::Memory { .. }) => false,
            _ => true,
        }
    }

    pub(crate) fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Read { path, source }
    }

    pub(crate) fn model(path: &Path, problem: impl Display) -> Self {
        Self::Model { path: path.to_owned(), problem: problem.to_string() }
    }
}
