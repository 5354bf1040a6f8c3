//! Small models with every kind of part, and their weights and gradients as plain numbers.
#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(unreachable_pub, reason = "shared by several test files")]

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use engram_config::{
    Activation, AttentionConfig, Compression, ExpertScore, ExpertsConfig, FeedForwardConfig, Gate, GateForm,
    HyperConnectionConfig, InitConfig, LatentConfig, Lookup, MemoryConfig, MemoryForm, ModelConfig,
    PlainConfig, Precision,
};
use engram_model::{LanguageModel, MemoryRows, Sequences, Tokens, Trace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// Memory rows that exist in a test's table; far fewer than slots, so that rows repeat.
const ROWS: usize = 23;

/// What a small model is made of.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub memory: Option<MemoryForm>,
    pub gate: Gate,
    pub gate_form: GateForm,
    pub convolution: Option<bool>,
    pub streams: usize,
    pub tied: bool,
    pub latent: bool,
    /// Whether two heads each share keys and values, where attention is plain.
    pub grouped: bool,
    pub query_rank: bool,
    pub experts: bool,
    pub shared: bool,
}

/// The paper's model in small: all parts that it has.
pub const PAPER: Options = Options {
    memory: Some(MemoryForm::Paper),
    gate: Gate::PerStream,
    gate_form: GateForm::SignedRoot,
    convolution: None,
    streams: 4,
    tied: false,
    latent: true,
    grouped: false,
    query_rank: true,
    experts: true,
    shared: true,
};

/// A plain transformer.
pub const PLAIN: Options = Options {
    memory: None,
    gate: Gate::PerStream,
    gate_form: GateForm::SignedRoot,
    convolution: None,
    streams: 1,
    tied: true,
    latent: false,
    grouped: false,
    query_rank: false,
    experts: false,
    shared: false,
};

/// Every combination that differs in more than one way from its neighbours.
pub fn combinations() -> Vec<Options> {
    vec![
        PAPER,
        PLAIN,
        Options { memory: Some(MemoryForm::V41), shared: false, ..PAPER },
        Options { streams: 1, tied: true, query_rank: false, ..PAPER },
        Options { memory: Some(MemoryForm::V41), streams: 1, latent: false, ..PAPER },
        Options { memory: Some(MemoryForm::Paper), streams: 2, ..PLAIN },
        Options { memory: None, tied: true, ..PAPER },
        Options { experts: true, tied: false, ..PLAIN },
        Options { latent: true, streams: 3, tied: false, memory: Some(MemoryForm::V41), ..PLAIN },
        Options { gate: Gate::Shared, ..PAPER },
        Options { gate_form: GateForm::Sigmoid, ..PAPER },
        Options { gate_form: GateForm::Sigmoid, memory: Some(MemoryForm::V41), streams: 1, ..PAPER },
        Options { gate: Gate::None, query_rank: false, ..PAPER },
        Options { convolution: Some(false), tied: true, ..PAPER },
        Options { gate: Gate::Shared, memory: Some(MemoryForm::V41), streams: 2, ..PLAIN },
        Options { gate: Gate::None, memory: Some(MemoryForm::V41), ..PLAIN },
        Options { memory: Some(MemoryForm::Added), ..PAPER },
        Options { memory: Some(MemoryForm::OverEncoding), ..PAPER },
        Options { memory: Some(MemoryForm::OverEncoding), ..PLAIN },
        Options { memory: Some(MemoryForm::AttentionValues), ..PAPER },
        Options { memory: Some(MemoryForm::AttentionValues), ..PLAIN },
        Options { grouped: true, ..PLAIN },
        Options { grouped: true, memory: Some(MemoryForm::AttentionValues), streams: 2, ..PLAIN },
    ]
}

impl Options {
    pub fn config(&self) -> ModelConfig {
        ModelConfig {
            vocabulary: 37,
            width: 16,
            blocks: 2,
            context: 16,
            norm_epsilon: 1e-6,
            tied_head: self.tied,
            init: InitConfig::default(),
            embedding_scale: None,
            post_norms: false,
            attention: if self.latent {
                AttentionConfig::Latent(LatentConfig {
                    heads: 3,
                    query_rank: self.query_rank.then_some(10),
                    latent_rank: 9,
                    content_width: 5,
                    rotary_width: 4,
                    value_width: 7,
                    rotary_base: 100.0,
                    yarn: None,
                    scale: None,
                    rotary_scaling: None,
                })
            } else {
                let (heads, key_heads) = if self.grouped { (4, Some(2)) } else { (3, None) };
                AttentionConfig::Plain(PlainConfig {
                    key_heads,
                    rotary_base: 100.0,
                    ..PlainConfig::new(heads, 6)
                })
            },
            feed_forward: FeedForwardConfig { width: 11, activation: Activation::Swiglu },
            experts: self.experts.then_some(ExpertsConfig {
                first_block: 1,
                routed: 5,
                active: 2,
                width: 6,
                shared_width: if self.shared { 7 } else { 0 },
                balance_rate: 0.01,
                sequence_balance: 0.0,
                dense_blocks: Vec::new(),
                score: ExpertScore::Sigmoid,
                normalise: true,
                scaling: 1.0,
                groups: None,
            }),
            hyper_connections: (self.streams > 1)
                .then_some(HyperConnectionConfig { streams: self.streams, sinkhorn_iterations: 20 }),
            memory: self.memory.map(|form| MemoryConfig {
                form,
                gate: self.gate,
                gate_form: self.gate_form,
                convolution: self.convolution,
                layers: if form == MemoryForm::OverEncoding { vec![0] } else { vec![0, 1] },
                max_order: 3,
                heads: 2,
                row_width: if form == MemoryForm::Added { 16 } else { 3 },
                rows_per_head: vec![5, 7],
                compression: Compression::None,
                lookup: Lookup::Own,
                seed: 0,
                pad_id: 0,
                kernel: 3,
                row_init: 0.0,
            }),
        }
    }

    /// A model of these options, on a device with autodiff, with weights in which nothing is zero or special.
    pub fn model(&self, seed: u64) -> LanguageModel {
        let model = LanguageModel::new(&self.config(), &device(), seed, Precision::F32).unwrap();
        shaken(model, seed)
    }
}

/// Where tests train: fused unless asked otherwise.
pub fn device() -> Device {
    Device::flex().autodiff()
}

/// A batch with its memory, by value.
pub struct Batch {
    pub ids: Vec<u32>,
    pub targets: Arc<[u32]>,
    pub sequences: Sequences,
    pub memory: Vec<MemoryRows>,
}

impl Batch {
    /// `count` random sequences of `time` tokens, and for every memory layer rows that depend on each token and
    /// the one before it.
    pub fn random(config: &ModelConfig, count: usize, time: usize, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let ids = (0..count * time).map(|_| random.random_range(0..config.vocabulary as u32)).collect();
        Self::of(config, ids, count)
    }

    /// As [`random`](Self::random), for given tokens. The target is the next token, the last's is 0.
    pub fn of(config: &ModelConfig, ids: Vec<u32>, count: usize) -> Self {
        let sequences = Sequences::equal(count, ids.len() / count);
        Self::of_sequences(config, ids, sequences)
    }

    /// As [`random`](Self::random), with sequences of these lengths.
    pub fn ragged(config: &ModelConfig, lengths: &[usize], seed: u64) -> Self {
        let ids = Self::random(config, 1, lengths.iter().sum(), seed).ids;
        Self::of_sequences(config, ids, Sequences::of_lengths(lengths.iter().copied()))
    }

    fn of_sequences(config: &ModelConfig, ids: Vec<u32>, sequences: Sequences) -> Self {
        let positions: Vec<usize> = sequences.lengths().flat_map(|time| 0..time).collect();
        let starts = |at: usize| positions.get(at).is_none_or(|&position| position == 0);
        let target = |at: usize| if starts(at + 1) { 0 } else { ids[at + 1] };
        let targets = (0..ids.len()).map(target).collect();
        let layers = config.memory.as_ref().map_or(0, |memory| memory.layers.len());
        let memory = (0..layers).map(|layer| memory_rows(config, &ids, &positions, layer)).collect();
        Self { ids, targets, sequences, memory }
    }

    pub fn tokens(&self) -> Tokens<'_> {
        Tokens { ids: &self.ids, sequences: &self.sequences, memory: &self.memory }
    }

    /// Mean loss, summed up in f64 from every token's.
    pub fn loss(&self, model: &LanguageModel) -> (f64, Trace) {
        let mut trace = Trace::default();
        let losses = model.token_losses(self.tokens(), &self.targets, &mut trace);
        (losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / losses.len() as f64, trace)
    }
}

fn memory_rows(config: &ModelConfig, ids: &[u32], positions: &[usize], layer: usize) -> MemoryRows {
    let memory = config.memory.as_ref().unwrap();
    let rows = normal([ROWS, memory.row_width], 77 + layer as u64).require_grad();
    let index = (0..ids.len()).flat_map(|t| {
        let before = if positions[t] == 0 { 0 } else { ids[t - 1] };
        (0..memory.slots() as u32).map(move |slot| (ids[t] * 7 + before * 3 + slot * 5) % ROWS as u32)
    });
    MemoryRows { rows, index: index.collect(), dead: None }
}

/// Normal values with a fixed seed, on the device with autodiff.
pub fn normal<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.sample(StandardNormal)).collect();
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// The values of a tensor.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.into_data().try_into_vec().unwrap()
}

/// A module's weights, each halved and moved by noise of 0.2: zeros and ones at the start hide errors.
pub fn shaken<M: Module>(module: M, seed: u64) -> M {
    struct Shake(ChaCha8Rng);
    impl ModuleMapper for Shake {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|old| {
                let noise = |value: f32| 0.5 * value + 0.2 * self.0.sample::<f32, _>(StandardNormal);
                let shaken = values(old.clone()).into_iter().map(noise).collect();
                like(&old, shaken)
            })
        }
    }
    module.map(&mut Shake(ChaCha8Rng::seed_from_u64(seed)))
}

/// The module with `change` applied to the values of the weight called `name`.
pub fn changed<M: Module>(module: M, name: &str, change: &dyn Fn(&mut [f32])) -> M {
    struct Change<'a> {
        path: Vec<String>,
        name: &'a str,
        change: &'a dyn Fn(&mut [f32]),
        done: bool,
    }
    impl ModuleMapper for Change<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if self.path.join(".") != self.name {
                return param;
            }
            self.done = true;
            param.map(|old| {
                let mut new = values(old.clone());
                (self.change)(&mut new);
                like(&old, new)
            })
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            if !is_variant(container) {
                self.path.push(name.to_owned());
            }
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            if !is_variant(container) {
                self.path.pop();
            }
        }
    }
    let mut mapper = Change { path: Vec::new(), name, change, done: false };
    let module = module.map(&mut mapper);
    assert!(mapper.done, "no weight is called {name}");
    module
}

/// Whether a module is what a variant of an enum holds: it has no name of its own.
fn is_variant(container: &str) -> bool {
    container.starts_with("Enum:")
}

fn like<const D: usize>(old: &Tensor<D>, values: Vec<f32>) -> Tensor<D> {
    let new = Tensor::from_data(TensorData::new(values, old.dims()), &old.device());
    if old.is_require_grad() { new.require_grad() } else { new }
}

/// What `visit` makes of each weight that learns, by name.
pub fn weights<M: Module, T>(module: &M, visit: impl FnMut(Weight<'_>) -> T) -> BTreeMap<String, T> {
    struct Visit<F, T> {
        path: Vec<String>,
        visit: F,
        all: BTreeMap<String, T>,
    }
    impl<T, F: FnMut(Weight<'_>) -> T> ModuleVisitor for Visit<F, T> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val();
            if tensor.is_require_grad() {
                let gradient = |gradients: &Gradients| tensor.grad(gradients).map(values);
                let weight = Weight { values: values(tensor.clone()), gradient: &gradient };
                self.all.insert(self.path.join("."), (self.visit)(weight));
            }
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            if !is_variant(container) {
                self.path.push(name.to_owned());
            }
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            if !is_variant(container) {
                self.path.pop();
            }
        }
    }
    let mut visitor = Visit { path: Vec::new(), visit, all: BTreeMap::new() };
    module.visit(&mut visitor);
    visitor.all
}

/// A weight that learns.
pub struct Weight<'a> {
    pub values: Vec<f32>,
    gradient: &'a dyn Fn(&Gradients) -> Option<Vec<f32>>,
}

impl Weight<'_> {
    /// Its gradient; zeros where the loss does not depend on it.
    pub fn gradient(&self, gradients: &Gradients) -> Vec<f32> {
        (self.gradient)(gradients).unwrap_or_else(|| vec![0.0; self.values.len()])
    }
}

/// Compares within 1e-5 + 1e-4·|x|; gives the largest difference.
#[track_caller]
pub fn assert_close(name: &str, found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "{name}");
    let mut largest = 0.0_f32;
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 1e-5 + 1e-4 * e.abs(), "{name}[{i}]: {f}, expected {e}");
        largest = largest.max((f - e).abs());
    }
    largest
}
