//! Rows of values, copied from place to place.

/// Each row of `left` `[rows, left_width]`, then that of `right` `[rows, right_width]`: `[rows, left_width + right_width]`.
pub(crate) fn side_by_side(
    (left, left_width): (&[f32], usize),
    (right, right_width): (&[f32], usize),
) -> Vec<f32> {
    let mut both = Vec::with_capacity(left.len() + right.len());
    for (left, right) in left.chunks_exact(left_width).zip(right.chunks_exact(right_width)) {
        both.extend_from_slice(left);
        both.extend_from_slice(right);
    }
    both
}

/// The rows of `x` `[rows, width]` that `indices` name, in their order.
pub(crate) fn select(x: &[f32], width: usize, indices: impl IntoIterator<Item = usize>) -> Vec<f32> {
    let mut selected = Vec::new();
    for index in indices {
        selected.extend_from_slice(&x[index * width..][..width]);
    }
    selected
}

/// Each row of `x` `[rows, width]` so many times: `[rows, times, width]`.
pub(crate) fn repeat(x: &[f32], width: usize, times: usize) -> Vec<f32> {
    let mut repeated = Vec::with_capacity(times * x.len());
    for row in x.chunks_exact(width) {
        (0..times).for_each(|_| repeated.extend_from_slice(row));
    }
    repeated
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_copied_whole() {
        let x = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(side_by_side((&x, 2), (&[5.0, 6.0], 1)), [1.0, 2.0, 5.0, 3.0, 4.0, 6.0]);
        assert_eq!(select(&x, 2, [1, 0, 1]), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(repeat(&x, 2, 2), [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]);
    }
}
