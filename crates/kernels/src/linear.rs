//! A linear map of rows, x·W with W `[inputs, outputs]`, and its two gradients.

use crate::product::{Matrix, MatrixMut, Threads, multiply};

/// `x` `[rows, inputs]` · `weight` `[inputs, outputs]`, which is `[rows, outputs]`.
///
/// # Panics
/// When `inputs` is 0 or a slice is not a whole number of rows (of `x`) or columns (of `weight`).
pub fn linear(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (parts(x, inputs), parts(weight, inputs));
    let mut y = vec![0.0; rows * outputs];
    let (x, weight) = (Matrix::new(x, rows, inputs), Matrix::new(weight, inputs, outputs));
    multiply(1.0, x, weight, 0.0, MatrixMut::new(&mut y, rows, outputs), Threads::All);
    y
}

/// Adds [`linear`] of `x` and `weight` to `y`, `[rows, outputs]`.
///
/// # Panics
/// As [`linear`], or when `y` has another size.
pub fn linear_add(x: &[f32], weight: &[f32], inputs: usize, y: &mut [f32]) {
    let (rows, outputs) = (parts(x, inputs), parts(weight, inputs));
    assert_eq!(y.len(), rows * outputs, "linear: the sum is not [rows, outputs] = [{rows}, {outputs}]");
    let (x, weight) = (Matrix::new(x, rows, inputs), Matrix::new(weight, inputs, outputs));
    multiply(1.0, x, weight, 1.0, MatrixMut::new(y, rows, outputs), Threads::All);
}

/// Gradient `[rows, inputs]` of [`linear`]'s `x`: `grad` `[rows, outputs]` · weightᵀ.
///
/// # Panics
/// As [`linear`].
pub fn linear_backward_input(grad: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let outputs = parts(weight, inputs);
    let rows = parts(grad, outputs);
    let mut dx = vec![0.0; rows * inputs];
    let weight = Matrix::new(weight, inputs, outputs).transposed();
    let grad = Matrix::new(grad, rows, outputs);
    multiply(1.0, grad, weight, 0.0, MatrixMut::new(&mut dx, rows, inputs), Threads::All);
    dx
}

/// Gradient `[inputs, outputs]` of [`linear`]'s `weight`: xᵀ · grad.
///
/// # Panics
/// When `x` and `grad` do not have the same whole number of rows.
pub fn linear_backward_weight(x: &[f32], grad: &[f32], inputs: usize) -> Vec<f32> {
    let rows = parts(x, inputs);
    let outputs = parts(grad, rows);
    let mut dw = vec![0.0; inputs * outputs];
    let x = Matrix::new(x, rows, inputs).transposed();
    let grad = Matrix::new(grad, rows, outputs);
    multiply(1.0, x, grad, 0.0, MatrixMut::new(&mut dw, inputs, outputs), Threads::All);
    dw
}

/// How many parts of `size` values `data` has.
fn parts(data: &[f32], size: usize) -> usize {
    assert!(size > 0 && data.len().is_multiple_of(size), "linear: {} values in parts of {size}", data.len());
    data.len() / size
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_gradient, random, weighted};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn gradients(rows in 1_usize..20, inputs in 1_usize..20, outputs in 1_usize..20, seed: u64) {
            let (x, w) = (random(rows * inputs, seed), random(inputs * outputs, seed ^ 1));
            let grad = random(rows * outputs, seed ^ 2);
            let loss = |x: &[f32], w: &[f32]| weighted(&linear(x, w, inputs), &grad);
            assert_gradient("x", &x, &linear_backward_input(&grad, &w, inputs), |x| loss(x, &w));
            assert_gradient("w", &w, &linear_backward_weight(&x, &grad, inputs), |w| loss(&x, w));
        }
    }

    #[test]
    fn a_product_by_hand() {
        assert_eq!(
            linear(&[1.0, 2.0, 3.0, 4.0], &[1.0, 0.0, 2.0, 0.0, 1.0, 3.0], 2),
            [1.0, 2.0, 8.0, 3.0, 4.0, 18.0]
        );
        let mut sum = [10.0, 20.0];
        linear_add(&[1.0, 2.0], &[1.0, 0.0, 2.0, 1.0], 2, &mut sum);
        assert_eq!(sum, [15.0, 22.0]);
    }
}
