//! What can go wrong between a corpus and a trained checkpoint.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
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
    /// A file of weights or state that does not fit.
    #[error("{source_name}: {problem}")]
    Weights {
        /// The file.
        source_name: String,
        /// What does not fit.
        problem: String,
    },
    /// A run that would overwrite another.
    #[error("{}: already holds a run; resume it with --resume, or name another folder", path.display())]
    RunExists {
        /// The run's folder.
        path: PathBuf,
    },
    /// A run that another process works on.
    #[error("{}: {holder} trains here; wait until it is done, or name another folder", path.display())]
    RunLocked {
        /// The run's folder.
        path: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// Losses or gradients that are not numbers any more.
    #[error(
        "training diverged at step {step}: too many steps in a row had a loss or gradient that is not finite \
         (`train.skip_limit`); resume from the last checkpoint with lower rates (`train.optimizer`), or a longer warm-up"
    )]
    Diverged {
        /// The step.
        step: u64,
    },
    /// A line of a file that cannot be used.
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A result that is not a number.
    #[error(
        "{0} is not finite: the model's weights are damaged, or its training diverged; take an earlier checkpoint"
    )]
    NotFinite(String),
    /// A value that does not fit what it is used with.
    #[error("{0}")]
    Mismatch(String),
    /// It was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Corpora, tokenizers or token shards that cannot be used.
    #[error(transparent)]
    Data(#[from] engram_data::Error),
    /// Addressing refused.
    #[error(transparent)]
    Address(#[from] engram_address::AddressError),
    /// The row store refused.
    #[error(transparent)]
    Store(#[from] engram_store::StoreError),
    /// A configuration file that cannot be used.
    #[error(transparent)]
    Config(#[from] engram_config::Error),
    /// A checkpoint that cannot be read or written.
    #[error(transparent)]
    Import(#[from] engram_import::Error),
    /// A configuration value that cannot be, outside of a file.
    #[error(transparent)]
    Value(#[from] engram_config::ConfigError),
}

impl Error {
    /// Whether the cause is in what was given (usage, configuration, input), not in the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::File { source, .. } => {
                use io::ErrorKind::{
                    IsADirectory, NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem,
                };
                matches!(
                    source.kind(),
                    NotFound | NotADirectory | IsADirectory | PermissionDenied | ReadOnlyFilesystem
                )
            }
            Self::Diverged { .. } | Self::NotFinite(_) | Self::Interrupted => false,
            Self::Data(error) => error.is_input(),
            Self::Config(error) => error.is_input(),
            Self::Import(error) => error.is_input(),
            Self::Store(error) => {
                use engram_store::StoreError::{Io, Memory};
                !matches!(error, Io { .. } | Memory { .. })
            }
            _ => true,
        }
    }

    pub(crate) fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn weights(source: impl AsRef<Path>, problem: impl Display) -> Self {
        Self::Weights { source_name: source.as_ref().display().to_string(), problem: problem.to_string() }
    }
}
