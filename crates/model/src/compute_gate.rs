//! What a gate computes.

use burn::tensor::Tensor;

/// A gate decides how far a memory is read: for each of G queries and keys a number between 0 and 1.
pub(crate) trait ComputeGate {
    /// a, `[tokens, G, 1]`, from queries and keys `[tokens, G·width]`; without a graph where these have none.
    fn gate(&self, h: Tensor<2>, keys: Tensor<2>) -> Tensor<3>;

    /// The value, `[tokens, width]`, times every gate, `[tokens, G·width]`.
    fn times(&self, h: Tensor<2>, keys: Tensor<2>, value: Tensor<2>) -> Tensor<2> {
        let (shape, [tokens, width]) = (h.dims(), value.dims());
        (self.gate(h, keys) * value.reshape([tokens, 1, width])).reshape(shape)
    }
}
