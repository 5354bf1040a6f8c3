//! Routed experts: the weights of the chosen ones, and their feed-forwards.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use engram_kernels::{ExpertsInput, ExpertsSaved, ExpertsShape};

use super::fused::{self, Operation, Pass, choose};
use super::product::product;
use super::selection::select;
use super::swiglu::swiglu;
use crate::choice::Choice;

/// `Σ gate·SwiGLU` over the chosen experts of each token, `[tokens, width]`.
///
/// `gates`: `[tokens, active]`, `input`: gate and up, `[routed, width, 2·hidden]`, `output`: `[routed, hidden, width]`.
pub(crate) fn experts(
    x: Tensor<2>,
    gates: Tensor<2>,
    input: Tensor<3>,
    output: Tensor<3>,
    choice: &Choice,
    bf16: bool,
) -> Tensor<2> {
    let output_shape = x.dims();
    let fused = |(x, gates, input, output): (Tensor<2>, Tensor<2>, Tensor<3>, Tensor<3>)| {
        let [experts, width, double] = input.dims();
        let shape = ExpertsShape { experts, active: choice.active, width, hidden: double / 2 };
        let inputs = [fused::input(x), fused::input(gates), fused::input(input), fused::input(output)];
        fused::apply(FusedExperts { shape, choice: choice.clone() }, inputs, output_shape)
    };
    let composed = |(x, gates, input, output)| composed_experts(x, gates, input, output, choice, bf16);
    choose(&x.device(), (x, gates, input, output), fused, composed)
}

/// All experts at once, in places for as many tokens as the most chosen one sees.
fn composed_experts(
    x: Tensor<2>,
    gates: Tensor<2>,
    input: Tensor<3>,
    output: Tensor<3>,
    choice: &Choice,
    bf16: bool,
) -> Tensor<2> {
    let ([tokens, width], active) = (x.dims(), choice.active);
    let routed = input.dims()[0];
    let dispatch = choice.dispatch();
    let places = dispatch.token.len() / routed;
    let x = select(x, dispatch.token).reshape([routed, places, width]);
    let hidden = product(x, input, bf16);
    let double = hidden.dims()[2];
    let hidden = swiglu(hidden.reshape([routed * places, double])).reshape([routed, places, double / 2]);
    let y = product(hidden, output, bf16).reshape([routed * places, width]);
    let y = select(y, dispatch.place).reshape([tokens, active, width]);
    (y * gates.reshape([tokens, active, 1])).sum_dim(1).reshape([tokens, width])
}

/// Weights of the chosen experts, `[tokens, active]`: their sigmoid scores, normalised to sum to one.
pub(crate) fn expert_gates(logits: Tensor<2>, choice: &Choice) -> Tensor<2> {
    let shape = [logits.dims()[0], choice.active];
    let fused = |logits| {
        let operation = FusedGates { choice: choice.clone() };
        fused::apply(operation, [fused::input::<2>(logits)], shape)
    };
    let composed = |logits: Tensor<2>| {
        let chosen = choice.tensor(&logits.device());
        let scores = sigmoid(logits).gather(1, chosen);
        scores.clone() / scores.sum_dim(1)
    };
    choose(&logits.device(), logits, fused, composed)
}

#[derive(Debug)]
struct FusedGates {
    choice: Choice,
}

impl Operation<1> for FusedGates {
    type Saved = ();

    fn forward(&self, [logits]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        let mut gates = Vec::with_capacity(self.choice.experts.len());
        self.each_token(logits, |row, chosen| {
            let start = gates.len();
            gates.extend(chosen.iter().map(|&expert| logistic(row[expert as usize])));
            let sum: f32 = gates[start..].iter().sum();
            gates[start..].iter_mut().for_each(|gate| *gate /= sum);
        });
        (gates, ())
    }

    /// With s the scores, S their sum and g = s/S: ds = (dg − Σ dg·g)/S, and dlogit = ds·s·(1−s).
    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        let mut gradient = vec![0.0; pass.inputs[0].len()];
        let routed = self.choice.routed;
        let active = self.choice.active;
        let rows = pass.inputs[0].chunks_exact(routed).zip(self.choice.experts.chunks_exact(active));
        let gates = pass.output.chunks_exact(active).zip(pass.gradient.chunks_exact(active));
        for (((row, chosen), (gate, upstream)), out) in rows.zip(gates).zip(gradient.chunks_exact_mut(routed))
        {
            let sum: f32 = chosen.iter().map(|&expert| logistic(row[expert as usize])).sum();
            let mean: f32 = gate.iter().zip(upstream).map(|(g, d)| g * d).sum();
            for (&expert, d) in chosen.iter().zip(upstream) {
                let score = logistic(row[expert as usize]);
                out[expert as usize] += (d - mean) / sum * score * (1.0 - score);
            }
        }
        [gradient]
    }
}

impl FusedGates {
    fn each_token(&self, logits: &[f32], mut visit: impl FnMut(&[f32], &[u32])) {
        let rows = logits.chunks_exact(self.choice.routed);
        for (row, chosen) in rows.zip(self.choice.experts.chunks_exact(self.choice.active)) {
            visit(row, chosen);
        }
    }
}

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[derive(Debug)]
struct FusedExperts {
    shape: ExpertsShape,
    choice: Choice,
}

impl FusedExperts {
    fn input<'a>(&'a self, [x, gate, w_in, w_out]: [&'a [f32]; 4]) -> ExpertsInput<'a> {
        ExpertsInput { x, choice: &self.choice.experts, gate, w_in, w_out }
    }
}

impl Operation<4> for FusedExperts {
    type Saved = ExpertsSaved;

    fn forward(&self, inputs: [&[f32]; 4]) -> (Vec<f32>, ExpertsSaved) {
        let experts = engram_kernels::experts(&self.input(inputs), self.shape);
        (experts.output, experts.saved)
    }

    fn backward(&self, pass: Pass<'_, ExpertsSaved, 4>) -> [Vec<f32>; 4] {
        let input = self.input(pass.inputs);
        let gradients = engram_kernels::experts_backward(pass.gradient, &input, self.shape, pass.saved);
        [gradients.x, gradients.gate, gradients.w_in, gradients.w_out]
    }
}
