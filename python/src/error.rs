//! Rust's errors as Python's.

use std::io::ErrorKind;

use engram_address::AddressError;
use engram_store::StoreError;
use pyo3::exceptions::{
    PyFileNotFoundError, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyPermissionError, PyRuntimeError,
    PyTimeoutError, PyValueError,
};
use pyo3::prelude::*;

pyo3::create_exception!(
    engram_lm,
    FormatError,
    PyValueError,
    "A file is not of the kind that is needed, or of a version that is not read."
);
pyo3::create_exception!(
    engram_lm,
    DamagedError,
    FormatError,
    "A file was right once; some of its bytes have changed or are missing. Restore it from a copy."
);
pyo3::create_exception!(
    engram_lm,
    AddressMismatch,
    PyValueError,
    "Rows belong to another addressing, layer or base than the one at hand."
);

/// What an error of the addressing is in Python.
pub(crate) fn address(error: AddressError) -> PyErr {
    let text = error.to_string();
    match error {
        AddressError::Identity(_) => AddressMismatch::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

/// What an error of the store is in Python.
pub(crate) fn store(error: StoreError) -> PyErr {
    let text = error.to_string();
    match error {
        StoreError::Io { source, .. } => io(source.kind(), text),
        StoreError::Memory { .. } => PyMemoryError::new_err(text),
        StoreError::RowUnreadable { .. } | StoreError::Changed { .. } | StoreError::LostMemory { .. } => {
            PyOSError::new_err(text)
        }
        StoreError::TooSlow { .. } => PyTimeoutError::new_err(text),
        StoreError::Damaged { .. } => DamagedError::new_err(text),
        StoreError::NotATable { .. }
        | StoreError::NotAnOverlay { .. }
        | StoreError::NotACheckpoint { .. } => FormatError::new_err(text),
        StoreError::WrongOrigin { .. } | StoreError::WrongBase { .. } => AddressMismatch::new_err(text),
        StoreError::RowOutOfRange { .. }
        | StoreError::RowsNotAscending { .. }
        | StoreError::GradientNotFinite { .. }
        | StoreError::WrongLength { .. }
        | StoreError::InvalidSetting { .. } => PyValueError::new_err(text),
        StoreError::Interrupted => PyKeyboardInterrupt::new_err(text),
        _ => PyRuntimeError::new_err(text),
    }
}

fn io(kind: ErrorKind, text: String) -> PyErr {
    match kind {
        ErrorKind::NotFound => PyFileNotFoundError::new_err(text),
        ErrorKind::PermissionDenied => PyPermissionError::new_err(text),
        _ => PyOSError::new_err(text),
    }
}
