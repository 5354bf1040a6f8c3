//! The SwiGLU feed-forward (arXiv 2002.05202).

use burn::module::Module;
use burn::tensor::Tensor;
use engram_config::{ModelConfig, Precision};

use crate::init::Init;
use crate::linear::Linear;
use crate::ops::swiglu;
use crate::training::{DeclareTraining, Matrices, TrainingPlan};

/// `(silu(x·W_gate) ⊙ x·W_up)·W_out`, gate and up side by side in one matrix.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// Gate, then up: `[width, 2·hidden]`.
    pub input: Linear,
    /// `[hidden, width]`.
    pub output: Linear,
}

impl FeedForward {
    /// A feed-forward of the model `config`, `hidden` wide inside.
    pub(crate) fn new(init: &Init, config: &ModelConfig, hidden: usize, precision: Precision) -> Self {
        let (width, scale) = (config.width, config.init.projection);
        Self {
            input: Linear::new(&init.child("input"), [width, 2 * hidden], scale, precision),
            output: Linear::new(&init.child("output"), [hidden, width], config.output_scale(), precision),
        }
    }

    /// `[tokens, width]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(swiglu(self.input.forward(x)))
    }
}

impl DeclareTraining for FeedForward {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        let [_, double] = self.input.weight.val().dims();
        plan.muon(&self.input.weight, Matrices::side_by_side(vec![double / 2; 2]));
        self.output.declare_whole(plan);
    }
}
