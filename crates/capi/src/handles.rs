//! Numbers that stand for what is open.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::failure::{Failure, engram_status};

/// Values by number. Numbers are never given twice, so that a closed one stays closed.
pub(crate) struct Handles<T> {
    what: &'static str,
    open: RwLock<Open<T>>,
}

struct Open<T> {
    last: u64,
    values: Option<HashMap<u64, Arc<T>>>,
}

impl<T> Handles<T> {
    pub(crate) const fn of(what: &'static str) -> Self {
        Self { what, open: RwLock::new(Open { last: 0, values: None }) }
    }

    pub(crate) fn insert(&self, value: T) -> u64 {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.last += 1;
        let handle = open.last;
        open.values.get_or_insert_default().insert(handle, Arc::new(value));
        handle
    }

    /// The value, for as long as it is held, whoever closes it meanwhile.
    pub(crate) fn get(&self, handle: u64) -> Result<Arc<T>, Failure> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let value = open.values.as_ref().and_then(|values| values.get(&handle));
        value.cloned().ok_or_else(|| self.missing(handle))
    }

    pub(crate) fn remove(&self, handle: u64) -> Result<Arc<T>, Failure> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let value = open.values.as_mut().and_then(|values| values.remove(&handle));
        value.ok_or_else(|| self.missing(handle))
    }

    fn missing(&self, handle: u64) -> Failure {
        let text = format!("{} {handle} is not open; it was closed or taken, or never existed", self.what);
        Failure::new(engram_status::ENGRAM_NO_HANDLE, text)
    }
}
