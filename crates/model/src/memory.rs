//! The Engram module: rows of the n-gram tables, gated by context, into the residual streams (arXiv 2601.07372,
//! section 2.3).
//!
//! For every stream m of M: `k_m = W_K[m]·e`, one value `v = W_V·e` for all, the gate
//! `a_m = σ(√|s|·sign s)` of `s = ⟨RMSNorm(h_m), RMSNorm(k_m)⟩/√d`, and `u_m = a_m·v`. The paper's form adds
//! `SiLU(conv(RMSNorm(u)))`, a short causal convolution over time. The signed root is in the published code, not
//! in the paper's equation 4.
//!
//! Parts can be left out, to see what each is worth (section 6.2): one gate, of the mean of the streams, for all of
//! them; no gate, so that `u_m = v`; no convolution.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::gate::Gate;
use crate::host::{InnerOrSelf, values};
use crate::init::Init;
use crate::memory_rows::{MemoryRows, silence};
use crate::ops::{add_bias, rows_product};
use crate::sequences::Sequences;
use crate::short_convolution::ShortConvolution;
use crate::training::{DeclareTraining, Matrices, TrainingPlan};
use engram_config::{MemoryConfig, MemoryForm, Precision};

/// Reads one layer's memory into the residual streams.
#[derive(Module, Debug)]
pub struct Memory {
    /// Keys of all streams, then (in V4.1's fused form) the value.
    pub projection: Projection,
    /// The gate, whose field is named after the weights of the published one; none: every value is added whole.
    pub norms: Option<Gate>,
    /// The short convolution of the paper's form.
    pub convolution: Option<ShortConvolution>,
    streams: usize,
    /// G, gates per token: one for each stream, one for all, or none.
    gates: usize,
    width: usize,
    memory_width: usize,
    bf16: bool,
}

/// From the concatenated rows to the keys of G gates and one value.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per block; a few hundred bytes do not matter")]
pub enum Projection {
    /// Separate projections with biases (the paper's demonstration).
    Separate(SeparateProjection),
    /// One matrix without biases, `[d_mem, (G+1)·width]`, keys first (V4.1's `wkv`).
    Fused(Param<Tensor<2>>),
    /// The paper's form where there is no gate.
    Value(ValueProjection),
}

/// Projections of the paper's form.
#[derive(Module, Debug)]
pub struct SeparateProjection {
    /// W_K, gate-major, `[d_mem, G·width]`.
    pub key: Param<Tensor<2>>,
    /// `[G·width]`.
    pub key_bias: Param<Tensor<1>>,
    /// W_V, `[d_mem, width]`.
    pub value: Param<Tensor<2>>,
    /// `[width]`.
    pub value_bias: Param<Tensor<1>>,
}

/// The projection of the paper's form without keys.
#[derive(Module, Debug)]
pub struct ValueProjection {
    /// W_V, `[d_mem, width]`.
    pub value: Param<Tensor<2>>,
    /// `[width]`.
    pub value_bias: Param<Tensor<1>>,
}

impl Memory {
    /// A module for `streams` streams of `width`. The convolution starts at zero, as in the paper.
    ///
    /// `config` must be valid and of a gated form. To give it other weights, set its parameters.
    pub fn new(
        config: &MemoryConfig,
        streams: usize,
        width: usize,
        init: &Init,
        precision: Precision,
    ) -> Self {
        let (memory_width, gates) = (config.width(), config.gates(streams));
        let deviation = (memory_width as f32).sqrt().recip();
        let value = || init.normal("value", [memory_width, width], deviation);
        let value_bias = || init.constant([width], 0.0);
        let projection = match config.form {
            MemoryForm::Paper if gates == 0 => {
                Projection::Value(ValueProjection { value: value(), value_bias: value_bias() })
            }
            MemoryForm::Paper => {
                let separate = SeparateProjection {
                    key: init.normal("key", [memory_width, gates * width], deviation),
                    key_bias: init.constant([gates * width], 0.0),
                    value: value(),
                    value_bias: value_bias(),
                };
                Projection::Separate(separate)
            }
            _ => Projection::Fused(init.normal("projection", [memory_width, (gates + 1) * width], deviation)),
        };
        Self {
            projection,
            norms: (gates > 0).then(|| Gate::new(config, gates, width, init)),
            convolution: config
                .has_convolution()
                .then(|| ShortConvolution::new(streams, width, config.kernel, config.max_order, init)),
            streams,
            gates,
            width,
            memory_width,
            bf16: precision == Precision::Bf16,
        }
    }

    /// What is added to the streams: `[tokens, M·width]` from streams `h` of that shape.
    pub fn forward(&self, h: Tensor<2>, sequences: &Sequences, rows: &MemoryRows) -> Tensor<2> {
        let (keys, value) = self.project(rows.concatenated(self.memory_width));
        let u = self.gated(h, keys, value);
        let u = match &rows.dead {
            Some(dead) => silence(u, dead),
            None => u,
        };
        match &self.convolution {
            Some(convolution) => convolution.forward(u, sequences),
            None => u,
        }
    }

    /// The gates a of every token, `[tokens, G]`, without a graph; nothing where there are none.
    pub fn gates(&self, h: Tensor<2>, rows: &MemoryRows) -> Vec<f32> {
        let (Some(keys), _) = self.project(rows.concatenated(self.memory_width)) else { return Vec::new() };
        let Some(gate) = &self.norms else { return Vec::new() };
        let tokens = h.dims()[0];
        let gates = gate.gate(self.query(h.inner_or_self()), keys.inner_or_self());
        let mut gates = values(gates.reshape([tokens, self.gates]));
        if let Some(dead) = &rows.dead {
            let dead = gates.chunks_exact_mut(self.gates).zip(dead.iter()).filter(|(_, dead)| **dead);
            dead.for_each(|(gates, _)| gates.fill(0.0));
        }
        gates
    }

    /// Keys `[tokens, G·width]`, where there is a gate, and the value `[tokens, width]`.
    fn project(&self, e: Tensor<2>) -> (Option<Tensor<2>>, Tensor<2>) {
        let map = |weight: &Param<Tensor<2>>, bias: &Param<Tensor<1>>| {
            add_bias(rows_product(e.clone(), weight.val(), self.bf16), bias.val())
        };
        match &self.projection {
            Projection::Separate(separate) => {
                (Some(map(&separate.key, &separate.key_bias)), map(&separate.value, &separate.value_bias))
            }
            Projection::Value(only) => (None, map(&only.value, &only.value_bias)),
            Projection::Fused(weight) => {
                let both = rows_product(e, weight.val(), self.bf16);
                match self.gates * self.width {
                    0 => (None, both),
                    keys => (Some(both.clone().narrow(1, 0, keys)), both.narrow(1, keys, self.width)),
                }
            }
        }
    }

    /// u: the value times the gate of each stream, `[tokens, M·width]`.
    fn gated(&self, h: Tensor<2>, keys: Option<Tensor<2>>, value: Tensor<2>) -> Tensor<2> {
        let u = match (keys, &self.norms) {
            (Some(keys), Some(gate)) => gate.times(self.query(h), keys, value),
            _ => value,
        };
        if u.dims()[1] == self.streams * self.width { u } else { u.repeat_dim(1, self.streams) }
    }

    /// What the keys are held against, `[tokens, G·width]`: the streams, or their mean.
    fn query(&self, h: Tensor<2>) -> Tensor<2> {
        if self.gates == self.streams {
            return h;
        }
        let tokens = h.dims()[0];
        h.reshape([tokens, self.streams, self.width]).mean_dim(1).reshape([tokens, self.width])
    }
}

impl DeclareTraining for Memory {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        // Every gate's W_K is a matrix of its own, as is W_V (section 2.3).
        let keys = Matrices::side_by_side(vec![self.width; self.gates]);
        match &self.projection {
            Projection::Separate(separate) => {
                plan.muon(&separate.key, keys);
                plan.adam_without_decay(&separate.key_bias);
                plan.muon(&separate.value, Matrices::whole(self.width));
                plan.adam_without_decay(&separate.value_bias);
            }
            Projection::Value(only) => {
                plan.muon(&only.value, Matrices::whole(self.width));
                plan.adam_without_decay(&only.value_bias);
            }
            Projection::Fused(both) => {
                plan.muon(both, Matrices::side_by_side(vec![self.width; self.gates + 1]));
            }
        }
        self.norms.declare_training(plan);
        self.convolution.declare_training(plan);
    }
}
