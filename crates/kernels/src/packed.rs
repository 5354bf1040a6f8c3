//! Products with weights that are packed once and used for every decoded token.
//!
//! A decoder multiplies one row, or a few dozen, by the same weights again and again, so reading the weights dominates.
//! They are stored in panels of [`PANEL`] columns, each read from start to end: floats, exact or rounded to 16 bits, or
//! whole numbers of two to eight bits with scales, from a GGUF file or rounded here.
//!
//! **Every value is one chain of fused multiply-adds over the inputs (or groups of them), in order.** So a row's result
//! has the same bits alone, in any batch, and with any number of threads.

mod block_panels;
mod dot;
mod float_rows;
mod layout;
mod line;
mod packer;
mod rounded_rows;

pub use packer::BlockPacker;

use half::{bf16, f16};

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use crate::block_format::{BlockError, BlockFormat};
use crate::columns::ColumnsMut;
use crate::heads::HeadMut;
use crate::parallel;
use block_panels::{BlockPanels, Scratch};
use float_rows::{BLOCK_ROWS, GROUP_ROWS, Strided, Weight, rows_by_panels};
use rounded_rows::RoundedRows;

/// Columns of a panel: four vectors of 256 bits, the width that loops are compiled for even if wider ones exist.
const PANEL: usize = 32;
/// Below this number of multiplications, a second thread costs more than it saves.
const WORTH_SHARING: usize = 1 << 15;
/// Multiplications beside which the beginning of a task counts for nothing.
const TASK: usize = 1 << 23;
/// Float panels that a block of rows passes over before the next block: they stay in the second cache beside it.
const PANELS: usize = 4;

/// The formats that f32 weights are packed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// f32, unchanged.
    #[default]
    F32,
    /// Rounded to the nearest bf16, ties to even. Products and sums stay f32.
    Bf16,
    /// Eight bits and a scale for every 32 inputs. The rows that they multiply are rounded in the same way.
    Int8,
}

/// How rows are rounded before they are multiplied with quantised weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// To eight bits and a scale for every 32 values, for fast products of whole numbers.
    #[default]
    Rounded,
    /// Not at all. Weights become f32 again, a panel at a time. The product equals that of a dequantised matrix, bit
    /// for bit as with [`WeightFormat::F32`].
    Exact,
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
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Blocks(BlockPanels, Activations),
}

/// A weight, and rows in the form that it needs.
enum Factors<'a> {
    F32(&'a [f32], Strided<'a>),
    F16(&'a [f16], Strided<'a>),
    Bf16(&'a [bf16], Strided<'a>),
    Rounded(&'a BlockPanels, Arc<RoundedRows>),
    Exact(&'a BlockPanels, Strided<'a>),
}

impl Factors<'_> {
    /// Panels that a block of rows passes over together. A single block gains nothing, and would push panels out of the
    /// cache that has just been filled with them.
    fn panels_at_once(&self) -> usize {
        match self {
            Self::Rounded(..) => 1,
            Self::F32(_, x) | Self::F16(_, x) | Self::Bf16(_, x) | Self::Exact(_, x) => {
                if x.count() > BLOCK_ROWS { PANELS } else { 1 }
            }
        }
    }
}

impl PackedMatrix {
    /// Packs `weight` `[inputs, outputs]`.
    ///
    /// # Panics
    /// When a size is 0 or `weight` has another.
    pub fn new(weight: &[f32], inputs: usize, outputs: usize, format: WeightFormat) -> Self {
        assert!(inputs > 0 && outputs > 0, "packed: [{inputs}, {outputs}] is empty");
        assert_eq!(
            Some(weight.len()),
            inputs.checked_mul(outputs),
            "packed: the weight is not [{inputs}, {outputs}]"
        );
        let mut panels = vec![0.0; outputs.div_ceil(PANEL) * inputs * PANEL];
        parallel::for_each(panels.chunks_exact_mut(inputs * PANEL).enumerate(), |(index, panel)| {
            let columns = index * PANEL..outputs.min((index + 1) * PANEL);
            for (target, row) in panel.chunks_exact_mut(PANEL).zip(weight.chunks_exact(outputs)) {
                target[..columns.len()].copy_from_slice(&row[columns.clone()]);
            }
        });
        let panels = match format {
            WeightFormat::F32 => Panels::F32(panels),
            WeightFormat::Bf16 => Panels::Bf16(panels.into_iter().map(bf16::from_f32).collect()),
            WeightFormat::Int8 => Panels::Blocks(BlockPanels::rounded(&panels, inputs), Activations::Rounded),
        };
        Self { inputs, outputs, panels }
    }

    /// Packs a tensor of a GGUF file: the blocks of `outputs` rows of `inputs` values, which is the transpose of the
    /// argument of [`new`](Self::new). Weights keep their bits, in at most 1.04 times the file's bytes. A
    /// [`BlockPacker`] packs them part by part.
    ///
    /// # Errors
    /// When a row is not whole blocks, a size is 0 or too large, or `bytes` has another size.
    pub fn from_blocks(
        format: BlockFormat,
        bytes: &[u8],
        inputs: usize,
        outputs: usize,
        activations: Activations,
    ) -> Result<Self, BlockError> {
        let mut packer = BlockPacker::new(format, inputs, outputs, activations)?;
        packer.push(bytes)?;
        packer.finish()
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
            Panels::F16(panels) => size_of_val(&panels[..]),
            Panels::Bf16(panels) => size_of_val(&panels[..]),
            Panels::Blocks(panels, _) => panels.bytes(),
        }
    }

    /// The weights of one output, `[inputs]`, as f32: a row of the embedding, if this is a tied head.
    ///
    /// # Panics
    /// When the output does not exist, or `values` has the wrong size.
    pub fn output_weights_into(&self, output: usize, values: &mut [f32]) {
        assert!(output < self.outputs, "packed: output {output} of {}", self.outputs);
        assert_eq!(values.len(), self.inputs, "packed: an output has {} weights", self.inputs);
        let first = output / PANEL * self.inputs * PANEL + output % PANEL;
        let at = |input: usize| first + input * PANEL;
        let each = values.iter_mut().enumerate();
        match &self.panels {
            Panels::F32(panels) => each.for_each(|(input, value)| *value = panels[at(input)]),
            Panels::F16(panels) => each.for_each(|(input, value)| *value = panels[at(input)].widen()),
            Panels::Bf16(panels) => each.for_each(|(input, value)| *value = panels[at(input)].widen()),
            Panels::Blocks(panels, _) => panels.dequantize_output(output, values),
        }
    }

    /// `x` `[rows, inputs]` · weight, which is `[rows, outputs]`.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let [y] = Self::products([self], x);
        y
    }

    /// The products of the same rows by several weights, such as those of queries, keys and values. Threads share the
    /// whole work.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows of one of them.
    pub fn products<const N: usize>(weights: [&Self; N], x: &[f32]) -> [Vec<f32>; N] {
        let mut all = weights.map(|weight| Vec::with_capacity(weight.values_of(x)));
        let targets = weights.into_iter().zip(&mut all).map(|(weight, y)| {
            let values = weight.values_of(x);
            (weight, &mut y.spare_capacity_mut()[..values])
        });
        write_products(x, targets.collect());
        for (weight, y) in weights.iter().zip(&mut all) {
            // SAFETY: `write_products` has written all of these values.
            unsafe { y.set_len(weight.values_of(x)) };
        }
        all
    }

    /// Like [`product`](Self::product), on the calling thread: for products inside a parallel task.
    ///
    /// # Panics
    /// As [`product`](Self::product).
    pub fn product_here(&self, x: &[f32]) -> Vec<f32> {
        let values = self.values_of(x);
        let mut y = Vec::with_capacity(values);
        self.write(x, &mut y.spare_capacity_mut()[..values]);
        // SAFETY: `write` has written all of these values.
        unsafe { y.set_len(values) };
        y
    }

    fn is_float(&self) -> bool {
        !matches!(self.panels, Panels::Blocks(..))
    }

    /// How it has rows rounded, if it has.
    fn rounding(&self) -> Option<(usize, i32)> {
        match &self.panels {
            Panels::Blocks(panels, Activations::Rounded) => Some(panels.rounding()),
            _ => None,
        }
    }

    fn panel_count(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Writes the product of all rows to `y` `[rows, outputs]`, on this thread.
    fn write(&self, x: &[f32], y: &mut [MaybeUninit<f32>]) {
        let factors = self.factors(Strided::rows(x, self.inputs), false);
        self.write_panels(0..self.panel_count(), &factors, |panel, row, values| {
            copy(values, &mut y[row * self.outputs + panel * PANEL..]);
        });
    }

    /// The rows in the form that this weight needs. With `share`, threads share the work.
    fn factors<'a>(&'a self, x: Strided<'a>, share: bool) -> Factors<'a> {
        match &self.panels {
            Panels::F32(panels) => Factors::F32(panels, x),
            Panels::F16(panels) => Factors::F16(panels, x),
            Panels::Bf16(panels) => Factors::Bf16(panels, x),
            Panels::Blocks(panels, Activations::Rounded) => {
                Factors::Rounded(panels, Arc::new(panels.rows(x, share)))
            }
            Panels::Blocks(panels, Activations::Exact) => Factors::Exact(panels, x),
        }
    }

    /// Passes the values of each row and each of some panels to `write`, with the numbers of panel and row.
    fn write_panels(
        &self,
        panels: Range<usize>,
        factors: &Factors<'_>,
        mut write: impl FnMut(usize, usize, &[f32]),
    ) {
        let mut scratch = Scratch::default();
        let step = factors.panels_at_once();
        for first in panels.clone().step_by(step) {
            let some = first..panels.end.min(first + step);
            let range = some.start * self.inputs * PANEL..some.end * self.inputs * PANEL;
            let mut each = |panel: usize, row: usize, sums: &[f32; PANEL]| {
                let panel = first + panel;
                write(panel, row, &sums[..PANEL.min(self.outputs - panel * PANEL)]);
            };
            match factors {
                Factors::F32(all, x) => rows_by_panels(*x, &all[range], &mut each),
                Factors::F16(all, x) => rows_by_panels(*x, &all[range], &mut each),
                Factors::Bf16(all, x) => rows_by_panels(*x, &all[range], &mut each),
                Factors::Rounded(all, rows) => {
                    all.rows_by_panel(first, rows, &mut scratch, &mut |row, sums| each(0, row, sums));
                }
                Factors::Exact(all, x) => {
                    all.dequantize_panels(some, &mut scratch);
                    rows_by_panels(*x, &scratch.panels, &mut each);
                }
            }
        }
    }

    fn rows_of(&self, x: &[f32]) -> usize {
        assert!(x.len().is_multiple_of(self.inputs), "packed: {} values in rows of {}", x.len(), self.inputs);
        x.len() / self.inputs
    }

    /// Values of the product with `x`.
    fn values_of(&self, x: &[f32]) -> usize {
        self.rows_of(x) * self.outputs
    }
}

/// Writes the product of `x` by each weight to its target `[rows, outputs]`: every value of it.
fn write_products(x: &[f32], products: Vec<(&PackedMatrix, &mut [MaybeUninit<f32>])>) {
    let threads = rayon::current_num_threads();
    let work: usize = products.iter().map(|(weight, _)| x.len() * weight.outputs).sum();
    if work < WORTH_SHARING || threads == 1 {
        return products.into_iter().for_each(|(weight, y)| weight.write(x, y));
    }
    let by_rows = |weight: &PackedMatrix| weight.is_float() && weight.panel_count() < 4 * threads;
    let (narrow, others): (Vec<_>, Vec<_>) = products.into_iter().partition(|(weight, _)| by_rows(weight));
    for (weight, y) in narrow {
        let size = rows_of_task(weight.rows_of(x), threads);
        let tasks = x.chunks(size * weight.inputs).zip(y.chunks_mut(size * weight.outputs));
        parallel::for_each(tasks, |(x, y)| weight.write(x, y));
    }
    share_columns(x, others);
}

/// Products whose columns threads share.
fn share_columns(x: &[f32], products: Vec<(&PackedMatrix, &mut [MaybeUninit<f32>])>) {
    let counts: Vec<usize> = products.iter().map(|(weight, _)| weight.panel_count()).collect();
    if x.is_empty() || counts.is_empty() {
        return;
    }
    let share = panels_of_task(&counts, x.len() * PANEL, rayon::current_num_threads());
    let (weights, outputs): (Vec<_>, Vec<_>) = products.into_iter().unzip();
    let factors = factors_of_all(x, &weights);
    let tasks = weights.iter().zip(&factors).zip(outputs).flat_map(|((weight, factors), y)| {
        let pieces = ColumnsMut::split(y, weight.outputs, share * PANEL).into_iter().enumerate();
        pieces.map(move |(index, piece)| (*weight, factors, index * share, piece))
    });
    parallel::for_each(tasks, |(weight, factors, first, mut y)| {
        let panels = first..weight.panel_count().min(first + share);
        weight.write_panels(panels, factors, |panel, row, values| {
            copy(values, &mut y.row(row)[(panel - first) * PANEL..]);
        });
    });
}

/// Panels of a task, where weights have so many panels of `work` multiplications each: few enough that no thread waits
/// long for the last task, and so many that all threads have equally much to do.
fn panels_of_task(counts: &[usize], work: usize, threads: usize) -> usize {
    let coarse = counts.iter().sum::<usize>().div_ceil(4 * threads);
    let most = coarse.min(TASK.div_ceil(work).max(PANELS)).max(1);
    let longest = |share: usize| {
        let tasks: usize = counts.iter().map(|count| count.div_ceil(share)).sum();
        tasks.div_ceil(threads) * share
    };
    (most.div_ceil(2)..=most).rev().min_by_key(|&share| longest(share)).unwrap_or(most)
}

/// The same rows in the form that each weight needs. Weights that have them rounded in the same way share them.
fn factors_of_all<'a>(x: &'a [f32], weights: &[&'a PackedMatrix]) -> Vec<Factors<'a>> {
    let mut rounded: Vec<((usize, i32), Arc<RoundedRows>)> = Vec::new();
    let mut all = Vec::new();
    for weight in weights {
        let known =
            weight.rounding().and_then(|wanted| rounded.iter().find(|(rounding, _)| *rounding == wanted));
        let factors = match (&weight.panels, known) {
            (Panels::Blocks(panels, Activations::Rounded), Some((_, rows))) => {
                Factors::Rounded(panels, Arc::clone(rows))
            }
            _ => weight.factors(Strided::rows(x, weight.inputs), true),
        };
        if let (Factors::Rounded(panels, rows), None) = (&factors, known) {
            rounded.push((panels.rounding(), Arc::clone(rows)));
        }
        all.push(factors);
    }
    all
}

/// Each head's part of `x` by its own weight.
///
/// Row r of `x` has `x_row` values. Head h reads `inputs` of them from `h · x_head` on, and writes the first `outputs`
/// of its `width` values in row r of `y` `[rows, heads, width]`. The others stay unchanged.
///
/// # Panics
/// When a slice does not have the stated shape, or the weights differ in shape.
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
        let factors = weights[head].factors(x, false);
        weights[head].write_panels(0..outputs.div_ceil(PANEL), &factors, |panel, row, values| {
            y.row(row)[panel * PANEL..][..values.len()].copy_from_slice(values);
        });
    };
    let split = HeadMut::split(y, rows, heads, width).into_iter().enumerate();
    if rows * heads * inputs * outputs < WORTH_SHARING {
        split.for_each(work);
    } else {
        parallel::for_each(split, work);
    }
}

/// Rows of a task of a narrow weight, in whole groups: few enough that no thread waits long for the last task.
fn rows_of_task(rows: usize, threads: usize) -> usize {
    rows.div_ceil(4 * threads).next_multiple_of(GROUP_ROWS).min(4 * GROUP_ROWS)
}

/// Copies a row's values of one panel to the beginning of `target`. Pieces of 32 bytes are copied without a call.
#[inline(always)]
fn copy(values: &[f32], target: &mut [MaybeUninit<f32>]) {
    let (pieces, rest) = values.as_chunks::<8>();
    let (targets, rest_of_target) = target[..values.len()].as_chunks_mut::<8>();
    for (target, piece) in targets.iter_mut().zip(pieces) {
        target.write_copy_of_slice(piece);
    }
    rest_of_target.write_copy_of_slice(rest);
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

        /// Rounding errors are those of independent half steps: a hundredth of a product of random values.
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

    /// Sizes that cover every path: one thread, shared columns, shared rows.
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
    fn tasks_share_the_panels_evenly() {
        let (few, many) = (576 * PANEL, 1024 * 576 * PANEL);
        for (counts, work, share) in [
            (&[18][..], many, 3),
            (&[18, 6, 6], many, 3),
            (&[48, 48], many, 4),
            (&[48, 48], few, 12),
            (&[1], few, 1),
        ] {
            assert_eq!(panels_of_task(counts, work, 2), share, "{counts:?}");
        }
    }

    #[test]
    fn tasks_share_the_rows_evenly() {
        for (rows, threads, size) in [(1, 2, 12), (48, 2, 12), (200, 2, 36), (1024, 2, 48)] {
            assert_eq!(rows_of_task(rows, threads), size, "{rows} rows on {threads} threads");
        }
    }

    #[test]
    #[should_panic(expected = "the weight is not [2, 3]")]
    fn refuses_another_shape() {
        PackedMatrix::new(&[0.0; 5], 2, 3, WeightFormat::F32);
    }
}
