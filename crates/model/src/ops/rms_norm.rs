//! Root-mean-square normalisation.

use burn::tensor::Tensor;

use super::fused::{self, Operation, Pass, choose};
use super::token_sums::for_every_token;

/// `x / √(mean(x²) + ε) · w` of every row of x, `[tokens, width]`, with `[width]` weights.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let shape = x.dims();
    let fused = |(x, weight): (Tensor<2>, Tensor<1>)| {
        let operation = Fused { width: shape[1], epsilon: epsilon as f32 };
        fused::apply(operation, [fused::input(x), fused::input(weight)], shape)
    };
    let composed =
        |(x, weight): (Tensor<2>, Tensor<1>)| normalise(x, epsilon) * for_every_token(weight, shape[0]);
    choose(&x.device(), (x, weight), fused, composed)
}

/// `x / √(mean(x²) + ε)` over the last dimension, in Burn's primitives.
pub(crate) fn normalise<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let scale = (x.clone().square().mean_dim(D - 1) + epsilon).sqrt().recip();
    x * scale
}

#[derive(Debug)]
struct Fused {
    width: usize,
    epsilon: f32,
}

impl Operation<2> for Fused {
    /// 1/rms of every row.
    type Saved = Vec<f32>;

    fn forward(&self, [x, weight]: [&[f32]; 2]) -> (Vec<f32>, Vec<f32>) {
        let norm = engram_kernels::rms_norm(x, Some(weight), self.width, self.epsilon);
        (norm.output, norm.inverse_rms)
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 2>) -> [Vec<f32>; 2] {
        let [x, weight] = pass.inputs;
        let gradients =
            engram_kernels::rms_norm_backward(pass.gradient, x, Some(weight), pass.saved, self.width);
        [gradients.input, gradients.weight.unwrap_or_default()]
    }
}
