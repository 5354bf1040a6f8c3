//! Root-mean-square normalisation.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::init::Init;
use crate::ops;
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
        ops::rms_norm(x, self.weight.val(), self.epsilon)
    }
}

impl DeclareTraining for RmsNorm {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam_without_decay(&self.weight);
    }
}
