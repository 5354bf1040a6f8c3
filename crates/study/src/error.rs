use std::io;
use std::path::{Path, PathBuf};

/// Result of a study.
pub type Result<T> = std::result::Result<T, Error>;

/// What can be wrong with a study: what, where, and what to do.
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
    /// An arm that is no run, or of which no configuration meets the budget.
    #[error("arm `{arm}`: {problem}")]
    Arm {
        /// Its name.
        arm: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An arm that was asked for and is not there.
    #[error("no arm `{name}` in this study; its arms are {there}")]
    UnknownArm {
        /// What was asked for.
        name: String,
        /// Those that are there.
        there: String,
    },
    /// A folder that holds something else.
    #[error("{}: {problem}; name another folder", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What it holds.
        problem: String,
    },
    /// A line of results that cannot be read.
    #[error("{}:{line}: {problem}; remove the line, and its run is made again", path.display())]
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
        /// Which.
        run: String,
        /// Why.
        #[source]
        source: Box<engram_train::Error>,
    },
    /// Nothing can be said: too few runs came to an end.
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
