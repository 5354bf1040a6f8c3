//! Engram's memory for Python: addressing, tables of rows, row-sparse training.
//!
//! A thin layer over `engram-address` and `engram-store`. It adds what Python needs: arrays of other libraries in
//! place ([`array`]), no interpreter lock while rows are fetched, an error in place of a hang after a fork
//! ([`process`]), and Python's kinds of errors ([`error`]).

mod addressing;
mod array;
mod distinct;
mod error;
mod files;
mod history;
mod overlay;
mod process;
mod rows;
mod size;
mod table;
mod ticket;
mod trainable;
mod weights;

/// The compiled part of `engram_lm`, which re-exports what is for use.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use crate::addressing::{Addressing, classes_of_tokenizer};
    #[pymodule_export]
    use crate::distinct::{ReuseStats, distinct};
    #[pymodule_export]
    use crate::error::{AddressMismatch, DamagedError, FormatError};
    #[pymodule_export]
    use crate::files::{convert, table_info, verify};
    #[pymodule_export]
    use crate::history::History;
    #[pymodule_export]
    use crate::overlay::OverlayWriter;
    #[pymodule_export]
    use crate::table::Table;
    #[pymodule_export]
    use crate::ticket::{Ticket, end_callbacks};
    #[pymodule_export]
    use crate::trainable::TrainableTable;
    #[pymodule_export]
    use crate::weights::{blake3_of, blake3_of_file, initial_values};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let end = module.getattr("_end_callbacks")?;
        module.py().import("atexit")?.call_method1("register", (end,))?;
        Ok(())
    }
}
