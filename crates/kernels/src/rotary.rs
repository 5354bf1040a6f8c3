//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

use crate::parallel::{self, block_rows};
use crate::simd::vectorized;

/// Cosines and sines of every position's angles.
///
/// The pair rotated by angle i of a vector of `width` values is (i, i + width/2).
#[derive(Debug, Clone, Copy)]
pub struct Angles<'a> {
    /// `[time, width/2]`.
    pub cos: &'a [f32],
    /// `[time, width/2]`.
    pub sin: &'a [f32],
}

impl Angles<'_> {
    /// Panics unless there are `time` rows for vectors of `width` values.
    pub(crate) fn check(&self, time: usize, width: usize) {
        assert!(width.is_multiple_of(2), "rotary: width {width} must be even");
        let expected = time * width / 2;
        assert_eq!(
            self.cos.len(),
            expected,
            "rotary: cosines are not [time, width/2] = [{time}, {}]",
            width / 2
        );
        assert_eq!(
            self.sin.len(),
            expected,
            "rotary: sines are not [time, width/2] = [{time}, {}]",
            width / 2
        );
    }

    /// Writes to `output` the vector `input` turned by the angles of `position`.
    ///
    /// # Panics
    /// When there are no angles of that position, or `output` is shorter than `input`.
    #[inline(always)]
    pub fn turn(&self, position: usize, input: &[f32], output: &mut [f32]) {
        self.turn_signed(position, 1.0, input, output);
    }

    /// The inverse of [`Angles::turn`], which is its transpose and therefore its backward pass.
    #[inline(always)]
    pub(crate) fn turn_back(&self, position: usize, input: &[f32], output: &mut [f32]) {
        self.turn_signed(position, -1.0, input, output);
    }

    #[inline(always)]
    fn turn_signed(&self, position: usize, sign: f32, input: &[f32], output: &mut [f32]) {
        let half = input.len() / 2;
        let (cos, sin) = (&self.cos[position * half..][..half], &self.sin[position * half..][..half]);
        let (a, b) = input.split_at(half);
        let (a_out, b_out) = output.split_at_mut(half);
        let (b, a_out, b_out) = (&b[..half], &mut a_out[..half], &mut b_out[..half]);
        for i in 0..half {
            let sin = sign * sin[i];
            a_out[i] = a[i] * cos[i] - b[i] * sin;
            b_out[i] = a[i] * sin + b[i] * cos[i];
        }
    }
}

/// Turns every vector of `x` `[batch, time, heads, width]` by the angles of its position.
///
/// # Panics
/// When a slice does not have the shape stated.
pub fn rotary(x: &[f32], angles: Angles<'_>, heads: usize, width: usize) -> Vec<f32> {
    turn_all(
        x,
        angles,
        heads,
        width,
        #[inline(always)]
        |position, input, output| angles.turn(position, input, output),
    )
}

/// Gradient of [`rotary`]'s input, given `grad` of its output: every vector turned back.
///
/// # Panics
/// As [`rotary`].
pub fn rotary_backward(grad: &[f32], angles: Angles<'_>, heads: usize, width: usize) -> Vec<f32> {
    turn_all(
        grad,
        angles,
        heads,
        width,
        #[inline(always)]
        |position, input, output| angles.turn_back(position, input, output),
    )
}

fn turn_all(
    x: &[f32],
    angles: Angles<'_>,
    heads: usize,
    width: usize,
    turn: impl Fn(usize, &[f32], &mut [f32]) + Sync + Send,
) -> Vec<f32> {
    assert!(heads > 0 && width > 0, "rotary: no heads or no width");
    let time = angles.cos.len() / (width / 2).max(1);
    angles.check(time, width);
    let row = heads * width;
    assert!(
        x.len().is_multiple_of((time * row).max(1)),
        "rotary: {} values are not [_, {time}, {row}]",
        x.len()
    );
    let mut output = vec![0.0; x.len()];
    let block = block_rows(2 * row);
    let blocks = x.chunks(block * row).zip(output.chunks_mut(block * row)).enumerate();
    parallel::for_each(blocks, |(index, (x, output))| {
        vectorized(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(row).zip(output.chunks_exact_mut(row)).enumerate();
                for (r, (x, output)) in rows {
                    let position = (index * block + r) % time;
                    for (x, output) in x.chunks_exact(width).zip(output.chunks_exact_mut(width)) {
                        turn(position, x, output);
                    }
                }
            },
        );
    });
    output
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    /// Cosines and sines for the usual frequencies base^(−2i/width).
    pub(crate) fn table(time: usize, width: usize) -> (Vec<f32>, Vec<f32>) {
        let angles = (0..time).flat_map(|t| {
            (0..width / 2).map(move |i| t as f64 * 10_000_f64.powf(-2.0 * i as f64 / width as f64))
        });
        angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip()
    }

    proptest! {
        #[test]
        fn turns_pairs_and_back(
            batch in 1_usize..3, time in 1_usize..9, heads in 1_usize..4, half in 1_usize..20, seed: u64,
        ) {
            let width = 2 * half;
            let (cos, sin) = table(time, width);
            let angles = Angles { cos: &cos, sin: &sin };
            let x = random(batch * time * heads * width, seed);
            let turned = rotary(&x, angles, heads, width);
            for (index, (x, y)) in x.chunks(width).zip(turned.chunks(width)).enumerate() {
                let t = index / heads % time;
                for i in 0..half {
                    let (c, s) = (cos[t * half + i], sin[t * half + i]);
                    prop_assert!((y[i] - (x[i] * c - x[i + half] * s)).abs() < 1e-6);
                    prop_assert!((y[i + half] - (x[i] * s + x[i + half] * c)).abs() < 1e-6);
                }
            }
            assert_close(&rotary_backward(&turned, angles, heads, width), &x, 1e-5);
            let grad = random(x.len(), seed ^ 1);
            let found = rotary_backward(&grad, angles, heads, width);
            assert_gradient("x", &x, &found, |x| weighted(&rotary(x, angles, heads, width), &grad));
        }
    }

    #[test]
    fn positions_run_on_across_blocks() {
        let (batch, time, heads, width) = (3, 50, 8, 64);
        let (cos, sin) = table(time, width);
        let angles = Angles { cos: &cos, sin: &sin };
        let x = random(batch * time * heads * width, 5);
        let by_sequence: Vec<f32> =
            x.chunks(time * heads * width).flat_map(|x| rotary(x, angles, heads, width)).collect();
        assert_eq!(rotary(&x, angles, heads, width), by_sequence);
    }
}
