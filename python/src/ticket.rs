//! Rows on their way.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use engram_store::{FetchedRows, RowFormat};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::array::{Array, ValuesMut};
use crate::error::store;
use crate::process::{Owned, claim};
use crate::table::rows_room;

/// The right to rows that `Table.prefetch` fetches. Take them once.
///
/// `take` waits without the interpreter's lock; `await ticket` waits in an event loop and gives float32 rows. Dropped, a
/// ticket cancels its fetch.
#[pyclass(module = "engram_lm", frozen)]
pub(crate) struct Ticket {
    state: Owned<Mutex<State>>,
    /// That of the ids.
    shape: Vec<usize>,
    width: usize,
    format: RowFormat,
}

enum State {
    Waiting(engram_store::Ticket),
    Fetched(FetchedRows),
    Taken,
}

#[pymethods]
impl Ticket {
    /// Waits for the rows and writes them as floats, `[..., width]` for ids `[...]`; `out` and `dtype` as in
    /// `Table.gather`.
    ///
    /// Raises what the fetch met (`OSError`, `DamagedError`, …); `TimeoutError` if rows are not there within the limit;
    /// `RuntimeError` if they were taken before. After a wrong `out` the rows can still be taken.
    #[pyo3(signature = (out=None, dtype=None))]
    fn take<'py>(
        &self,
        py: Python<'py>,
        out: Option<&Bound<'py, PyAny>>,
        dtype: Option<&str>,
    ) -> PyResult<Bound<'py, PyAny>> {
        claim()?;
        let (mut array, result, dtype) = rows_room(py, out, &self.shape, self.width, dtype)?;
        let values = array.values_mut(dtype)?;
        py.detach(|| {
            let fetched = self.fetched()?;
            match values {
                ValuesMut::F32(out) => fetched.decode(out).map_err(store),
                ValuesMut::F16(out) => self.rounded(&fetched, out),
                ValuesMut::Bf16(out) => self.rounded(&fetched, out),
            }
        })?;
        Ok(result)
    }

    /// Waits for the rows and writes them as they are stored, into uint8 `[..., row_bytes]`.
    ///
    /// Raises as `take`.
    fn take_stored(&self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        claim()?;
        let mut array = Array::of("out", out)?;
        array.check_shape(&[&self.shape[..], &[self.format.bytes_per_row(self.width)]].concat())?;
        let bytes = array.bytes_mut()?;
        py.detach(|| {
            bytes.copy_from_slice(self.fetched()?.stored());
            Ok(())
        })
    }

    /// Whether `take` would return at once.
    #[getter]
    fn ready(&self) -> PyResult<bool> {
        claim()?;
        Ok(match &*self.lock() {
            State::Waiting(ticket) => ticket.is_ready(),
            State::Fetched(_) | State::Taken => true,
        })
    }

    /// Calls `callback()` once rows are there, or the fetch has failed: from a thread of its own, or at once.
    fn _when_ready(&self, callback: Py<PyAny>) -> PyResult<()> {
        claim()?;
        let mut state = self.lock();
        let State::Waiting(ticket) = &mut *state else { return Bell::new(callback).ring() };
        let bell = Arc::new(Bell::new(callback));
        let waker = Waker::from(Arc::clone(&bell));
        match Pin::new(ticket).poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => Ok(()),
            Poll::Ready(fetched) => {
                *state = match fetched {
                    Ok(rows) => State::Fetched(rows),
                    Err(error) => {
                        *state = State::Taken;
                        return Err(store(error));
                    }
                };
                bell.ring()
            }
        }
    }

    fn __await__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let module = slf.py().import("engram_lm._await")?;
        module.call_method1("rows_of", (slf,))?.call_method0("__await__")
    }

    fn __repr__(&self) -> String {
        format!("Ticket(ids of shape {:?}, rows of {} values)", self.shape, self.width)
    }
}

impl Ticket {
    pub(crate) fn new(
        ticket: engram_store::Ticket,
        shape: Vec<usize>,
        width: usize,
        format: RowFormat,
    ) -> Self {
        Self { state: Owned::new(Mutex::new(State::Waiting(ticket))), shape, width, format }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rows; waits for them.
    fn fetched(&self) -> PyResult<FetchedRows> {
        let state = std::mem::replace(&mut *self.lock(), State::Taken);
        match state {
            State::Waiting(ticket) => ticket.wait().map_err(store),
            State::Fetched(rows) => Ok(rows),
            State::Taken => {
                Err(PyRuntimeError::new_err("these rows were taken before, or their fetch has failed"))
            }
        }
    }

    fn rounded<T>(&self, fetched: &FetchedRows, out: &mut [T]) -> PyResult<()>
    where
        [T]: half::slice::HalfFloatSliceExt,
    {
        let mut values = vec![0.0; out.len()];
        fetched.decode(&mut values).map_err(store)?;
        half::slice::HalfFloatSliceExt::convert_from_f32_slice(out, &values);
        Ok(())
    }
}

/// Tells Python that rows are there.
struct Bell {
    callback: Mutex<Option<Py<PyAny>>>,
}

impl Bell {
    fn new(callback: Py<PyAny>) -> Self {
        Self { callback: Mutex::new(Some(callback)) }
    }

    /// Hands the callback to the thread that calls back, so that the one that fetches never waits for the
    /// interpreter's lock.
    fn ring(&self) -> PyResult<()> {
        let callback = self.callback.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(callback) = callback else { return Ok(()) };
        let gone = || PyRuntimeError::new_err("the thread that calls back is gone");
        ringer().ok_or_else(gone)?.send(callback).map_err(|_| gone())
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        // Without its thread, which only the end of the process ends, nobody listens any more.
        let _ = self.ring();
    }
}

/// Whether the interpreter ends; held while a callback runs.
static CALLING: Mutex<bool> = Mutex::new(false);

/// Waits for the callback that is running, and lets no other begin: for the end of the interpreter, which would end the
/// calling thread in the middle of Rust's frames, and with it the process.
#[pyfunction]
#[pyo3(name = "_end_callbacks")]
pub(crate) fn end_callbacks(py: Python<'_>) {
    // A forked child has no such thread, and nobody there would unlock.
    if claim().is_ok() {
        py.detach(|| *CALLING.lock().unwrap_or_else(PoisonError::into_inner) = true);
    }
}

/// The way to the thread that calls back.
fn ringer() -> Option<&'static Sender<Py<PyAny>>> {
    static RINGER: OnceLock<Option<Sender<Py<PyAny>>>> = OnceLock::new();
    RINGER
        .get_or_init(|| {
            let (sender, receiver) = channel::<Py<PyAny>>();
            let call = move || {
                for callback in receiver {
                    let ended = CALLING.lock().unwrap_or_else(PoisonError::into_inner);
                    if *ended {
                        return;
                    }
                    let called = Python::try_attach(|py| match callback.call0(py) {
                        Ok(_) => (),
                        Err(error) => error.write_unraisable(py, Some(callback.bind(py))),
                    });
                    if called.is_none() {
                        return;
                    }
                }
            };
            std::thread::Builder::new().name("row-tickets".into()).spawn(call).ok().map(|_| sender)
        })
        .as_ref()
}
