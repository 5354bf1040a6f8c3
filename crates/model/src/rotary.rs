//! Rotary positions (RoPE, arXiv 2104.09864).

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use engram_kernels::Angles;

/// Cosines and sines of every position and frequency, `[time, width/2]`. Dimension i is paired with i + width/2.
#[derive(Debug, Clone)]
pub struct Rotary {
    width: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
}

impl Rotary {
    /// Angles `position · base^(−2i/width)` for `time` positions.
    pub fn new(width: usize, base: f32, time: usize) -> Self {
        let frequencies: Vec<f64> =
            (0..width / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / width as f64)).collect();
        let angles = (0..time).flat_map(|t| frequencies.iter().map(move |f| t as f64 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Self { width, cos: cos.into(), sin: sin.into() }
    }

    /// Cosines and sines of the first `time` positions, `[time, width/2]` each.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn angles(&self, time: usize) -> Angles<'_> {
        let count = time * self.width / 2;
        Angles { cos: &self.cos[..count], sin: &self.sin[..count] }
    }

    /// Rotates `[batch, time, heads, width]`, in Burn's primitives.
    pub(crate) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, time, _, width] = x.dims();
        let half = width / 2;
        let Angles { cos, sin } = self.angles(time);
        let table = |values: &[f32], device: &Device| {
            Tensor::<4>::from_data(TensorData::new(values.to_vec(), [1, time, 1, half]), device)
        };
        let device = x.device();
        let (cos, sin) = (table(cos, &device), table(sin, &device));
        let mut halves = x.split(half, 3).into_iter();
        let (Some(a), Some(b)) = (halves.next(), halves.next()) else {
            unreachable!("an even width splits into two halves")
        };
        let rotated_a = a.clone() * cos.clone() - b.clone() * sin.clone();
        Tensor::cat(vec![rotated_a, b * cos + a * sin], 3)
    }
}
