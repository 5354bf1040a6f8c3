//! Linear maps.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use engram_config::Precision;

use crate::init::Init;
use crate::ops::{add_bias, rows_product};
use crate::training::{Matrices, TrainingPlan};

/// `y = x·W`, plus a bias where there is one, with W stored as `[in, out]`, the layout in which both passes are fast on CPU.
#[derive(Module, Debug)]
pub struct Linear {
    /// Weight, `[in, out]`.
    pub weight: Param<Tensor<2>>,
    /// Bias, `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    bf16: bool,
}

impl Linear {
    /// Weights of standard deviation `scale / √in`.
    pub(crate) fn new(init: &Init, [input, output]: [usize; 2], scale: f32, precision: Precision) -> Self {
        let weight = init.normal("weight", [input, output], scale / (input as f32).sqrt());
        Self { weight, bias: None, bf16: precision == Precision::Bf16 }
    }

    /// The same with a bias, which starts at zero, if `there`.
    pub(crate) fn with_bias(self, init: &Init, there: bool) -> Self {
        let [_, output] = self.weight.val().dims();
        Self { bias: there.then(|| init.constant([output], 0.0)), ..self }
    }

    /// Muon trains the weight, which holds one matrix.
    pub(crate) fn declare_whole(&self, plan: &mut TrainingPlan) {
        let [_, columns] = self.weight.val().dims();
        plan.muon(&self.weight, Matrices::whole(columns));
        self.declare_bias(plan);
    }

    /// Adam trains the bias, where there is one.
    pub(crate) fn declare_bias(&self, plan: &mut TrainingPlan) {
        self.bias.iter().for_each(|bias| plan.adam_without_decay(bias));
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = rows_product(x, self.weight.val(), self.bf16);
        match &self.bias {
            Some(bias) => add_bias(y, bias.val()),
            None => y,
        }
    }
}
