//! GeGLU (arXiv 2002.05202), its GELU approximated by tanh, as Gemma has it.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

use super::fused::{self, Operation, Pass, choose};

/// 2·√(2/π).
const FACTOR: f32 = 1.595_769;

/// `gelu(gate) ⊙ up` of `[tokens, 2·hidden]`, gate first.
pub(crate) fn geglu(x: Tensor<2>) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let hidden = width / 2;
    let fused = |x| fused::apply(Fused { hidden }, [fused::input::<2>(x)], [tokens, hidden]);
    let composed = |x: Tensor<2>| {
        let (gate, up) = (x.clone().narrow(1, 0, hidden), x.narrow(1, hidden, hidden));
        let cube = gate.clone().powi_scalar(3).mul_scalar(0.044_715);
        gate.clone() * sigmoid((gate + cube).mul_scalar(FACTOR)) * up
    };
    choose(&x.device(), x, fused, composed)
}

#[derive(Debug)]
struct Fused {
    hidden: usize,
}

impl Operation<1> for Fused {
    type Saved = ();

    fn forward(&self, [x]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        (engram_kernels::geglu(x, self.hidden), ())
    }

    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        [engram_kernels::geglu_backward(pass.gradient, pass.inputs[0], self.hidden)]
    }
}
