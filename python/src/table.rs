//! Tables to read, wherever their rows are.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use engram_store::{
    Cached, ContentHash, DirectOptions, DirectTable, Overlaid, PrefetchOptions, Prefetcher, RowSource,
    Storage, TableHeader, TableOrigin, TableReader, ZeroRows,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::addressing::Addressing;
use crate::array::{Array, Dtype, ValuesMut, new_array};
use crate::error::store;
use crate::overlay::OverlayWriter;
use crate::process::{Owned, claim};
use crate::rows::{gather, lookup_into};
use crate::size::Size;
use crate::ticket::Ticket;

type Source = Arc<dyn RowSource>;

/// A table that is read: row ids to rows.
///
/// Ids are int64 arrays of any shape; every row comes from where the tier keeps it. All methods let go of the
/// interpreter while they work, and any number of threads may call them. A forked child gets `RuntimeError`: open the
/// table in it, or fetch in the parent.
#[pyclass(module = "engram_lm", frozen)]
pub(crate) struct Table {
    parts: Owned<Parts>,
    header: TableHeader,
    path: PathBuf,
    tier: &'static str,
    prefetch: PrefetchOptions,
}

struct Parts {
    source: Source,
    overlaid: Arc<Overlaid<Source>>,
    cache: Option<Arc<Cached<Source>>>,
    prefetcher: OnceLock<Prefetcher>,
    /// Held while the prefetcher is made, so that only one is.
    making: Mutex<()>,
}

#[pymethods]
impl Table {
    /// Opens the table file at `path`.
    ///
    /// `tier`: where rows are while they are asked for. "mapped": in the file, mapped; "ram": all in memory, checked
    /// while they are read; "direct": read from disk past the page cache, many reads at once.
    /// `cache`: bytes of rows kept in memory in front of the tier: an integer, or a text such as "1GiB".
    /// `addressing`: an `Addressing` whose chosen layer the table must belong to; none: the file's word is taken (see
    /// `identity` and `layer`).
    /// `checked`: whether a block (1 MiB) is checked when a row in it is first read ("ram" checks all at once).
    /// `overlays`: overlay files to lay on top, the lowest first. Each must have been made for exactly what lies below
    /// it; with `stack`, for the table or for any overlay below it.
    /// `depth`: reads in flight at once, of the direct tier.
    /// `prefetch_threads`, `prefetch_bytes`, `time_limit`: what `prefetch` may use at once, and seconds it may take.
    ///
    /// Raises `FileNotFoundError`, `OSError`; `FormatError` if it is not a table; `DamagedError`; `AddressMismatch` if it
    /// belongs to another addressing or layer; `ValueError` for an impossible setting.
    #[staticmethod]
    #[pyo3(signature = (path, *, tier="mapped", cache=None, addressing=None, checked=false, overlays=Vec::new(),
        stack=false, depth=128, prefetch_threads=2, prefetch_bytes=Size(256 << 20), time_limit=60.0))]
    #[allow(clippy::too_many_arguments)]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        tier: &str,
        cache: Option<Size>,
        addressing: Option<&Bound<'_, Addressing>>,
        checked: bool,
        overlays: Vec<PathBuf>,
        stack: bool,
        depth: usize,
        prefetch_threads: usize,
        prefetch_bytes: Size,
        time_limit: f64,
    ) -> PyResult<Self> {
        claim()?;
        let expected = addressing.map(|addressing| addressing.get().origin()).transpose()?;
        let tier = tier_named(tier)?;
        let time_limit = seconds(time_limit)?;
        let prefetch = PrefetchOptions::default()
            .threads(prefetch_threads)
            .bytes(prefetch_bytes.0)
            .time_limit(time_limit);
        py.detach(|| {
            let reader = TableReader::open(&path).map_err(store)?;
            let (header, content) = (reader.header().clone(), reader.content());
            let origin = expected.unwrap_or(header.origin);
            let base = open_tier(&path, tier, &origin, checked, depth, time_limit)?;
            let (base, cache): (Source, _) = match cache {
                Some(bytes) => {
                    let cache = Arc::new(Cached::new(base, bytes.0).map_err(store)?);
                    (Arc::clone(&cache) as Source, Some(cache))
                }
                None => (base, None),
            };
            Self::under(base, cache, (header, content), (&overlays, stack), (path, tier, prefetch))
        })
    }

    /// Rows of `width` zeros, which take no room: what a memory reads that has learned nothing yet.
    ///
    /// `addressing`: an `Addressing` whose chosen layer they belong to. `overlays`, `stack`: as for `open`.
    ///
    /// Raises as `open`.
    #[staticmethod]
    #[pyo3(signature = (width, *, addressing, overlays=Vec::new(), stack=false))]
    fn zeros(
        py: Python<'_>,
        width: usize,
        addressing: &Bound<'_, Addressing>,
        overlays: Vec<PathBuf>,
        stack: bool,
    ) -> PyResult<Self> {
        claim()?;
        let addressing = addressing.get();
        let (rows, origin) = (addressing.chosen_rows()?, addressing.origin()?);
        py.detach(|| {
            let zeros = ZeroRows::new(rows, width, origin).map_err(store)?;
            let (header, content) = (zeros.header().clone(), zeros.content());
            let (path, options) = (PathBuf::from("rows of zero"), PrefetchOptions::default());
            Self::under(
                Arc::new(zeros),
                None,
                (header, content),
                (&overlays, stack),
                (path, "zeros", options),
            )
        })
    }

    /// Rows as floats: `ids` int64 `[...]` to `[..., width]`.
    ///
    /// `out`: float32, float16 or bfloat16 `[..., width]`, or with the last two dimensions joined (`[..., slots]` ids
    /// to `[..., slots·width]`); written in place and returned. None: a new memoryview of float32, or of the bits of 16-bit
    /// floats as uint16.
    /// `dtype`: "f32", "f16" or "bf16", whose bits may go to a uint16 `out`; none: that of `out`.
    ///
    /// Raises `TypeError` for another dtype; `ValueError` for a wrong shape, a layout that is not contiguous, or an id
    /// that is not a row (with its position); `OSError`, `DamagedError` if rows cannot be read.
    #[pyo3(signature = (ids, out=None, dtype=None))]
    fn gather<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        dtype: Option<&str>,
    ) -> PyResult<Bound<'py, PyAny>> {
        claim()?;
        gather(py, &*self.parts.source, ids, out, dtype)
    }

    /// Rows as they are stored: `ids` int64 `[...]` into `out` uint8 `[..., row_bytes]`, in place.
    ///
    /// Raises as `gather`.
    fn lookup_into(&self, py: Python<'_>, ids: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        claim()?;
        lookup_into(py, &*self.parts.source, ids, out)
    }

    /// Begins to fetch rows on threads of the table and returns at once: `ids` int64 `[...]`.
    ///
    /// Take one ticket for a step's ids, not one for each token. Dropped, a ticket cancels its fetch.
    ///
    /// Raises as `gather`; `TimeoutError` if there is no room for the rows within the limit; `ValueError` if they are
    /// more than `prefetch_bytes`.
    fn prefetch(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Ticket> {
        claim()?;
        let array = Array::of("ids", ids)?;
        let list = array.row_ids()?.to_vec();
        let ticket = py.detach(|| self.prefetcher()?.submit(list).map_err(store))?;
        Ok(Ticket::new(ticket, array.shape.clone(), self.header.width, self.header.format))
    }

    /// Seconds that Rust itself takes for each of `repeats` gathers of `ids` into `out` (float32): what a bench compares
    /// `gather` with.
    fn _gather_seconds(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        repeats: usize,
    ) -> PyResult<Vec<f64>> {
        claim()?;
        let (ids, mut out) = (Array::of("ids", ids)?, Array::of("out", out)?);
        let list = ids.row_ids()?;
        let ValuesMut::F32(values) = out.values_mut(Dtype::F32)? else {
            return Err(PyValueError::new_err("`out` must hold float32"));
        };
        py.detach(|| {
            let mut once = || {
                let start = std::time::Instant::now();
                self.parts.source.gather(list, values).map_err(store)?;
                Ok(start.elapsed().as_secs_f64())
            };
            (0..repeats).map(|_| once()).collect()
        })
    }

    /// Begins an overlay on top of this table and its overlays.
    fn overlay_writer(&self) -> PyResult<OverlayWriter> {
        claim()?;
        Ok(OverlayWriter::new(self.parts.overlaid.writer(), self.header.width, self.header.bytes_per_row()))
    }

    /// Number of rows.
    #[getter]
    fn rows(&self) -> u64 {
        self.header.rows
    }

    /// Values per row.
    #[getter]
    fn width(&self) -> usize {
        self.header.width
    }

    /// Bytes of a stored row.
    #[getter]
    fn row_bytes(&self) -> usize {
        self.header.bytes_per_row()
    }

    /// Layout of a stored row: "f32", "bf16", "f16", "fp8e4m3", "fp8e4m3:SCALE", "int8" or "int4".
    #[getter]
    fn format(&self) -> String {
        self.header.format.to_string()
    }

    /// Identity of the addressing that placed the rows, 64 hexadecimal digits.
    #[getter]
    fn identity(&self) -> String {
        self.header.origin.identity.to_string()
    }

    /// The block that the rows are for, counted from 0.
    #[getter]
    fn layer(&self) -> u64 {
        self.header.origin.layer
    }

    /// "ram", "mapped", "direct", or "zeros" for rows that are nowhere.
    #[getter]
    fn tier(&self) -> &'static str {
        self.tier
    }

    /// Hash of all that the table and its overlays hold, 64 hexadecimal digits.
    #[getter]
    fn content(&self) -> PyResult<String> {
        claim()?;
        Ok(self.parts.overlaid.content().to_string())
    }

    /// What the table is and has done: `rows`, `width`, `format`, `row_bytes`, `bytes` (of rows), `tier`, `overlays`;
    /// with a cache `cache_hits`, `cache_misses`, `cache_fetched`, `cache_hit_rate` (0 to 1); `prefetch_bytes` in use.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        claim()?;
        let stats = PyDict::new(py);
        stats.set_item("rows", self.header.rows)?;
        stats.set_item("width", self.header.width)?;
        stats.set_item("format", self.header.format.to_string())?;
        stats.set_item("row_bytes", self.header.bytes_per_row())?;
        stats.set_item("bytes", self.header.rows * self.header.bytes_per_row() as u64)?;
        stats.set_item("tier", self.tier)?;
        stats.set_item("overlays", self.parts.overlaid.overlays().len())?;
        if let Some(cache) = &self.parts.cache {
            let counts = cache.counts();
            stats.set_item("cache_hits", counts.hits)?;
            stats.set_item("cache_misses", counts.misses)?;
            stats.set_item("cache_fetched", counts.fetched)?;
            stats.set_item("cache_hit_rate", counts.hit_rate())?;
        }
        stats.set_item("prefetch_bytes", self.parts.prefetcher.get().map_or(0, Prefetcher::bytes_in_use))?;
        Ok(stats)
    }

    fn __len__(&self) -> usize {
        self.header.rows as usize
    }

    fn __repr__(&self) -> String {
        let TableHeader { rows, width, format, .. } = &self.header;
        format!("Table({:?}, {rows} rows of {width} {format} values, tier {:?})", self.path, self.tier)
    }
}

impl Table {
    /// `base`, perhaps behind a `cache`, with `overlays` on top.
    fn under(
        base: Source,
        cache: Option<Arc<Cached<Source>>>,
        (header, content): (TableHeader, ContentHash),
        (overlays, stack): (&[PathBuf], bool),
        (path, tier, prefetch): (PathBuf, &'static str, PrefetchOptions),
    ) -> PyResult<Self> {
        let read_header = TableHeader { training: None, ..header.clone() };
        let mut overlaid = Overlaid::new(Arc::clone(&base), &read_header, content).map_err(store)?;
        for overlay in overlays {
            if stack { overlaid.stack(overlay) } else { overlaid.push(overlay) }.map_err(store)?;
        }
        let overlaid = Arc::new(overlaid);
        let source = if overlays.is_empty() { base } else { Arc::clone(&overlaid) as Source };
        let parts = Parts { source, overlaid, cache, prefetcher: OnceLock::new(), making: Mutex::new(()) };
        Ok(Self { parts: Owned::new(parts), header, path, tier, prefetch })
    }

    fn prefetcher(&self) -> PyResult<&Prefetcher> {
        if let Some(prefetcher) = self.parts.prefetcher.get() {
            return Ok(prefetcher);
        }
        let _making = self.parts.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(prefetcher) = self.parts.prefetcher.get() {
            return Ok(prefetcher);
        }
        let prefetcher = Prefetcher::new(Arc::clone(&self.parts.source), &self.prefetch).map_err(store)?;
        Ok(self.parts.prefetcher.get_or_init(|| prefetcher))
    }
}

/// Bytes of a row by its header.
pub(crate) trait RowBytes {
    fn bytes_per_row(&self) -> usize;
}

impl RowBytes for TableHeader {
    fn bytes_per_row(&self) -> usize {
        self.format.bytes_per_row(self.width)
    }
}

fn tier_named(name: &str) -> PyResult<&'static str> {
    ["ram", "mapped", "direct"].into_iter().find(|tier| *tier == name).ok_or_else(|| {
        PyValueError::new_err(format!("`tier` is {name:?}, but must be \"ram\", \"mapped\" or \"direct\""))
    })
}

/// A time limit in seconds.
fn seconds(limit: f64) -> PyResult<Duration> {
    match Duration::try_from_secs_f64(limit) {
        Ok(limit) if !limit.is_zero() => Ok(limit),
        _ => Err(PyValueError::new_err(format!("`time_limit` is {limit}, but must be seconds above 0"))),
    }
}

fn open_tier(
    path: &Path,
    tier: &str,
    origin: &TableOrigin,
    checked: bool,
    depth: usize,
    time_limit: Duration,
) -> PyResult<Source> {
    use engram_store::Table;
    Ok(match tier {
        "ram" => Arc::new(Table::read(path, origin, &Storage::Ram).map_err(store)?),
        "mapped" if checked => Arc::new(Table::open_checked(path, origin).map_err(store)?),
        "mapped" => Arc::new(Table::open(path, origin).map_err(store)?),
        _ => {
            let options = DirectOptions::default().depth(depth).checked(checked).time_limit(time_limit);
            Arc::new(DirectTable::open(path, origin, &options).map_err(store)?)
        }
    })
}

/// The dtype asked for: `dtype`, or that of `out`; both must agree where both are given.
pub(crate) fn dtype_of(dtype: Option<&str>, out: Option<&Array>) -> PyResult<Dtype> {
    match dtype {
        Some(name) => Dtype::named(name),
        None => Dtype::of(out),
    }
}

/// Room for rows of `width` values for ids of this shape: `out`, or a new view.
pub(crate) fn rows_room<'py>(
    py: Python<'py>,
    out: Option<&Bound<'py, PyAny>>,
    ids: &[usize],
    width: usize,
    dtype: Option<&str>,
) -> PyResult<(Array, Bound<'py, PyAny>, Dtype)> {
    let shape = [ids, &[width]].concat();
    let Some(out) = out else {
        let dtype = dtype_of(dtype, None)?;
        let (format, item) = match dtype {
            Dtype::F32 => ("f", 4),
            // A memoryview has no floats of 16 bits that every Python knows.
            Dtype::F16 | Dtype::Bf16 => ("H", 2),
        };
        let (array, view) = new_array(py, "out", format, item, &shape)?;
        return Ok((array, view, dtype));
    };
    let array = Array::of("out", out)?;
    let dtype = dtype_of(dtype, Some(&array))?;
    let joined = match ids.split_last() {
        Some((slots, outer)) => array.shape == [outer, &[slots * width]].concat(),
        None => false,
    };
    if !joined {
        array.check_shape(&shape)?;
    }
    Ok((array, out.clone(), dtype))
}
