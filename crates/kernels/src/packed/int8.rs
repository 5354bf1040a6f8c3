//! Weights and rows as whole numbers of eight bits, a scale for every [`GROUP`] inputs.
//!
//! A value is its group's scale times a number from −127 to 127; the scale is the group's largest value over 127.
//! Within a group the products are summed as whole numbers, exactly, in whatever order is fastest; the groups are one
//! chain of fused multiply-adds in their order. So a row has the same bits in any batch, and on any machine.

use super::{PANEL, ROWS, Strided};
use crate::parallel;
use crate::simd::vectorized;

/// Inputs that share a scale.
const GROUP: usize = 32;
/// Inputs that the processor's product of bytes sums at once.
const QUAD: usize = 4;
const QUADS: usize = GROUP / QUAD;
/// Added to weights, because that product takes one side without a sign.
const OFFSET: i32 = 128;
/// The largest number.
const LARGEST: f32 = 127.0;

/// A group of inputs of a panel: `[quads, columns, quad]`.
type GroupWeights = [[[u8; QUAD]; PANEL]; QUADS];

/// A weight `[inputs, outputs]` in panels; inputs past the last are zeros.
#[derive(Debug, Clone)]
pub(super) struct Int8Panels {
    /// `[panels, groups]`
    weights: Vec<GroupWeights>,
    /// `[panels, groups]`
    scales: Vec<[f32; PANEL]>,
    groups: usize,
}

/// Rows `[rows, inputs]` to be multiplied.
pub(super) struct Int8Rows {
    /// `[rows, groups]`
    values: Vec<[[i8; QUAD]; QUADS]>,
    /// `[rows, groups]`
    scales: Vec<f32>,
    /// What [`OFFSET`] adds too much to a group's sum, negative, `[rows, groups]`.
    corrections: Vec<i32>,
    groups: usize,
}

impl Int8Panels {
    /// Rounds panels `[panels, inputs, PANEL]`.
    pub(super) fn new(panels: &[f32], inputs: usize) -> Self {
        let of_panels = parallel::map(panels.chunks_exact(inputs * PANEL), |panel| {
            vectorized(
                #[inline(always)]
                || {
                    let groups = panel.chunks(GROUP * PANEL).map(|group| round_weights(group.as_chunks().0));
                    groups.collect::<Vec<_>>()
                },
            )
        });
        let (weights, scales) = of_panels.into_iter().flatten().unzip();
        Self { weights, scales, groups: inputs.div_ceil(GROUP) }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.weights[..]) + size_of_val(&self.scales[..])
    }

    /// Gives `each` every row's sums of one panel.
    pub(super) fn rows_by_panel(
        &self,
        panel: usize,
        rows: &Int8Rows,
        each: &mut impl FnMut(usize, &[f32; PANEL]),
    ) {
        let range = panel * self.groups..(panel + 1) * self.groups;
        let panel = Panel { weights: &self.weights[range.clone()], scales: &self.scales[range] };
        let (count, mut first) = (rows.scales.len() / rows.groups, 0);
        while first < count {
            let few = (count - first).min(ROWS);
            match few {
                1 => few_rows::<1>(&panel, rows, first, each),
                2 => few_rows::<2>(&panel, rows, first, each),
                3 => few_rows::<3>(&panel, rows, first, each),
                _ => few_rows::<ROWS>(&panel, rows, first, each),
            }
            first += few;
        }
    }
}

impl Int8Rows {
    /// Rounds the rows of `x`.
    pub(super) fn new(x: Strided<'_>) -> Self {
        let groups = x.width.div_ceil(GROUP);
        let size = x.count() * groups;
        let mut rows = Self {
            values: Vec::with_capacity(size),
            scales: Vec::with_capacity(size),
            corrections: Vec::with_capacity(size),
            groups,
        };
        vectorized(
            #[inline(always)]
            || {
                for row in 0..x.count() {
                    let (whole, rest) = x.row(row).as_chunks::<GROUP>();
                    for group in whole {
                        rows.push(group);
                    }
                    if !rest.is_empty() {
                        let mut group = [0.0; GROUP];
                        group[..rest.len()].copy_from_slice(rest);
                        rows.push(&group);
                    }
                }
            },
        );
        rows
    }

    #[inline(always)]
    fn push(&mut self, group: &[f32; GROUP]) {
        let scale = max_magnitude(group) / LARGEST;
        let inverse = inverse(scale);
        let mut numbers = [0_i8; GROUP];
        let mut sum = 0;
        for (number, &value) in numbers.iter_mut().zip(group) {
            *number = round(value, inverse);
            sum += i32::from(*number);
        }
        self.values.push(std::array::from_fn(|quad| std::array::from_fn(|i| numbers[quad * QUAD + i])));
        self.scales.push(scale);
        self.corrections.push(-OFFSET * sum);
    }
}

/// A group of inputs of a panel, at most [`GROUP`] rows, rounded, and its columns' scales.
#[inline(always)]
fn round_weights(rows: &[[f32; PANEL]]) -> (GroupWeights, [f32; PANEL]) {
    let mut most = [0; PANEL];
    for row in rows {
        for (most, weight) in most.iter_mut().zip(row) {
            *most = weight.abs().to_bits().max(*most);
        }
    }
    let scales = most.map(|most| f32::from_bits(most) / LARGEST);
    let inverses = scales.map(inverse);
    let mut numbers: GroupWeights = [[[OFFSET as u8; QUAD]; PANEL]; QUADS];
    for (input, row) in rows.iter().enumerate() {
        for ((numbers, &weight), &inverse) in numbers[input / QUAD].iter_mut().zip(row).zip(&inverses) {
            numbers[input % QUAD] = (i32::from(round(weight, inverse)) + OFFSET) as u8;
        }
    }
    (numbers, scales)
}

/// The largest magnitude, NaN if there is one: bits of magnitudes are in the order of what they stand for.
#[inline(always)]
fn max_magnitude(values: &[f32; GROUP]) -> f32 {
    f32::from_bits(values.iter().fold(0, |most, value| most.max(value.abs().to_bits())))
}

/// `value / scale` as the nearest whole number, ties to even, given the scale's inverse.
#[inline(always)]
fn round(value: f32, inverse: f32) -> i8 {
    /// 1.5 · 2^23: adding it leaves the nearest whole number in the low bits, without a call where the processor's
    /// own rounding is not known to exist.
    const ROUND: f32 = 12_582_912.0;
    (value * inverse + ROUND).to_bits() as i8
}

/// 1 / scale, and 0 for a group of zeros. A scale that is not finite makes every sum NaN by itself.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// The groups of one panel.
struct Panel<'a> {
    weights: &'a [GroupWeights],
    scales: &'a [[f32; PANEL]],
}

fn few_rows<const R: usize>(
    panel: &Panel<'_>,
    rows: &Int8Rows,
    first: usize,
    each: &mut impl FnMut(usize, &[f32; PANEL]),
) {
    let sums = sums::<R>(panel, rows, first);
    for (row, sums) in sums.iter().enumerate() {
        each(first + row, sums);
    }
}

/// Sums of rows `first..first + R` with the columns of a panel.
fn sums<const R: usize>(panel: &Panel<'_>, rows: &Int8Rows, first: usize) -> [[f32; PANEL]; R] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the processor has just been found to have both features.
        return unsafe { vnni::sums::<R>(panel, rows, first) };
    }
    vectorized(
        #[inline(always)]
        || plain_sums::<R>(panel, rows, first),
    )
}

#[inline(always)]
fn plain_sums<const R: usize>(panel: &Panel<'_>, rows: &Int8Rows, first: usize) -> [[f32; PANEL]; R] {
    let mut sums = [[0.0; PANEL]; R];
    for (group, (weights, scales)) in panel.weights.iter().zip(panel.scales).enumerate() {
        for (row, sums) in sums.iter_mut().enumerate() {
            let index = (first + row) * rows.groups + group;
            let mut exact = [rows.corrections[index]; PANEL];
            for (weights, x) in weights.iter().zip(&rows.values[index]) {
                for (exact, weight) in exact.iter_mut().zip(weights) {
                    for i in 0..QUAD {
                        *exact += i32::from(weight[i]) * i32::from(x[i]);
                    }
                }
            }
            for column in 0..PANEL {
                let scale = scales[column] * rows.scales[index];
                sums[column] = (exact[column] as f32).mul_add(scale, sums[column]);
            }
        }
    }
    sums
}

/// The same with the product of bytes that AVX-512 has.
#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::{
        __m512, __m512i, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{Int8Rows, PANEL, Panel, QUAD};
    use crate::simd::LANES;

    /// Vectors of a panel's columns.
    const VECTORS: usize = PANEL / LANES;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn sums<const R: usize>(
        panel: &Panel<'_>,
        rows: &Int8Rows,
        first: usize,
    ) -> [[f32; PANEL]; R] {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; R];
        for (group, (weights, scales)) in panel.weights.iter().zip(panel.scales).enumerate() {
            let index: [usize; R] = std::array::from_fn(|row| (first + row) * rows.groups + group);
            let mut exact = index.map(|index| [_mm512_set1_epi32(rows.corrections[index]); VECTORS]);
            let values = index.map(|index| &rows.values[index]);
            for (quad, weights) in weights.iter().enumerate() {
                let weights = load_weights(weights);
                for row in 0..R {
                    let x = _mm512_set1_epi32(i32::from_ne_bytes(values[row][quad].map(|x| x as u8)));
                    for vector in 0..VECTORS {
                        exact[row][vector] = _mm512_dpbusd_epi32(exact[row][vector], weights[vector], x);
                    }
                }
            }
            let scales = load_scales(scales);
            for row in 0..R {
                let scale = _mm512_set1_ps(rows.scales[index[row]]);
                for vector in 0..VECTORS {
                    let scale = _mm512_mul_ps(scales[vector], scale);
                    let exact = _mm512_cvtepi32_ps(exact[row][vector]);
                    sums[row][vector] = _mm512_fmadd_ps(exact, scale, sums[row][vector]);
                }
            }
        }
        sums.map(|sums| store(sums))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_weights(weights: &[[u8; QUAD]; PANEL]) -> [__m512i; VECTORS] {
        let (vectors, _) = weights.as_chunks::<LANES>();
        // SAFETY: each is LANES · QUAD = 64 bytes, which may be read from any address.
        std::array::from_fn(|vector| unsafe { _mm512_loadu_si512(vectors[vector].as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_scales(scales: &[f32; PANEL]) -> [__m512; VECTORS] {
        let (vectors, _) = scales.as_chunks::<LANES>();
        // SAFETY: each is LANES = 16 values of 4 bytes, which may be read from any address.
        std::array::from_fn(|vector| unsafe { _mm512_loadu_ps(vectors[vector].as_ptr()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(sums: [__m512; VECTORS]) -> [f32; PANEL] {
        let mut values = [0.0; PANEL];
        let (vectors, _) = values.as_chunks_mut::<LANES>();
        for (target, sum) in vectors.iter_mut().zip(sums) {
            // SAFETY: the target is LANES = 16 values of 4 bytes, borrowed for writing, at any address.
            unsafe { _mm512_storeu_ps(target.as_mut_ptr(), sum) };
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use proptest::prelude::*;

    fn panels(inputs: usize, seed: u64) -> Int8Panels {
        Int8Panels::new(&random(inputs * PANEL, seed), inputs)
    }

    proptest! {
        /// What the processor's own product makes of it, to the last bit.
        #[test]
        fn every_way_gives_the_same_bits(inputs in 1_usize..200, seed: u64) {
            let panels = panels(inputs, seed);
            let x = random(ROWS * inputs, seed ^ 1);
            let rows = Int8Rows::new(Strided::rows(&x, inputs));
            let panel = Panel { weights: &panels.weights, scales: &panels.scales };
            let expected = plain_sums::<ROWS>(&panel, &rows, 0);
            prop_assert_eq!(sums::<ROWS>(&panel, &rows, 0), expected);
            prop_assert_eq!(sums::<1>(&panel, &rows, 2)[0], expected[2]);
        }

        /// A value that is no number is not lost.
        #[test]
        fn nan_stays_nan(inputs in 1_usize..100, at: prop::sample::Index, infinite: bool) {
            let panels = panels(inputs, 1);
            let mut x = random(inputs, 2);
            x[at.index(inputs)] = if infinite { f32::INFINITY } else { f32::NAN };
            let rows = Int8Rows::new(Strided::rows(&x, inputs));
            let mut found = Vec::new();
            panels.rows_by_panel(0, &rows, &mut |_, sums| found.extend_from_slice(sums));
            prop_assert!(found.iter().all(|sum| sum.is_nan()));
        }

        /// Numbers are within half a step of the values, the largest are kept, and zeros stay zeros.
        #[test]
        fn rounds_to_the_nearest(inputs in 1_usize..100, zeros: bool, seed: u64) {
            let x = if zeros { vec![0.0; inputs] } else { random(inputs, seed) };
            let rows = Int8Rows::new(Strided::rows(&x, inputs));
            for (index, group) in x.chunks(GROUP).enumerate() {
                let scale = rows.scales[index];
                let most = group.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                prop_assert!((scale * LARGEST - most).abs() <= 1e-6 * most);
                for (i, &value) in group.iter().enumerate() {
                    let number = rows.values[index][i / QUAD][i % QUAD];
                    prop_assert!((f32::from(number) * scale - value).abs() <= 0.5001 * scale);
                }
            }
        }
    }
}
