//! The short convolution of the paper's memory (arXiv 2601.07372, section 2.3).

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::init::Init;
use crate::ops::{self, ConvolutionShape};
use crate::sequences::Sequences;
use crate::training::{DeclareTraining, TrainingPlan};

/// Causal depthwise convolution over time, one filter per channel of each stream, no bias.
#[derive(Module, Debug)]
pub struct ShortConvolution {
    /// Norm before the convolution, `[M, width]`.
    pub norm: Param<Tensor<2>>,
    /// Taps, the last at the token itself, `[M, width, kernel]`.
    pub weight: Param<Tensor<3>>,
    dilation: usize,
    epsilon: f64,
}

/// Epsilon of the norm before the convolution.
const EPSILON: f64 = 1e-5;

impl ShortConvolution {
    /// Starts at zero, as in the paper: nothing is added.
    pub(crate) fn new(streams: usize, width: usize, kernel: usize, dilation: usize, init: &Init) -> Self {
        Self {
            norm: init.constant([streams, width], 1.0),
            weight: init.constant([streams, width, kernel], 0.0),
            dilation,
            epsilon: EPSILON,
        }
    }

    /// `u + SiLU(conv(RMSNorm(u)))`, `[tokens, M·width]`.
    pub(crate) fn forward(&self, u: Tensor<2>, sequences: &Sequences) -> Tensor<2> {
        let [streams, width, kernel] = self.weight.val().dims();
        let (dilation, epsilon) = (self.dilation, self.epsilon);
        let shape =
            ConvolutionShape { sequences: sequences.clone(), streams, width, kernel, dilation, epsilon };
        ops::short_convolution(u, self.norm.val(), self.weight.val(), shape)
    }
}

impl DeclareTraining for ShortConvolution {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam_without_decay(&self.norm);
        plan.adam_without_decay(&self.weight);
    }
}
