//! Causal attention between given queries, keys and values.

use burn::tensor::Tensor;

use super::fused::{self, Operation, Pass, choose};
use super::product::product;
use super::softmax::causal_softmax;
use crate::rotary::Rotary;
use crate::sequences::{Run, Sequences};

/// What latent attention computes with beside its tensors.
#[derive(Debug, Clone)]
pub(crate) struct LatentAttentionShape {
    pub(crate) sequences: Sequences,
    pub(crate) heads: usize,
    /// Width of a head's content part.
    pub(crate) content: usize,
    /// Width of a head's values.
    pub(crate) value: usize,
    /// Width of a head's rotary part.
    pub(crate) rotary_width: usize,
    pub(crate) rotary: Rotary,
    /// Factor on the scores.
    pub(crate) scale: f32,
    pub(crate) bf16: bool,
}

/// Values that the heads gather, `[tokens, heads·value]`.
///
/// `q`: `[tokens, heads·(content + rotary)]`, `kv`: `[tokens, heads·(content + value)]`, `key`, which all heads share:
/// `[tokens, rotary]`; both rotary parts are not yet rotated.
pub(crate) fn latent_attention(
    q: Tensor<2>,
    kv: Tensor<2>,
    key: Tensor<2>,
    shape: LatentAttentionShape,
) -> Tensor<2> {
    let output = [q.dims()[0], shape.heads * shape.value];
    let fused = |(inputs, shape): ([Tensor<2>; 3], LatentAttentionShape)| {
        fused::apply(shape, inputs.map(fused::input), output)
    };
    let composed = |(inputs, shape): ([Tensor<2>; 3], LatentAttentionShape)| {
        shape.sequences.map_tensors(inputs, |run, inputs| composed_latent(inputs, run, &shape))
    };
    choose(&q.device(), ([q, kv, key], shape), fused, composed)
}

fn composed_latent([q, kv, key]: [Tensor<2>; 3], run: Run, shape: &LatentAttentionShape) -> Tensor<2> {
    let LatentAttentionShape { heads, content, value, rotary_width, ref rotary, scale, bf16, .. } = *shape;
    let (batch, time) = (run.sequences, run.time);
    let positions: Vec<usize> = (0..time).collect();
    let q = q.reshape([batch, time, heads, content + rotary_width]);
    let q_content = q.clone().narrow(3, 0, content);
    let q_rotary = rotary.rotate(q.narrow(3, content, rotary_width), &positions);
    let kv = kv.reshape([batch, time, heads, content + value]);
    let k_content = kv.clone().narrow(3, 0, content);
    let values = kv.narrow(3, content, value);
    let k_rotary = rotary.rotate(key.reshape([batch, time, 1, rotary_width]), &positions);
    let k_rotary = k_rotary.repeat_dim(2, heads);
    let queries = Tensor::cat(vec![q_content, q_rotary], 3);
    let keys = Tensor::cat(vec![k_content, k_rotary], 3);
    causal(queries, keys, values, (scale, None), bf16)
}

/// What plain attention computes with beside its tensors.
#[derive(Debug, Clone)]
pub(crate) struct CausalAttentionShape {
    pub(crate) sequences: Sequences,
    pub(crate) heads: usize,
    pub(crate) head_width: usize,
    /// Factor on the scores.
    pub(crate) scale: f32,
    /// Positions that a position sees, its own included; none: all.
    pub(crate) window: Option<usize>,
    pub(crate) bf16: bool,
}

/// Values that the heads gather; all `[tokens, heads·head_width]`.
pub(crate) fn causal_attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    shape: CausalAttentionShape,
) -> Tensor<2> {
    let output = q.dims();
    let fused = |(inputs, shape): ([Tensor<2>; 3], CausalAttentionShape)| {
        fused::apply(shape, inputs.map(fused::input), output)
    };
    let composed = |(inputs, shape): ([Tensor<2>; 3], CausalAttentionShape)| {
        shape.sequences.map_tensors(inputs, |run, inputs| {
            let of_heads = [run.sequences, run.time, shape.heads, shape.head_width];
            let [q, k, v] = inputs.map(|heads| heads.reshape(of_heads));
            causal(q, k, v, (shape.scale, shape.window), shape.bf16)
        })
    };
    // The fused kernel sees all that is not later: where no sequence is longer than the window, that is the same.
    let fits = shape.window.is_none_or(|window| shape.sequences.lengths().all(|time| time <= window));
    if !fits {
        return composed(([q, k, v], shape));
    }
    choose(&q.device(), ([q, k, v], shape), fused, composed)
}

/// Softmax attention over `[batch, time, heads, ·]` in Burn's primitives; gives `[batch·time, heads·value]`.
fn causal(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    (scale, window): (f32, Option<usize>),
    bf16: bool,
) -> Tensor<2> {
    let [batch, time, heads, _] = q.dims();
    let width = v.dims()[3];
    let (q, k, v) = (q.swap_dims(1, 2), k.swap_dims(1, 2), v.swap_dims(1, 2));
    let out = product(causal_softmax(product(q, k.swap_dims(2, 3), bf16), scale, window), v, bf16);
    out.swap_dims(1, 2).reshape([batch * time, heads * width])
}

impl LatentAttentionShape {
    fn of(&self, run: Run) -> engram_kernels::LatentShape {
        engram_kernels::LatentShape {
            batch: run.sequences,
            time: run.time,
            heads: self.heads,
            content: self.content,
            rotary: self.rotary_width,
            value: self.value,
        }
    }
}

impl Operation<3> for LatentAttentionShape {
    /// Log-sum-exp of every row of scores, `[sequences, heads, time]` of every run.
    type Saved = Vec<f32>;

    fn forward(&self, inputs: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let all = self.sequences.map(inputs, |run, [q, kv, key]| {
            let angles = self.rotary.angles(run.time);
            let attention = engram_kernels::latent_attention(q, kv, key, angles, self.of(run), self.scale);
            [attention.output, attention.log_sum_exp]
        });
        all.into()
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 3>) -> [Vec<f32>; 3] {
        let [q, kv, key] = pass.inputs;
        let data = [pass.gradient, q, kv, key, pass.output, pass.saved];
        self.sequences.map(data, |run, [gradient, q, kv, key, output, log_sum_exp]| {
            let gradients = engram_kernels::latent_attention_backward(
                gradient,
                q,
                kv,
                key,
                self.rotary.angles(run.time),
                engram_kernels::AttentionOutput { output, log_sum_exp },
                self.of(run),
                self.scale,
            );
            [gradients.q, gradients.kv, gradients.k_rotary]
        })
    }
}

impl CausalAttentionShape {
    fn of(&self, run: Run) -> engram_kernels::AttentionShape {
        engram_kernels::AttentionShape {
            batch: run.sequences,
            time: run.time,
            heads: self.heads,
            key: self.head_width,
            value: self.head_width,
        }
    }
}

impl Operation<3> for CausalAttentionShape {
    /// Log-sum-exp of every row of scores, `[sequences, heads, time]` of every run.
    type Saved = Vec<f32>;

    fn forward(&self, inputs: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let all = self.sequences.map(inputs, |run, [q, k, v]| {
            let attention = engram_kernels::causal_attention(q, k, v, self.of(run), self.scale);
            [attention.output, attention.log_sum_exp]
        });
        all.into()
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 3>) -> [Vec<f32>; 3] {
        let [q, k, v] = pass.inputs;
        let data = [pass.gradient, q, k, v, pass.output, pass.saved];
        self.sequences.map(data, |run, [gradient, q, k, v, output, log_sum_exp]| {
            let forward = engram_kernels::AttentionOutput { output, log_sum_exp };
            let gradients = engram_kernels::causal_attention_backward(
                gradient,
                q,
                k,
                v,
                forward,
                self.of(run),
                self.scale,
            );
            [gradients.q, gradients.k, gradients.v]
        })
    }
}
