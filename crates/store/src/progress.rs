//! Telling how far long work has come.

use std::ops::ControlFlow;

use crate::error::{Result, StoreError};

/// What is reported while a table is written, read or checked. The answer says whether to continue:
/// [`ControlFlow::Break`] ends the work with [`StoreError::Interrupted`], and what was being written is
/// gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How much is done: rows, or bytes where a whole file is checked.
    pub done: u64,
    /// How much there is to do.
    pub total: u64,
}

/// Reports progress, and fails if the answer is to stop.
pub(crate) fn report(progress: &mut dyn FnMut(Progress) -> ControlFlow<()>, reached: Progress) -> Result<()> {
    match progress(reached) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(StoreError::Interrupted),
    }
}
