//! SwiGLU (arXiv 2002.05202).

use burn::tensor::Tensor;

use super::function::{self, Function};
use super::fused::{self, Operation, Pass, choose};

/// `silu(gate) ⊙ up` of `[tokens, 2·hidden]`, gate first.
pub(crate) fn swiglu(x: Tensor<2>) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let hidden = width / 2;
    let fused = |x| fused::apply(Fused { hidden }, [fused::input::<2>(x)], [tokens, hidden]);
    choose(&x.device(), x, fused, |x| function::apply(Swiglu, x))
}

#[derive(Debug, Clone)]
struct Swiglu;

impl Function<2> for Swiglu {
    /// Gate and up.
    type Kept = Tensor<2>;

    fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let [gate, up] = halves(x.clone());
        (gate.clone() * logistic(gate) * up, x)
    }

    /// With s = σ(gate): dgate = dy·up·s·(1 + gate·(1 − s)), and dup = dy·gate·s.
    fn backward(&self, x: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
        let [gate, up] = halves(x);
        let open = logistic(gate.clone());
        let silu = gate * open.clone();
        let of_up = gradient.clone() * silu.clone();
        let of_gate = gradient * up * (silu.clone() + open.clone() - silu * open);
        Tensor::cat(vec![of_gate, of_up], 1)
    }
}

fn halves(x: Tensor<2>) -> [Tensor<2>; 2] {
    let hidden = x.dims()[1] / 2;
    [x.clone().narrow(1, 0, hidden), x.narrow(1, hidden, hidden)]
}

/// σ(x): four passes over x on a GPU, where Burn's own makes six.
fn logistic(x: Tensor<2>) -> Tensor<2> {
    x.neg().exp().add_scalar(1.0).recip()
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
