//! The gated activations of a feed-forward block: silu(gate) · up and gelu(gate) · up (Shazeer 2020, arXiv 2002.05202).

use crate::parallel::{self, block_rows};
use crate::simd::{sigmoid, vectorized};

/// silu(gate) · up for `gate_up` `[rows, 2·width]`, whose rows hold the gate and then the up part;
/// returns `[rows, width]`.
///
/// # Panics
/// When `width` is 0 or `gate_up` is not a whole number of rows.
pub fn swiglu(gate_up: &[f32], width: usize) -> Vec<f32> {
    let mut output = vec![0.0; gate_up.len() / 2];
    swiglu_into(gate_up, width, &mut output);
    output
}

/// Like [`swiglu`], written to `output` `[rows, width]`.
///
/// # Panics
/// As [`swiglu`], or when `output` has another size.
pub fn swiglu_into(gate_up: &[f32], width: usize, output: &mut [f32]) {
    gated(
        gate_up,
        width,
        output,
        #[inline(always)]
        |gate| gate * sigmoid(gate),
    )
}

/// Like [`swiglu`], with gelu(gate) · up in the approximation by tanh (Hendrycks & Gimpel 2016, arXiv 1606.08415):
/// gelu(x) = x·(1 + tanh z)/2 = x·σ(2z) with z = √(2/π)·(x + 0.044715·x³).
///
/// # Panics
/// As [`swiglu`].
pub fn geglu(gate_up: &[f32], width: usize) -> Vec<f32> {
    let mut output = vec![0.0; gate_up.len() / 2];
    geglu_into(gate_up, width, &mut output);
    output
}

/// Like [`geglu`], written to `output` `[rows, width]`.
///
/// # Panics
/// As [`geglu`], or when `output` has another size.
pub fn geglu_into(gate_up: &[f32], width: usize, output: &mut [f32]) {
    gated(gate_up, width, output, gelu)
}

/// silu(gate) · up of values that lie apart, written to `gate`.
///
/// # Panics
/// When `gate` and `up` differ in size.
pub fn swiglu_apart(gate: &mut [f32], up: &[f32]) {
    gated_apart(
        gate,
        up,
        #[inline(always)]
        |gate| gate * sigmoid(gate),
    )
}

/// Like [`swiglu_apart`], with the gelu of [`geglu`].
///
/// # Panics
/// As [`swiglu_apart`].
pub fn geglu_apart(gate: &mut [f32], up: &[f32]) {
    gated_apart(gate, up, gelu)
}

fn gated_apart(gate: &mut [f32], up: &[f32], activation: impl Fn(f32) -> f32 + Sync) {
    assert_eq!(gate.len(), up.len(), "swiglu: as many gates as values");
    let block = block_rows(2);
    parallel::for_each(gate.chunks_mut(block).zip(up.chunks(block)), |(gate, up)| {
        vectorized(
            #[inline(always)]
            || gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = activation(*gate) * up),
        );
    });
}

/// gelu(x) in the approximation by tanh.
#[inline(always)]
fn gelu(x: f32) -> f32 {
    x * sigmoid(GELU_FACTOR * x * (0.044_715 * x).mul_add(x, 1.0))
}

/// 2·√(2/π).
const GELU_FACTOR: f32 = 1.595_769;

fn gated(gate_up: &[f32], width: usize, output: &mut [f32], activation: impl Fn(f32) -> f32 + Sync) {
    check(gate_up, width);
    assert_eq!(2 * output.len(), gate_up.len(), "swiglu: the output must be half as large as the input");
    let block = block_rows(3 * width);
    let blocks = gate_up.chunks(2 * block * width).zip(output.chunks_mut(block * width));
    parallel::for_each(blocks, |(gate_up, output)| {
        vectorized(
            #[inline(always)]
            || {
                for (row, output) in gate_up.chunks_exact(2 * width).zip(output.chunks_exact_mut(width)) {
                    let (gate, up) = row.split_at(width);
                    for ((y, &g), &u) in output.iter_mut().zip(gate).zip(up) {
                        *y = activation(g) * u;
                    }
                }
            },
        );
    });
}

/// Gradient `[rows, 2·width]` of [`swiglu`]'s input, given `grad` `[rows, width]` of its output.
///
/// # Panics
/// When `width` is 0, `gate_up` is not a whole number of rows, or `grad` is not half its size.
pub fn swiglu_backward(grad: &[f32], gate_up: &[f32], width: usize) -> Vec<f32> {
    // With s = sigmoid(gate): d(silu) = s·(1 + gate·(1 − s)).
    gated_backward(
        grad,
        gate_up,
        width,
        #[inline(always)]
        |gate| {
            let s = sigmoid(gate);
            let silu = gate * s;
            (silu, s + silu * (1.0 - s))
        },
    )
}

/// As [`swiglu_backward`], for [`geglu`].
///
/// # Panics
/// As [`swiglu_backward`].
pub fn geglu_backward(grad: &[f32], gate_up: &[f32], width: usize) -> Vec<f32> {
    // With s = σ(2z): d(x·s) = s + x·s·(1 − s)·2z', and x·s·(1 − s) is 0 wherever z' is large.
    gated_backward(
        grad,
        gate_up,
        width,
        #[inline(always)]
        |gate| {
            let square = 0.044_715 * gate * gate;
            let s = sigmoid(GELU_FACTOR * gate * (square + 1.0));
            let inside = if s == 0.0 || s == 1.0 { 0.0 } else { s * (1.0 - s) * (3.0 * square + 1.0) };
            (gate * s, s + GELU_FACTOR * gate * inside)
        },
    )
}

/// `activation` gives the value and the derivative at a gate.
fn gated_backward(
    grad: &[f32],
    gate_up: &[f32],
    width: usize,
    activation: impl Fn(f32) -> (f32, f32) + Sync,
) -> Vec<f32> {
    check(gate_up, width);
    assert_eq!(2 * grad.len(), gate_up.len(), "swiglu: the gradient must be half as large as the input");
    let mut input = vec![0.0; gate_up.len()];
    let block = block_rows(5 * width);
    let blocks = (gate_up.chunks(2 * block * width))
        .zip(grad.chunks(block * width))
        .zip(input.chunks_mut(2 * block * width));
    parallel::for_each(blocks, |((gate_up, grad), input)| {
        vectorized(
            #[inline(always)]
            || {
                let rows = gate_up.chunks_exact(2 * width).zip(grad.chunks_exact(width));
                for ((row, grad), input) in rows.zip(input.chunks_exact_mut(2 * width)) {
                    let ((gate, up), (d_gate, d_up)) = (row.split_at(width), input.split_at_mut(width));
                    let grad = &grad[..width];
                    for i in 0..width {
                        let (value, slope) = activation(gate[i]);
                        d_up[i] = grad[i] * value;
                        d_gate[i] = grad[i] * up[i] * slope;
                    }
                }
            },
        );
    });
    input
}

fn check(gate_up: &[f32], width: usize) {
    assert!(
        width > 0 && gate_up.len().is_multiple_of(2 * width),
        "swiglu: {} values are not rows of 2 x {width}",
        gate_up.len()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn forward_and_gradient(rows in 1_usize..6, width in 1_usize..40, seed: u64) {
            let gate_up: Vec<f32> = random(rows * 2 * width, seed).iter().map(|v| 4.0 * v).collect();
            let expected: Vec<f32> = gate_up.chunks(2 * width).flat_map(|row| {
                (0..width).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[width + i])
            }).collect();
            assert_close(&swiglu(&gate_up, width), &expected, 1e-5);
            let grad = random(rows * width, seed ^ 1);
            let found = swiglu_backward(&grad, &gate_up, width);
            assert_gradient("gate_up", &gate_up, &found, |x| weighted(&swiglu(x, width), &grad));
            let found = geglu_backward(&grad, &gate_up, width);
            assert_gradient("gate_up", &gate_up, &found, |x| weighted(&geglu(x, width), &grad));
        }
    }

    #[test]
    fn gates_that_lie_apart_have_the_same_bits() {
        let (rows, width) = (700, 96);
        let x = random(rows * 2 * width, 3);
        let half = |first: usize| -> Vec<f32> {
            x.chunks(2 * width).flat_map(|row| &row[first..first + width]).copied().collect()
        };
        let apart = |of: fn(&mut [f32], &[f32])| {
            let mut gates = half(0);
            of(&mut gates, &half(width));
            gates
        };
        assert_eq!(apart(swiglu_apart), swiglu(&x, width));
        assert_eq!(apart(geglu_apart), geglu(&x, width));
    }

    #[test]
    fn many_blocks_equal_one_row_at_a_time() {
        let (rows, width) = (700, 96);
        let (x, grad) = (random(rows * 2 * width, 1), random(rows * width, 2));
        let by_row: Vec<f32> = x.chunks(2 * width).flat_map(|row| swiglu(row, width)).collect();
        assert_eq!(swiglu(&x, width), by_row);
        let by_row: Vec<f32> = (x.chunks(2 * width).zip(grad.chunks(width)))
            .flat_map(|(row, grad)| swiglu_backward(grad, row, width))
            .collect();
        assert_eq!(swiglu_backward(&grad, &x, width), by_row);
    }

    #[test]
    fn geglu_is_the_approximation_by_tanh() {
        for step in -100..=100 {
            let x = f64::from(step) / 10.0;
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            let expected = 1.5 * 0.5 * x * (1.0 + z.tanh());
            let found = f64::from(geglu(&[x as f32, 1.5], 1)[0]);
            assert!((found - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{x}: {found}, not {expected}");
        }
        assert_eq!(geglu(&[-1e20, 2.0], 1), [-0.0]);
    }

    #[test]
    #[should_panic(expected = "the output must be half as large")]
    fn refuses_an_output_of_another_size() {
        swiglu_into(&[0.0; 8], 2, &mut [0.0; 3]);
    }

    #[test]
    fn large_gates_do_not_overflow() {
        assert_eq!(swiglu(&[-1000.0, 2.0], 1), [-0.0]);
        assert_eq!(swiglu(&[1000.0, 2.0], 1), [2000.0]);
        assert_eq!(swiglu_backward(&[1.0], &[-1000.0, 2.0], 1), [-0.0, -0.0]);
        assert_eq!(geglu_backward(&[1.0], &[-1e20, 2.0], 1), [-0.0, 0.0]);
        assert_eq!(geglu_backward(&[1.0], &[1e4, 2.0], 1), [2.0, 1e4]);
    }
}
