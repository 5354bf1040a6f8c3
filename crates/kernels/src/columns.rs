//! The columns of a matrix `[rows, width]`, divided into pieces that threads write concurrently.

use std::marker::PhantomData;

/// Adjacent columns of every row, writable.
///
/// Different pieces interleave in memory without sharing values, so each thread may hold one.
pub(crate) struct ColumnsMut<'a, T> {
    start: *mut T,
    rows: usize,
    stride: usize,
    width: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a ColumnsMut has exclusive access to its columns (see `split`), as a `&mut [T]` has to its values, and T
// may move between threads.
unsafe impl<T: Send> Send for ColumnsMut<'_, T> {}

impl<'a, T> ColumnsMut<'a, T> {
    /// Pieces of `size` columns of `data` `[rows, width]`; the last may have fewer.
    pub(crate) fn split(data: &'a mut [T], width: usize, size: usize) -> Vec<Self> {
        assert!(width * size > 0 && data.len().is_multiple_of(width), "not whole rows of {width}");
        let (start, rows) = (data.as_mut_ptr(), data.len() / width);
        let piece = |first: usize| Self {
            start: start.wrapping_add(first),
            rows,
            stride: width,
            width: size.min(width - first),
            borrow: PhantomData,
        };
        (0..width).step_by(size).map(piece).collect()
    }

    /// The values of this piece in `row`.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `split` made this piece from an exclusively borrowed matrix of rows · stride values; its values in
        // this row begin at row · stride + first and end within the row, disjoint from every other (row, piece). `&mut
        // self` keeps two rows of this piece from being borrowed at once.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_belongs_to_one_piece() {
        let (rows, width, size) = (3, 7, 3);
        let mut data = vec![0.0; rows * width];
        for (index, mut piece) in ColumnsMut::split(&mut data, width, size).into_iter().enumerate() {
            for row in 0..rows {
                piece.row(row).iter_mut().for_each(|v| *v += (index * rows + row + 1) as f32);
            }
        }
        for (index, &value) in data.iter().enumerate() {
            assert_eq!(value, (index % width / size * rows + index / width + 1) as f32);
        }
    }

    #[test]
    #[should_panic(expected = "row 3 of 3")]
    fn refuses_a_row_past_the_end() {
        ColumnsMut::split(&mut [0.0; 12], 4, 2)[0].row(3);
    }
}
