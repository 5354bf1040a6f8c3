//! Rows rounded to whole numbers of eight bits, with a scale for every 32 values.
//!
//! A value is its group's scale times a number from −127 to 127; the scale is the group's largest magnitude over 127.
//! A group whose scale is below the smallest normal f32 is zeros: its inverse would not be finite.

use super::Strided;
use super::layout::{GROUP, Layout, QUAD, QUADS};
use crate::parallel;
use crate::simd::vectorized;

/// The largest number.
pub(super) const LARGEST: f32 = 127.0;
/// Groups of a task.
const TASK_GROUPS: usize = 1 << 10;

/// A group of a row, in a cache line of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(super) struct RoundedGroup {
    pub(super) values: [[i8; QUAD]; QUADS],
    pub(super) scale: f32,
    /// The negative excess in the sum of products of each half due to the weights' offset. If halves share a scale, the
    /// first value is for both.
    pub(super) corrections: [i32; 2],
    /// The correction of that sum if bytes are multiplied with 128 subtracted, because both sides are signed.
    pub(super) signed: [i32; 2],
    /// The scale times the sum of the numbers, of each half, or of both as above.
    pub(super) sums: [f32; 2],
}

/// Rows `[rows, inputs]` to be multiplied; values past the last are zeros.
#[derive(Debug)]
pub(super) struct RoundedRows {
    /// `[rows, groups]`
    data: Vec<RoundedGroup>,
    /// Groups of a row.
    groups: usize,
}

impl RoundedGroup {
    const ZERO: Self =
        Self { values: [[0; QUAD]; QUADS], scale: 0.0, corrections: [0; 2], signed: [0; 2], sums: [0.0; 2] };

    #[inline(always)]
    fn new(values: &[f32; GROUP], offset: i32, halves: usize) -> Self {
        let scale = max_magnitude(values) / LARGEST;
        let inverse = inverse(scale);
        // In arrays of their own, so that the compiler computes many values at once.
        let mut numbers = [0; GROUP];
        for (number, &value) in numbers.iter_mut().zip(values) {
            *number = round(value, inverse);
        }
        let mut group = Self { scale, ..Self::ZERO };
        for (quad, numbers) in group.values.iter_mut().zip(numbers.as_chunks().0) {
            *quad = *numbers;
        }
        let mut sums = [0; 2];
        for (sum, half) in sums.iter_mut().zip(numbers.as_chunks::<{ GROUP / 2 }>().0) {
            for &number in half {
                *sum += i32::from(number);
            }
        }
        if halves == 1 {
            sums = [sums[0] + sums[1], 0];
        }
        group.corrections = sums.map(|sum| -offset * sum);
        group.signed = sums.map(|sum| (128 - offset) * sum);
        group.sums = sums.map(|sum| scale * sum as f32);
        group
    }
}

impl RoundedRows {
    /// Rounds the rows of `x` for weights of a layout whose numbers have `offset`. With `share`, threads share the
    /// work.
    pub(super) fn new(x: Strided<'_>, layout: &Layout, offset: i32, share: bool) -> Self {
        let (count, groups) = (x.count(), x.width.div_ceil(GROUP));
        let mut data = vec![RoundedGroup::ZERO; count * groups];
        let rows = if share { (TASK_GROUPS / groups).max(1) } else { count.max(1) };
        let tasks = data.chunks_mut(rows * groups).enumerate();
        let work = |(task, data): (usize, &mut [RoundedGroup])| {
            vectorized(
                #[inline(always)]
                || {
                    for (row, groups) in data.chunks_exact_mut(groups).enumerate() {
                        round_row(x.row(task * rows + row), groups, offset, layout.halves);
                    }
                },
            );
        };
        if count <= rows {
            tasks.for_each(work)
        } else {
            parallel::for_each(tasks, work)
        }
        Self { data, groups }
    }

    pub(super) fn count(&self) -> usize {
        self.data.len() / self.groups
    }

    #[inline(always)]
    pub(super) fn row(&self, index: usize) -> &[RoundedGroup] {
        &self.data[index * self.groups..][..self.groups]
    }
}

#[inline(always)]
fn round_row(x: &[f32], groups: &mut [RoundedGroup], offset: i32, halves: usize) {
    let (whole, rest) = x.as_chunks::<GROUP>();
    for (group, values) in groups.iter_mut().zip(whole) {
        *group = RoundedGroup::new(values, offset, halves);
    }
    if let Some(group) = groups.get_mut(whole.len()) {
        let mut values = [0.0; GROUP];
        values[..rest.len()].copy_from_slice(rest);
        *group = RoundedGroup::new(&values, offset, halves);
    }
}

/// The largest magnitude, NaN if there is one: bits of magnitudes sort like the magnitudes.
#[inline(always)]
fn max_magnitude(values: &[f32; GROUP]) -> f32 {
    f32::from_bits(values.iter().fold(0, |most, value| most.max(value.abs().to_bits())))
}

/// `value / scale` as the nearest whole number, ties to even, given the scale's inverse.
#[inline(always)]
pub(super) fn round(value: f32, inverse: f32) -> i8 {
    /// 1.5 · 2^23: adding it leaves the nearest whole number in the low bits, without calling a rounding function on
    /// processors that may lack the instruction.
    const ROUND: f32 = 12_582_912.0;
    (value * inverse + ROUND).to_bits() as i8
}

/// 1 / scale, and 0 for a group of zeros. A scale that is not finite makes every sum NaN.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use proptest::prelude::*;

    fn rounded(x: &[f32]) -> RoundedRows {
        let layout = Layout::of(crate::BlockFormat::Q8_0).unwrap();
        RoundedRows::new(Strided::rows(x, x.len()), &layout, 128, false)
    }

    proptest! {
        /// Numbers are within half a step of the values, the largest are kept, and zeros stay zeros.
        #[test]
        fn rounds_to_the_nearest(inputs in 1_usize..100, zeros: bool, power in -100..100_i32, seed: u64) {
            let x = if zeros { vec![0.0; inputs] } else { random(inputs, seed) };
            let x: Vec<f32> = x.iter().map(|x| x * 2.0_f32.powi(power)).collect();
            let rows = rounded(&x);
            for (group, values) in rows.row(0).iter().zip(x.chunks(GROUP)) {
                let most = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                prop_assert!((group.scale * LARGEST - most).abs() <= 1e-6 * most);
                for (i, &value) in values.iter().enumerate() {
                    let number = group.values[i / QUAD][i % QUAD];
                    prop_assert!((f32::from(number) * group.scale - value).abs() <= 0.5001 * group.scale);
                }
            }
        }
    }

    /// A scale whose inverse overflows does not make numbers of nothing.
    #[test]
    fn values_below_all_normal_numbers_are_zeros() {
        for value in [1e-45, 1e-40, 1.4e-38, 100.0 * f32::MIN_POSITIVE] {
            let rows = rounded(&[value; 32]);
            assert_eq!(rows.row(0)[0].values, [[0; QUAD]; QUADS], "{value}");
        }
        assert_eq!(rounded(&[200.0 * f32::MIN_POSITIVE; 32]).row(0)[0].values, [[127; QUAD]; QUADS]);
    }
}
