//! The gate of retrieved memory (Engram, arXiv 2601.07372, section 2.3, with the signed root of the published code).
//!
//! For each residual stream m of a token, with hidden state h, key k and the shared value v:
//!
//! ```text
//! s = ⟨RMSNorm(h), RMSNorm(k)⟩ / √width       a = σ(sign(s)·√max(|s|, 1e-6))       u = a·v
//! ```

use crate::parallel::{self, block_rows};
use crate::simd::{dot, sigmoid, vectorized};

/// Scores below this are replaced by it under the root; it has no gradient.
const SMALLEST_SCORE: f32 = 1e-6;

/// The inputs of [`memory_gate`], all row-major.
#[derive(Debug, Clone, Copy)]
pub struct MemoryGateInput<'a> {
    /// `[rows, streams, width]`: the hidden state.
    pub hidden: &'a [f32],
    /// `[rows, streams, width]`: one key for each stream.
    pub key: &'a [f32],
    /// `[rows, width]`: the value all streams share.
    pub value: &'a [f32],
    /// `[streams, width]`: weight of the hidden state's norm.
    pub query_weight: &'a [f32],
    /// `[streams, width]`: weight of the key's norm.
    pub key_weight: &'a [f32],
    /// Streams of a row.
    pub streams: usize,
    /// Added to the mean squares of hidden state and key before their roots.
    pub epsilon: f32,
}

/// What [`memory_gate`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryGate {
    /// u `[rows, streams, width]`: the gated value of each stream.
    pub output: Vec<f32>,
    /// a `[rows, streams]`: the gates, in (0, 1).
    pub gates: Vec<f32>,
    /// `[rows, streams, 3]`: s, 1/rms of h and 1/rms of k, for the backward pass.
    pub saved: Vec<f32>,
}

/// What [`memory_gate_backward`] computes, each of its input's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryGateGradients {
    /// Gradient of the hidden state.
    pub hidden: Vec<f32>,
    /// Gradient of the keys.
    pub key: Vec<f32>,
    /// Gradient of the values.
    pub value: Vec<f32>,
    /// Gradient of the weight of the hidden state's norm.
    pub query_weight: Vec<f32>,
    /// Gradient of the weight of the key's norm.
    pub key_weight: Vec<f32>,
}

/// The value of each row, gated per stream by the agreement of key and hidden state.
///
/// # Panics
/// When the input is empty or its slices do not have the shapes stated.
pub fn memory_gate(input: &MemoryGateInput<'_>) -> MemoryGate {
    let (rows, width) = input.shape();
    let (streams, row) = (input.streams, input.streams * width);
    let mut output = vec![0.0; rows * row];
    let mut gates = vec![0.0; rows * streams];
    let mut saved = vec![0.0; rows * streams * SAVED];
    let block = block_rows(3 * row);
    let blocks = (input.hidden.chunks(block * row).zip(input.key.chunks(block * row)))
        .zip(input.value.chunks(block * width).zip(output.chunks_mut(block * row)))
        .zip(gates.chunks_mut(block * streams).zip(saved.chunks_mut(block * streams * SAVED)));
    parallel::for_each(blocks, |(((hidden, key), (value, output)), (gates, saved))| {
        vectorized(
            #[inline(always)]
            || {
                let heads = (hidden.chunks_exact(width).zip(key.chunks_exact(width)))
                    .zip(output.chunks_exact_mut(width))
                    .zip(gates.iter_mut().zip(saved.chunks_exact_mut(SAVED)));
                for (index, (((h, k), u), (gate, saved))) in heads.enumerate() {
                    let stream = index % streams * width..(index % streams + 1) * width;
                    let (query, key) = (&input.query_weight[stream.clone()], &input.key_weight[stream]);
                    let [score, inverse_h, inverse_k] = compare(h, k, query, key, input.epsilon);
                    saved.copy_from_slice(&[score, inverse_h, inverse_k]);
                    *gate = sigmoid(signed_root(score));
                    let value = &value[index / streams * width..][..width];
                    u.iter_mut().zip(value).for_each(|(u, v)| *u = *gate * v);
                }
            },
        );
    });
    MemoryGate { output, gates, saved }
}

/// Gradients of [`memory_gate`], given `grad` `[rows, streams, width]` of its output.
///
/// With c = rₕrₖ/√width and w the product of both weights: s = c·Σhkw, so ds gives
/// dh = ds·(c·kw − h·s·rₕ²/width), dk likewise, and both weights from Σ rows ds·c·hk.
/// Where |s| was replaced by the constant 1e-6, ds is 0.
///
/// # Panics
/// As [`memory_gate`], and when `grad` or `forward` belong to another shape.
pub fn memory_gate_backward(
    grad: &[f32],
    input: &MemoryGateInput<'_>,
    forward: &MemoryGate,
) -> MemoryGateGradients {
    let (rows, width) = input.shape();
    let (streams, row) = (input.streams, input.streams * width);
    assert_eq!(grad.len(), rows * row, "memory_gate: the gradient has another size than the output");
    assert!(
        forward.gates.len() == rows * streams && forward.saved.len() == rows * streams * SAVED,
        "memory_gate: saved values of another shape",
    );
    let weight = input.joint_weight();
    let mut hidden_grad = vec![0.0; rows * row];
    let mut key_grad = vec![0.0; rows * row];
    let mut value_grad = vec![0.0; rows * width];
    let block = parallel::reduction_rows(rows);
    let blocks = (grad.chunks(block * row).zip(input.hidden.chunks(block * row)))
        .zip(input.key.chunks(block * row).zip(input.value.chunks(block * width)))
        .zip(forward.gates.chunks(block * streams).zip(forward.saved.chunks(block * streams * SAVED)))
        .zip(hidden_grad.chunks_mut(block * row).zip(key_grad.chunks_mut(block * row)))
        .zip(value_grad.chunks_mut(block * width));
    let parts = parallel::map(blocks, |(((((grad, h), (k, v)), (a, saved)), (dh, dk)), dv)| {
        let mut weight_part = vec![0.0; row];
        let rows = Rows { grad, hidden: h, key: k, value: v, gates: a, saved };
        vectorized(
            #[inline(always)]
            || rows.backward(&weight, streams, width, dh, dk, dv, &mut weight_part),
        );
        weight_part
    });
    let joint = parallel::sum_in_order(parts, row);
    let times = |other: &[f32]| joint.iter().zip(other).map(|(g, w)| g * w).collect();
    MemoryGateGradients {
        hidden: hidden_grad,
        key: key_grad,
        value: value_grad,
        query_weight: times(input.key_weight),
        key_weight: times(input.query_weight),
    }
}

/// Values saved for each stream of a row.
const SAVED: usize = 3;

impl MemoryGateInput<'_> {
    /// Checks the slices and returns (rows, width).
    fn shape(&self) -> (usize, usize) {
        let streams = self.streams;
        let width = self.query_weight.len() / streams.max(1);
        let row = streams * width;
        assert!(row > 0 && row == self.query_weight.len(), "memory_gate: no width or no streams");
        assert_eq!(self.key_weight.len(), row, "memory_gate: norm weights of different sizes");
        let rows = self.hidden.len() / row;
        assert_eq!(self.hidden.len(), rows * row, "memory_gate: the hidden state is not whole rows of {row}");
        assert_eq!(self.key.len(), rows * row, "memory_gate: one key for each hidden vector");
        assert_eq!(self.value.len(), rows * width, "memory_gate: one value for each row");
        (rows, width)
    }

    /// The product of both weights, `[streams, width]`. The gradients of h and k depend on nothing else.
    fn joint_weight(&self) -> Vec<f32> {
        self.query_weight.iter().zip(self.key_weight).map(|(q, k)| q * k).collect()
    }
}

/// The score s and the inverse root mean squares of h and k.
///
/// Near s = 0 the root is so steep that the last bits of s decide its gradient. So each operation rounds, and each sum
/// runs, in the order of the published code on a CPU.
#[inline(always)]
fn compare(h: &[f32], k: &[f32], query_weight: &[f32], key_weight: &[f32], epsilon: f32) -> [f32; 3] {
    let width = h.len();
    let (k, query_weight, key_weight) = (&k[..width], &query_weight[..width], &key_weight[..width]);
    let inverse =
        |x: &[f32]| 1.0 / (sum_as_published(width, |i| x[i] * x[i]) / width as f32 + epsilon).sqrt();
    let (inverse_h, inverse_k) = (inverse(h), inverse(k));
    let agreement = sum_as_published(width, |i| {
        let (query, key) = (h[i] * inverse_h * query_weight[i], k[i] * inverse_k * key_weight[i]);
        query * key
    });
    [agreement / (width as f32).sqrt(), inverse_h, inverse_k]
}

/// Sum of `term(i)` for i in 0..len: 32 partial sums fold to 8, which are added one after another to the sum of the
/// tail. This is PyTorch's order for up to 512 terms; beyond, its partial sums cascade.
#[inline(always)]
fn sum_as_published(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    const VECTOR: usize = 8;
    let mut partial = [0.0; 4 * VECTOR];
    let mut start = 0;
    while start + partial.len() <= len {
        for (lane, sum) in partial.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
        start += partial.len();
    }
    while start + VECTOR <= len {
        for (lane, sum) in partial[..VECTOR].iter_mut().enumerate() {
            *sum += term(start + lane);
        }
        start += VECTOR;
    }
    let mut total = 0.0;
    for i in start..len {
        total += term(i);
    }
    for lane in 0..VECTOR {
        total += (1..4).fold(partial[lane], |sum, vector| sum + partial[vector * VECTOR + lane]);
    }
    total
}

/// sign(s)·√max(|s|, 1e-6), 0 at 0.
#[inline(always)]
fn signed_root(score: f32) -> f32 {
    let size = score.abs();
    let root = if size < SMALLEST_SCORE { SMALLEST_SCORE } else { size }.sqrt();
    if score == 0.0 { 0.0 } else { root.copysign(score) }
}

/// The derivative of [`signed_root`].
#[inline(always)]
fn signed_root_slope(score: f32) -> f32 {
    let size = score.abs();
    if size < SMALLEST_SCORE { 0.0 } else { 0.5 / size.sqrt() }
}

/// A block of rows of the backward pass's operands.
struct Rows<'a> {
    grad: &'a [f32],
    hidden: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
    gates: &'a [f32],
    saved: &'a [f32],
}

impl Rows<'_> {
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "the outputs are borrowed from different vectors")]
    fn backward(
        &self,
        weight: &[f32],
        streams: usize,
        width: usize,
        hidden_grad: &mut [f32],
        key_grad: &mut [f32],
        value_grad: &mut [f32],
        weight_grad: &mut [f32],
    ) {
        let heads = (self.grad.chunks_exact(width))
            .zip(self.hidden.chunks_exact(width).zip(self.key.chunks_exact(width)))
            .zip(self.gates.iter().zip(self.saved.chunks_exact(SAVED)))
            .zip(hidden_grad.chunks_exact_mut(width).zip(key_grad.chunks_exact_mut(width)));
        for (index, (((du, (h, k)), (&gate, saved)), (dh, dk))) in heads.enumerate() {
            let (row, stream) = (index / streams, index % streams);
            let w = &weight[stream * width..][..width];
            let value = &self.value[row * width..][..width];
            let dv = &mut value_grad[row * width..][..width];
            let dw = &mut weight_grad[stream * width..][..width];

            let [score, inverse_h, inverse_k] = [saved[0], saved[1], saved[2]];
            let dscore = dot(du, value) * gate * (1.0 - gate) * signed_root_slope(score);
            let scale = dscore * inverse_h * inverse_k / (width as f32).sqrt();
            let along_h = dscore * score * inverse_h * inverse_h / width as f32;
            let along_k = dscore * score * inverse_k * inverse_k / width as f32;
            if stream == 0 {
                dv.fill(0.0);
            }
            for i in 0..width {
                dv[i] += gate * du[i];
                dh[i] = scale * w[i] * k[i] - along_h * h[i];
                dk[i] = scale * w[i] * h[i] - along_k * k[i];
                dw[i] += scale * h[i] * k[i];
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
    fn naive(input: &MemoryGateInput<'_>) -> (Vec<f32>, Vec<f32>) {
        let (rows, width) = input.shape();
        let norm = |x: &[f32], w: &[f32]| -> Vec<f64> {
            let square: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
            let rms = (square / width as f64 + f64::from(input.epsilon)).sqrt();
            x.iter().zip(w).map(|(&x, &w)| f64::from(x) / rms * f64::from(w)).collect()
        };
        let (mut output, mut gates) = (Vec::new(), Vec::new());
        for row in 0..rows {
            for stream in 0..input.streams {
                let at = |x: &'_ [f32], i: usize| x[i * width..][..width].to_vec();
                let (h, k) = (
                    at(input.hidden, row * input.streams + stream),
                    at(input.key, row * input.streams + stream),
                );
                let h = norm(&h, &at(input.query_weight, stream));
                let k = norm(&k, &at(input.key_weight, stream));
                let score: f64 = h.iter().zip(&k).map(|(h, k)| h * k).sum::<f64>() / (width as f64).sqrt();
                let root = score.abs().max(1e-6).sqrt() * if score == 0.0 { 0.0 } else { score.signum() };
                let gate = 1.0 / (1.0 + (-root).exp());
                gates.push(gate as f32);
                output.extend(at(input.value, row).iter().map(|&v| (f64::from(v) * gate) as f32));
            }
        }
        (output, gates)
    }

    proptest! {
        #[test]
        fn forward_and_gradients(rows in 1_usize..6, streams in 1_usize..5, width in 1_usize..40, seed: u64) {
            let row = streams * width;
            let (hidden, key) = (random(rows * row, seed), random(rows * row, seed ^ 1));
            let value = random(rows * width, seed ^ 2);
            let positive = |seed| -> Vec<f32> { random(row, seed).iter().map(|w| 1.5 + w).collect() };
            let (query_weight, key_weight) = (positive(seed ^ 3), positive(seed ^ 4));
            let input = MemoryGateInput {
                hidden: &hidden, key: &key, value: &value, query_weight: &query_weight,
                key_weight: &key_weight, streams, epsilon: 0.1,
            };
            let found = memory_gate(&input);
            let (output, gates) = naive(&input);
            // The root is steep near 0, where rounding of a score becomes visible.
            let near_zero = found.saved.chunks(3).any(|s| s[0].abs() < 1e-3);
            assert_close(&found.output, &output, if near_zero { 1e-3 } else { 1e-5 });
            assert_close(&found.gates, &gates, if near_zero { 1e-3 } else { 1e-5 });

            // Finite differences are meaningless across the kink at 0, so the loss leaves such streams out.
            let mut grad = random(rows * row, seed ^ 5);
            for (grad, saved) in grad.chunks_mut(width).zip(found.saved.chunks(3)) {
                if saved[0].abs() < 0.7 { grad.fill(0.0); }
            }
            let gradients = memory_gate_backward(&grad, &input, &found);
            let loss = |input: MemoryGateInput<'_>| weighted(&memory_gate(&input).output, &grad);
            assert_gradient("hidden", &hidden, &gradients.hidden, |hidden| {
                loss(MemoryGateInput { hidden, ..input })
            });
            assert_gradient("key", &key, &gradients.key, |key| loss(MemoryGateInput { key, ..input }));
            assert_gradient("value", &value, &gradients.value, |value| {
                loss(MemoryGateInput { value, ..input })
            });
            assert_gradient("query weight", &query_weight, &gradients.query_weight, |query_weight| {
                loss(MemoryGateInput { query_weight, ..input })
            });
            assert_gradient("key weight", &key_weight, &gradients.key_weight, |key_weight| {
                loss(MemoryGateInput { key_weight, ..input })
            });
        }
    }

    #[test]
    fn scores_near_zero_are_constant() {
        // h ⟂ k up to 1e-7: the root is of 1e-6, with the sign of the score and no gradient.
        let (hidden, value, weight) = ([1.0, 0.0], [2.0, -4.0], [1.0; 2]);
        for (key, expected) in [([1e-7, 1.0], 1e-3_f32), ([-1e-7, 1.0], -1e-3), ([0.0, 1.0], 0.0)] {
            let input = MemoryGateInput {
                hidden: &hidden,
                key: &key,
                value: &value,
                query_weight: &weight,
                key_weight: &weight,
                streams: 1,
                epsilon: 1e-20,
            };
            let found = memory_gate(&input);
            assert_close(&found.gates, &[1.0 / (1.0 + (-expected).exp())], 1e-6);
            let gradients = memory_gate_backward(&[1.0, 1.0], &input, &found);
            assert_eq!(gradients.hidden, [0.0; 2]);
            assert_eq!(gradients.key, [0.0; 2]);
            assert_close(&gradients.value, &[found.gates[0]; 2], 1e-6);
        }
    }

    #[test]
    fn many_blocks_match_single_rows_and_repeat_their_bits() {
        let (rows, streams, width) = (300, 2, 24);
        let row = streams * width;
        let (hidden, key) = (random(rows * row, 1), random(rows * row, 2));
        let (value, weight) = (random(rows * width, 3), random(row, 4));
        let grad = random(rows * row, 5);
        let input = MemoryGateInput {
            hidden: &hidden,
            key: &key,
            value: &value,
            query_weight: &weight,
            key_weight: &weight,
            streams,
            epsilon: 1e-6,
        };
        let forward = memory_gate(&input);
        let backward = memory_gate_backward(&grad, &input, &forward);
        assert_eq!(forward, memory_gate(&input));
        assert_eq!(backward, memory_gate_backward(&grad, &input, &forward));
        let mut query_weight = vec![0.0; row];
        for i in 0..rows {
            let one = MemoryGateInput {
                hidden: &hidden[i * row..][..row],
                key: &key[i * row..][..row],
                value: &value[i * width..][..width],
                ..input
            };
            let one_forward = memory_gate(&one);
            assert_eq!(one_forward.output, &forward.output[i * row..][..row]);
            let one_backward = memory_gate_backward(&grad[i * row..][..row], &one, &one_forward);
            assert_eq!(one_backward.hidden, &backward.hidden[i * row..][..row]);
            query_weight.iter_mut().zip(&one_backward.query_weight).for_each(|(t, p)| *t += p);
        }
        assert_close(&backward.query_weight, &query_weight, 1e-3);
    }

    #[test]
    #[should_panic(expected = "one value for each row")]
    fn refuses_a_value_of_another_size() {
        memory_gate(&MemoryGateInput {
            hidden: &[0.0; 8],
            key: &[0.0; 8],
            value: &[0.0; 3],
            query_weight: &[1.0; 4],
            key_weight: &[1.0; 4],
            streams: 2,
            epsilon: 1e-6,
        });
    }
}
