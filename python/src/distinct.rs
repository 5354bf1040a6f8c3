//! The distinct rows of a batch, and how a cache would do.

use std::sync::{Mutex, MutexGuard, PoisonError};

use engram_store::{DistinctRows, ReuseDistances};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::array::{Array, new_array};

/// The distinct ids of a batch, ascending, and which of them each occurrence is: `ids` int64 `[...]` to
/// (int64 `[distinct]`, int64 `[...]`). About half of the rows that a batch of text asks for are duplicates.
///
/// Raises `TypeError`, `ValueError` if `ids` are not row ids.
#[pyfunction]
pub(crate) fn distinct<'py>(
    py: Python<'py>,
    ids: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let array = Array::of("ids", ids)?;
    let list = array.row_ids()?;
    let distinct = py.detach(|| DistinctRows::of(list));
    let (mut ids, ids_view) = new_array(py, "distinct", "q", 8, &[distinct.len()])?;
    let (mut index, index_view) = new_array(py, "index", "q", 8, &array.shape)?;
    ids.row_ids_mut()?.copy_from_slice(distinct.ids());
    index.row_ids_mut()?.iter_mut().zip(distinct.index()).for_each(|(out, &place)| *out = u64::from(place));
    Ok((ids_view, index_view))
}

/// How often a cache of any size would have had the rows that were looked up: least recently used, from reuse
/// distances over a sample of the rows.
#[pyclass(module = "engram_lm", frozen)]
pub(crate) struct ReuseStats {
    inner: Mutex<ReuseDistances>,
}

#[pymethods]
impl ReuseStats {
    /// `share`: of rows that are followed, above 0 and at most 1.
    #[new]
    #[pyo3(signature = (share=1.0))]
    fn new(share: f64) -> PyResult<Self> {
        if !(share > 0.0 && share <= 1.0) {
            return Err(PyValueError::new_err(format!(
                "`share` is {share}, but must be above 0 and at most 1"
            )));
        }
        Ok(Self { inner: Mutex::new(ReuseDistances::new(share)) })
    }

    /// Counts a batch: `ids` int64 `[...]`.
    ///
    /// Raises `TypeError`, `ValueError` if `ids` are not row ids.
    fn look_up(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let array = Array::of("ids", ids)?;
        let list = array.row_ids()?;
        py.detach(|| self.lock().look_up(list));
        Ok(())
    }

    /// Lookups so far.
    #[getter]
    fn lookups(&self) -> u64 {
        self.lock().lookups()
    }

    /// The share of lookups, 0 to 1, that a cache of `rows` rows would have had.
    fn hit_rate(&self, rows: u64) -> f64 {
        self.lock().hit_rate(rows)
    }
}

impl ReuseStats {
    fn lock(&self) -> MutexGuard<'_, ReuseDistances> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
