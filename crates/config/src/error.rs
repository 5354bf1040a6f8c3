//! Errors of configurations.

use std::io;
use std::path::PathBuf;

/// Result of reading a configuration file.
pub type Result<T> = std::result::Result<T, Error>;

/// A configuration file cannot be read or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: cannot read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A key or value is invalid.
    #[error("{}:{line}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
}

impl Error {
    /// Whether the input is at fault, not the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Read { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData)
            }
            Self::Config { .. } => true,
        }
    }
}

/// An invalid configuration value: its key, and why it is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{key}`: {reason}")]
pub struct ConfigError {
    /// Dotted path of the key, such as `model.attention.heads`.
    pub key: String,
    /// What is wrong, and what is valid.
    pub reason: String,
}

impl ConfigError {
    /// An error at `key`.
    pub fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { key: key.into(), reason: reason.into() }
    }
}

/// Refuses a size of 0.
pub(crate) fn positive(key: &str, value: usize) -> std::result::Result<(), ConfigError> {
    if value == 0 { Err(ConfigError::new(key, "is 0: must be at least 1")) } else { Ok(()) }
}
