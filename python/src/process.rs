//! Which process may use rows.
//!
//! Threads do not survive a fork: a child that shares work with the parent's threads, or asks them for rows, would
//! wait for ever. So the first process that touches rows keeps them, and a child of it gets an error. Addressing needs
//! no thread and works in both.

use std::sync::atomic::{AtomicU32, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// The process whose threads serve rows; 0: none yet.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Fails in a child that was forked from a process that used rows.
///
/// # Errors
/// `RuntimeError` with both processes and what to do.
pub(crate) fn claim() -> PyResult<()> {
    let process = std::process::id();
    match OWNER.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok(()),
        Err(owner) if owner == process => Ok(()),
        Err(owner) => Err(PyRuntimeError::new_err(format!(
            "process {process} was forked from process {owner}, which has used rows: its threads are not here, and \
             fetching would never end. Compute row ids here (Addressing works) and fetch rows in process {owner}, or \
             start workers with the `spawn` method and open the table in them"
        ))),
    }
}

/// Whether this is the process that may use rows, or none has yet.
fn is_owner() -> bool {
    matches!(OWNER.load(Ordering::Relaxed), 0) || OWNER.load(Ordering::Relaxed) == std::process::id()
}

/// A value that is dropped only by the process that owns rows: in a forked child its drop could wait for a lock that
/// another thread of the parent held.
#[derive(Debug)]
pub(crate) struct Owned<T>(std::mem::ManuallyDrop<T>);

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::mem::ManuallyDrop::new(value))
    }
}

impl<T> std::ops::Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if is_owner() {
            // SAFETY: the value is never touched again.
            unsafe { std::mem::ManuallyDrop::drop(&mut self.0) }
        }
    }
}
