//! Products of float rows with a panel of float weights.
//!
//! Every sum is one chain of fused multiply-adds over all inputs, in order. Neither the instruction set nor the number of
//! rows changes its bits.

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::{bf16, f16};

use super::PANEL;
use super::line::from_f16;
use crate::simd::{multiply_add, vectorized};

/// Rows that are multiplied together. With AVX-512, their sums fit the registers and are enough to hide the time of an
/// addition.
pub(super) const GROUP_ROWS: usize = 12;
/// Weights of a panel's columns that all rows of a block pass over before the next: 24 KB, which fit the first cache.
const PART_INPUTS: usize = 192;
/// Rows whose sums stay in the first cache beside the weights.
pub(super) const BLOCK_ROWS: usize = 96;

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

/// Passes the products of each row of `x` with each of `panels` `[panels, inputs, PANEL]` to `each`, with the numbers of
/// panel and row.
///
/// A block of rows stays in the second cache for all panels, and a part of a panel in the first cache for all of them.
pub(super) fn rows_by_panels<T: Weight>(
    x: Strided<'_>,
    panels: &[T],
    each: &mut impl FnMut(usize, usize, &[f32; PANEL]),
) {
    assert!(
        panels.len().is_multiple_of(x.width * PANEL),
        "packed: {} weights are not whole panels",
        panels.len()
    );
    let instructions = Instructions::best();
    let mut sums = [[0.0; PANEL]; BLOCK_ROWS];
    for block in (0..x.count()).step_by(BLOCK_ROWS) {
        let sums = &mut sums[..(x.count() - block).min(BLOCK_ROWS)];
        for (panel, weights) in panels.chunks_exact(x.width * PANEL).enumerate() {
            sums.fill([0.0; PANEL]);
            for (part, inputs) in weights.as_chunks::<PANEL>().0.chunks(PART_INPUTS).enumerate() {
                for (group, sums) in sums.chunks_mut(GROUP_ROWS).enumerate() {
                    let row = |row: usize| {
                        &x.row(block + group * GROUP_ROWS + row)[part * PART_INPUTS..][..inputs.len()]
                    };
                    instructions.add_group(row, inputs, sums);
                }
            }
            sums.iter().enumerate().for_each(|(row, sums)| each(panel, block + row, sums));
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

    /// Adds the products of as many rows as there are `sums`, at most [`GROUP_ROWS`], with a panel's `inputs`.
    #[inline(always)]
    fn add_group<'a, T: Weight>(
        self,
        row: impl Fn(usize) -> &'a [f32],
        inputs: &[[T; PANEL]],
        sums: &mut [[f32; PANEL]],
    ) {
        macro_rules! add {
            ($($rows:literal)*) => {
                match sums.len() {
                    $($rows => {
                        // One array of so many.
                        for sums in sums.as_chunks_mut::<$rows>().0 {
                            self.add(std::array::from_fn(&row), inputs, sums);
                        }
                    })*
                    rows => unreachable!("{rows} rows in a group of {GROUP_ROWS}"),
                }
            };
        }
        add!(1 2 3 4 5 6 7 8 9 10 11 12);
    }

    /// Adds the products of R rows with a panel's `inputs` to `sums`.
    ///
    /// # Panics
    /// When a row has not as many values as there are inputs.
    fn add<const R: usize, T: Weight>(
        self,
        rows: [&[f32]; R],
        inputs: &[[T; PANEL]],
        sums: &mut [[f32; PANEL]; R],
    ) {
        assert!(rows.iter().all(|row| row.len() == inputs.len()), "a row has as many values as the panel");
        match self {
            Self::Portable => add(rows, inputs, sums),
            // SAFETY: only `best` returns it, after it found the processor's support, and the rows are as long as the
            // panel.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::add(rows, inputs, sums) },
        }
    }
}

/// [`Instructions::add`] in portable code.
fn add<const R: usize, T: Weight>(rows: [&[f32]; R], inputs: &[[T; PANEL]], sums: &mut [[f32; PANEL]; R]) {
    vectorized(
        #[inline(always)]
        || {
            let (pairs, single) = sums.as_chunks_mut::<2>();
            for (&[first, second], sums) in rows.as_chunks().0.iter().zip(pairs) {
                for ((&first, &second), weights) in first.iter().zip(second).zip(inputs) {
                    *sums = multiply_add([first, second], widened(weights), *sums);
                }
            }
            for (row, sums) in rows.as_chunks::<2>().1.iter().zip(single) {
                for (&value, weights) in row.iter().zip(inputs) {
                    [*sums] = multiply_add([value], widened(weights), [*sums]);
                }
            }
        },
    );
}

#[inline(always)]
fn widened<T: Weight>(weights: &[T; PANEL]) -> [f32; PANEL] {
    std::array::from_fn(
        #[inline(always)]
        |column| weights[column].widen(),
    )
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
    fn defined<T: Weight>(x: Strided<'_>, panel: &[T]) -> Vec<[f32; PANEL]> {
        let sum = |row: usize, column: usize| {
            let products = x.row(row).iter().zip(panel.iter().skip(column).step_by(PANEL));
            products.fold(0.0_f32, |sum, (value, weight)| value.mul_add(weight.widen(), sum))
        };
        (0..x.count()).map(|row| std::array::from_fn(|column| sum(row, column))).collect()
    }

    fn check<T: Weight>(rows: usize, inputs: usize, seed: u64, weight: impl Fn(f32) -> T) {
        let data = random(rows * (inputs + 3), seed);
        let x = Strided { data: &data, start: 2, stride: inputs + 3, width: inputs };
        let panel: Vec<T> = random(inputs * PANEL, seed ^ 1).into_iter().map(weight).collect();
        let expected = defined(x, &panel);
        let mut found = Vec::new();
        rows_by_panels(x, &panel, &mut |panel, row, sums| {
            assert_eq!((panel, row), (0, found.len()));
            found.push(*sums);
        });
        assert_eq!(found, expected, "{:?}", Instructions::best());
        let mut portable = vec![[0.0; PANEL]; rows];
        for (sums, row) in portable.chunks_mut(GROUP_ROWS).zip((0..).step_by(GROUP_ROWS)) {
            Instructions::Portable.add_group(|index| x.row(row + index), panel.as_chunks().0, sums);
        }
        assert_eq!(portable, expected);
    }

    proptest! {
        #[test]
        fn every_instruction_set_gives_the_defined_bits(rows in 0_usize..200, inputs in 1_usize..400, seed: u64) {
            check::<f32>(rows, inputs, seed, |value| value);
            check::<f16>(rows, inputs, seed, f16::from_f32);
            check::<bf16>(rows, inputs, seed, bf16::from_f32);
        }
    }

    #[test]
    #[should_panic(expected = "as many values as the panel")]
    fn refuses_a_shorter_row() {
        Instructions::best().add([&[0.0; 3]], &[[0.0_f32; PANEL]; 4], &mut [[0.0; PANEL]]);
    }
}
