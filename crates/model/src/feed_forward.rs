//! The SwiGLU feed-forward (arXiv 2002.05202).

use burn::module::Module;
use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::fused::{self, Operation, Pass};
use crate::init::Init;
use crate::linear::{Linear, Precision};

/// `(silu(x·W_gate) ⊙ x·W_up)·W_out`, gate and up side by side in one matrix.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// Gate, then up: `[width, 2·hidden]`.
    pub input: Linear,
    /// `[hidden, width]`.
    pub output: Linear,
}

impl FeedForward {
    pub(crate) fn new(init: &Init, width: usize, hidden: usize, scale: f32, precision: Precision) -> Self {
        Self {
            input: Linear::new(&init.child("input"), [width, 2 * hidden], 1.0, precision),
            output: Linear::new(&init.child("output"), [hidden, width], scale, precision),
        }
    }

    /// `[tokens, width]` to the same.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(swiglu(self.input.forward(x)))
    }
}

/// `silu(gate) ⊙ up` of `[tokens, 2·hidden]`, gate first.
pub(crate) fn swiglu(x: Tensor<2>) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let hidden = width / 2;
    if fused::available(&x) {
        return fused::apply(Fused { hidden }, [fused::input(x)], [tokens, hidden]);
    }
    silu(x.clone().narrow(1, 0, hidden)) * x.narrow(1, hidden, hidden)
}

#[derive(Debug)]
struct Fused {
    hidden: usize,
}

impl Operation<1> for Fused {
    type Saved = ();

    fn forward(&self, [x]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        (engram_kernels::swiglu(x, self.hidden), ())
    }

    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        [engram_kernels::swiglu_backward(pass.gradient, pass.inputs[0], self.hidden)]
    }
}
