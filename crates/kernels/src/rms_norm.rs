//! Root-mean-square normalisation of rows (Zhang & Sennrich 2019, arXiv 1910.07467).

use std::mem::MaybeUninit;

use crate::parallel::{self, block_rows};
use crate::simd::{sum, vectorized};

/// What [`rms_norm`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNorm {
    /// `[rows, width]`: x · inverse_rms · weight.
    pub output: Vec<f32>,
    /// `[rows]`: 1 / sqrt(mean(x²) + epsilon) of each row, for the backward pass.
    pub inverse_rms: Vec<f32>,
}

/// What [`rms_norm_backward`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNormGradients {
    /// `[rows, width]`: gradient of the input.
    pub input: Vec<f32>,
    /// `[width]`: gradient of the weight, when there is one.
    pub weight: Option<Vec<f32>>,
}

/// Divides each row of `x` `[rows, width]` by its root mean square and multiplies it by `weight`
/// `[width]`, if given.
///
/// # Panics
/// When `width` is 0, or a slice does not have the shape stated.
pub fn rms_norm(x: &[f32], weight: Option<&[f32]>, width: usize, epsilon: f32) -> RmsNorm {
    let rows = rows_of(x, weight, width);
    let mut output = Vec::with_capacity(x.len());
    let mut inverse_rms = vec![0.0; rows];
    let block = block_rows(2 * width);
    let targets = output.spare_capacity_mut()[..x.len()].chunks_mut(block * width);
    let blocks = x.chunks(block * width).zip(targets).zip(inverse_rms.chunks_mut(block));
    parallel::for_each(blocks, |((x, output), inverse_rms)| {
        vectorized(
            #[inline(always)]
            || forward_block(x, weight, width, epsilon, output, inverse_rms),
        );
    });
    // SAFETY: each block of rows has written all of its values.
    unsafe { output.set_len(x.len()) };
    RmsNorm { output, inverse_rms }
}

/// The output of [`rms_norm`], into `output` `[rows, width]`: for decoding, which has no backward pass.
///
/// # Panics
/// As [`rms_norm`], or when `output` has another size.
pub fn rms_norm_into(x: &[f32], weight: Option<&[f32]>, width: usize, epsilon: f32, output: &mut [f32]) {
    rows_of(x, weight, width);
    assert_eq!(output.len(), x.len(), "rms_norm: output and input differ in size");
    let block = block_rows(2 * width);
    let blocks = x.chunks(block * width).zip(output.chunks_mut(block * width));
    parallel::for_each(blocks, |(x, output)| {
        vectorized(
            #[inline(always)]
            || {
                for (x, output) in x.chunks_exact(width).zip(output.chunks_exact_mut(width)) {
                    let inverse = inverse_rms_of(x, epsilon);
                    normalize(x, weight, inverse, output.iter_mut(), |y, value| *y = value);
                }
            },
        );
    });
}

/// Gradients of [`rms_norm`], given `grad` `[rows, width]` of its output and the `inverse_rms` it
/// returned.
///
/// With g = grad · weight and r = inverse_rms: dx = r·(g − x·r²·mean(g·x)), dweight = Σ rows grad·x·r.
///
/// # Panics
/// When `width` is 0, or a slice does not have the shape stated.
pub fn rms_norm_backward(
    grad: &[f32],
    x: &[f32],
    weight: Option<&[f32]>,
    inverse_rms: &[f32],
    width: usize,
) -> RmsNormGradients {
    let rows = rows_of(x, weight, width);
    assert_eq!(grad.len(), x.len(), "rms_norm: gradient and input differ in size");
    assert_eq!(inverse_rms.len(), rows, "rms_norm: one inverse_rms for each row");
    let mut input = vec![0.0; x.len()];
    let block = block_rows(3 * width);
    let blocks = (x.chunks(block * width).zip(grad.chunks(block * width)))
        .zip(input.chunks_mut(block * width).zip(inverse_rms.chunks(block)));
    let parts = parallel::map(blocks, |((x, grad), (input, inverse_rms))| {
        let mut weight_part = weight.map(|w| vec![0.0; w.len()]);
        vectorized(
            #[inline(always)]
            || match (weight, &mut weight_part) {
                (Some(weight), Some(part)) => backward_weighted(grad, x, weight, inverse_rms, input, part),
                _ => backward_plain(grad, x, width, inverse_rms, input),
            },
        );
        weight_part
    });
    let weight = weight.map(|_| parallel::sum_in_order(parts.into_iter().flatten().collect(), width));
    RmsNormGradients { input, weight }
}

/// Checks the shapes and returns the number of rows.
fn rows_of(x: &[f32], weight: Option<&[f32]>, width: usize) -> usize {
    assert!(width > 0 && x.len().is_multiple_of(width), "rms_norm: {} values in rows of {width}", x.len());
    if let Some(weight) = weight {
        assert_eq!(weight.len(), width, "rms_norm: the weight must be as wide as a row");
    }
    x.len() / width
}

/// Writes all values of `output`.
#[inline(always)]
fn forward_block(
    x: &[f32],
    weight: Option<&[f32]>,
    width: usize,
    epsilon: f32,
    output: &mut [MaybeUninit<f32>],
    inverse_rms: &mut [f32],
) {
    let rows = x.chunks_exact(width).zip(output.chunks_exact_mut(width)).zip(inverse_rms);
    for ((x, output), inverse) in rows {
        *inverse = inverse_rms_of(x, epsilon);
        normalize(
            x,
            weight,
            *inverse,
            output.iter_mut(),
            #[inline(always)]
            |y, value| {
                y.write(value);
            },
        );
    }
}

#[inline(always)]
fn inverse_rms_of(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (crate::simd::dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

/// Passes each value of a row, normalised, to `write` with its place.
#[inline(always)]
fn normalize<Y>(
    x: &[f32],
    weight: Option<&[f32]>,
    inverse: f32,
    output: impl Iterator<Item = Y>,
    write: impl Fn(Y, f32),
) {
    match weight {
        Some(weight) => {
            for ((y, x), w) in output.zip(x).zip(weight) {
                write(y, x * inverse * w);
            }
        }
        None => {
            for (y, x) in output.zip(x) {
                write(y, x * inverse);
            }
        }
    }
}

#[inline(always)]
fn backward_weighted(
    grad: &[f32],
    x: &[f32],
    weight: &[f32],
    inverse_rms: &[f32],
    input: &mut [f32],
    weight_part: &mut [f32],
) {
    let width = weight.len();
    let rows = grad.chunks_exact(width).zip(x.chunks_exact(width)).zip(input.chunks_exact_mut(width));
    for (((grad, x), dx), &r) in rows.zip(inverse_rms) {
        let weight_part = &mut weight_part[..width];
        let products = sum(
            [grad, weight, x],
            #[inline(always)]
            |[grad, weight, x]| grad * weight * x,
        );
        let mean = products / width as f32;
        let along = r * r * r * mean;
        for i in 0..width {
            dx[i] = r * grad[i] * weight[i] - along * x[i];
            weight_part[i] += grad[i] * x[i] * r;
        }
    }
}

#[inline(always)]
fn backward_plain(grad: &[f32], x: &[f32], width: usize, inverse_rms: &[f32], input: &mut [f32]) {
    let rows = grad.chunks_exact(width).zip(x.chunks_exact(width)).zip(input.chunks_exact_mut(width));
    for (((grad, x), dx), &r) in rows.zip(inverse_rms) {
        let along = r * r * r * crate::simd::dot(grad, x) / width as f32;
        for i in 0..width {
            dx[i] = r * grad[i] - along * x[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    fn naive(x: &[f32], weight: Option<&[f32]>, width: usize, epsilon: f32) -> Vec<f32> {
        x.chunks(width)
            .flat_map(|row| {
                let square: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                let inverse = 1.0 / (square + f64::from(epsilon)).sqrt();
                (0..width).map(move |i| (f64::from(row[i]) * inverse) as f32 * weight.map_or(1.0, |w| w[i]))
            })
            .collect()
    }

    proptest! {
        #[test]
        fn forward_and_gradients(rows in 1_usize..6, width in 1_usize..40, scaled: bool, seed: u64) {
            let x = random(rows * width, seed);
            let weight = scaled.then(|| random(width, seed ^ 1));
            let weight = weight.as_deref();
            let found = rms_norm(&x, weight, width, 0.1);
            assert_close(&found.output, &naive(&x, weight, width, 0.1), 1e-5);

            let grad = random(rows * width, seed ^ 2);
            let mut output = vec![0.0; x.len()];
            rms_norm_into(&x, weight, width, 0.1, &mut output);
            prop_assert_eq!(&output, &found.output);
            let gradients = rms_norm_backward(&grad, &x, weight, &found.inverse_rms, width);
            let loss = |x: &[f32], w: Option<&[f32]>| weighted(&rms_norm(x, w, width, 0.1).output, &grad);
            assert_gradient("x", &x, &gradients.input, |x| loss(x, weight));
            if let (Some(w), Some(dw)) = (weight, &gradients.weight) {
                assert_gradient("weight", w, dw, |w| loss(&x, Some(w)));
            }
        }
    }

    #[test]
    fn many_blocks_give_the_sums_of_one_and_the_same_bits_twice() {
        let (rows, width) = (1000, 100);
        let (x, weight, grad) = (random(rows * width, 1), random(width, 2), random(rows * width, 3));
        let run = || {
            let forward = rms_norm(&x, Some(&weight), width, 1e-6);
            let backward = rms_norm_backward(&grad, &x, Some(&weight), &forward.inverse_rms, width);
            (forward, backward)
        };
        let (forward, backward) = run();
        assert_eq!((forward.clone(), backward.clone()), run());
        let expected: Vec<f32> = (0..width)
            .map(|i| {
                (0..rows)
                    .map(|r| {
                        f64::from(grad[r * width + i] * x[r * width + i]) * f64::from(forward.inverse_rms[r])
                    })
                    .sum::<f64>() as f32
            })
            .collect();
        assert_close(&backward.weight.unwrap(), &expected, 1e-3);
    }

    #[test]
    #[should_panic(expected = "7 values in rows of 2")]
    fn refuses_part_of_a_row() {
        rms_norm(&[1.0; 7], None, 2, 1e-6);
    }
}
