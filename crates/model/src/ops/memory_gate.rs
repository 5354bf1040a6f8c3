//! The published gate of a memory (arXiv 2601.07372, section 2.3).

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use engram_kernels::{MemoryGate, MemoryGateInput};

use super::fused::{self, Operation, Pass, choose};
use super::rms_norm::normalise;
use super::token_sums::for_every_token;

/// Weights of the norms of queries and keys, `[G, width]` each; no key's: the query's is the product of both.
pub(crate) type NormWeights = (Tensor<2>, Option<Tensor<2>>);

/// The value times every gate, `[tokens, G·width]`, from queries and keys of that shape and a value `[tokens, width]`.
pub(crate) fn memory_gate(
    h: Tensor<2>,
    keys: Tensor<2>,
    value: Tensor<2>,
    norms: NormWeights,
    epsilon: f64,
) -> Tensor<2> {
    let shape = h.dims();
    let [gates, width] = norms.0.dims();
    let fused = |(h, keys, value, (query, key)): (Tensor<2>, Tensor<2>, Tensor<2>, NormWeights)| {
        let key = key.unwrap_or_else(|| Tensor::ones(query.dims(), &query.device()));
        let inputs = [h, keys, value, query, key].map(fused::input);
        fused::apply(FusedGate { streams: gates, epsilon: epsilon as f32 }, inputs, shape)
    };
    let composed = |(h, keys, value, norms): (Tensor<2>, Tensor<2>, Tensor<2>, NormWeights)| {
        let value = value.reshape([shape[0], 1, width]);
        (signed_root_gate(h, keys, norms, epsilon) * value).reshape(shape)
    };
    choose(&h.device(), (h, keys, value, norms), fused, composed)
}

/// `σ(√|s|·sign s)` of `s = ⟨RMSNorm(h), RMSNorm(k)⟩/√width`, `[tokens, G, 1]`, in Burn's primitives.
pub(crate) fn signed_root_gate(
    h: Tensor<2>,
    keys: Tensor<2>,
    (of_query, of_key): NormWeights,
    epsilon: f64,
) -> Tensor<3> {
    let (tokens, [gates, width]) = (h.dims()[0], of_query.dims());
    let split = |x: Tensor<2>| x.reshape([tokens, gates, width]);
    let weight = |weight: Tensor<2>| split(for_every_token(weight.reshape([gates * width]), tokens));
    let query = normalise(split(h), epsilon) * weight(of_query);
    let key = normalise(split(keys), epsilon);
    let key = match of_key {
        Some(of_key) => key * weight(of_key),
        None => key,
    };
    let s = (query * key).sum_dim(2).div_scalar((width as f32).sqrt());
    sigmoid(s.clone().sign() * s.abs().clamp_min(1e-6).sqrt())
}

#[derive(Debug)]
struct FusedGate {
    streams: usize,
    epsilon: f32,
}

impl FusedGate {
    fn input<'a>(
        &self,
        [hidden, key, value, query_weight, key_weight]: [&'a [f32]; 5],
    ) -> MemoryGateInput<'a> {
        let Self { streams, epsilon } = *self;
        MemoryGateInput { hidden, key, value, query_weight, key_weight, streams, epsilon }
    }
}

impl Operation<5> for FusedGate {
    /// The kernel's saved values; its output lies in the graph.
    type Saved = MemoryGate;

    fn forward(&self, inputs: [&[f32]; 5]) -> (Vec<f32>, MemoryGate) {
        let mut gate = engram_kernels::memory_gate(&self.input(inputs));
        (std::mem::take(&mut gate.output), gate)
    }

    fn backward(&self, pass: Pass<'_, MemoryGate, 5>) -> [Vec<f32>; 5] {
        let gradients =
            engram_kernels::memory_gate_backward(pass.gradient, &self.input(pass.inputs), pass.saved);
        [gradients.hidden, gradients.key, gradients.value, gradients.query_weight, gradients.key_weight]
    }
}
