//! The sum of a residual stream and what a layer adds to it.

use crate::parallel::{self, block_rows};

/// Adds `y` to `x`.
///
/// # Panics
/// When they differ in size.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "residual: as many values as the stream has");
    let block = block_rows(2);
    parallel::for_each(x.chunks_mut(block).zip(y.chunks(block)), |(x, y)| {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_each_value() {
        let count = 3 * block_rows(2) + 5;
        let mut x: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let y = x.clone();
        add(&mut x, &y);
        assert!(x.iter().enumerate().all(|(i, &x)| x == 2.0 * i as f32));
    }
}
