//! Linear maps without bias.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use engram_config::Precision;

use crate::init::Init;
use crate::ops::rows_product;
use crate::training::{Matrices, TrainingPlan};

/// `y = x·W` with W stored as `[in, out]`, the layout in which both passes are fast on CPU.
#[derive(Module, Debug)]
pub struct Linear {
    /// Weight, `[in, out]`.
    pub weight: Param<Tensor<2>>,
    bf16: bool,
}

impl Linear {
    /// Weights of standard deviation `scale / √in`.
    pub(crate) fn new(init: &Init, [input, output]: [usize; 2], scale: f32, precision: Precision) -> Self {
        let weight = init.normal("weight", [input, output], scale / (input as f32).sqrt());
        Self { weight, bf16: precision == Precision::Bf16 }
    }

    /// Muon trains the weight, which holds one matrix.
    pub(crate) fn declare_whole(&self, plan: &mut TrainingPlan) {
        let [_, columns] = self.weight.val().dims();
        plan.muon(&self.weight, Matrices::whole(columns));
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        rows_product(x, self.weight.val(), self.bf16)
    }
}
