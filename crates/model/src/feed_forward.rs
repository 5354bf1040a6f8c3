//! The gated feed-forward (arXiv 2002.05202).

use burn::module::Module;
use burn::tensor::Tensor;
use engram_config::{Activation, ModelConfig, Precision};

use crate::init::Init;
use crate::linear::Linear;
use crate::ops::{geglu, swiglu};
use crate::training::{DeclareTraining, Matrices, TrainingPlan};

/// `(act(x·W_gate) ⊙ x·W_up)·W_out`, gate and up side by side in one matrix; act is SiLU or GELU.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// Gate, then up: `[width, 2·hidden]`.
    pub input: Linear,
    /// `[hidden, width]`.
    pub output: Linear,
    #[module(skip)]
    activation: Activation,
}

impl FeedForward {
    /// A feed-forward of the model `config`, `hidden` wide inside.
    pub(crate) fn new(init: &Init, config: &ModelConfig, hidden: usize, precision: Precision) -> Self {
        let (width, scale) = (config.width, config.init.projection);
        Self {
            input: Linear::new(&init.child("input"), [width, 2 * hidden], scale, precision),
            output: Linear::new(&init.child("output"), [hidden, width], config.output_scale(), precision),
            activation: config.feed_forward.activation,
        }
    }

    /// `[tokens, width]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let hidden = self.input.forward(x);
        self.output.forward(match self.activation {
            Activation::Swiglu => swiglu(hidden),
            Activation::Geglu => geglu(hidden),
        })
    }
}

impl DeclareTraining for FeedForward {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        let [_, double] = self.input.weight.val().dims();
        plan.muon(&self.input.weight, Matrices::side_by_side(vec![double / 2; 2]));
        self.output.declare_whole(plan);
    }
}
