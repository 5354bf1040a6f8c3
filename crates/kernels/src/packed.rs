//! Products with weights that are packed once and used for every token that is decoded.
//!
//! A decoder multiplies one row, or a few dozen, by the same weights again and again, so that reading the
//! weights is what costs. They are kept in panels of [`PANEL`] columns, each read from start to end, in f32,
//! rounded to bf16, which is half of the reading, or to eight bits, which is a quarter, and three times as fast where
//! the processor multiplies bytes.
//!
//! **Every value is one chain of fused multiply-adds over the inputs (or groups of them), in their order.** A row's
//! result therefore
//! has the same bits alone, in any batch, and with any number of threads: what a server promises of an answer
//! holds by construction.

mod int8;

use int8::{Int8Panels, Int8Rows};

use crate::heads::HeadMut;
use crate::parallel;
use crate::simd::{multiply_add, vectorized};

/// Columns of a panel: four vectors of 256 bits, which is what loops are compiled to even where wider ones exist.
const PANEL: usize = 32;
/// Rows that share one pass over a panel: their sums and a panel's values together fit the registers of AVX-512.
const ROWS: usize = 4;
/// Rows of a task, where there are many: a panel stays in cache meanwhile.
const TASK_ROWS: usize = 48;
/// Multiplications below which a second thread costs more than it saves.
const WORTH_SHARING: usize = 1 << 17;

/// The numbers that packed weights are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// As they are.
    #[default]
    F32,
    /// Rounded to the nearest bf16, ties to even. Products and sums stay f32.
    Bf16,
    /// Eight bits and a scale for every 32 inputs; the rows that are multiplied are rounded in the same way.
    Int8,
}

/// A weight `[inputs, outputs]` in panels.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    inputs: usize,
    outputs: usize,
    panels: Panels,
}

/// `[⌈outputs / PANEL⌉, inputs, PANEL]`; columns past the last are zeros.
#[derive(Debug, Clone)]
enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    Int8(Int8Panels),
}

/// A weight, and rows in the form that it wants them in.
enum Factors<'a> {
    F32(&'a [f32], Strided<'a>),
    Bf16(&'a [u16], Strided<'a>),
    Int8(&'a Int8Panels, Int8Rows),
}

impl PackedMatrix {
    /// Packs `weight` `[inputs, outputs]`.
    ///
    /// # Panics
    /// When a size is 0 or `weight` has another.
    pub fn new(weight: &[f32], inputs: usize, outputs: usize, format: WeightFormat) -> Self {
        assert!(inputs * outputs > 0, "packed: [{inputs}, {outputs}] is empty");
        assert_eq!(weight.len(), inputs * outputs, "packed: the weight is not [{inputs}, {outputs}]");
        let mut panels = vec![0.0; outputs.div_ceil(PANEL) * inputs * PANEL];
        parallel::for_each(panels.chunks_exact_mut(inputs * PANEL).enumerate(), |(index, panel)| {
            let columns = index * PANEL..outputs.min((index + 1) * PANEL);
            for (target, row) in panel.chunks_exact_mut(PANEL).zip(weight.chunks_exact(outputs)) {
                target[..columns.len()].copy_from_slice(&row[columns.clone()]);
            }
        });
        let panels = match format {
            WeightFormat::F32 => Panels::F32(panels),
            WeightFormat::Bf16 => Panels::Bf16(panels.into_iter().map(to_bf16).collect()),
            WeightFormat::Int8 => Panels::Int8(Int8Panels::new(&panels, inputs)),
        };
        Self { inputs, outputs, panels }
    }

    /// Values of an input row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Values of an output row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(&panels[..]),
            Panels::Bf16(panels) => size_of_val(&panels[..]),
            Panels::Int8(panels) => panels.bytes(),
        }
    }

    /// `x` `[rows, inputs]` · weight, which is `[rows, outputs]`.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.rows_of(x);
        let mut y = vec![0.0; rows * self.outputs];
        let work = rows * self.inputs * self.outputs;
        if work < WORTH_SHARING || rayon::current_num_threads() == 1 {
            self.write(x, &mut y);
        } else if rows >= TASK_ROWS * rayon::current_num_threads() / 2 {
            let size = task_rows(rows, rayon::current_num_threads());
            let tasks = x.chunks(size * self.inputs).zip(y.chunks_mut(size * self.outputs));
            parallel::for_each(tasks, |(x, y)| self.write(x, y));
        } else {
            self.share_columns(x, &mut y);
        }
        y
    }

    /// As [`product`](Self::product), on the calling thread: for products inside a parallel task.
    ///
    /// # Panics
    /// As [`product`](Self::product).
    pub fn product_here(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; self.rows_of(x) * self.outputs];
        self.write(x, &mut y);
        y
    }

    /// The product of few rows: threads share the columns.
    fn share_columns(&self, x: &[f32], y: &mut [f32]) {
        let panels = self.outputs.div_ceil(PANEL);
        let share = panels.div_ceil(4 * rayon::current_num_threads());
        let count = self.rows_of(x);
        let factors = self.factors(Strided::rows(x, self.inputs));
        let parts = parallel::map((0..panels).step_by(share), |first| {
            let last = panels.min(first + share);
            let width = self.outputs.min(last * PANEL) - first * PANEL;
            let mut part = vec![0.0; count * width];
            for panel in first..last {
                let column = (panel - first) * PANEL;
                self.panel(panel, &factors, |row, values| {
                    copy(values, &mut part[row * width + column..]);
                });
            }
            (first * PANEL, width, part)
        });
        for (column, width, part) in parts {
            for (y, part) in y.chunks_exact_mut(self.outputs).zip(part.chunks_exact(width)) {
                y[column..column + width].copy_from_slice(part);
            }
        }
    }

    /// The product of all rows, on this thread.
    fn write(&self, x: &[f32], y: &mut [f32]) {
        let factors = self.factors(Strided::rows(x, self.inputs));
        for panel in 0..self.outputs.div_ceil(PANEL) {
            self.panel(panel, &factors, |row, values| {
                copy(values, &mut y[row * self.outputs + panel * PANEL..]);
            });
        }
    }

    fn factors<'a>(&'a self, x: Strided<'a>) -> Factors<'a> {
        match &self.panels {
            Panels::F32(panels) => Factors::F32(panels, x),
            Panels::Bf16(panels) => Factors::Bf16(panels, x),
            Panels::Int8(panels) => Factors::Int8(panels, Int8Rows::new(x)),
        }
    }

    /// Gives `write` each row's values of one panel.
    fn panel(&self, panel: usize, factors: &Factors<'_>, mut write: impl FnMut(usize, &[f32])) {
        let size = self.inputs * PANEL;
        let columns = PANEL.min(self.outputs - panel * PANEL);
        let range = panel * size..(panel + 1) * size;
        let mut each = |row: usize, sums: &[f32; PANEL]| write(row, &sums[..columns]);
        match factors {
            Factors::F32(panels, x) => rows_by_panel(*x, &panels[range], &|w| w, &mut each),
            Factors::Bf16(panels, x) => rows_by_panel(*x, &panels[range], &from_bf16, &mut each),
            Factors::Int8(panels, rows) => panels.rows_by_panel(panel, rows, &mut each),
        }
    }

    fn rows_of(&self, x: &[f32]) -> usize {
        assert!(x.len().is_multiple_of(self.inputs), "packed: {} values in rows of {}", x.len(), self.inputs);
        x.len() / self.inputs
    }
}

/// Each head's part of `x` by a weight of its own.
///
/// Row r of `x` has `x_row` values, of which head h reads `inputs` from `h · x_head` on; it writes the first
/// `outputs` of the `width` values that it has in row r of `y` `[rows, heads, width]`. The others are left alone.
///
/// # Panics
/// When a slice has not the shape stated, or the weights are not all of one shape.
pub fn head_products(
    x: &[f32],
    [x_row, x_head]: [usize; 2],
    weights: &[PackedMatrix],
    y: &mut [f32],
    width: usize,
) {
    let (heads, inputs, outputs) = (weights.len(), weights[0].inputs, weights[0].outputs);
    assert!(weights.iter().all(|w| (w.inputs, w.outputs) == (inputs, outputs)), "heads of different shapes");
    assert!(x.len().is_multiple_of(x_row) && (heads - 1) * x_head + inputs <= x_row, "head_products: x");
    let rows = x.len() / x_row;
    assert_eq!(y.len(), rows * heads * width, "head_products: y is not [{rows}, {heads}, {width}]");
    assert!(outputs <= width, "head_products: {outputs} values do not fit {width}");
    let work = |(head, mut y): (usize, HeadMut<'_>)| {
        let x = Strided { data: x, start: head * x_head, stride: x_row, width: inputs };
        let factors = weights[head].factors(x);
        for panel in 0..outputs.div_ceil(PANEL) {
            weights[head].panel(panel, &factors, |row, values| {
                copy(values, &mut y.row(row)[panel * PANEL..]);
            });
        }
    };
    let split = HeadMut::split(y, rows, heads, width).into_iter().enumerate();
    if rows * heads * inputs * outputs < WORTH_SHARING {
        split.for_each(work);
    } else {
        parallel::for_each(split, work);
    }
}

/// Rows of each task: at most [`TASK_ROWS`], and as many for each thread, in whole groups of [`ROWS`].
fn task_rows(rows: usize, threads: usize) -> usize {
    let tasks = rows.div_ceil(TASK_ROWS).next_multiple_of(threads);
    rows.div_ceil(tasks).next_multiple_of(ROWS)
}

/// Copies a row's values of one panel to the beginning of `target`, without a call where the panel is full.
fn copy(values: &[f32], target: &mut [f32]) {
    match <&[f32; PANEL]>::try_from(values) {
        Ok(values) => target[..PANEL].copy_from_slice(values),
        Err(_) => target[..values.len()].copy_from_slice(values),
    }
}

/// Rows of `width` values that lie `stride` apart.
#[derive(Clone, Copy)]
struct Strided<'a> {
    data: &'a [f32],
    start: usize,
    stride: usize,
    width: usize,
}

impl<'a> Strided<'a> {
    fn rows(data: &'a [f32], width: usize) -> Self {
        Self { data, start: 0, stride: width, width }
    }

    fn count(&self) -> usize {
        self.data.len() / self.stride
    }

    #[inline(always)]
    fn row(&self, index: usize) -> &'a [f32] {
        &self.data[index * self.stride + self.start..][..self.width]
    }
}

/// All rows by one panel, a few at a time.
fn rows_by_panel<T: Copy>(
    x: Strided<'_>,
    panel: &[T],
    widen: &impl Fn(T) -> f32,
    each: &mut impl FnMut(usize, &[f32; PANEL]),
) {
    vectorized(
        #[inline(always)]
        || {
            let (count, mut first) = (x.count(), 0);
            while first < count {
                let few = (count - first).min(ROWS);
                match few {
                    1 => few_rows::<1, T>(x, first, panel, widen, each),
                    2 => few_rows::<2, T>(x, first, panel, widen, each),
                    3 => few_rows::<3, T>(x, first, panel, widen, each),
                    _ => few_rows::<ROWS, T>(x, first, panel, widen, each),
                }
                first += few;
            }
        },
    );
}

#[inline(always)]
fn few_rows<const R: usize, T: Copy>(
    x: Strided<'_>,
    first: usize,
    panel: &[T],
    widen: &impl Fn(T) -> f32,
    each: &mut impl FnMut(usize, &[f32; PANEL]),
) {
    let rows: [&[f32]; R] = std::array::from_fn(|row| x.row(first + row));
    let mut sums = [[0.0_f32; PANEL]; R];
    for (k, weights) in panel.as_chunks::<PANEL>().0[..x.width].iter().enumerate() {
        let weights: [f32; PANEL] = std::array::from_fn(
            #[inline(always)]
            |column| widen(weights[column]),
        );
        sums = multiply_add(rows.map(|row| row[k]), weights, sums);
    }
    for (row, sums) in sums.iter().enumerate() {
        each(first + row, sums);
    }
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((u64::from(bits) + 0x7fff + u64::from((bits >> 16) & 1)) >> 16) as u16
}

#[inline(always)]
fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};
    use proptest::prelude::*;

    fn plain(x: &[f32], w: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
        let rows = x.chunks_exact(inputs);
        let value = |x: &[f32], column: usize| -> f32 {
            (0..inputs).map(|k| f64::from(x[k]) * f64::from(w[k * outputs + column])).sum::<f64>() as f32
        };
        rows.flat_map(|x| (0..outputs).map(move |column| value(x, column))).collect()
    }

    proptest! {
        #[test]
        fn is_the_product(rows in 0_usize..70, inputs in 1_usize..50, outputs in 1_usize..150, seed: u64) {
            let (x, w) = (random(rows * inputs, seed), random(inputs * outputs, seed ^ 1));
            let packed = PackedMatrix::new(&w, inputs, outputs, WeightFormat::F32);
            assert_close(&packed.product(&x), &plain(&x, &w, inputs, outputs), 1e-5);
        }

        /// Errors of rounding are those of independent half steps: a hundredth of a product of random values.
        #[test]
        fn eight_bits_are_nearly_the_product(rows in 1_usize..6, inputs in 1_usize..200, seed: u64) {
            let outputs = 40;
            let (x, w) = (random(rows * inputs, seed), random(inputs * outputs, seed ^ 1));
            let packed = PackedMatrix::new(&w, inputs, outputs, WeightFormat::Int8);
            let size = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
            for (row, x) in packed.product(&x).chunks(outputs).zip(x.chunks(inputs)) {
                let expected = plain(x, &w, inputs, outputs);
                let errors: Vec<f32> = row.iter().zip(&expected).map(|(a, b)| a - b).collect();
                prop_assert!(size(&errors) <= 0.03 * size(x) * size(&w) / (inputs as f32).sqrt());
            }
        }

        #[test]
        fn heads_are_products_of_their_own(
            rows in 1_usize..20, heads in 1_usize..5, inputs in 1_usize..20, outputs in 1_usize..80, seed: u64,
        ) {
            let (x_row, width) = (heads * (inputs + 2), outputs + 3);
            let x = random(rows * x_row, seed);
            let weight = |head: u64| random(inputs * outputs, seed ^ (head + 1));
            let weights: Vec<_> = (0..heads as u64)
                .map(|head| PackedMatrix::new(&weight(head), inputs, outputs, WeightFormat::F32)).collect();
            let mut y = vec![7.0; rows * heads * width];
            head_products(&x, [x_row, inputs + 2], &weights, &mut y, width);
            for (row, y) in y.chunks(heads * width).enumerate() {
                for (head, y) in y.chunks(width).enumerate() {
                    let x = &x[row * x_row + head * (inputs + 2)..][..inputs];
                    prop_assert_eq!(&y[..outputs], &weights[head].product(x)[..]);
                    prop_assert_eq!(&y[outputs..], &[7.0; 3]);
                }
            }
        }
    }

    /// Sizes that take every path: one thread, shared columns, shared rows.
    #[test]
    fn a_row_has_the_same_bits_in_any_batch() {
        let (inputs, outputs) = (300, 1000);
        let w = random(inputs * outputs, 1);
        for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8] {
            let packed = PackedMatrix::new(&w, inputs, outputs, format);
            let x = random(200 * inputs, 2);
            let all = packed.product(&x);
            for (first, count) in [(0, 1), (7, 1), (3, 2), (190, 5), (12, 47), (100, 48), (0, 64), (1, 199)] {
                let part = packed.product(&x[first * inputs..(first + count) * inputs]);
                assert_eq!(
                    part,
                    all[first * outputs..(first + count) * outputs],
                    "{count} rows from {first}"
                );
            }
            assert_eq!(packed.product_here(&x), all);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            assert_eq!(pool.install(|| packed.product(&x)), all);
        }
    }

    #[test]
    fn tasks_share_the_rows_evenly() {
        for (rows, threads, size) in [(48, 2, 24), (64, 2, 32), (128, 2, 32), (512, 2, 44), (200, 3, 36)] {
            assert_eq!(task_rows(rows, threads), size, "{rows} rows on {threads} threads");
        }
    }

    #[test]
    fn bf16_rounds_to_nearest() {
        for value in random(10_000, 3).into_iter().chain([0.0, -0.0, 1.0, 1e-30, 3e38]) {
            let rounded = from_bf16(to_bf16(value));
            assert!((rounded - value).abs() <= value.abs() / 256.0, "{value} became {rounded}");
        }
        assert_eq!(from_bf16(to_bf16(f32::INFINITY)), f32::INFINITY);
        assert_eq!(from_bf16(to_bf16(f32::MAX)), f32::INFINITY);
        assert!(from_bf16(to_bf16(f32::NAN)).is_nan());
        // Half-way between two neighbours: the even one.
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
    }

    #[test]
    #[should_panic(expected = "the weight is not [2, 3]")]
    fn refuses_another_shape() {
        PackedMatrix::new(&[0.0; 5], 2, 3, WeightFormat::F32);
    }
}
