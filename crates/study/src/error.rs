use std::io;
use std::path::{Path, PathBuf};

/// Result of a study.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of a study: what is wrong, where, and what to do.
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
    /// An arm is invalid, or no configuration meets its budget.
    #[error("arm `{arm}`: {problem}")]
    Arm {
        /// Its name.
        arm: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The requested arm does not exist.
    #[error("this study has no arm `{name}`; its arms are {there}")]
    UnknownArm {
        /// The requested name.
        name: String,
        /// The existing arms.
        there: String,
    },
    /// A folder with other contents.
    #[error("{}: {problem}; name another folder", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Its contents.
        problem: String,
    },
    /// A line of results that cannot be read.
    #[error("{}:{line}: {problem}; remove the line to repeat its run", path.display())]
    Results {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A run that failed.
    #[error("run {run}: {source}")]
    Run {
        /// The run.
        run: String,
        /// The cause.
        #[source]
        source: Box<engram_train::Error>,
    },
    /// Too few runs finished for any finding.
    #[error("{0}")]
    Inconclusive(String),
    /// It was asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The configuration or the data cannot be used.
    #[error(transparent)]
    Train(Box<engram_train::Error>),
}

impl From<engram_train::Error> for Error {
    fn from(error: engram_train::Error) -> Self {
        Self::Train(Box::new(error))
    }
}

impl From<engram_config::Error> for Error {
    fn from(error: engram_config::Error) -> Self {
        engram_train::Error::from(error).into()
    }
}

impl Error {
    pub(crate) fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn arm(arm: &str, problem: impl std::fmt::Display) -> Self {
        Self::Arm { arm: arm.to_owned(), problem: problem.to_string() }
    }
}
