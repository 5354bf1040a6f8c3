//! Linear maps without bias.

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use engram_config::Precision;

use crate::fused;
use crate::init::Init;
use crate::token_sums;
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

/// [`product`] of the rows of all tokens, `[tokens, in]`, with a weight, `[in, out]`.
pub(crate) fn rows_product(x: Tensor<2>, w: Tensor<2>, bf16: bool) -> Tensor<2> {
    if fused::available(&x) {
        return product(x, w, bf16);
    }
    let ([tokens, input], [_, output]) = (x.dims(), w.dims());
    let parts = token_sums::parts(tokens, PRODUCT_PARTS);
    let x = x.reshape([parts, tokens / parts, input]);
    product(x, w.unsqueeze(), bf16).reshape([tokens, output])
}

/// Products that a weight's gradient is the sum of.
const PRODUCT_PARTS: usize = 16;

/// `x·w`, in bf16 if asked, back in f32.
pub(crate) fn product<const D: usize>(x: Tensor<D>, w: Tensor<D>, bf16: bool) -> Tensor<D> {
    if bf16 { x.cast(DType::BF16).matmul(w.cast(DType::BF16)).cast(DType::F32) } else { x.matmul(w) }
}
