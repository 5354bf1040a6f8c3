//! Causal attention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) and the plain form.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::init::Init;
use crate::linear::Linear;
use crate::ops::{self, CausalAttentionShape, LatentAttentionShape};
use crate::rms_norm::RmsNorm;
use crate::rotary::Rotary;
use crate::sequences::Sequences;
use crate::training::{DeclareTraining, Matrices, TrainingPlan};
use engram_config::{AttentionConfig, LatentConfig, ModelConfig, PlainConfig, Precision};

/// Attention of one block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per block; a few hundred bytes do not matter")]
pub enum Attention {
    /// A low-rank joint latent of keys and values.
    Latent(LatentAttention),
    /// A projection each for queries, keys and values.
    Plain(PlainAttention),
}

impl Attention {
    pub(crate) fn new(config: &ModelConfig, block: usize, init: &Init, precision: Precision) -> Self {
        match &config.attention {
            AttentionConfig::Latent(_) => Self::Latent(LatentAttention::new(config, init, precision)),
            AttentionConfig::Plain(plain) => {
                Self::Plain(PlainAttention::new(config, plain, block, init, precision))
            }
        }
    }

    /// `[tokens, width]` to the same; a token sees itself and the tokens of its sequence before it.
    /// Positions are those of `rotary`; none: heads are not rotated, which plain attention alone may be.
    pub fn forward(&self, x: Tensor<2>, sequences: &Sequences, rotary: Option<&Rotary>) -> Tensor<2> {
        self.forward_adding(x, sequences, rotary, None)
    }

    /// As [`forward`](Self::forward), with `values`, `[tokens, key_heads·value]`, added to the values of all heads
    /// that have some.
    pub fn forward_adding(
        &self,
        x: Tensor<2>,
        sequences: &Sequences,
        rotary: Option<&Rotary>,
        values: Option<Tensor<2>>,
    ) -> Tensor<2> {
        match self {
            Self::Latent(attention) => {
                let rotary = rotary.expect("latent attention has rotary positions in every block");
                attention.forward(x, sequences, rotary, values)
            }
            Self::Plain(attention) => attention.forward(x, sequences, rotary, values),
        }
    }
}

impl DeclareTraining for Attention {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        match self {
            Self::Latent(attention) => attention.declare_training(plan),
            Self::Plain(attention) => attention.declare_training(plan),
        }
    }
}

/// Multi-head latent attention: queries, keys and values come from low-rank latents, and position enters through
/// separate rotary dimensions whose key all heads share.
#[derive(Module, Debug)]
pub struct LatentAttention {
    /// To the query's latent, if it has one, `[width, query_rank]`.
    pub query_down: Option<Linear>,
    /// Norm of the query's latent.
    pub query_norm: Option<RmsNorm>,
    /// To the queries, `[query_rank or width, heads·(content + rotary)]`.
    pub query_up: Linear,
    /// To the joint latent and the shared rotary key, `[width, latent_rank + rotary]`.
    pub latent_down: Linear,
    /// Norm of the latent.
    pub latent_norm: RmsNorm,
    /// To keys and values, `[latent_rank, heads·(content + value)]`.
    pub latent_up: Linear,
    /// From the heads' values, `[heads·value, width]`.
    pub output: Linear,
    heads: usize,
    content: usize,
    rotary: usize,
    value: usize,
    latent: usize,
    bf16: bool,
}

impl LatentAttention {
    fn new(config: &ModelConfig, init: &Init, precision: Precision) -> Self {
        let AttentionConfig::Latent(LatentConfig {
            heads,
            query_rank,
            latent_rank,
            content_width: content,
            rotary_width: rotary,
            value_width: value,
            ..
        }) = config.attention
        else {
            unreachable!("built from a latent configuration only")
        };
        let width = config.width;
        let linear = |name: &str, shape: [usize; 2], scale: f32| {
            Linear::new(&init.child(name), shape, scale, precision)
        };
        let queries = heads * (content + rotary);
        Self {
            query_down: query_rank.map(|rank| linear("query_down", [width, rank], config.init.projection)),
            query_norm: query_rank.map(|rank| RmsNorm::new(init, rank, config.norm_epsilon)),
            query_up: linear("query_up", [query_rank.unwrap_or(width), queries], config.init.projection),
            latent_down: linear("latent_down", [width, latent_rank + rotary], config.init.projection),
            latent_norm: RmsNorm::new(init, latent_rank, config.norm_epsilon),
            latent_up: linear("latent_up", [latent_rank, heads * (content + value)], config.init.projection),
            output: linear("output", [heads * value, width], config.output_scale()),
            heads,
            content,
            rotary,
            value,
            latent: latent_rank,
            bf16: precision == Precision::Bf16,
        }
    }

    fn forward(
        &self,
        x: Tensor<2>,
        sequences: &Sequences,
        rotary: &Rotary,
        values: Option<Tensor<2>>,
    ) -> Tensor<2> {
        let [tokens, _] = x.dims();
        let query_latent = match (&self.query_down, &self.query_norm) {
            (Some(down), Some(norm)) => norm.forward(down.forward(x.clone())),
            _ => x.clone(),
        };
        let queries = self.query_up.forward(query_latent);
        let down = self.latent_down.forward(x);
        let latent = down.clone().slice([0..tokens, 0..self.latent]);
        let rotary_key = down.slice([0..tokens, self.latent..self.latent + self.rotary]);
        let keys_values = self.latent_up.forward(self.latent_norm.forward(latent));
        let keys_values = match values {
            Some(values) => keys_values + self.beside_no_keys(values),
            None => keys_values,
        };
        let shape = LatentAttentionShape {
            sequences: sequences.clone(),
            heads: self.heads,
            content: self.content,
            value: self.value,
            rotary_width: self.rotary,
            rotary: rotary.clone(),
            scale: self.scale(rotary),
            bf16: self.bf16,
        };
        self.output.forward(ops::latent_attention(queries, keys_values, rotary_key, shape))
    }

    /// `values`, `[tokens, heads·value]`, behind keys of zeros, `[tokens, heads·(content + value)]`.
    fn beside_no_keys(&self, values: Tensor<2>) -> Tensor<2> {
        let (tokens, heads) = (values.dims()[0], self.heads);
        let keys = Tensor::zeros([tokens, heads, self.content], &values.device());
        let both = Tensor::cat(vec![keys, values.reshape([tokens, heads, self.value])], 2);
        both.reshape([tokens, heads * (self.content + self.value)])
    }

    fn scale(&self, rotary: &Rotary) -> f32 {
        ((self.content + self.rotary) as f32).sqrt().recip() * rotary.inverse_temperature()
    }
}

impl DeclareTraining for LatentAttention {
    /// The matrices are those of the paper: W^UQ and W^QR, W^DKV and W^KR, W^UK and W^UV.
    fn declare_training(&self, plan: &mut TrainingPlan) {
        let Self { heads, content, rotary, value, latent, .. } = *self;
        self.query_down.iter().for_each(|down| down.declare_whole(plan));
        self.query_norm.declare_training(plan);
        plan.muon(&self.query_up.weight, Matrices::of_heads(heads, vec![content, rotary]));
        plan.muon(&self.latent_down.weight, Matrices::side_by_side(vec![latent, rotary]));
        self.latent_norm.declare_training(plan);
        plan.muon(&self.latent_up.weight, Matrices::of_heads(heads, vec![content, value]));
        self.output.declare_whole(plan);
    }
}

/// Plain multi-head attention with rotary positions. Successive heads may share keys and values (grouped queries,
/// arXiv 2305.13245): head h sees those of key head `h / (heads / key_heads)`.
#[derive(Module, Debug)]
pub struct PlainAttention {
    /// To the queries, `[width, heads·head_width]`.
    pub query: Linear,
    /// To the keys, `[width, key_heads·head_width]`.
    pub key: Linear,
    /// To the values, as to the keys.
    pub value: Linear,
    /// From the heads' values, `[heads·head_width, width]`.
    pub output: Linear,
    /// Norm of every head of the queries, before it is rotated.
    pub query_norm: Option<RmsNorm>,
    /// Norm of every head of the keys.
    pub key_norm: Option<RmsNorm>,
    heads: usize,
    key_heads: usize,
    head_width: usize,
    scale: f32,
    /// Positions that a position sees, its own included; none: all.
    window: Option<usize>,
    bf16: bool,
}

impl PlainAttention {
    fn new(
        config: &ModelConfig,
        plain: &PlainConfig,
        block: usize,
        init: &Init,
        precision: Precision,
    ) -> Self {
        let (heads, key_heads, head_width) = (plain.heads, config.attention.key_heads(), plain.head_width);
        let (width, inner, shared) = (config.width, heads * head_width, key_heads * head_width);
        let linear = |name: &str, shape: [usize; 2], scale: f32, bias: bool| {
            let init = init.child(name);
            Linear::new(&init, shape, scale, precision).with_bias(&init, bias)
        };
        let projection = config.init.projection;
        let norm = || plain.query_key_norm.then(|| RmsNorm::new(init, head_width, config.norm_epsilon));
        Self {
            query: linear("query", [width, inner], projection, plain.bias),
            key: linear("key", [width, shared], projection, plain.bias),
            value: linear("value", [width, shared], projection, plain.bias),
            output: linear("output", [inner, width], config.output_scale(), plain.output_bias),
            query_norm: norm(),
            key_norm: norm(),
            heads,
            key_heads,
            head_width,
            scale: config.attention.scale(),
            window: config.attention.window_of(block),
            bf16: precision == Precision::Bf16,
        }
    }

    fn forward(
        &self,
        x: Tensor<2>,
        sequences: &Sequences,
        rotary: Option<&Rotary>,
        added: Option<Tensor<2>>,
    ) -> Tensor<2> {
        let inner = self.heads * self.head_width;
        let [batch, time] = sequences.layout();
        let place = |x: Tensor<2>, heads: usize, norm: Option<&RmsNorm>| {
            let x = self.normed(x, heads, norm).reshape([batch, time, heads, self.head_width]);
            match rotary {
                Some(rotary) => rotary.rotate(x, &sequences.positions()),
                None => x,
            }
        };
        let queries = place(self.query.forward(x.clone()), self.heads, self.query_norm.as_ref());
        let keys = place(self.key.forward(x.clone()), self.key_heads, self.key_norm.as_ref());
        let values = self.value.forward(x);
        let values = match added {
            Some(added) => values + added,
            None => values,
        };
        let values = values.reshape([batch, time, self.key_heads, self.head_width]);
        let (keys, values) = (self.for_all_heads(keys), self.for_all_heads(values));
        let [queries, keys, values] =
            [queries, keys, values].map(|heads| heads.reshape([batch * time, inner]));
        let shape = CausalAttentionShape {
            sequences: sequences.clone(),
            heads: self.heads,
            head_width: self.head_width,
            scale: self.scale,
            window: self.window,
            bf16: self.bf16,
        };
        self.output.forward(ops::causal_attention(queries, keys, values, shape))
    }

    /// Every head of `[tokens, heads·head_width]` normalised by itself, where there is a norm.
    fn normed(&self, x: Tensor<2>, heads: usize, norm: Option<&RmsNorm>) -> Tensor<2> {
        let Some(norm) = norm else { return x };
        let [tokens, inner] = x.dims();
        norm.forward(x.reshape([tokens * heads, self.head_width])).reshape([tokens, inner])
    }

    /// `[batch, time, key_heads, head_width]`, each repeated for the heads that share it, `[batch, time, heads, head_width]`.
    fn for_all_heads(&self, shared: Tensor<4>) -> Tensor<4> {
        if self.key_heads == self.heads {
            return shared;
        }
        let [batch, time, key_heads, width] = shared.dims();
        let group = self.heads / key_heads;
        shared
            .reshape([batch, time, key_heads, 1, width])
            .repeat_dim(3, group)
            .reshape([batch, time, self.heads, width])
    }
}

impl DeclareTraining for PlainAttention {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        let of_heads = |heads: usize| Matrices::of_heads(heads, vec![self.head_width]);
        plan.muon(&self.query.weight, of_heads(self.heads));
        plan.muon(&self.key.weight, of_heads(self.key_heads));
        plan.muon(&self.value.weight, of_heads(self.key_heads));
        [&self.query, &self.key, &self.value].into_iter().for_each(|linear| linear.declare_bias(plan));
        self.output.declare_whole(plan);
        self.query_norm.declare_training(plan);
        self.key_norm.declare_training(plan);
    }
}
