//! Matrix products on borrowed row-major matrices: a safe interface to the `gemm` crate.

use crate::parallel::{self, block_rows};
use gemm::Parallelism;

/// A matrix in a borrowed slice; a transposed view swaps the strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// The matrix of `rows` × `columns` that `data` holds row after row.
    pub(crate) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Like [`Matrix::new`], with `row_stride` values from one row's start to the next.
    pub(crate) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        check(data.len(), rows, columns, row_stride);
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The `count` columns from `first` on, without moving anything.
    pub(crate) fn columns(self, first: usize, count: usize) -> Self {
        assert!(
            first.checked_add(count).is_some_and(|end| end <= self.columns),
            "{count} columns from {first} on, of {}",
            self.columns
        );
        let start = (first * self.column_stride).min(self.data.len());
        Self { data: &self.data[start..], columns: count, ..self }
    }

    /// The transpose, without moving anything.
    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// A row-major matrix in a mutably borrowed slice, to receive a product.
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// The matrix of `rows` × `columns` that `data` holds row after row.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Like [`MatrixMut::new`], with `row_stride` values from one row's start to the next.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        check(data.len(), rows, columns, row_stride);
        Self { data, rows, columns, row_stride }
    }
}

/// Panics unless `rows` × `columns` at this stride lie within `len` values and rows do not overlap.
fn check(len: usize, rows: usize, columns: usize, row_stride: usize) {
    assert!(row_stride >= columns, "row stride {row_stride} is less than the {columns} columns");
    let needed = match rows {
        0 => Some(0),
        _ if columns == 0 => Some(0),
        _ => (rows - 1).checked_mul(row_stride).and_then(|before| before.checked_add(columns)),
    };
    assert!(
        needed.is_some_and(|needed| needed <= len),
        "{rows}x{columns} at row stride {row_stride} needs more than the {len} values given",
    );
}

/// How many threads one product may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread: for products inside a parallel block.
    One,
    /// All of rayon's current pool.
    All,
}

/// `c = alpha · a · b + beta · c`. With `beta` 0, what `c` held is not read.
///
/// # Panics
/// When the shapes do not agree.
pub(crate) fn multiply(
    alpha: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
    beta: f32,
    c: MatrixMut<'_>,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows, "inner dimensions of a product differ");
    assert_eq!((a.rows, b.columns), (c.rows, c.columns), "a product's output has another shape");
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the constructors checked that every (row, column) of each view lies within its slice
    // (transposing permutes the same positions), c's rows do not overlap, and c is borrowed
    // exclusively, so it aliases neither a nor b. Strides fit isize as slices are shorter than that.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.data.as_mut_ptr(),
            1,
            c.row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The transpose `[columns, rows]` of `data` `[rows, columns]`, moved.
///
/// Worth its pass over the data if a transposed view would be read repeatedly: rows a power of two apart compete for
/// the same cache lines.
pub(crate) fn transpose(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; rows * columns];
    transpose_from(data, rows, columns, 0, &mut transposed);
    transposed
}

/// Like [`transpose`], with all threads.
pub(crate) fn transpose_parallel(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; rows * columns];
    let band = block_rows(2 * rows);
    let bands = transposed.chunks_mut(band * rows.max(1)).enumerate();
    parallel::for_each(bands, |(index, target)| transpose_from(data, rows, columns, index * band, target));
    transposed
}

/// Fills `target` `[_, rows]` with the columns of `data` from `first_column`.
fn transpose_from(data: &[f32], rows: usize, columns: usize, first_column: usize, target: &mut [f32]) {
    const TILE: usize = 16;
    for first_row in (0..rows).step_by(TILE) {
        let last_row = rows.min(first_row + TILE);
        for (target, column) in target.chunks_exact_mut(rows).zip(first_column..) {
            for (value, row) in target[first_row..last_row].iter_mut().zip(first_row..) {
                *value = data[row * columns + column];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_that_wrap_around_are_refused() {
        let refuses =
            |make: &dyn Fn()| assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(make)).is_err());
        let data = [1.0; 4];
        for (rows, columns, stride) in
            [((1 << 62) + 1, 4, 4), (usize::MAX, 2, 2), (2, 2, usize::MAX), (3, 1, 1 << 63)]
        {
            refuses(&|| _ = Matrix::strided(&data, rows, columns, stride));
            refuses(&|| _ = MatrixMut::strided(&mut [1.0; 4], rows, columns, stride).rows);
        }
        refuses(&|| _ = Matrix::new(&data, 2, 2).columns(1, usize::MAX));
        assert_eq!(Matrix::strided(&data, 2, 1, 3).rows, 2);
    }

    fn values(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed)) >> 8) as f32 / 1e7 - 0.8)
            .collect()
    }

    proptest! {
        #[test]
        fn matches_the_sum_of_products(
            m in 0_usize..40, k in 0_usize..40, n in 0_usize..40, pad in 0_usize..3,
            flip_a: bool, flip_b: bool, all: bool, beta in prop_oneof![Just(0.0_f32), Just(1.0), Just(-0.5)],
        ) {
            let (a_rows, a_columns) = if flip_a { (k, m) } else { (m, k) };
            let (b_rows, b_columns) = if flip_b { (n, k) } else { (k, n) };
            let a_data = values(a_rows * (a_columns + pad), 1);
            let b_data = values(b_rows * (b_columns + pad), 2);
            let c_start = values(m * (n + pad), 3);
            let mut a = Matrix::strided(&a_data, a_rows, a_columns, a_columns + pad);
            let mut b = Matrix::strided(&b_data, b_rows, b_columns, b_columns + pad);
            if flip_a { a = a.transposed(); }
            if flip_b { b = b.transposed(); }
            let mut c = c_start.clone();
            let threads = if all { Threads::All } else { Threads::One };
            multiply(0.7, a, b, beta, MatrixMut::strided(&mut c, m, n, n + pad), threads);
            for i in 0..m {
                for j in 0..n + pad {
                    let at = i * (n + pad) + j;
                    if j >= n {
                        prop_assert_eq!(c[at], c_start[at]); // padding is left alone
                        continue;
                    }
                    let dot: f64 = (0..k).map(|l| {
                        f64::from(a_data[i * a.row_stride + l * a.column_stride])
                            * f64::from(b_data[l * b.row_stride + j * b.column_stride])
                    }).sum();
                    let expected = 0.7 * dot + f64::from(beta) * f64::from(c_start[at]);
                    prop_assert!((f64::from(c[at]) - expected).abs() < 1e-5, "{} {}", c[at], expected);
                }
            }
        }
    }

    #[test]
    fn transposes_of_every_shape() {
        for (rows, columns) in [(0, 3), (3, 0), (1, 1), (17, 5), (300, 200)] {
            let data = values(rows * columns, 4);
            let moved = transpose(&data, rows, columns);
            assert_eq!(moved, transpose_parallel(&data, rows, columns));
            for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                assert_eq!(moved[j * rows + i], data[i * columns + j]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "needs more than the 11 values given")]
    fn refuses_a_slice_too_short() {
        Matrix::new(&[0.0; 11], 3, 4);
    }
}
