//! Momentum whose steps are balanced between the rows and the columns of what a batch touches.
//!
//! DeepSeek-V4.1 trains its tables by momentum with alternating normalisation of rows and columns. What is public of
//! it: Nesterov's momentum, and, by a comment on pull request 299 of NVIDIA-NeMo/Emerging-Optimizers, eleven
//! normalisations by turns, rows that hardly have a gradient left out below a floor of 1e-3, and a scale of 0.18, with
//! which the steps are as long as Adam's. The alternation itself is that of
//! Scetbon et al. 2025 (arXiv 2502.06742, "square-root Sinkhorn"). Not public, and decided here: momentum rests
//! where a row is not touched, as in every optimiser of this crate, and the floor is a share of the root mean square
//! over all touched rows.

use rayon::prelude::*;

use crate::records::RecordsMut;

/// One step's constants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BalancedStep {
    /// β.
    pub(crate) momentum: f32,
    /// K, normalisations of rows and columns together.
    pub(crate) iterations: u32,
    /// τ, below which a row takes no step.
    pub(crate) floor: f64,
    /// Rate times scale.
    pub(crate) size: f64,
}

/// Rows whose sums are taken together; fixed, so that rounding does not depend on the number of threads.
const BLOCK_ROWS: usize = 256;

impl BalancedStep {
    /// Steps the rows `ids` (ascending, all inside `rows`) with gradients \[ids, width\]. Beside what it is given it
    /// takes as much memory as the gradients.
    pub(crate) fn apply(self, rows: &mut RecordsMut<'_>, ids: &[u64], grads: &[f32]) {
        let width = rows.widths[0];
        let mut update = grads.to_vec();
        rows.reborrow().for_each(ids, &mut update, &|record, update| {
            let moments = &mut record[width..2 * width];
            for (m, u) in moments.iter_mut().zip(update) {
                *m = self.momentum * *m + *u;
                *u += self.momentum * *m;
            }
        });
        let Scales { rows: by_row, columns } = self.balance(&update, width);
        let scaled = update.par_chunks_exact_mut(width).zip(&by_row);
        scaled.with_min_len(BLOCK_ROWS).for_each(|(update, row)| {
            for (u, column) in update.iter_mut().zip(&columns) {
                *u = (f64::from(*u) * row * column * self.size) as f32;
            }
        });
        rows.reborrow().for_each(ids, &mut update, &|record, update| {
            record[..width].iter_mut().zip(update).for_each(|(p, u)| *p -= *u);
        });
    }

    /// The factors that balance `update` \[rows, width\]: after the last pass over rows or columns, each of them has
    /// root mean square 1. Rows below the floor have the factor 0 and count for no column.
    fn balance(self, update: &[f32], width: usize) -> Scales {
        let ones = vec![1.0; width];
        let norms = row_norms(update, &ones);
        let total = (norms.iter().map(|norm| norm * norm).sum::<f64>() / norms.len().max(1) as f64).sqrt();
        let active: Vec<bool> = norms.iter().map(|&norm| norm > self.floor * total).collect();
        let alive = active.iter().filter(|&&active| active).count();
        let start = active.iter().map(|&active| if active { 1.0 } else { 0.0 }).collect();
        let mut scales = Scales { rows: start, columns: ones };
        for iteration in 0..self.iterations {
            if iteration % 2 == 0 {
                let norms = row_norms(update, &scales.columns);
                let norms = norms.into_iter().zip(&active);
                scales.rows = norms.map(|(norm, &active)| if active { inverse(norm) } else { 0.0 }).collect();
            } else {
                let squares = column_squares(update, width, &scales.rows);
                scales.columns =
                    squares.into_iter().map(|square| inverse((square / alive as f64).sqrt())).collect();
            }
        }
        scales
    }
}

/// Factors on the rows and columns of an update.
struct Scales {
    rows: Vec<f64>,
    columns: Vec<f64>,
}

/// 1/norm; 0 where all is zero, which stays zero.
fn inverse(norm: f64) -> f64 {
    if norm > 0.0 { norm.recip() } else { 0.0 }
}

/// Root mean square of every row, its columns times `scales`.
fn row_norms(update: &[f32], scales: &[f64]) -> Vec<f64> {
    let norm = |row: &[f32]| {
        let squares = row.iter().zip(scales).map(|(&u, scale)| (f64::from(u) * scale).powi(2));
        (squares.sum::<f64>() / scales.len() as f64).sqrt()
    };
    update.par_chunks_exact(scales.len()).with_min_len(BLOCK_ROWS).map(norm).collect()
}

/// Sum of squares of every column, its rows times `scales`.
fn column_squares(update: &[f32], width: usize, scales: &[f64]) -> Vec<f64> {
    let blocks = update.par_chunks(width * BLOCK_ROWS).zip(scales.par_chunks(BLOCK_ROWS));
    let of_block = |(rows, scales): (&[f32], &[f64])| {
        let mut squares = vec![0.0; width];
        for (row, scale) in rows.chunks_exact(width).zip(scales) {
            squares.iter_mut().zip(row).for_each(|(sum, &u)| *sum += (f64::from(u) * scale).powi(2));
        }
        squares
    };
    let blocks: Vec<Vec<f64>> = blocks.map(of_block).collect();
    let mut squares = vec![0.0; width];
    for block in &blocks {
        squares.iter_mut().zip(block).for_each(|(sum, square)| *sum += square);
    }
    squares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_init::RowInit;

    const STEP: BalancedStep = BalancedStep { momentum: 0.95, iterations: 11, floor: 1e-3, size: 1.0 };

    fn normal(rows: usize, width: usize) -> Vec<f32> {
        let mut values = vec![0.0; rows * width];
        RowInit::Normal { deviation: 1.0, seed: 3 }.fill(0, &mut values);
        values
    }

    fn balanced(step: BalancedStep, update: &[f32], width: usize) -> Vec<f64> {
        let scales = step.balance(update, width);
        let value =
            |(i, &u): (usize, &f32)| f64::from(u) * scales.rows[i / width] * scales.columns[i % width];
        update.iter().enumerate().map(value).collect()
    }

    fn norm(values: impl Iterator<Item = f64>) -> f64 {
        let values: Vec<f64> = values.collect();
        (values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64).sqrt()
    }

    #[test]
    fn rows_and_columns_come_to_norm_one() {
        let (rows, width) = (700, 12);
        let mut update = normal(rows, width);
        // Frequent rows with gradients thirty times those of rare ones, which stay above the floor, and a loud column.
        for (i, u) in update.iter_mut().enumerate() {
            *u *= if (i / width) % 7 == 0 { 3.0 } else { 0.1 } * if i % width == 3 { 20.0 } else { 1.0 };
        }
        let update = balanced(STEP, &update, width);
        for row in update.chunks(width) {
            assert!((norm(row.iter().copied()) - 1.0).abs() < 1e-9);
        }
        for column in 0..width {
            let norm = norm(update.iter().skip(column).step_by(width).copied());
            assert!((norm - 1.0).abs() < 1e-3, "column {column} has norm {norm}");
        }
    }

    /// With two passes the result is the formula, taken step by step.
    #[test]
    fn passes_take_turns_and_begin_with_rows() {
        let (rows, width) = (5, 3);
        let update = normal(rows, width);
        let mut expected: Vec<f64> = update.iter().map(|&u| f64::from(u)).collect();
        for row in expected.chunks_mut(width) {
            let norm = norm(row.iter().copied());
            row.iter_mut().for_each(|u| *u /= norm);
        }
        for column in 0..width {
            let norm = norm(expected.iter().skip(column).step_by(width).copied());
            expected.iter_mut().skip(column).step_by(width).for_each(|u| *u /= norm);
        }
        let found = balanced(BalancedStep { iterations: 2, ..STEP }, &update, width);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
        }
    }

    #[test]
    fn rows_below_the_floor_take_no_step_and_count_for_no_column() {
        let (rows, width) = (40, 4);
        let mut update = normal(rows, width);
        let expected = balanced(STEP, &update[..39 * width], width);
        update[39 * width..].iter_mut().for_each(|u| *u *= 1e-5);
        let found = balanced(STEP, &update, width);
        assert_eq!(found[39 * width..], [0.0; 4]);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-12);
        }
        assert!(balanced(STEP, &[0.0; 8], 4).iter().all(|&u| u == 0.0), "nothing to balance");
    }

    #[test]
    fn a_zero_column_stays_zero() {
        let mut update = normal(6, 3);
        update.iter_mut().skip(1).step_by(3).for_each(|u| *u = 0.0);
        let found = balanced(STEP, &update, 3);
        assert!(found.iter().all(|u| u.is_finite()));
        assert!(found.iter().skip(1).step_by(3).all(|&u| u == 0.0));
    }
}
