//! The distinct rows of a batch, and which of them each occurrence wants.

use rayon::prelude::*;

use crate::error::{Result, check_length};
use crate::simd::vectorized;

/// The distinct row ids of a batch in ascending order, and the way back to the occurrences.
///
/// Text repeats itself: about half of a batch's row ids are duplicates. Each distinct row is fetched once,
/// enters the model once, and is updated once with the sum of its occurrences' gradients. The result depends
/// on the batch alone, not on threads or on earlier use. Refill one value with [`assign`](Self::assign) to
/// reuse its buffers.
#[derive(Clone, Debug, Default)]
pub struct DistinctRows {
    ids: Vec<u64>,
    index: Vec<u32>,
    /// Occurrences grouped by distinct row, in batch order within each: row r has
    /// `grouped[starts[r]..starts[r + 1]]`.
    grouped: Vec<u32>,
    starts: Vec<u32>,
    pairs: Vec<Occurrence>,
    spare: Vec<Occurrence>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Occurrence {
    id: u64,
    position: u32,
}

impl DistinctRows {
    /// The distinct rows of `batch`.
    ///
    /// # Panics
    /// As [`assign`](Self::assign).
    pub fn of(batch: &[u64]) -> Self {
        let mut distinct = Self::default();
        distinct.assign(batch);
        distinct
    }

    /// Replaces the content by the distinct rows of `batch`, reusing the buffers.
    ///
    /// # Panics
    /// If `batch` has 2³² or more ids (32 GiB of them).
    pub fn assign(&mut self, batch: &[u64]) {
        assert!(u32::try_from(batch.len()).is_ok(), "a batch holds fewer than 2^32 row ids");
        self.pairs.clear();
        self.pairs.extend((0..).zip(batch).map(|(position, &id)| Occurrence { id, position }));
        sort(&mut self.pairs, &mut self.spare);

        self.ids.clear();
        self.starts.clear();
        self.grouped.clear();
        self.index.clear();
        self.index.resize(batch.len(), 0);
        for (rank, &Occurrence { id, position }) in (0..).zip(&self.pairs) {
            if self.ids.last() != Some(&id) {
                self.ids.push(id);
                self.starts.push(rank);
            }
            self.index[position as usize] = self.ids.len() as u32 - 1;
            self.grouped.push(position);
        }
        self.starts.push(batch.len() as u32);
    }

    /// The distinct ids, ascending.
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// For each occurrence of the batch, the place of its row in [`ids`](Self::ids).
    pub fn index(&self) -> &[u32] {
        &self.index
    }

    /// Number of distinct rows.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether the batch was empty.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The positions in the batch at which distinct row `row` (a place in [`ids`](Self::ids)) occurs,
    /// ascending.
    ///
    /// # Panics
    /// If `row` is not below [`len`](Self::len).
    pub fn occurrences(&self, row: usize) -> &[u32] {
        &self.grouped[self.starts[row] as usize..self.starts[row + 1] as usize]
    }

    /// Copies each occurrence's row: `rows` \[distinct, width\] → `out` \[occurrences, width\].
    ///
    /// # Errors
    /// If a buffer's length is not its rows times `width`.
    pub fn expand(&self, rows: &[f32], width: usize, out: &mut [f32]) -> Result<()> {
        check_length("distinct rows to expand", self.len() * width, rows.len())?;
        check_length("expanded rows", self.index.len() * width, out.len())?;
        let copy = |(out, &row): (&mut [f32], &u32)| {
            let start = row as usize * width;
            out.copy_from_slice(&rows[start..start + width]);
        };
        out.par_chunks_exact_mut(width.max(1)).zip(&self.index).with_min_len(1024).for_each(copy);
        Ok(())
    }

    /// Adds up each distinct row's occurrences, in batch order: `grads` \[occurrences, width\] → `sums`
    /// \[distinct, width\]. The gradient of [`expand`](Self::expand); the same bits at any number of threads.
    ///
    /// # Errors
    /// If a buffer's length is not its rows times `width`.
    pub fn sum(&self, grads: &[f32], width: usize, sums: &mut [f32]) -> Result<()> {
        check_length("gradients of occurrences", self.index.len() * width, grads.len())?;
        check_length("gradients of distinct rows", self.len() * width, sums.len())?;
        // Some rows at a time, compiled for the machine's vectors as a whole.
        const ROWS: usize = 512;
        let add = |(chunk, sums): (usize, &mut [f32])| {
            vectorized(
                #[inline(always)]
                || {
                    for (row, sum) in (chunk * ROWS..).zip(sums.chunks_exact_mut(width)) {
                        sum_row(self.occurrences(row), grads, sum);
                    }
                },
            );
        };
        if width > 0 {
            sums.par_chunks_mut(ROWS * width).enumerate().for_each(add);
        }
        Ok(())
    }
}

/// Adds up the rows `occurrences` of `grads` into `sum`, whose length is a row's.
#[inline(always)]
fn sum_row(occurrences: &[u32], grads: &[f32], sum: &mut [f32]) {
    let width = sum.len();
    let done = sum_columns::<128>(occurrences, grads, sum, 0);
    let done = sum_columns::<64>(occurrences, grads, sum, done);
    let done = sum_columns::<16>(occurrences, grads, sum, done);
    debug_assert!(width - done < 16);
    sum_columns::<1>(occurrences, grads, sum, done);
}

/// Adds up columns from `start` on, `COLUMNS` at a time while there are that many. Returns the first column that is left.
/// The sums of `COLUMNS` columns stay in registers until all occurrences are added. They are not written and read again
/// for each occurrence.
#[inline(always)]
fn sum_columns<const COLUMNS: usize>(
    occurrences: &[u32],
    grads: &[f32],
    sum: &mut [f32],
    start: usize,
) -> usize {
    let (width, mut column) = (sum.len(), start);
    let (blocks, _) = sum[start..].as_chunks_mut::<COLUMNS>();
    for block in blocks {
        let grad = |position: u32| -> &[f32; COLUMNS] {
            let grad = &grads[position as usize * width + column..];
            grad.first_chunk().expect("rows have the same width")
        };
        let mut added = *grad(occurrences[0]);
        for &position in &occurrences[1..] {
            added.iter_mut().zip(grad(position)).for_each(|(added, grad)| *added += grad);
        }
        *block = added;
        column += COLUMNS;
    }
    column
}

/// Bits sorted in one pass: 2048 counters stay in the first-level cache.
const DIGIT_BITS: u32 = 11;
const DIGITS: usize = 1 << DIGIT_BITS;

/// Sorts by id, keeping batch order among equals: a radix sort over the bits that ids have in use, which for
/// batches of training is 2.6 times as fast as comparing (benches/distinct_rows.rs).
fn sort(pairs: &mut Vec<Occurrence>, spare: &mut Vec<Occurrence>) {
    if pairs.len() < DIGITS {
        return pairs.sort_unstable();
    }
    spare.resize(pairs.len(), Occurrence::default());
    let bits = 64 - pairs.iter().fold(0, |all, pair| all | pair.id).leading_zeros();
    for shift in (0..bits).step_by(DIGIT_BITS as usize) {
        let digit = |pair: &Occurrence| (pair.id >> shift) as usize % DIGITS;
        let mut next = [0; DIGITS];
        pairs.iter().for_each(|pair| next[digit(pair)] += 1);
        let mut start = 0;
        next.iter_mut().for_each(|slot| start += std::mem::replace(slot, start));
        for pair in pairs.iter() {
            let slot = &mut next[digit(pair)];
            spare[*slot] = *pair;
            *slot += 1;
        }
        std::mem::swap(pairs, spare);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn check(distinct: &DistinctRows, batch: &[u64]) {
        let mut wanted: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for (position, &id) in batch.iter().enumerate() {
            wanted.entry(id).or_default().push(position as u32);
        }
        assert_eq!(distinct.ids(), wanted.keys().copied().collect::<Vec<_>>());
        assert_eq!(distinct.index().len(), batch.len());
        for (&row, id) in distinct.index().iter().zip(batch) {
            assert_eq!(distinct.ids()[row as usize], *id);
        }
        for (row, positions) in wanted.values().enumerate() {
            assert_eq!(distinct.occurrences(row), positions);
        }
    }

    #[test]
    fn keeps_each_row_once_and_remembers_who_wanted_it() {
        let distinct = DistinctRows::of(&[9, 2, 9, 7, 2, 9]);
        assert_eq!(distinct.ids(), [2, 7, 9]);
        assert_eq!(distinct.index(), [2, 0, 2, 1, 0, 2]);
        assert_eq!(distinct.occurrences(2), [0, 2, 5]);
        let mut sums = [0.0; 6];
        let grads: Vec<f32> = (1..=12).map(|value| value as f32).collect();
        distinct.sum(&grads, 2, &mut sums).unwrap();
        assert_eq!(sums, [12.0, 14.0, 7.0, 8.0, 17.0, 20.0]);
        assert!(DistinctRows::of(&[]).is_empty());
    }

    #[test]
    fn buffers_of_the_wrong_length_are_refused() {
        let distinct = DistinctRows::of(&[1, 1]);
        let refused = distinct.sum(&[0.0; 3], 2, &mut [0.0; 2]).unwrap_err().to_string();
        assert!(refused.contains("3 values where 4 are needed"), "{refused}");
        assert!(distinct.expand(&[0.0; 2], 2, &mut [0.0; 2]).is_err());
    }

    #[test]
    fn sums_of_any_width_are_those_of_the_plain_loop_bit_for_bit() {
        let batch: Vec<u64> = (0..1500u64).map(|i| i * i % 611).collect();
        let distinct = DistinctRows::of(&batch);
        for width in [1, 2, 15, 16, 17, 63, 64, 100, 128, 129, 200, 256, 300] {
            let grads: Vec<f32> = (0..batch.len() * width).map(|i| (i as f32 * 0.37).sin() * 1e3).collect();
            let (mut sums, mut expected) = (vec![9.0; distinct.len() * width], Vec::new());
            for row in 0..distinct.len() {
                for column in 0..width {
                    let grad = |position: &u32| grads[*position as usize * width + column];
                    let mut values = distinct.occurrences(row).iter().map(grad);
                    let first = values.next().unwrap();
                    expected.push(values.fold(first, |sum, grad| sum + grad).to_bits());
                }
            }
            distinct.sum(&grads, width, &mut sums).unwrap();
            assert_eq!(sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>(), expected, "width {width}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_batch_small_or_large_even_in_used_buffers(
            batch in prop::collection::vec(any::<u64>(), 0..6000),
            before in prop::collection::vec(any::<u64>(), 0..6000),
            bits in 0..=64u32,
        ) {
            let narrow = |id: &u64| if bits == 0 { 0 } else { id >> (64 - bits) };
            let (batch, before): (Vec<_>, Vec<_>) =
                (batch.iter().map(narrow).collect(), before.iter().map(narrow).collect());
            let mut distinct = DistinctRows::of(&before);
            distinct.assign(&batch);
            check(&distinct, &batch);
        }

        #[test]
        fn summing_is_the_transpose_of_expanding(
            batch in prop::collection::vec(0..20u64, 1..200),
            width in 1..5usize,
        ) {
            // <expand(x), y> = <x, sum(y)> for whole numbers, which f32 adds exactly.
            let distinct = DistinctRows::of(&batch);
            let numbers = |count: usize, seed: usize| -> Vec<f32> {
                (0..count).map(|i| ((i * 37 + seed) % 11) as f32 - 5.0).collect()
            };
            let (x, y) = (numbers(distinct.len() * width, 3), numbers(batch.len() * width, 8));
            let (mut expanded, mut summed) = (vec![0.0; y.len()], vec![0.0; x.len()]);
            distinct.expand(&x, width, &mut expanded).unwrap();
            distinct.sum(&y, width, &mut summed).unwrap();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            prop_assert_eq!(dot(&expanded, &y), dot(&x, &summed));
        }
    }
}
