//! Copying random rows of memory: the loop that everything waits for.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::memory::{prefetch, rows_ahead};
use crate::row_format::vectorized;

/// Copies the `row_bytes` bytes that begin at byte `id * stride` of `rows`, for each of `ids`, to `out`
/// \[ids, row bytes\].
///
/// A random row is a miss in every cache; asking for rows well ahead keeps many such misses in flight at once
/// instead of one after another.
///
/// # Panics
/// If a row is not within `rows`, or `out` has another length than the rows together.
pub(crate) fn copy_rows(rows: &[u8], stride: usize, row_bytes: usize, ids: &[u64], out: &mut [u8]) {
    assert_eq!(ids.len().checked_mul(row_bytes), Some(out.len()), "room for each row");
    let ahead = rows_ahead(row_bytes);
    // Values are moved into the loop: read through references, each is loaded anew after every part is written.
    vectorized(
        #[inline(always)]
        move || {
            for &id in ids.iter().take(ahead) {
                prefetch(rows, id as usize * stride, row_bytes);
            }
            for (at, (&id, out)) in ids.iter().zip(out.chunks_exact_mut(row_bytes)).enumerate() {
                if let Some(&next) = ids.get(at + ahead) {
                    prefetch(rows, next as usize * stride, row_bytes);
                }
                copy_row(&rows[id as usize * stride..][..row_bytes], out);
            }
        },
    );
}

/// Copies a row in the widest registers that the code around it is compiled for. A call of `memcpy` for each row,
/// which finds out every time what the length asks for, makes the loop a third slower on some processors.
#[inline(always)]
fn copy_row(row: &[u8], out: &mut [u8]) {
    const PART: usize = 64;
    let (Some(last), Some(last_out)) = (row.last_chunk::<PART>(), out.last_chunk_mut::<PART>()) else {
        return out.copy_from_slice(row);
    };
    // The last part may overlap the one before it.
    *last_out = *last;
    for (part, out) in row.as_chunks::<PART>().0.iter().zip(out.as_chunks_mut::<PART>().0) {
        *out = *part;
        // Without this the compiler finds that the loop is a `memcpy`, and calls it.
        compiler_fence(Ordering::SeqCst);
    }
}
