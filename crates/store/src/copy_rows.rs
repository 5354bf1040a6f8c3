//! Copying random rows of memory: the loop that everything waits for.

use std::sync::atomic::{Ordering, compiler_fence};

use crate::cache_line::{LINE, MOST_AHEAD, prefetch, prefetch_lines, rows_ahead};
use crate::simd::vectorized;

/// Copies the `row_bytes` bytes that begin at byte `id * stride` of `rows`, for each of `ids`, to `out`
/// \[ids, row bytes\].
///
/// # Panics
/// If a row is not within `rows`, or `out` has another length than the rows together.
pub(crate) fn copy_rows(rows: &[u8], stride: usize, row_bytes: usize, ids: &[u64], out: &mut [u8]) {
    assert_eq!(ids.len().checked_mul(row_bytes), Some(out.len()), "room for each row");
    CopyRows { rows, stride, row_bytes }.copy(
        out,
        #[inline(always)]
        |position| ids[position],
    );
}

/// Where rows are, to copy some of them.
pub(crate) struct CopyRows<'a> {
    pub(crate) rows: &'a [u8],
    /// Bytes from the start of a row to that of the next.
    pub(crate) stride: usize,
    pub(crate) row_bytes: usize,
}

impl CopyRows<'_> {
    /// Copies as many rows as `out` \[count, row bytes\] has room for: at position i the row `find(i)`. `find` is called
    /// once for each position, in order and some rows ahead of copying.
    ///
    /// A random row is a miss in every cache; asking for rows well ahead keeps many such misses in flight at once
    /// instead of one after another. Some 25 cycles pass for each of their lines, so that the loop itself counts: where
    /// the number of lines is known when compiling, it is a fifth to a quarter faster (`docs/log.md`).
    ///
    /// # Panics
    /// If a row is not within the rows.
    pub(crate) fn copy(self, out: &mut [u8], find: impl FnMut(usize) -> u64) {
        self.copy_checked(
            out,
            find,
            #[inline(always)]
            |_, row| row,
        );
    }

    /// [`copy`](Self::copy), where at position i `check(i, find(i))` tells the row to copy, when the processor has had
    /// time to fetch that of `find`. It is called once for each position, in order.
    ///
    /// # Panics
    /// If a row is not within the rows.
    pub(crate) fn copy_checked(
        self,
        out: &mut [u8],
        find: impl FnMut(usize) -> u64,
        check: impl FnMut(usize, u64) -> u64,
    ) {
        match self.row_bytes / LINE {
            1 => self.of_lines::<1>(out, find, check),
            2 => self.of_lines::<2>(out, find, check),
            3 => self.of_lines::<3>(out, find, check),
            4 => self.of_lines::<4>(out, find, check),
            5 => self.of_lines::<5>(out, find, check),
            6 => self.of_lines::<6>(out, find, check),
            7 => self.of_lines::<7>(out, find, check),
            8 => self.of_lines::<8>(out, find, check),
            9 => self.of_lines::<9>(out, find, check),
            10 => self.of_lines::<10>(out, find, check),
            11 => self.of_lines::<11>(out, find, check),
            12 => self.of_lines::<12>(out, find, check),
            13 => self.of_lines::<13>(out, find, check),
            14 => self.of_lines::<14>(out, find, check),
            15 => self.of_lines::<15>(out, find, check),
            16 => self.of_lines::<16>(out, find, check),
            _ => self.of_any_length(out, find, check),
        }
    }

    /// Rows of at least `LINES` lines, and less than one more.
    fn of_lines<const LINES: usize>(
        self,
        out: &mut [u8],
        find: impl FnMut(usize) -> u64,
        check: impl FnMut(usize, u64) -> u64,
    ) {
        if self.row_bytes == LINES * LINE {
            self.run(out, find, check, prefetch_lines::<LINES>, copy_lines::<LINES>);
        } else {
            self.run(out, find, check, prefetch_lines::<LINES>, copy_lines_and_rest::<LINES>);
        }
    }

    fn of_any_length(
        self,
        out: &mut [u8],
        find: impl FnMut(usize) -> u64,
        check: impl FnMut(usize, u64) -> u64,
    ) {
        self.run(
            out,
            find,
            check,
            prefetch,
            #[inline(always)]
            |row, out| out.copy_from_slice(row),
        );
    }

    #[inline(always)]
    fn run(
        self,
        out: &mut [u8],
        mut find: impl FnMut(usize) -> u64,
        mut check: impl FnMut(usize, u64) -> u64,
        ask: impl Fn(*const u8, usize),
        copy: impl Fn(&[u8], &mut [u8]),
    ) {
        let Self { rows, stride, row_bytes } = self;
        let (start, count) = (rows.as_ptr(), out.len() / row_bytes);
        let ahead = rows_ahead(row_bytes).min(count);
        // Values are moved into the loop: read through references, each is loaded anew after every part is written.
        vectorized(
            #[inline(always)]
            move || {
                // What was found and is not yet copied.
                let mut asked = [0; MOST_AHEAD];
                for (position, asked) in asked.iter_mut().enumerate().take(ahead) {
                    *asked = find(position);
                    ask(start.wrapping_add(*asked as usize * stride), row_bytes);
                }
                // Two loops, neither of which asks at each row whether there is one to ask for.
                let (out, out_of_last) = out.split_at_mut((count - ahead) * row_bytes);
                for (position, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                    let later = find(position + ahead);
                    ask(start.wrapping_add(later as usize * stride), row_bytes);
                    let id = check(position, asked[position % MOST_AHEAD]);
                    asked[(position + ahead) % MOST_AHEAD] = later;
                    copy(&rows[id as usize * stride..][..row_bytes], out);
                }
                for (position, out) in (count - ahead..).zip(out_of_last.chunks_exact_mut(row_bytes)) {
                    let id = check(position, asked[position % MOST_AHEAD]);
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
