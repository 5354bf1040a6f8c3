//! Orthogonalisation for the Muon optimiser (Jordan et al. 2024): five steps of a quintic
//! Newton–Schulz iteration, whose coefficients push every singular value towards 1.

use crate::parallel;
use crate::product::{Matrix, MatrixMut, Threads, multiply};
use crate::simd::{dot, vectorized};

/// p(s) = a·s + b·s³ + c·s⁵ has the steepest slope at 0 for which five steps bring every singular
/// value into about (0.7, 1.2).
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const STEPS: usize = 5;
/// Added to the norm that divides a matrix, for the zero matrix.
const NORM_EPSILON: f32 = 1e-7;

/// Replaces the singular values of each matrix in `matrices` `[count, rows, columns]` by values near 1.
///
/// X₀ = G / (‖G‖ + 1e-7), and five times X ← aX + (bA + cA²)X with A = XXᵀ. A matrix of more rows
/// than columns works on its transpose: with A = XᵀX, X ← aX + X(bA + cA²).
///
/// # Panics
/// When `matrices` is not a whole number of matrices.
pub fn newton_schulz(matrices: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    // No slice has a length that overflows.
    let size = rows.checked_mul(columns).unwrap_or(0);
    assert!(
        size > 0 && matrices.len().is_multiple_of(size),
        "newton_schulz: {} values in matrices of {rows}x{columns}",
        matrices.len(),
    );
    let mut output = matrices.to_vec();
    // Several matrices: one for each task. A few: all threads in each product.
    if output.len() / size >= rayon::current_num_threads() {
        parallel::for_each(output.chunks_mut(size), |x| orthogonalise(x, rows, columns, Threads::One));
    } else {
        output.chunks_mut(size).for_each(|x| orthogonalise(x, rows, columns, Threads::All));
    }
    output
}

fn orthogonalise(x: &mut [f32], rows: usize, columns: usize, threads: Threads) {
    let (a, b, c) = COEFFICIENTS;
    let side = rows.min(columns);
    let mut gram = vec![0.0; side * side];
    let mut polynomial = vec![0.0; side * side];
    let mut next = vec![0.0; x.len()];
    normalise(x);
    for _ in 0..STEPS {
        let view = Matrix::new(x, rows, columns);
        let (left, right) =
            if rows > columns { (view.transposed(), view) } else { (view, view.transposed()) };
        multiply(1.0, left, right, 0.0, MatrixMut::new(&mut gram, side, side), threads);
        polynomial.copy_from_slice(&gram);
        let square = Matrix::new(&gram, side, side);
        multiply(c, square, square, b, MatrixMut::new(&mut polynomial, side, side), threads);
        let factor = Matrix::new(&polynomial, side, side);
        next.copy_from_slice(x);
        let (left, right) = if rows > columns { (view, factor) } else { (factor, view) };
        multiply(1.0, left, right, a, MatrixMut::new(&mut next, rows, columns), threads);
        x.copy_from_slice(&next);
    }
}

/// Divides by the Frobenius norm.
fn normalise(x: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            let scale = 1.0 / (dot(x, x).sqrt() + NORM_EPSILON);
            x.iter_mut().for_each(|v| *v *= scale);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};
    use proptest::prelude::*;

    /// The published steps, written out in f64 (transposing as published).
    fn reference(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        let transpose = |x: &[f64], rows: usize, columns: usize| -> Vec<f64> {
            (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
        };
        let product = |a: &[f64], b: &[f64], m: usize, k: usize, n: usize| -> Vec<f64> {
            (0..m * n).map(|i| (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum()).collect()
        };
        let x: Vec<f64> = matrix.iter().map(|&v| f64::from(v)).collect();
        let tall = rows > columns;
        let (m, n) = if tall { (columns, rows) } else { (rows, columns) };
        let mut x = if tall { transpose(&x, rows, columns) } else { x };
        let norm = x.iter().map(|v| v * v).sum::<f64>().sqrt() + 1e-7;
        x.iter_mut().for_each(|v| *v /= norm);
        for _ in 0..5 {
            let gram = product(&x, &transpose(&x, m, n), m, n, m);
            let square = product(&gram, &gram, m, m, m);
            let b: Vec<f64> = gram.iter().zip(&square).map(|(a, s)| -4.7750 * a + 2.0315 * s).collect();
            let step = product(&b, &x, m, m, n);
            x = x.iter().zip(&step).map(|(x, s)| 3.4445 * x + s).collect();
        }
        let x = if tall { transpose(&x, m, n) } else { x };
        x.iter().map(|&v| v as f32).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn follows_the_published_steps(
            count in 1_usize..4, rows in 1_usize..20, columns in 1_usize..20, seed: u64,
        ) {
            let matrices = random(count * rows * columns, seed);
            let found = newton_schulz(&matrices, rows, columns);
            for (found, matrix) in found.chunks(rows * columns).zip(matrices.chunks(rows * columns)) {
                assert_close(found, &reference(matrix, rows, columns), 1e-3);
            }
        }
    }

    #[test]
    fn singular_values_come_near_one() {
        let (rows, columns) = (8, 64); // random and wide: well conditioned
        let x = newton_schulz(&random(rows * columns, 3), rows, columns);
        for i in 0..rows {
            let norm = x[i * columns..][..columns].iter().map(|v| v * v).sum::<f32>().sqrt();
            assert!((0.6..1.3).contains(&norm), "{norm}");
        }
    }

    #[test]
    fn sizes_that_wrap_around_are_refused() {
        for (rows, columns) in
            [((1 << 62) + 1, 4), (4, (1 << 62) + 1), (1 << 33, 1 << 33), (usize::MAX, 2), (0, 4)]
        {
            let refused = std::panic::catch_unwind(|| newton_schulz(&[1.0; 4], rows, columns)).unwrap_err();
            let message = refused.downcast_ref::<String>().unwrap();
            assert!(
                message.starts_with(&format!("newton_schulz: 4 values in matrices of {rows}x{columns}")),
                "{message}"
            );
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        assert_eq!(newton_schulz(&[0.0; 12], 3, 4), [0.0; 12]);
    }
}
