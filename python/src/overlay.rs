//! Changed rows on top of a table.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

use crate::array::Array;
use crate::error::store;

/// Collects changed rows for a small file that lies on top of a table: a fine-tuned or edited memory.
///
/// Made by `Table.overlay_writer()`; the file is for that table, with its overlays, and is refused on any other.
#[pyclass(module = "engram_lm", frozen)]
pub(crate) struct OverlayWriter {
    writer: Mutex<engram_store::OverlayWriter>,
    width: usize,
    row_bytes: usize,
}

#[pymethods]
impl OverlayWriter {
    /// Sets rows: `ids` int64 `[n]`, `rows` float32 `[n, width]`, encoded in the table's format. A row that is set
    /// twice has the later values.
    ///
    /// Raises `TypeError`, `ValueError` for wrong arrays or an id that is not a row; rows before it are then set.
    fn set(&self, ids: &Bound<'_, PyAny>, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let (ids, rows) = (Array::of("ids", ids)?, Array::of("rows", rows)?);
        rows.check_shape(&[&ids.shape[..], &[self.width]].concat())?;
        let mut writer = self.lock();
        let rows = rows.values()?.chunks_exact(self.width);
        ids.row_ids()?.iter().zip(rows).try_for_each(|(&id, row)| writer.set(id, row).map_err(store))
    }

    /// Sets rows as they are stored: `ids` int64 `[n]`, `rows` uint8 `[n, row_bytes]`.
    ///
    /// Raises as `set`.
    fn set_stored(&self, ids: &Bound<'_, PyAny>, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let (ids, rows) = (Array::of("ids", ids)?, Array::of("rows", rows)?);
        rows.check_shape(&[&ids.shape[..], &[self.row_bytes]].concat())?;
        let mut writer = self.lock();
        let rows = rows.bytes()?.chunks_exact(self.row_bytes);
        ids.row_ids()?.iter().zip(rows).try_for_each(|(&id, row)| writer.set_encoded(id, row).map_err(store))
    }

    /// Writes the overlay file at `path`, whole or not at all; gives its content hash.
    ///
    /// Raises `OSError` if the file system refuses.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<String> {
        py.detach(|| self.lock().save(&path).map_err(store)).map(|content| content.to_string())
    }

    fn __len__(&self) -> usize {
        self.lock().len()
    }

    fn __repr__(&self) -> String {
        format!("OverlayWriter({} rows)", self.lock().len())
    }
}

impl OverlayWriter {
    pub(crate) fn new(writer: engram_store::OverlayWriter, width: usize, row_bytes: usize) -> Self {
        Self { writer: Mutex::new(writer), width, row_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, engram_store::OverlayWriter> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
