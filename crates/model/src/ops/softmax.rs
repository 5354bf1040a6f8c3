//! The softmax of causal attention: one of the few things in a step whose size is the square of the time.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor};

use super::function::{self, Function};

/// Softmax of `scale` times `scores`, `[batch, heads, time, time]`, over what is not later, nor further
/// back than `window` positions, the own included.
pub(super) fn causal_softmax(scores: Tensor<4>, scale: f32, window: Option<usize>) -> Tensor<4> {
    function::apply(CausalSoftmax { scale, window }, scores)
}

#[derive(Debug, Clone)]
struct CausalSoftmax {
    scale: f32,
    window: Option<usize>,
}

impl Function<4> for CausalSoftmax {
    /// The probabilities.
    type Kept = Tensor<4>;

    fn forward(&self, scores: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [_, _, time, _] = scores.dims();
        let later = Tensor::<2, Bool>::tril_mask([time, time], 0, &scores.device()).unsqueeze();
        let mut scores = scores.mul_scalar(self.scale).mask_fill(later, f32::NEG_INFINITY);
        if let Some(window) = self.window {
            let near = Tensor::<2, Bool>::tril_mask([time, time], -(window as i64), &scores.device());
            scores = scores.mask_fill(near.bool_not().unsqueeze(), f32::NEG_INFINITY);
        }
        let probabilities = softmax(scores, 3);
        (probabilities.clone(), probabilities)
    }

    /// With p the probabilities: dscore = scale·p·(dp − Σ dp·p). What is not seen has p = 0.
    fn backward(&self, probabilities: Tensor<4>, gradient: Tensor<4>) -> Tensor<4> {
        let weighted = probabilities.clone() * gradient;
        let sum = weighted.clone().sum_dim(3);
        (weighted - probabilities * sum).mul_scalar(self.scale)
    }
}
