//! What every tier does: row ids to rows.

use std::cell::RefCell;
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{Result, check_length, check_rows};
use crate::row_format::RowFormat;

/// Anything that turns row ids into rows, wherever they are kept.
///
/// A tier has to [`read`](Self::read) rows as they are stored; [`gather`](Self::gather), which decodes them,
/// follows from it.
pub trait RowSource: Send + Sync {
    /// Number of rows: ids run from 0 to one less.
    fn rows(&self) -> u64;

    /// Values per row.
    fn width(&self) -> usize;

    /// The layout in which rows are kept.
    fn format(&self) -> RowFormat;

    /// Bytes of a stored row.
    fn bytes_per_row(&self) -> usize {
        self.format().bytes_per_row(self.width())
    }

    /// Copies row `ids[i]`, as it is stored, to `out[i * bytes_per_row..][..bytes_per_row]`. Ids may repeat
    /// and have any order.
    ///
    /// # Errors
    /// If an id is not a row (named with its position) or `out` is not \[ids, bytes per row\]: nothing was then
    /// read or written. If rows cannot be read: what `out` holds is then undefined.
    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()>;

    /// Reads row `ids[i]` into `out[i * width..][..width]`, decoded to `f32`. Ids may repeat and have any
    /// order.
    ///
    /// Large batches may be shared between the threads of the current rayon pool; the result is the same.
    ///
    /// # Errors
    /// As [`read`](Self::read), `out` being \[ids, width\].
    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_gather(self, ids, out)?;
        with_scratch(ids.len() * self.bytes_per_row(), |stored| {
            self.read(ids, stored)?;
            decode_rows(self.format(), self.width(), stored, out);
            Ok(())
        })
    }

    /// Begins to bring the rows `ids` near, and does not wait for them: a hint, which changes nothing but how soon
    /// [`read`](Self::read) has them. Best called with [`DistinctRows::ids`](crate::DistinctRows::ids), which
    /// ascend, some time before they are read. Mapped tables read ahead from disk; other tiers do nothing.
    ///
    /// # Errors
    /// If an id is not a row.
    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        check_rows(ids, self.rows())
    }
}

/// The same rows behind a reference or pointer.
macro_rules! forward {
    ($($pointer:ty),*) => {$(
        impl<S: RowSource + ?Sized> RowSource for $pointer {
            fn rows(&self) -> u64 {
                (**self).rows()
            }

            fn width(&self) -> usize {
                (**self).width()
            }

            fn format(&self) -> RowFormat {
                (**self).format()
            }

            fn bytes_per_row(&self) -> usize {
                (**self).bytes_per_row()
            }

            fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
                (**self).read(ids, out)
            }

            fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
                (**self).gather(ids, out)
            }

            fn prefetch(&self, ids: &[u64]) -> Result<()> {
                (**self).prefetch(ids)
            }
        }
    )*};
}
forward!(&S, Box<S>, Arc<S>);

/// Fails unless `ids` are rows of `source` and `out` has room for them as they are stored.
pub(crate) fn check_read(source: &(impl RowSource + ?Sized), ids: &[u64], out: &[u8]) -> Result<()> {
    check_length("rows to read", ids.len() * source.bytes_per_row(), out.len())?;
    check_rows(ids, source.rows())
}

/// Fails unless `ids` are rows of `source` and `out` has room for them decoded.
pub(crate) fn check_gather(source: &(impl RowSource + ?Sized), ids: &[u64], out: &[f32]) -> Result<()> {
    check_length("gathered rows", ids.len() * source.width(), out.len())?;
    check_rows(ids, source.rows())
}

/// Bytes of rows below which handing work to another thread costs more than it saves.
pub(crate) const BYTES_PER_TASK: usize = 1 << 18;

/// Whether `bytes` of work are worth the hand-over to other threads.
pub(crate) fn worth_sharing(bytes: usize) -> bool {
    bytes > BYTES_PER_TASK && rayon::current_num_threads() > 1
}

/// Decodes stored rows: `stored` \[n, bytes per row\] → `out` \[n, width\].
pub(crate) fn decode_rows(format: RowFormat, width: usize, stored: &[u8], out: &mut [f32]) {
    let row_bytes = format.bytes_per_row(width);
    let here = |(stored, out): (&[u8], &mut [f32])| format.decode_rows(stored, width, out);
    if worth_sharing(stored.len()) {
        let rows = (BYTES_PER_TASK / row_bytes).max(1);
        stored.par_chunks(rows * row_bytes).zip(out.par_chunks_mut(rows * width)).for_each(here);
    } else {
        here((stored, out));
    }
}

/// Runs `work` on `bytes` bytes of this thread's scratch memory, with any content.
pub(crate) fn with_scratch<T>(bytes: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    /// Kept from one small batch to the next; large ones, and nested ones, have their own.
    const KEPT: usize = 4 << 20;
    thread_local!(static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
    let mut scratch = SCRATCH.take();
    if scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    let result = work(&mut scratch[..bytes]);
    if scratch.len() <= KEPT {
        SCRATCH.set(scratch);
    }
    result
}
