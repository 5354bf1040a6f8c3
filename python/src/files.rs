//! What is done with whole files.

use std::ops::ControlFlow;
use std::path::PathBuf;

use engram_store::{Progress, RowFormat, TableHeader, TableReader, table_scale};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::store;

/// Checks every block of the table file at `path` against its checksum. `progress(done, total)`, in bytes, is called
/// now and then; an exception in it, or Ctrl-C, ends the work and is raised.
///
/// Raises `DamagedError` naming the first damaged block, `FormatError`, `OSError`.
#[pyfunction]
#[pyo3(signature = (path, progress=None))]
pub(crate) fn verify(py: Python<'_>, path: PathBuf, progress: Option<Py<PyAny>>) -> PyResult<()> {
    py.detach(|| {
        let mut told = Told::new(progress);
        let done = TableReader::open(&path).and_then(|reader| reader.verify(&mut |at| told.tell(at)));
        told.result(done)
    })
}

/// Writes the rows of the table file `source` to the table file `target` in `format`: "f32", "bf16", "f16", "fp8e4m3",
/// "fp8e4m3:SCALE" ("fp8e4m3:auto" finds the scale, reading `source` once more), "int8" or "int4". Streams; optimiser
/// state is left behind. `progress(done, total)` as in `verify`, in rows.
///
/// Gives what it cost: `rows`, `mean_error`, `largest_error`, `largest_error_row`, `relative_rms_error`, `mean_cosine`,
/// `least_cosine`, `least_cosine_row`, `lost`, `not_finite`.
///
/// Raises as `verify`, and `ValueError` for an unknown format.
#[pyfunction]
#[pyo3(signature = (source, target, format, progress=None))]
pub(crate) fn convert(
    py: Python<'_>,
    source: PathBuf,
    target: PathBuf,
    format: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyDict>> {
    let quality = py.detach(|| {
        let mut told = Told::new(progress);
        let format = if format == "fp8e4m3:auto" {
            let scale = table_scale(&source, &mut |at| told.tell(at));
            RowFormat::Fp8E4m3OneScale(told.result(scale)?)
        } else {
            format_named(format)?
        };
        let done = engram_store::convert(&source, &target, format, &mut |at| told.tell(at));
        told.result(done)
    })?;
    let report = PyDict::new(py);
    report.set_item("rows", quality.rows)?;
    report.set_item("mean_error", quality.mean_error)?;
    report.set_item("largest_error", quality.largest_error.0)?;
    report.set_item("largest_error_row", quality.largest_error.1)?;
    report.set_item("relative_rms_error", quality.relative_rms_error)?;
    report.set_item("mean_cosine", quality.mean_cosine)?;
    report.set_item("least_cosine", quality.least_cosine.0)?;
    report.set_item("least_cosine_row", quality.least_cosine.1)?;
    report.set_item("lost", quality.lost)?;
    report.set_item("not_finite", quality.not_finite)?;
    Ok(report.unbind())
}

/// What the table file at `path` says of itself: `rows`, `width`, `format`, `row_bytes`, `identity`, `layer`, `content`,
/// and for a trained one `step` and `optimizer` (JSON). Reads no rows.
///
/// Raises `FormatError`, `DamagedError`, `OSError`.
#[pyfunction]
pub(crate) fn table_info(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyDict>> {
    let reader = py.detach(|| TableReader::open(&path)).map_err(store)?;
    let TableHeader { rows, width, format, origin, training } = reader.header();
    let info = PyDict::new(py);
    info.set_item("rows", rows)?;
    info.set_item("width", width)?;
    info.set_item("format", format.to_string())?;
    info.set_item("row_bytes", format.bytes_per_row(*width))?;
    info.set_item("identity", origin.identity.to_string())?;
    info.set_item("layer", origin.layer)?;
    info.set_item("content", reader.content().to_string())?;
    if let Some((optimizer, step)) = training {
        info.set_item("step", step)?;
        let text =
            serde_json::to_string(optimizer).map_err(|error| PyValueError::new_err(error.to_string()))?;
        info.set_item("optimizer", text)?;
    }
    Ok(info.unbind())
}

fn format_named(name: &str) -> PyResult<RowFormat> {
    name.parse().map_err(|error| PyValueError::new_err(format!("`format`: {error}")))
}

/// Tells Python of progress, and remembers what it raised.
struct Told {
    progress: Option<Py<PyAny>>,
    raised: Option<PyErr>,
}

impl Told {
    fn new(progress: Option<Py<PyAny>>) -> Self {
        Self { progress, raised: None }
    }

    fn tell(&mut self, at: Progress) -> ControlFlow<()> {
        let told = Python::attach(|py| {
            py.check_signals()?;
            match &self.progress {
                Some(progress) => progress.call1(py, (at.done, at.total)).map(drop),
                None => Ok(()),
            }
        });
        match told {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.raised = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn result<T>(&mut self, done: engram_store::Result<T>) -> PyResult<T> {
        match self.raised.take() {
            Some(error) => Err(error),
            None => done.map_err(store),
        }
    }
}
