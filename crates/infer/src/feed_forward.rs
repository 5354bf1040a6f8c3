//! The SwiGLU feed-forward (arXiv 2002.05202), for decoding.

use engram_kernels::{PackedMatrix, WeightFormat, swiglu};
use engram_model::FeedForward;

use crate::weights::pack;

/// `(silu(x·W_gate) ⊙ x·W_up)·W_out`.
#[derive(Debug)]
pub(crate) struct FeedForwardDecoder {
    input: PackedMatrix,
    output: PackedMatrix,
}

impl FeedForwardDecoder {
    pub(crate) fn new(feed_forward: &FeedForward, format: WeightFormat) -> Self {
        Self { input: pack(&feed_forward.input, format), output: pack(&feed_forward.output, format) }
    }

    pub(crate) fn of(input: PackedMatrix, output: PackedMatrix) -> Self {
        Self { input, output }
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        self.output.product(&swiglu(&self.input.product(x), self.output.inputs()))
    }

    /// As [`forward`](Self::forward), on the calling thread.
    pub(crate) fn forward_here(&self, x: &[f32]) -> Vec<f32> {
        self.output.product_here(&swiglu(&self.input.product_here(x), self.output.inputs()))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.input.bytes() + self.output.bytes()
    }
}
