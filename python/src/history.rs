//! What addressing remembers of a growing sequence.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::addressing::{Addressing, Given, masked, room};
use crate::error::address;

/// What addressing remembers of one sequence, for all memory layers. In whatever pieces a sequence comes, its ids are
/// those of the whole.
///
/// Made by `Addressing.history()`. It works in forked processes.
#[pyclass(module = "engram_lm", frozen)]
#[derive(Debug)]
pub(crate) struct History {
    inner: Mutex<engram_address::History>,
    addressing: Addressing,
}

#[pymethods]
impl History {
    /// Appends tokens and gives their row ids, `[time, slots]` int64, in the chosen layer's table.
    ///
    /// `tokens`: `[time]` int32 or int64. `dead`, `starts`: bool `[time]`, as in `Addressing.row_ids`.
    /// `out`: int64 `[time, slots]`, written in place and returned; none: a new memoryview.
    ///
    /// Raises `TypeError`, `ValueError` as `Addressing.row_ids`; the history is then as it was.
    #[pyo3(signature = (tokens, dead=None, starts=None, out=None))]
    fn extend<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        dead: Option<&Bound<'py, PyAny>>,
        starts: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let index = self.addressing.index()?;
        self.extend_some(py, tokens, dead, starts, &[index], out).map(|mut results| results.remove(0))
    }

    /// Appends tokens and gives their row ids in every memory layer's table, a list of `[time, slots]` int64.
    ///
    /// Arguments and errors are those of `extend`.
    #[pyo3(signature = (tokens, dead=None, starts=None))]
    fn extend_layers<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        dead: Option<&Bound<'py, PyAny>>,
        starts: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let all: Vec<usize> = (0..self.addressing.inner.layers().len()).collect();
        self.extend_some(py, tokens, dead, starts, &all, None)
    }

    /// Takes the last `tokens` tokens back.
    ///
    /// Raises `ValueError` if there are fewer, or the history was told to keep fewer.
    fn rollback(&self, tokens: usize) -> PyResult<()> {
        self.lock().rollback(tokens).map_err(address)
    }

    /// A copy that goes its own way.
    fn fork(&self) -> Self {
        Self { inner: Mutex::new(self.lock().clone()), addressing: self.addressing.clone() }
    }

    fn __len__(&self) -> usize {
        self.lock().len()
    }

    fn __repr__(&self) -> String {
        format!("History({} tokens)", self.lock().len())
    }
}

impl History {
    pub(crate) fn new(inner: engram_address::History, addressing: Addressing) -> Self {
        Self { inner: Mutex::new(inner), addressing }
    }

    fn lock(&self) -> MutexGuard<'_, engram_address::History> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extend_some<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        dead: Option<&Bound<'py, PyAny>>,
        starts: Option<&Bound<'py, PyAny>>,
        layers: &[usize],
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let given = Given::of(tokens, dead, starts)?;
        let &[time] = &given.tokens.shape[..] else {
            return Err(PyValueError::new_err(format!(
                "`tokens` has the shape {:?}: a history is of one sequence, [time]",
                given.tokens.shape
            )));
        };
        let slots = |index: usize| self.addressing.inner.layers()[index].slots();
        let rooms = layers.iter().map(|&index| room(py, out, &[time, slots(index)]));
        let (mut arrays, results): (Vec<_>, Vec<_>) =
            rooms.collect::<PyResult<Vec<_>>>()?.into_iter().unzip();
        let (ids, dead, starts) = given.slices()?;
        arrays.iter().try_for_each(|array| given.check_apart(array))?;
        let outs: Vec<&mut [u64]> =
            arrays.iter_mut().map(|array| array.row_ids_mut()).collect::<PyResult<_>>()?;
        py.detach(|| {
            let mut history = self.lock();
            let new = history.extend(masked(&ids, dead, starts, 0..time)).map_err(address)?;
            layers
                .iter()
                .zip(outs)
                .try_for_each(|(&index, out)| new.row_ids_into(index, out).map_err(address))
        })?;
        Ok(results)
    }
}
