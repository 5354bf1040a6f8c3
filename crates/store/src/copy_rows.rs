//! Copying random rows of memory: the loop that everything waits for.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::cache_line::{LINE, prefetch, prefetch_lines, rows_ahead};
use crate::simd::vectorized;

/// Copies the `row_bytes` bytes that begin at byte `id * stride` of `rows`, for each of `ids`, to `out`
/// \[ids, row bytes\].
///
/// A random row is a miss in every cache; asking for rows well ahead keeps many such misses in flight at once
/// instead of one after another. Some 25 cycles pass for each of their lines, so that the loop itself counts: where the
/// number of lines is known when compiling, it is a fifth to a quarter faster (`docs/log.md`).
///
/// # Panics
/// If a row is not within `rows`, or `out` has another length than the rows together.
pub(crate) fn copy_rows(rows: &[u8], stride: usize, row_bytes: usize, ids: &[u64], out: &mut [u8]) {
    assert_eq!(ids.len().checked_mul(row_bytes), Some(out.len()), "room for each row");
    let all = CopyRows { rows, stride, row_bytes, ids, out };
    match row_bytes / LINE {
        1 => all.of_lines::<1>(),
        2 => all.of_lines::<2>(),
        3 => all.of_lines::<3>(),
        4 => all.of_lines::<4>(),
        5 => all.of_lines::<5>(),
        6 => all.of_lines::<6>(),
        7 => all.of_lines::<7>(),
        8 => all.of_lines::<8>(),
        9 => all.of_lines::<9>(),
        10 => all.of_lines::<10>(),
        11 => all.of_lines::<11>(),
        12 => all.of_lines::<12>(),
        13 => all.of_lines::<13>(),
        14 => all.of_lines::<14>(),
        15 => all.of_lines::<15>(),
        16 => all.of_lines::<16>(),
        _ => all.of_any_length(),
    }
}

struct CopyRows<'a> {
    rows: &'a [u8],
    stride: usize,
    row_bytes: usize,
    ids: &'a [u64],
    out: &'a mut [u8],
}

impl CopyRows<'_> {
    /// Rows of at least `LINES` lines, and less than one more.
    fn of_lines<const LINES: usize>(self) {
        if self.row_bytes == LINES * LINE {
            self.run(prefetch_lines::<LINES>, copy_lines::<LINES>);
        } else {
            self.run(prefetch_lines::<LINES>, copy_lines_and_rest::<LINES>);
        }
    }

    fn of_any_length(self) {
        self.run(
            prefetch,
            #[inline(always)]
            |row, out| out.copy_from_slice(row),
        );
    }

    #[inline(always)]
    fn run(self, ask: impl Fn(*const u8, usize), copy: impl Fn(&[u8], &mut [u8])) {
        let Self { rows, stride, row_bytes, ids, out } = self;
        let (start, ahead) = (rows.as_ptr(), rows_ahead(row_bytes).min(ids.len()));
        // Values are moved into the loop: read through references, each is loaded anew after every part is written.
        vectorized(
            #[inline(always)]
            move || {
                for &id in &ids[..ahead] {
                    ask(start.wrapping_add(id as usize * stride), row_bytes);
                }
                // Two loops, neither of which asks at each row whether there is one to ask for.
                let (out, out_of_last) = out.split_at_mut((ids.len() - ahead) * row_bytes);
                for ((&id, &later), out) in ids.iter().zip(&ids[ahead..]).zip(out.chunks_exact_mut(row_bytes))
                {
                    ask(start.wrapping_add(later as usize * stride), row_bytes);
                    copy(&rows[id as usize * stride..][..row_bytes], out);
                }
                for (&id, out) in ids[ids.len() - ahead..].iter().zip(out_of_last.chunks_exact_mut(row_bytes))
                {
                    copy(&rows[id as usize * stride..][..row_bytes], out);
                }
            },
        );
    }
}

/// Copies the first `LINES` lines of a row in the widest registers that the code around it is compiled for. A call of
/// `memcpy` for each row, which finds out every time what the length asks for, makes the loop a third slower on some
/// processors.
#[inline(always)]
fn copy_lines<const LINES: usize>(row: &[u8], out: &mut [u8]) {
    let (row, out) = (row.as_chunks::<LINE>().0, out.as_chunks_mut::<LINE>().0);
    for (line, out) in row[..LINES].iter().zip(&mut out[..LINES]) {
        *out = *line;
        // Without this the compiler finds that the loop is a `memcpy`, and calls it.
        compiler_fence(Ordering::SeqCst);
    }
}

/// [`copy_lines`] of a row with a rest of less than a line, which is copied with what is before it.
#[inline(always)]
fn copy_lines_and_rest<const LINES: usize>(row: &[u8], out: &mut [u8]) {
    if let (Some(last), Some(out)) = (row.last_chunk::<LINE>(), out.last_chunk_mut::<LINE>()) {
        *out = *last;
        compiler_fence(Ordering::SeqCst);
    }
    copy_lines::<LINES>(row, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_row_is_copied_whole_whatever_its_length(
            row_bytes in 1_usize..1200,
            gap in 0_usize..70,
            ids in prop::collection::vec(0_u64..40, 0..150),
        ) {
            let stride = row_bytes + gap;
            let rows: Vec<u8> = (0..40 * stride).map(|at| (at * 31 % 251) as u8).collect();
            let mut out = vec![0; ids.len() * row_bytes];
            copy_rows(&rows, stride, row_bytes, &ids, &mut out);
            for (&id, copied) in ids.iter().zip(out.chunks_exact(row_bytes)) {
                prop_assert_eq!(copied, &rows[id as usize * stride..][..row_bytes]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn a_row_past_the_end_is_not_read() {
        copy_rows(&[0; 640], 64, 64, &[3, 10], &mut [0; 128]);
    }
}
