//! Tables whose rows learn.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use engram_address::AddressIdentity;
use engram_store::{DistinctRows, RowInit, RowOptimizer, RowSource, Storage, TableHeader, TableOrigin};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::addressing::Addressing;
use crate::array::Array;
use crate::error::store;
use crate::process::{Owned, claim};
use crate::rows::{gather, lookup_into};

/// A table of float32 rows with the state of a row-sparse optimiser.
///
/// An update reads and writes the rows that it names and nothing else; no gradient is ever the size of the table.
/// Reading and updating let go of the interpreter; updates wait for reads that have begun and the other way round. A
/// forked child gets `RuntimeError`.
#[pyclass(module = "engram_lm", frozen)]
pub(crate) struct TrainableTable {
    inner: Owned<RwLock<engram_store::TrainableTable>>,
    rows: u64,
    width: usize,
    optimizer: RowOptimizer,
    origin: TableOrigin,
}

#[pymethods]
impl TrainableTable {
    /// A new table at step 0.
    ///
    /// `width`, `rows`: its shape. With an `addressing`, `rows` may be left out; given, it must be the chosen layer's.
    /// `addressing`: whose chosen layer the rows belong to, so that the file is refused by any other; none: the rows
    /// belong to nothing, such as those of another embedding table.
    /// `optimizer`: one of `engram_lm.optimizers`, or its name: "adam", "adam-by-row", "row-wise-adam",
    /// "balanced-momentum", "frozen".
    /// `deviation`, `seed`: rows begin as normal values, of a stream that depends on seed, row and column alone; 0: as
    /// zeros.
    /// `folder`: where to put the table's working file, mapped, for one larger than memory; none: in RAM.
    ///
    /// Raises `ValueError` for an impossible setting, `MemoryError` if the system refuses the memory.
    #[staticmethod]
    #[pyo3(signature = (width, rows=None, *, optimizer, addressing=None, deviation=0.0, seed=0, folder=None))]
    #[allow(clippy::too_many_arguments)]
    fn create(
        py: Python<'_>,
        width: usize,
        rows: Option<u64>,
        optimizer: &Bound<'_, PyAny>,
        addressing: Option<&Bound<'_, Addressing>>,
        deviation: f32,
        seed: u64,
        folder: Option<PathBuf>,
    ) -> PyResult<Self> {
        claim()?;
        let (rows, origin) = match addressing {
            Some(addressing) => (rows_of(addressing.get(), rows)?, addressing.get().origin()?),
            None => match rows {
                Some(rows) => (rows, no_origin()),
                None => return Err(PyValueError::new_err("give `rows`, or an `addressing`, which has them")),
            },
        };
        let json: String =
            py.import("engram_lm.optimizers")?.call_method1("to_json", (optimizer,))?.extract()?;
        let optimizer: RowOptimizer = serde_json::from_str(&json)
            .map_err(|error| PyValueError::new_err(format!("`optimizer`: {error}")))?;
        let init = if deviation == 0.0 { RowInit::Zeros } else { RowInit::Normal { deviation, seed } };
        let storage = folder.map_or(Storage::Ram, Storage::MappedIn);
        let table = py.detach(|| {
            engram_store::TrainableTable::new(rows, width, init, optimizer, origin, &storage).map_err(store)
        })?;
        Ok(Self::of(table))
    }

    /// Opens a table that `save` wrote, or a checkpoint's `memory.layerL.table`: values, optimiser state and step.
    ///
    /// `addressing`: whose chosen layer it must belong to; none: the file's word is taken.
    /// `folder`: where to put the table's working file; none: in RAM.
    ///
    /// Raises `FormatError` if it has no optimiser state, `AddressMismatch`, `DamagedError`, `OSError`, `MemoryError`.
    #[staticmethod]
    #[pyo3(signature = (path, *, addressing=None, folder=None))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        addressing: Option<&Bound<'_, Addressing>>,
        folder: Option<PathBuf>,
    ) -> PyResult<Self> {
        claim()?;
        let expected = addressing.map(|addressing| addressing.get().origin()).transpose()?;
        let storage = folder.map_or(Storage::Ram, Storage::MappedIn);
        let table = py.detach(|| {
            let origin = match expected {
                Some(origin) => origin,
                None => TableHeader::read(&path).map_err(store)?.origin,
            };
            engram_store::TrainableTable::load(&path, &origin, &storage).map_err(store)
        })?;
        Ok(Self::of(table))
    }

    /// Rows as floats, as `Table.gather`.
    #[pyo3(signature = (ids, out=None, dtype=None))]
    fn gather<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        dtype: Option<&str>,
    ) -> PyResult<Bound<'py, PyAny>> {
        claim()?;
        gather(py, &Shared(self), ids, out, dtype)
    }

    /// Rows as they are stored, as `Table.lookup_into`.
    fn lookup_into(&self, py: Python<'_>, ids: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        claim()?;
        lookup_into(py, &Shared(self), ids, out)
    }

    /// One optimiser step on the rows `ids` int64 `[...]` with their gradients `grads` float32 `[..., width]` at the
    /// learning rate `rate`. Gradients of a row that is named several times are added first, in their order. Rows that
    /// are not named keep values and state. An update without rows counts as a step, too.
    ///
    /// Raises `TypeError`, `ValueError` for wrong arrays, an id that is not a row, a gradient or rate that is not
    /// finite; the table is then untouched.
    fn update(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        grads: &Bound<'_, PyAny>,
        rate: f32,
    ) -> PyResult<()> {
        claim()?;
        let (ids, grads) = (Array::of("ids", ids)?, Array::of("grads", grads)?);
        grads.check_shape(&[&ids.shape[..], &[self.width]].concat())?;
        let (ids, grads) = (ids.row_ids()?, grads.values()?);
        py.detach(|| {
            let (ids, grads) = distinct(ids, grads, self.width)?;
            let mut table = self.inner.write().unwrap_or_else(PoisonError::into_inner);
            table.update(&ids, &grads, rate).map_err(store)
        })
    }

    /// Begins to bring rows near, a hint: for tables larger than memory.
    ///
    /// Raises `ValueError` if an id is not a row.
    fn will_need(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<()> {
        claim()?;
        let ids = Array::of("ids", ids)?;
        let ids = ids.row_ids()?;
        py.detach(|| self.read_lock().prefetch(ids).map_err(store))
    }

    /// Writes values, optimiser state and step to `path`: whole or not at all. `Table.open` reads it, too.
    ///
    /// Raises `OSError` if the file system refuses; `path` is then as it was.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        claim()?;
        py.detach(|| self.read_lock().save(&path).map_err(store))
    }

    /// Number of rows.
    #[getter]
    fn rows(&self) -> u64 {
        self.rows
    }

    /// Values per row.
    #[getter]
    fn width(&self) -> usize {
        self.width
    }

    /// Bytes of a stored row.
    #[getter]
    fn row_bytes(&self) -> usize {
        4 * self.width
    }

    /// Updates made so far.
    #[getter]
    fn step(&self, py: Python<'_>) -> PyResult<u64> {
        claim()?;
        Ok(py.detach(|| self.read_lock().step()))
    }

    /// The optimiser, one of `engram_lm.optimizers`.
    #[getter]
    fn optimizer<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let json = serde_json::to_string(&self.optimizer)
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        py.import("engram_lm.optimizers")?.call_method1("from_json", (json,))
    }

    /// Identity of the addressing that placed the rows, 64 hexadecimal digits; zeros if they belong to nothing.
    #[getter]
    fn identity(&self) -> String {
        self.origin.identity.to_string()
    }

    /// The block that the rows are for, counted from 0.
    #[getter]
    fn layer(&self) -> u64 {
        self.origin.layer
    }

    fn __len__(&self) -> usize {
        self.rows as usize
    }

    fn __repr__(&self) -> String {
        format!("TrainableTable({} rows of {} values, {:?})", self.rows, self.width, self.optimizer)
    }
}

impl TrainableTable {
    fn of(table: engram_store::TrainableTable) -> Self {
        let (rows, width) = (RowSource::rows(&table), RowSource::width(&table));
        let (optimizer, origin) = (table.optimizer(), table.origin());
        Self { inner: Owned::new(RwLock::new(table)), rows, width, optimizer, origin }
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, engram_store::TrainableTable> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The table as a source of rows that is locked only while rows are read.
struct Shared<'a>(&'a TrainableTable);

impl RowSource for Shared<'_> {
    fn rows(&self) -> u64 {
        self.0.rows
    }

    fn width(&self) -> usize {
        self.0.width
    }

    fn format(&self) -> engram_store::RowFormat {
        engram_store::RowFormat::F32
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> engram_store::Result<()> {
        self.0.read_lock().read(ids, out)
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> engram_store::Result<()> {
        self.0.read_lock().gather(ids, out)
    }

    fn prefetch(&self, ids: &[u64]) -> engram_store::Result<()> {
        self.0.read_lock().prefetch(ids)
    }
}

/// Ids `[distinct]` and their gradients `[distinct, width]`.
type Distinct<'a> = (Cow<'a, [u64]>, Cow<'a, [f32]>);

/// Distinct ascending ids with the sums of their gradients: as given, if they are so already.
fn distinct<'a>(ids: &'a [u64], grads: &'a [f32], width: usize) -> PyResult<Distinct<'a>> {
    if ids.is_sorted_by(|a, b| a < b) {
        return Ok((Cow::Borrowed(ids), Cow::Borrowed(grads)));
    }
    let distinct = DistinctRows::of(ids);
    let mut sums = vec![0.0; distinct.len() * width];
    distinct.sum(grads, width, &mut sums).map_err(store)?;
    Ok((Cow::Owned(distinct.ids().to_vec()), Cow::Owned(sums)))
}

fn rows_of(addressing: &Addressing, given: Option<u64>) -> PyResult<u64> {
    let rows = addressing.chosen_rows()?;
    match given {
        Some(given) if given != rows => Err(PyValueError::new_err(format!(
            "`rows` is {given}, but the addressing's layer has {rows}: leave it out"
        ))),
        _ => Ok(rows),
    }
}

/// Rows that no addressing placed.
fn no_origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 }
}
