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

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, silu};
use engram_kernels::{MemoryGate, MemoryGateInput, ShortConvolutionShape, ShortConvolutionWeights};

use crate::embedding::embed;
use crate::experts::{InnerOrSelf, values};
use crate::fused::{self, Operation, Pass};
use crate::init::Init;
use crate::linear::rows_product;
use crate::rms_norm::normalise;
use crate::selection::column;
use crate::sequences::{Run, Sequences};
use crate::token_sums::for_every_token;
use crate::training::{DeclareTraining, Matrices, TrainingPlan};
use engram_config::{MemoryConfig, MemoryForm, Precision};

/// The memory rows of one layer that a batch needs: each distinct row once, and where it goes.
#[derive(Debug, Clone)]
pub struct MemoryRows {
    /// Distinct rows, `[distinct, row_width]`: a leaf of the graph, so that its gradient can go back to the table.
    pub rows: Tensor<2>,
    /// Which of them stands in each slot, `[batch·time·slots]`.
    pub index: Arc<[u32]>,
    /// Positions whose gate is 0, `[batch·time]`; none: all are alive.
    pub dead: Option<Arc<[bool]>>,
}

impl MemoryRows {
    /// e: the rows of all orders and heads side by side, `[batch·time, d_mem]`.
    pub(crate) fn concatenated(&self, memory_width: usize) -> Tensor<2> {
        let tokens = self.index.len() * self.rows.dims()[1] / memory_width;
        embed(self.rows.clone(), Arc::clone(&self.index)).reshape([tokens, memory_width])
    }
}

/// Reads one layer's memory into the residual streams.
#[derive(Module, Debug)]
pub struct Memory {
    /// Keys of all streams, then (in V4.1's fused form) the value.
    pub projection: Projection,
    /// Weight of the norms before the gate's product; none: there is no gate.
    pub norms: Option<GateNorms>,
    /// The short convolution of the paper's form.
    pub convolution: Option<ShortConvolution>,
    streams: usize,
    /// G, gates per token: one for each stream, one for all, or none.
    gates: usize,
    width: usize,
    memory_width: usize,
    gate_epsilon: f64,
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

/// Weights of the norms of queries and keys. V4.1 keeps only their product.
#[derive(Module, Debug)]
pub struct GateNorms {
    /// Of the residual streams, `[G, width]`.
    pub query: Param<Tensor<2>>,
    /// Of the keys, `[G, width]`; none: the query's weight is the product of both.
    pub key: Option<Param<Tensor<2>>>,
}

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

/// f32 machine epsilon, in the gate's norms of the demonstration code.
const PAPER_GATE_EPSILON: f64 = f32::EPSILON as f64;
/// Epsilon of the gate's norms in V4.1.
const V41_GATE_EPSILON: f64 = 1e-20;
/// Epsilon of the norm before the convolution.
const CONVOLUTION_EPSILON: f64 = 1e-5;

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
        let (projection, gate_epsilon) = match config.form {
            MemoryForm::Paper if gates == 0 => {
                let projection = ValueProjection { value: value(), value_bias: value_bias() };
                (Projection::Value(projection), PAPER_GATE_EPSILON)
            }
            MemoryForm::Paper => {
                let separate = SeparateProjection {
                    key: init.normal("key", [memory_width, gates * width], deviation),
                    key_bias: init.constant([gates * width], 0.0),
                    value: value(),
                    value_bias: value_bias(),
                };
                (Projection::Separate(separate), PAPER_GATE_EPSILON)
            }
            _ => {
                let fused = init.normal("projection", [memory_width, (gates + 1) * width], deviation);
                (Projection::Fused(fused), V41_GATE_EPSILON)
            }
        };
        let paper = config.form == MemoryForm::Paper;
        Self {
            projection,
            norms: (gates > 0).then(|| GateNorms {
                query: init.constant([gates, width], 1.0),
                key: paper.then(|| init.constant([gates, width], 1.0)),
            }),
            convolution: config.has_convolution().then(|| ShortConvolution {
                norm: init.constant([streams, width], 1.0),
                weight: init.constant([streams, width, config.kernel], 0.0),
                dilation: config.max_order,
                epsilon: CONVOLUTION_EPSILON,
            }),
            streams,
            gates,
            width,
            memory_width,
            gate_epsilon,
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
            Some(convolution) => convolution.forward(u, sequences, self.streams, self.width),
            None => u,
        }
    }

    /// The gates a of every token, `[tokens, G]`, without a graph; nothing where there are none.
    pub fn gates(&self, h: Tensor<2>, rows: &MemoryRows) -> Vec<f32> {
        let (Some(keys), _) = self.project(rows.concatenated(self.memory_width)) else { return Vec::new() };
        let Some(norms) = &self.norms else { return Vec::new() };
        let tokens = h.dims()[0];
        let query = self.query(h.inner_or_self());
        let gates = self.gate(query, keys.inner_or_self(), norms, |norm| norm.inner_or_self());
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
            let product = rows_product(e.clone(), weight.val(), self.bf16);
            match fused::available(&product) {
                true => product + bias.val().unsqueeze(),
                false => product + for_every_token(bias.val(), e.dims()[0]),
            }
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
            (Some(keys), Some(norms)) => self.times_gate(self.query(h), keys, value, norms),
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

    /// The value times every gate, `[tokens, G·width]`.
    fn times_gate(&self, h: Tensor<2>, keys: Tensor<2>, value: Tensor<2>, norms: &GateNorms) -> Tensor<2> {
        let shape = h.dims();
        if fused::available(&h) {
            let operation = FusedGate { streams: self.gates, epsilon: self.gate_epsilon as f32 };
            let query = norms.query.val();
            let key = match &norms.key {
                Some(key) => key.val(),
                None => Tensor::ones(query.dims(), &query.device()),
            };
            let inputs = [
                fused::input(h),
                fused::input(keys),
                fused::input(value),
                fused::input(query),
                fused::input(key),
            ];
            return fused::apply(operation, inputs, shape);
        }
        let value = value.reshape([shape[0], 1, self.width]);
        (self.gate(h, keys, norms, |norm| norm) * value).reshape(shape)
    }

    /// a, `[tokens, G, 1]`, in Burn's primitives.
    fn gate(
        &self,
        h: Tensor<2>,
        keys: Tensor<2>,
        norms: &GateNorms,
        norm: impl Fn(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<3> {
        let tokens = h.dims()[0];
        let split = |x: Tensor<2>| x.reshape([tokens, self.gates, self.width]);
        let weight = |weight: &Param<Tensor<2>>| {
            split(for_every_token(norm(weight.val()).reshape([self.gates * self.width]), tokens))
        };
        let query = normalise(split(h), self.gate_epsilon) * weight(&norms.query);
        let key = normalise(split(keys), self.gate_epsilon);
        let key = match &norms.key {
            Some(of_key) => key * weight(of_key),
            None => key,
        };
        let s = (query * key).sum_dim(2).div_scalar((self.width as f32).sqrt());
        sigmoid(s.clone().sign() * s.abs().clamp_min(1e-6).sqrt())
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
        if let Some(norms) = &self.norms {
            plan.adam_without_decay(&norms.query);
            norms.key.iter().for_each(|key| plan.adam_without_decay(key));
        }
        if let Some(convolution) = &self.convolution {
            plan.adam_without_decay(&convolution.norm);
            plan.adam_without_decay(&convolution.weight);
        }
    }
}

impl ShortConvolution {
    /// `u + SiLU(conv(RMSNorm(u)))`, `[tokens, M·width]`.
    fn forward(&self, u: Tensor<2>, sequences: &Sequences, streams: usize, width: usize) -> Tensor<2> {
        let shape = u.dims();
        if !fused::available(&u) {
            return sequences.map_tensors([u], |run, [u]| self.composed(u, run, streams, width));
        }
        let operation = FusedConvolution {
            sequences: sequences.clone(),
            streams,
            width,
            kernel: self.weight.val().dims()[2],
            dilation: self.dilation,
            epsilon: self.epsilon as f32,
        };
        let inputs = [fused::input(u), fused::input(self.norm.val()), fused::input(self.weight.val())];
        fused::apply(operation, inputs, shape)
    }

    fn composed(&self, u: Tensor<2>, run: Run, streams: usize, width: usize) -> Tensor<2> {
        let (shape, batch, time) = (u.dims(), run.sequences, run.time);
        let kernel = self.weight.val().dims()[2];
        let channels = streams * width;
        let every_token = |weight: Tensor<2>| for_every_token(weight.reshape([channels]), shape[0]);
        let normed = normalise(u.clone().reshape([shape[0], streams, width]), self.epsilon).reshape(shape)
            * every_token(self.norm.val());
        let normed = normed.reshape([batch, time, channels]);
        let taps = self.weight.val().reshape([channels, kernel]);
        let mut sum = Tensor::zeros([batch, time, channels], &u.device());
        for tap in 0..kernel {
            let delay = (kernel - 1 - tap) * self.dilation;
            if delay >= time {
                continue;
            }
            let silence = Tensor::zeros([batch, delay, channels], &u.device());
            let shifted = Tensor::cat(vec![silence, normed.clone().narrow(1, 0, time - delay)], 1);
            let tap = every_token(taps.clone().narrow(1, tap, 1)).reshape([batch, time, channels]);
            sum = sum + shifted * tap;
        }
        u + silu(sum).reshape(shape)
    }
}

/// Zeroes the rows of dead positions.
pub(crate) fn silence(u: Tensor<2>, dead: &[bool]) -> Tensor<2> {
    let alive: Vec<bool> = dead.iter().map(|&dead| !dead).collect();
    let alive = column(&alive, &u.device());
    u * alive
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

#[derive(Debug)]
struct FusedConvolution {
    sequences: Sequences,
    streams: usize,
    width: usize,
    kernel: usize,
    dilation: usize,
    epsilon: f32,
}

impl FusedConvolution {
    fn shape(&self, run: Run) -> ShortConvolutionShape {
        let Self { streams, width, kernel, dilation, epsilon, .. } = *self;
        ShortConvolutionShape { time: run.time, streams, width, kernel, dilation, epsilon }
    }
}

impl Operation<3> for FusedConvolution {
    /// 1/rms of every stream of every token.
    type Saved = Vec<f32>;

    fn forward(&self, [u, norm, filter]: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let weights = ShortConvolutionWeights { norm, filter };
        let all = self.sequences.map([u], |run, [u]| {
            let convolution = engram_kernels::short_convolution(u, weights, self.shape(run));
            [convolution.output, convolution.inverse_rms]
        });
        all.into()
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 3>) -> [Vec<f32>; 3] {
        let [u, norm, filter] = pass.inputs;
        let weights = ShortConvolutionWeights { norm, filter };
        let (mut of_norm, mut of_filter) = (Vec::new(), Vec::new());
        let data = [pass.gradient, u, pass.saved];
        let [of_input] = self.sequences.map(data, |run, [gradient, u, inverse_rms]| {
            let shape = self.shape(run);
            let gradients =
                engram_kernels::short_convolution_backward(gradient, u, weights, shape, inverse_rms);
            add(&mut of_norm, gradients.norm);
            add(&mut of_filter, gradients.filter);
            [gradients.input]
        });
        [of_input, of_norm, of_filter]
    }
}

/// Adds `values` to the `sum`, if there is one yet.
fn add(sum: &mut Vec<f32>, values: Vec<f32>) {
    if sum.is_empty() {
        *sum = values;
    } else {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
}
