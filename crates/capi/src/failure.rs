//! What went wrong, as a number and in words.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use engram_store::StoreError;

/// The result of every function but `engram_last_error`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, clippy::enum_variant_names, clippy::upper_case_acronyms)]
pub enum engram_status {
    /// Success.
    ENGRAM_OK = 0,
    /// A pointer is null, a number or size is wrong, or a row is not in the table.
    ENGRAM_INVALID = 1,
    /// No table or ticket has this handle: it was closed, taken, or never opened.
    ENGRAM_NO_HANDLE = 2,
    /// The file is not a table, or a table of another addressing.
    ENGRAM_NOT_THIS_TABLE = 3,
    /// A file or the disk failed, or the file was changed while it was open.
    ENGRAM_IO = 4,
    /// No memory, or no room for more rows to prefetch now.
    ENGRAM_NO_ROOM = 5,
    /// Rows did not arrive in time.
    ENGRAM_TOO_SLOW = 6,
    /// A defect of this library.
    ENGRAM_DEFECT = 7,
}

use engram_status::*;

/// Why a call failed.
pub(crate) struct Failure {
    status: engram_status,
    text: String,
}

impl Failure {
    pub(crate) fn new(status: engram_status, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(ENGRAM_INVALID, text)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::RowOutOfRange { .. }
            | StoreError::WrongLength { .. }
            | StoreError::InvalidSetting { .. } => ENGRAM_INVALID,
            StoreError::NotATable { .. } | StoreError::WrongOrigin { .. } => ENGRAM_NOT_THIS_TABLE,
            StoreError::Memory { .. } => ENGRAM_NO_ROOM,
            StoreError::TooSlow { .. } => ENGRAM_TOO_SLOW,
            StoreError::SourcePanicked { .. } => ENGRAM_DEFECT,
            _ => ENGRAM_IO,
        };
        Self { status, text: error.to_string() }
    }
}

thread_local!(static LAST: RefCell<String> = const { RefCell::new(String::new()) });

/// Does `work`; what it fails with, or panics with, becomes the thread's last error.
pub(crate) fn guarded(work: impl FnOnce() -> Result<(), Failure>) -> engram_status {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return ENGRAM_OK,
        Ok(Err(failure)) => failure,
        Err(_) => {
            Failure::new(ENGRAM_DEFECT, "the library panicked; this is an error in it, please report it")
        }
    };
    LAST.set(failure.text);
    failure.status
}

/// The words of this thread's last failure.
pub(crate) fn last() -> String {
    LAST.with_borrow(String::clone)
}
