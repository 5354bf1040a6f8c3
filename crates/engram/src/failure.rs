//! How the command ends after an error: a message and an exit status.
//!
//! | status | when |
//! |---|---|
//! | 0 | success, or the reader of the output closed it |
//! | 1 | the machine failed: a full disk, no memory, a missing device |
//! | 2 | bad input: an option, a configuration, a missing or damaged file |
//! | 130 | interrupted (Ctrl-C) |

use std::io;

use engram_address::AddressError;

use engram_data::Error as DataError;
use engram_store::StoreError;

/// Bad input.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

/// An interruption, with what is left and how to resume.
#[derive(Debug, thiserror::Error)]
#[error("interrupted{0}")]
pub(crate) struct Interrupted(pub(crate) String);

/// An error with exit status 2.
pub(crate) fn refuse<T>(problem: impl Into<String>) -> anyhow::Result<T> {
    Err(Refused(problem.into()).into())
}

/// The exit status of `error`.
pub(crate) fn status(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(io) = cause.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::BrokenPipe
        {
            return 0;
        }
        if cause.is::<Interrupted>() {
            return 130;
        }
        if cause.is::<Refused>() || cause.is::<AddressError>() {
            return 2;
        }
        if cause.is::<engram_infer::WeightError>() {
            return 2;
        }
        if let Some(error) = cause.downcast_ref::<engram_infer::TierError>() {
            return of_tiers(error);
        }
        if let Some(error) = cause.downcast_ref::<engram_infer::TableError>() {
            return of_tables(error);
        }
        if let Some(error) = cause.downcast_ref::<engram_study::Error>() {
            return of_study(error);
        }
        if let Some(error) = cause.downcast_ref::<DataError>() {
            return of_data(error);
        }
        if let Some(error) = cause.downcast_ref::<StoreError>() {
            return of_store(error);
        }
        if let Some(error) = cause.downcast_ref::<engram_train::Error>() {
            return of_training(error);
        }
        if let Some(error) = cause.downcast_ref::<engram_eval::tasks::Error>() {
            return of_tasks(error);
        }
        if let Some(error) = cause.downcast_ref::<engram_import::Error>() {
            return of_import(error);
        }
        if let Some(error) = cause.downcast_ref::<engram_config::Error>() {
            return of_config(error);
        }
    }
    1
}

fn of_tasks(error: &engram_eval::tasks::Error) -> u8 {
    use engram_eval::tasks::Error;
    match error {
        Error::Interrupted => 130,
        Error::File { source, .. } => of_input(names_no_input(source)),
        Error::Model(error) => of_training(error),
        Error::Line { .. } | Error::Mismatch(_) | Error::Length(_) => 2,
        Error::Answers(_) => 1,
    }
}

fn of_import(error: &engram_import::Error) -> u8 {
    use engram_import::Error;
    match error {
        Error::Interrupted => 130,
        Error::Read { source, .. } | Error::File { source, .. } => of_input(names_no_input(source)),
        Error::Hub { is_input, .. } => of_input(*is_input),
        Error::NotFinite { .. } => 1,
        Error::Config(error) => of_config(error),
        Error::Tokenizer(error) => of_data(error),
        Error::Store(error) => of_store(error),
        _ => 2,
    }
}

fn of_training(error: &engram_train::Error) -> u8 {
    use engram_train::Error;
    match error {
        Error::Interrupted => 130,
        Error::Diverged { .. } | Error::NotFinite(_) => 1,
        Error::File { source, .. } => of_input(names_no_input(source)),
        Error::Data(error) => of_data(error),
        Error::Store(error) => of_store(error),
        Error::Import(error) => of_import(error),
        Error::Config(error) => of_config(error),
        _ => 2,
    }
}

fn of_config(error: &engram_config::Error) -> u8 {
    match error {
        engram_config::Error::Read { source, .. } => of_input(names_no_input(source)),
        _ => 2,
    }
}

fn of_study(error: &engram_study::Error) -> u8 {
    use engram_study::Error;
    match error {
        Error::Interrupted => 130,
        Error::File { source, .. } => of_input(names_no_input(source)),
        Error::Run { source, .. } | Error::Train(source) => of_training(source),
        Error::Inconclusive(_) => 1,
        Error::Arm { .. } | Error::UnknownArm { .. } | Error::Folder { .. } | Error::Results { .. } => 2,
    }
}

fn of_store(error: &StoreError) -> u8 {
    match error {
        StoreError::Interrupted => 130,
        StoreError::Io { source, .. } => of_input(names_no_input(source)),
        StoreError::Memory { .. } | StoreError::LostMemory { .. } | StoreError::Cluster { .. } => 1,
        _ => 2,
    }
}

fn of_tiers(error: &engram_infer::TierError) -> u8 {
    match error {
        engram_infer::TierError::Store(error) => of_store(error),
        _ => 2,
    }
}

fn of_tables(error: &engram_infer::TableError) -> u8 {
    match error {
        engram_infer::TableError::Store(error) => of_store(error),
        _ => 2,
    }
}

fn of_data(error: &DataError) -> u8 {
    match error {
        DataError::Interrupted => 130,
        DataError::Paused { cause, .. } => of_data(cause),
        error => of_input(error.is_input()),
    }
}

fn of_input(input: bool) -> u8 {
    if input { 2 } else { 1 }
}

/// Whether the system refused because the path does not exist or is of the wrong kind.
fn names_no_input(error: &io::Error) -> bool {
    use io::ErrorKind::{
        AlreadyExists, DirectoryNotEmpty, InvalidData, InvalidFilename, IsADirectory, NotADirectory,
        NotFound, PermissionDenied, ReadOnlyFilesystem,
    };
    matches!(
        error.kind(),
        NotFound
            | NotADirectory
            | IsADirectory
            | InvalidData
            | InvalidFilename
            | AlreadyExists
            | DirectoryNotEmpty
            | PermissionDenied
            | ReadOnlyFilesystem
    )
}

/// The message of `error`: what happened, then each cause that the text does not already mention.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn statuses() {
        assert_eq!(status(&anyhow!("the machine refused")), 1);
        assert_eq!(status(&refuse::<()>("no such layer").unwrap_err()), 2);
        assert_eq!(status(&refuse::<()>("no such layer").context("while looking").unwrap_err()), 2);
        assert_eq!(status(&Interrupted(String::new()).into()), 130);
        assert_eq!(status(&StoreError::Interrupted.into()), 130);
        let closed = || Err::<(), _>(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(status(&closed().context("writing").unwrap_err()), 0);
        let full = || Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(status(&full().context("writing").unwrap_err()), 1);
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow!("disk full").context("cannot write x: disk full").context("saving");
        assert_eq!(message(&error), "saving: cannot write x: disk full");
    }
}
