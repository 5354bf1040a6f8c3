//! The short convolution after the memory gate (Engram, arXiv 2601.07372, section 2.3).
//!
//! For the gated value u of each stream, over the time of one sequence:
//!
//! ```text
//! n = RMSNorm(u)      c[t] = Σⱼ wⱼ·n[t − (kernel − 1 − j)·dilation]      y = u + silu(c)
//! ```
//!
//! One filter per channel of each stream, no bias, zeros before the sequence starts. Normalised values exist only
//! inside a block: forward and backward read u once each and save only 1/rms.

use crate::parallel;
use crate::simd::{dot, sigmoid, vectorized};

/// The shape of [`short_convolution`]'s input and filter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShortConvolutionShape {
    /// Positions of each sequence.
    pub time: usize,
    /// Residual streams.
    pub streams: usize,
    /// Width of a stream.
    pub width: usize,
    /// Taps of a filter; the last is for the current position.
    pub kernel: usize,
    /// Positions from one tap to the next.
    pub dilation: usize,
    /// Added to the mean square before its root.
    pub epsilon: f32,
}

/// The learnt part of [`short_convolution`].
#[derive(Debug, Clone, Copy)]
pub struct ShortConvolutionWeights<'a> {
    /// `[streams, width]`: weight of each stream's norm.
    pub norm: &'a [f32],
    /// `[streams, width, kernel]`: the filter of each channel, oldest position first.
    pub filter: &'a [f32],
}

/// What [`short_convolution`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct ShortConvolution {
    /// y `[batch, time, streams, width]`.
    pub output: Vec<f32>,
    /// `[batch, time, streams]`: 1 / rms of each stream, for the backward pass.
    pub inverse_rms: Vec<f32>,
}

/// What [`short_convolution_backward`] computes, each of its input's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct ShortConvolutionGradients {
    /// Gradient of u.
    pub input: Vec<f32>,
    /// Gradient of the norm's weight.
    pub norm: Vec<f32>,
    /// Gradient of the filters.
    pub filter: Vec<f32>,
}

/// Positions per task, besides those before (and in the backward pass after) it that its taps reach.
const BLOCK_TIME: usize = 64;

/// u + silu(convolution of the normalised u) for `u` `[batch, time, streams, width]`.
///
/// # Panics
/// When the shape is empty or a slice does not have it.
pub fn short_convolution(
    u: &[f32],
    weights: ShortConvolutionWeights<'_>,
    shape: ShortConvolutionShape,
) -> ShortConvolution {
    shape.check(u, weights);
    let row = shape.row();
    let taps = shape.taps(weights);
    let mut output = vec![0.0; u.len()];
    let mut inverse_rms = vec![0.0; u.len() / shape.width];
    let blocks = (u.chunks(shape.time * row).zip(output.chunks_mut(shape.time * row)))
        .zip(inverse_rms.chunks_mut(shape.time * shape.streams))
        .flat_map(|((u, output), inverse)| {
            (output.chunks_mut(BLOCK_TIME * row).zip(inverse.chunks_mut(BLOCK_TIME * shape.streams)))
                .enumerate()
                .map(move |(block, (output, inverse))| (u, block * BLOCK_TIME, output, inverse))
        });
    parallel::for_each(blocks, |(u, start, output, inverse)| {
        vectorized(
            #[inline(always)]
            || shape.forward(&taps, u, start, output, inverse),
        );
    });
    ShortConvolution { output, inverse_rms }
}

/// Gradients of [`short_convolution`], given `grad` `[batch, time, streams, width]` of its output and
/// the `inverse_rms` it returned.
///
/// With dc = grad·silu'(c) and r = inverse_rms: dn[t] = Σⱼ wⱼ·dc[t + (kernel − 1 − j)·dilation], then
/// du = grad + r·(g·dn − u·r²·mean(g·dn·u)) with the norm's weight g, whose gradient is Σ dn·u·r.
///
/// # Panics
/// As [`short_convolution`], and when `grad` or `inverse_rms` belong to another shape.
pub fn short_convolution_backward(
    grad: &[f32],
    u: &[f32],
    weights: ShortConvolutionWeights<'_>,
    shape: ShortConvolutionShape,
    inverse_rms: &[f32],
) -> ShortConvolutionGradients {
    shape.check(u, weights);
    let row = shape.row();
    assert_eq!(grad.len(), u.len(), "short_convolution: gradient and input differ in size");
    assert_eq!(inverse_rms.len(), u.len() / shape.width, "short_convolution: one inverse_rms per stream");
    let taps = shape.taps(weights);
    let mut input = vec![0.0; u.len()];
    let blocks = (grad.chunks(shape.time * row).zip(u.chunks(shape.time * row)))
        .zip(inverse_rms.chunks(shape.time * shape.streams))
        .zip(input.chunks_mut(shape.time * row))
        .flat_map(|(((grad, u), inverse), input)| {
            let sequence = Sequence { grad, u, inverse };
            input
                .chunks_mut(BACKWARD_TIME * row)
                .enumerate()
                .map(move |(block, input)| (sequence, block * BACKWARD_TIME, input))
        });
    let parts = parallel::map(blocks, |(sequence, start, input)| {
        let mut taps_part = vec![0.0; shape.kernel * row];
        vectorized(
            #[inline(always)]
            || shape.backward(&taps, sequence, start, input, &mut taps_part),
        );
        taps_part
    });
    let taps_grad = parallel::sum_in_order(parts, shape.kernel * row);
    let (norm, filter) = shape.untangle(&taps_grad, weights);
    ShortConvolutionGradients { input, norm, filter }
}

/// Positions per task of the backward pass: more, because it recomputes dc for the positions after them.
const BACKWARD_TIME: usize = 128;

/// One sequence of the backward pass's operands.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    grad: &'a [f32],
    u: &'a [f32],
    inverse: &'a [f32],
}

impl ShortConvolutionShape {
    fn row(&self) -> usize {
        self.streams * self.width
    }

    fn check(&self, u: &[f32], weights: ShortConvolutionWeights<'_>) {
        let sequence = self.time * self.row();
        assert!(
            sequence > 0 && u.len().is_multiple_of(sequence),
            "short_convolution: {} values in sequences of {}x{}x{}",
            u.len(),
            self.time,
            self.streams,
            self.width,
        );
        assert!(self.kernel > 0 && self.dilation > 0, "short_convolution: no kernel or no dilation");
        assert_eq!(weights.norm.len(), self.row(), "short_convolution: norm weight of another size");
        assert_eq!(
            weights.filter.len(),
            self.row() * self.kernel,
            "short_convolution: filter of another size"
        );
    }

    /// Filter times norm weight, tap by tap: `[kernel, streams, width]`, the current position first.
    fn taps(&self, weights: ShortConvolutionWeights<'_>) -> Vec<f32> {
        let (kernel, row) = (self.kernel, self.row());
        (0..kernel * row)
            .map(|i| weights.norm[i % row] * weights.filter[i % row * kernel + kernel - 1 - i / row])
            .collect()
    }

    /// The gradients of norm weight and filter from those of their products.
    fn untangle(&self, taps_grad: &[f32], weights: ShortConvolutionWeights<'_>) -> (Vec<f32>, Vec<f32>) {
        let (kernel, row) = (self.kernel, self.row());
        let mut norm = vec![0.0; row];
        let mut filter = vec![0.0; row * kernel];
        for channel in 0..row {
            for tap in 0..kernel {
                let at = channel * kernel + kernel - 1 - tap;
                norm[channel] += taps_grad[tap * row + channel] * weights.filter[at];
                filter[at] = taps_grad[tap * row + channel] * weights.norm[channel];
            }
        }
        (norm, filter)
    }

    /// How many taps of position `t` lie within the sequence.
    #[inline(always)]
    fn taps_at(&self, t: usize) -> usize {
        self.kernel.min(t / self.dilation + 1)
    }

    /// c of one stream at position `t`, given 1/rms of a position.
    #[inline(always)]
    fn convolve(
        &self,
        taps: &[f32],
        u: &[f32],
        (t, stream): (usize, usize),
        inverse: impl Fn(usize) -> f32,
        output: &mut [f32],
    ) {
        let (row, at) = (self.row(), stream * self.width);
        for tap in 0..self.taps_at(t) {
            let from = t - tap * self.dilation;
            let inverse = inverse(from);
            let u = &u[from * row + at..][..self.width];
            let weight = &taps[tap * row + at..][..self.width];
            for ((c, u), w) in output.iter_mut().zip(u).zip(weight) {
                let old = if tap == 0 { 0.0 } else { *c };
                *c = (u * inverse).mul_add(*w, old);
            }
        }
    }

    /// Fills the positions of a sequence from `start` on, as many as `output` has.
    #[inline(always)]
    fn forward(&self, taps: &[f32], u: &[f32], start: usize, output: &mut [f32], inverse_rms: &mut [f32]) {
        let (row, width) = (self.row(), self.width);
        let end = start + output.len() / row;
        let first = start.saturating_sub((self.kernel - 1) * self.dilation);
        let mut inverses = vec![0.0; (end - first) * self.streams];
        // A loop, not an iterator's `collect`: that would not be compiled for the wide vectors.
        for (inverse, u) in inverses.iter_mut().zip(u[first * row..end * row].chunks_exact(width)) {
            *inverse = 1.0 / (dot(u, u) / width as f32 + self.epsilon).sqrt();
        }
        inverse_rms.copy_from_slice(&inverses[(start - first) * self.streams..]);
        for (index, output) in output.chunks_exact_mut(width).enumerate() {
            let (t, stream) = (start + index / self.streams, index % self.streams);
            self.convolve(taps, u, (t, stream), |t| inverses[(t - first) * self.streams + stream], output);
            let u = &u[t * row + stream * width..][..width];
            for (y, u) in output.iter_mut().zip(u) {
                *y = *y * sigmoid(*y) + u;
            }
        }
    }

    /// Fills the gradient of the positions from `start` on, as many as `input` has, and adds the
    /// gradient of the taps.
    #[inline(always)]
    fn backward(
        &self,
        taps: &[f32],
        sequence: Sequence<'_>,
        start: usize,
        input: &mut [f32],
        taps_grad: &mut [f32],
    ) {
        let (row, width) = (self.row(), self.width);
        let end = start + input.len() / row;
        let last = self.time.min(end + (self.kernel - 1) * self.dilation);
        let Sequence { grad, u, inverse } = sequence;
        let mut dc = vec![0.0; (last - start) * width];
        let mut dn = vec![0.0; width];
        for stream in 0..self.streams {
            let at = |t: usize| t * row + stream * width;
            let inverse = |t: usize| inverse[t * self.streams + stream];
            for (dc, t) in dc.chunks_exact_mut(width).zip(start..last) {
                self.convolve(taps, u, (t, stream), inverse, dc);
                for (dc, grad) in dc.iter_mut().zip(&grad[at(t)..][..width]) {
                    let s = sigmoid(*dc);
                    *dc = grad * s * (1.0 + *dc * (1.0 - s));
                }
            }
            for t in start..end {
                self.spread(taps, &dc, (t - start, last - start), stream, &mut dn);
                let (u, grad, r) = (&u[at(t)..][..width], &grad[at(t)..][..width], inverse(t));
                let along = r * r * r * dot(&dn, u) / width as f32;
                let du = &mut input[at(t - start)..][..width];
                for (((du, grad), dn), u) in du.iter_mut().zip(grad).zip(&dn).zip(u) {
                    *du = grad + r * dn - along * u;
                }
                self.add_taps(&dc, (t - start, last - start), stream, (u, r), taps_grad);
            }
        }
    }

    /// Gradient of the normalised value, times the norm's weight, at position `t` of the block.
    #[inline(always)]
    fn spread(&self, taps: &[f32], dc: &[f32], (t, last): (usize, usize), stream: usize, dn: &mut [f32]) {
        let width = self.width;
        for tap in 0..self.taps_at(last - 1 - t) {
            let dc = &dc[(t + tap * self.dilation) * width..][..width];
            let weight = &taps[tap * self.row() + stream * width..][..width];
            for ((dn, dc), w) in dn.iter_mut().zip(dc).zip(weight) {
                let old = if tap == 0 { 0.0 } else { *dn };
                *dn = dc.mul_add(*w, old);
            }
        }
    }

    /// Adds what position `t` of the block, with its `u` and 1/rms, gives to the taps' gradient.
    #[inline(always)]
    fn add_taps(
        &self,
        dc: &[f32],
        (t, last): (usize, usize),
        stream: usize,
        (u, r): (&[f32], f32),
        taps_grad: &mut [f32],
    ) {
        let width = self.width;
        for tap in 0..self.taps_at(last - 1 - t) {
            let dc = &dc[(t + tap * self.dilation) * width..][..width];
            let total = &mut taps_grad[tap * self.row() + stream * width..][..width];
            for ((total, dc), u) in total.iter_mut().zip(dc).zip(u) {
                *total = (u * r).mul_add(*dc, *total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    /// The formulas at the top, in f64.
    fn naive(u: &[f32], weights: ShortConvolutionWeights<'_>, shape: ShortConvolutionShape) -> Vec<f32> {
        let ShortConvolutionShape { time, streams, width, kernel, dilation, epsilon } = shape;
        let normed: Vec<f64> = u
            .chunks(width)
            .enumerate()
            .flat_map(|(index, u)| {
                let square: f64 = u.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                let rms = (square + f64::from(epsilon)).sqrt();
                (0..width).map(move |i| {
                    f64::from(u[i]) / rms * f64::from(weights.norm[index % streams * width + i])
                })
            })
            .collect();
        let row = streams * width;
        (0..u.len())
            .map(|i| {
                let (sequence, t, channel) = (i / (time * row), i / row % time, i % row);
                let c: f64 = (0..kernel)
                    .filter(|j| (kernel - 1 - j) * dilation <= t)
                    .map(|j| {
                        let from = sequence * time + t - (kernel - 1 - j) * dilation;
                        f64::from(weights.filter[channel * kernel + j]) * normed[from * row + channel]
                    })
                    .sum();
                (f64::from(u[i]) + c / (1.0 + (-c).exp())) as f32
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn forward_and_gradients(
            batch in 1_usize..3, time in 1_usize..20, streams in 1_usize..4, width in 1_usize..20,
            kernel in 1_usize..5, dilation in 1_usize..4, seed: u64,
        ) {
            let shape = ShortConvolutionShape { time, streams, width, kernel, dilation, epsilon: 0.1 };
            let u = random(batch * time * streams * width, seed);
            let norm = random(streams * width, seed ^ 1);
            let filter = random(streams * width * kernel, seed ^ 2);
            let weights = ShortConvolutionWeights { norm: &norm, filter: &filter };
            let found = short_convolution(&u, weights, shape);
            assert_close(&found.output, &naive(&u, weights, shape), 1e-5);

            let grad = random(u.len(), seed ^ 3);
            let gradients = short_convolution_backward(&grad, &u, weights, shape, &found.inverse_rms);
            let loss = |u: &[f32], weights: ShortConvolutionWeights<'_>| {
                weighted(&short_convolution(u, weights, shape).output, &grad)
            };
            assert_gradient("u", &u, &gradients.input, |u| loss(u, weights));
            assert_gradient("norm", &norm, &gradients.norm, |norm| {
                loss(&u, ShortConvolutionWeights { norm, ..weights })
            });
            assert_gradient("filter", &filter, &gradients.filter, |filter| {
                loss(&u, ShortConvolutionWeights { filter, ..weights })
            });
        }
    }

    #[test]
    fn many_blocks_match_differences_and_repeat_their_bits() {
        let shape = ShortConvolutionShape {
            time: 2 * BACKWARD_TIME + 5, // three blocks, the last shorter than the taps reach
            streams: 2,
            width: 3,
            kernel: 4,
            dilation: 3,
            epsilon: 0.1,
        };
        let u = random(2 * shape.time * 6, 1);
        let (norm, filter) = (random(6, 2), random(24, 3));
        let weights = ShortConvolutionWeights { norm: &norm, filter: &filter };
        let grad = random(u.len(), 4);
        let forward = short_convolution(&u, weights, shape);
        assert_close(&forward.output, &naive(&u, weights, shape), 1e-5);
        let backward = short_convolution_backward(&grad, &u, weights, shape, &forward.inverse_rms);
        assert_eq!(forward, short_convolution(&u, weights, shape));
        assert_eq!(backward, short_convolution_backward(&grad, &u, weights, shape, &forward.inverse_rms));
        let loss = |u: &[f32], weights: ShortConvolutionWeights<'_>| {
            weighted(&short_convolution(u, weights, shape).output, &grad)
        };
        let around = (BACKWARD_TIME - 10) * 6..(BACKWARD_TIME + 2) * 6; // across a border of blocks
        assert_gradient("u", &u[around.clone()], &backward.input[around.clone()], |part| {
            let mut u = u.clone();
            u[around.clone()].copy_from_slice(part);
            loss(&u, weights)
        });
        assert_gradient("filter", &filter, &backward.filter, |filter| {
            loss(&u, ShortConvolutionWeights { filter, ..weights })
        });
    }

    #[test]
    fn a_filter_of_zeros_changes_nothing() {
        let shape =
            ShortConvolutionShape { time: 5, streams: 2, width: 3, kernel: 4, dilation: 2, epsilon: 1e-5 };
        let u = random(30, 1);
        let weights = ShortConvolutionWeights { norm: &[1.0; 6], filter: &[0.0; 24] };
        assert_eq!(short_convolution(&u, weights, shape).output, u);
    }

    #[test]
    #[should_panic(expected = "7 values in sequences of 2x1x3")]
    fn refuses_part_of_a_sequence() {
        let shape =
            ShortConvolutionShape { time: 2, streams: 1, width: 3, kernel: 1, dilation: 1, epsilon: 1e-5 };
        let weights = ShortConvolutionWeights { norm: &[1.0; 3], filter: &[0.0; 3] };
        short_convolution(&[0.0; 7], weights, shape);
    }
}
