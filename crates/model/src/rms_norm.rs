//! Root-mean-square normalisation.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::fused::{self, Operation, Pass};
use crate::init::Init;
use crate::token_sums::for_every_token;
use crate::training::{DeclareTraining, TrainingPlan};

/// `x / √(mean(x²) + ε) · w` over the last dimension.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Weight, `[width]`.
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNorm {
    pub(crate) fn new(init: &Init, width: usize, epsilon: f32) -> Self {
        Self { weight: init.constant([width], 1.0), epsilon: f64::from(epsilon) }
    }

    /// `[tokens, width]`, normalised row by row.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let weight = self.weight.val();
        if !fused::available(&x) {
            let weight = for_every_token(weight, x.dims()[0]);
            return normalise(x, self.epsilon) * weight;
        }
        let shape = x.dims();
        let operation = Fused { width: shape[1], epsilon: self.epsilon as f32 };
        fused::apply(operation, [fused::input(x), fused::input(weight)], shape)
    }
}

impl DeclareTraining for RmsNorm {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam_without_decay(&self.weight);
    }
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
