//! A plain gate without norms and weights: `σ(⟨h, k⟩/√width)`.

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use crate::compute_gate::ComputeGate;
use crate::training::{DeclareTraining, TrainingPlan};

/// The gate of G queries and keys.
#[derive(Module, Debug)]
pub struct SigmoidGate {
    gates: usize,
}

impl SigmoidGate {
    pub(crate) fn new(gates: usize) -> Self {
        Self { gates }
    }
}

impl ComputeGate for SigmoidGate {
    fn gate(&self, h: Tensor<2>, keys: Tensor<2>) -> Tensor<3> {
        let [tokens, channels] = h.dims();
        let width = channels / self.gates;
        let split = |x: Tensor<2>| x.reshape([tokens, self.gates, width]);
        let score = (split(h) * split(keys)).sum_dim(2);
        sigmoid(score.div_scalar((width as f32).sqrt()))
    }
}

impl DeclareTraining for SigmoidGate {
    /// There is nothing to train.
    fn declare_training(&self, _plan: &mut TrainingPlan) {}
}
