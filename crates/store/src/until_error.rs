//! State that an error ends.

use std::path::Path;

use crate::error::{Result, StoreError};

/// A value that is used until something fails, and never again.
///
/// Work that fails halfway leaves its state halfway: a buffer with unchecked bytes, a count that is ahead of the
/// file. The value can only be reached through [`run`](Self::run), which drops it at the first error or panic.
#[derive(Debug)]
pub(crate) struct UntilError<T>(Option<T>);

impl<T> UntilError<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// Does `work` on the value. Every call after one that failed is an error that names `path`.
    pub(crate) fn run<R>(&mut self, path: &Path, work: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let mut value = self.0.take().ok_or_else(|| StoreError::Poisoned { path: path.to_owned() })?;
        let result = work(&mut value)?;
        self.0 = Some(value);
        Ok(result)
    }

    /// The value, unless something failed.
    pub(crate) fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }

    /// The value itself.
    ///
    /// # Errors
    /// If something failed before.
    pub(crate) fn into_inner(self, path: &Path) -> Result<T> {
        self.0.ok_or_else(|| StoreError::Poisoned { path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_or_a_panic_is_final() {
        let path = Path::new("rows.table");
        let mut count = UntilError::new(0);
        let mut add = |fail: bool| {
            count.run(path, |count| {
                *count += 1;
                if fail { Err(StoreError::Interrupted) } else { Ok(*count) }
            })
        };
        assert_eq!((add(false).unwrap(), add(false).unwrap()), (1, 2));
        assert!(matches!(add(true), Err(StoreError::Interrupted)));
        let refused = add(false).unwrap_err();
        assert!(
            matches!(&refused, StoreError::Poisoned { path } if path.ends_with("rows.table")),
            "{refused}"
        );
        assert!(count.get().is_none() && count.into_inner(path).is_err());

        let mut other = UntilError::new(0);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            other.run(path, |_| -> Result<()> { panic!("halfway") })
        }));
        assert!(panicked.is_err() && other.get().is_none());
    }
}
