//! Products of float rows with a panel of float weights.
//!
//! Every sum is one chain of fused multiply-adds over all inputs, in order. Neither the instruction set nor the number of
//! rows changes its bits.

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::{bf16, f16};

use super::PANEL;
use super::line::from_f16;
use crate::parallel;
use crate::simd::{multiply_add, vectorized};

/// Rows that are multiplied together. With AVX-512, their sums fit the registers and are enough to hide the time of an
/// addition.
pub(super) const GROUP_ROWS: usize = 6;
/// Rows of a group whose sums fit 16 registers of 256 bits beside a panel's weights.
const NARROW_ROWS: usize = 2;
/// Weights of a panel's columns that all rows of a block pass over before the next: 24 KB, which fit the first cache.
const PART_INPUTS: usize = 192;
/// Rows whose sums stay in the first cache beside the weights.
pub(super) const BLOCK_ROWS: usize = 96;
/// Values to copy that are worth a second thread.
const WORTH_SHARING: usize = 1 << 15;

/// A float as weights store it.
pub(super) trait Weight: Copy {
    /// Its value.
    fn widen(self) -> f32;

    /// The values of sixteen weights.
    ///
    /// # Safety
    /// The processor must have AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn vector(weights: &[Self; 16]) -> std::arch::x86_64::__m512;
}

/// Rows of `width` values that are `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    pub(super) data: &'a [f32],
    pub(super) start: usize,
    pub(super) stride: usize,
    pub(super) width: usize,
}

impl<'a> Strided<'a> {
    /// Rows that follow each other.
    pub(super) fn rows(data: &'a [f32], width: usize) -> Self {
        Self { data, start: 0, stride: width, width }
    }

    pub(super) fn count(&self) -> usize {
        self.data.len() / self.stride
    }

    #[inline(always)]
    pub(super) fn row(&self, index: usize) -> &'a [f32] {
        &self.data[index * self.stride + self.start..][..self.width]
    }
}

/// Rows in groups of [`GROUP_ROWS`]. The values of a group lie side by side, so that a product needs one index for all.
/// Zeros fill the last group. A single row that is left over is not copied, which is the usual case in decoding.
pub(super) struct GroupedRows<'a> {
    x: Strided<'a>,
    /// Rows in groups.
    count: usize,
    /// `[group, input]`
    groups: Vec<[f32; GROUP_ROWS]>,
}

impl<'a> GroupedRows<'a> {
    /// The groups of `x`. With `share`, threads share the work.
    pub(super) fn of(x: Strided<'a>, share: bool) -> Self {
        let count = if x.count() % GROUP_ROWS == 1 { x.count() - 1 } else { x.count() };
        let zeros = vec![0.0; if count.is_multiple_of(GROUP_ROWS) { 0 } else { x.width }];
        let mut groups = vec![[0.0; GROUP_ROWS]; count.div_ceil(GROUP_ROWS) * x.width];
        let fill = |(group, values): (usize, &mut [[f32; GROUP_ROWS]])| {
            let row = |row: usize| if row < count { x.row(row) } else { &zeros[..] };
            let rows: [&[f32]; GROUP_ROWS] =
                std::array::from_fn(|place| &row(group * GROUP_ROWS + place)[..x.width]);
            values.iter_mut().enumerate().for_each(|(input, value)| *value = rows.map(|row| row[input]));
        };
        let all = groups.chunks_exact_mut(x.width).enumerate();
        if share && count * x.width >= WORTH_SHARING {
            parallel::for_each(all, fill)
        } else {
            all.for_each(fill)
        }
        Self { x, count, groups }
    }

    /// Passes the products of each row with a panel `[inputs, PANEL]` to `each`. A part of the panel stays in the first
    /// cache for a block of rows.
    pub(super) fn by_panel<T: Weight>(&self, panel: &[T], each: &mut impl FnMut(usize, &[f32; PANEL])) {
        let Self { x, count, groups } = self;
        let inputs = &panel.as_chunks::<PANEL>().0[..x.width];
        let instructions = Instructions::best();
        let mut sums = [[0.0; PANEL]; BLOCK_ROWS];
        for block in (0..*count).step_by(BLOCK_ROWS) {
            let own = (count - block).min(BLOCK_ROWS);
            let sums = &mut sums.as_chunks_mut::<GROUP_ROWS>().0[..own.div_ceil(GROUP_ROWS)];
            sums.fill([[0.0; PANEL]; GROUP_ROWS]);
            let block_groups = &groups[block / GROUP_ROWS * x.width..];
            for (part, inputs) in inputs.chunks(PART_INPUTS).enumerate() {
                for (group, sums) in block_groups.chunks_exact(x.width).zip(&mut *sums) {
                    instructions.add(&group[part * PART_INPUTS..], inputs, sums);
                }
            }
            sums.iter().flatten().take(own).enumerate().for_each(|(row, sums)| each(block + row, sums));
        }
        for row in *count..x.count() {
            let mut sums = [[0.0; PANEL]];
            instructions.add(x.row(row).as_chunks::<1>().0, inputs, &mut sums);
            each(row, &sums[0]);
        }
    }
}

/// Instructions that multiply and add floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instructions {
    /// Portable code, as the compiler translates it for this machine's vectors of at most 256 bits.
    Portable,
    /// Vectors of 512 bits, which the compiler does not choose by itself.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Instructions {
    /// The best of this machine.
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            return Self::Avx512;
        }
        Self::Portable
    }

    /// Adds the products of R rows `[input, R]` with a panel's `inputs` to `sums`. Inputs that `rows` has beyond those
    /// of the panel do not count.
    fn add<const R: usize, T: Weight>(
        self,
        rows: &[[f32; R]],
        inputs: &[[T; PANEL]],
        sums: &mut [[f32; PANEL]; R],
    ) {
        match self {
            Self::Portable => add(rows, inputs, sums),
            // SAFETY: only `best` returns it, after it found the processor's support.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::add(rows, inputs, sums) },
        }
    }
}

/// [`Instructions::add`] in portable code.
fn add<const R: usize, T: Weight>(rows: &[[f32; R]], inputs: &[[T; PANEL]], sums: &mut [[f32; PANEL]; R]) {
    vectorized(
        #[inline(always)]
        || {
            let (pairs, single) = sums.as_chunks_mut::<NARROW_ROWS>();
            for (index, sums) in pairs.iter_mut().enumerate() {
                *sums = added(rows, NARROW_ROWS * index, inputs, *sums);
            }
            for sums in single {
                [*sums] = added(rows, R - 1, inputs, [*sums]);
            }
        },
    );
}

/// `sums` and the products of N rows of R, from row `first` on.
#[inline(always)]
fn added<const N: usize, const R: usize, T: Weight>(
    rows: &[[f32; R]],
    first: usize,
    inputs: &[[T; PANEL]],
    mut sums: [[f32; PANEL]; N],
) -> [[f32; PANEL]; N] {
    for (values, weights) in rows.iter().zip(inputs) {
        let values: [f32; N] = std::array::from_fn(
            #[inline(always)]
            |row| values[first + row],
        );
        let weights: [f32; PANEL] = std::array::from_fn(
            #[inline(always)]
            |column| weights[column].widen(),
        );
        sums = multiply_add(values, weights, sums);
    }
    sums
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vector(weights: &[Self; 16]) -> std::arch::x86_64::__m512 {
        avx512::vector(weights)
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        from_f16(self.to_bits())
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vector(weights: &[Self; 16]) -> std::arch::x86_64::__m512 {
        avx512::vector_of_f16(weights)
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vector(weights: &[Self; 16]) -> std::arch::x86_64::__m512 {
        avx512::vector_of_bf16(weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use proptest::prelude::*;

    /// Each sum by its definition.
    fn defined<const R: usize, T: Weight>(
        rows: &[[f32; R]],
        inputs: &[[T; PANEL]],
        sums: &mut [[f32; PANEL]; R],
    ) {
        for (row, sums) in sums.iter_mut().enumerate() {
            for (column, sum) in sums.iter_mut().enumerate() {
                for (values, weights) in rows.iter().zip(inputs) {
                    *sum = values[row].mul_add(weights[column].widen(), *sum);
                }
            }
        }
    }

    fn check<const R: usize, T: Weight>(inputs: usize, seed: u64, weight: impl Fn(f32) -> T) {
        let rows = random(inputs * R, seed);
        let weights: Vec<T> = random(inputs * PANEL, seed ^ 1).into_iter().map(weight).collect();
        let (rows, weights) = (rows.as_chunks::<R>().0, weights.as_chunks::<PANEL>().0);
        let start = random(R * PANEL, seed ^ 2);
        let start: [[f32; PANEL]; R] = std::array::from_fn(|row| start.as_chunks().0[row]);
        let (mut expected, mut portable, mut best) = (start, start, start);
        defined(rows, weights, &mut expected);
        add(rows, weights, &mut portable);
        Instructions::best().add(rows, weights, &mut best);
        assert_eq!(portable, expected);
        assert_eq!(best, expected, "{:?}", Instructions::best());
    }

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_defined_bits(inputs in 0_usize..40, seed: u64) {
            check::<1, f32>(inputs, seed, |value| value);
            check::<3, f32>(inputs, seed, |value| value);
            check::<GROUP_ROWS, f32>(inputs, seed, |value| value);
            check::<GROUP_ROWS, f16>(inputs, seed, f16::from_f32);
            check::<GROUP_ROWS, bf16>(inputs, seed, bf16::from_f32);
        }
    }
}
