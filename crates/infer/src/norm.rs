//! RMS norms (arXiv 1910.07467), for decoding.

use engram_kernels::rms_norm;

use crate::weights::{Loader, WeightError};

/// An RMS norm over rows, or over the heads of rows.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    /// The norm called `name` over `width` values.
    pub(crate) fn load(
        loader: &Loader<'_>,
        name: &str,
        width: usize,
        epsilon: f32,
    ) -> Result<Self, WeightError> {
        Ok(Self { weight: loader.child(name).vector("weight", width)?, epsilon })
    }

    /// `[rows, width]`, normalised row by row.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        rms_norm(x, Some(&self.weight), self.weight.len(), self.epsilon).output
    }
}
