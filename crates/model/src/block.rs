//! One transformer block: attention, then feed-forward, each around a residual.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::attention::Attention;
use crate::block_memory::BlockMemory;
use crate::choice::Choice;
use crate::experts::Experts;
use crate::feed_forward::FeedForward;
use crate::hyper_connection::HyperConnection;
use crate::init::Init;
use crate::memory_rows::MemoryRows;
use crate::rms_norm::RmsNorm;
use crate::rotary::Rotary;
use crate::sequences::Sequences;
use crate::training::{DeclareTraining, TrainingPlan};
use engram_config::{ModelConfig, Precision};

/// A block, with the memory that is read before its attention, if it has one.
#[derive(Module, Debug)]
pub struct Block {
    /// Memory of this layer.
    pub memory: Option<BlockMemory>,
    /// Attention and its residual.
    pub attention: Attention,
    /// Norm before attention.
    pub attention_norm: RmsNorm,
    /// Norm of what attention computes, before the residual; none: it is added as it is.
    pub attention_post_norm: Option<RmsNorm>,
    /// Streams around attention; none: a plain residual.
    pub attention_streams: Option<HyperConnection>,
    /// Feed-forward, dense or of experts.
    pub feed_forward: BlockFeedForward,
    /// Norm before the feed-forward.
    pub feed_forward_norm: RmsNorm,
    /// Norm of what the feed-forward computes, before the residual; none: it is added as it is.
    pub feed_forward_post_norm: Option<RmsNorm>,
    /// Streams around the feed-forward; none: a plain residual.
    pub feed_forward_streams: Option<HyperConnection>,
}

/// The feed-forward of a block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per block; a few hundred bytes do not matter")]
pub enum BlockFeedForward {
    /// One for all tokens.
    Dense(FeedForward),
    /// Chosen experts for each token.
    Experts(Experts),
}

impl Block {
    pub(crate) fn new(config: &ModelConfig, index: usize, init: &Init, precision: Precision) -> Self {
        let (width, epsilon) = (config.width, config.norm_epsilon);
        let streams = |name: &str, layer: usize| {
            let hyper = config.hyper_connections.as_ref()?;
            Some(HyperConnection::new(hyper, width, layer, epsilon, &init.child(name)))
        };
        let post_norm = || config.post_norms.then(|| RmsNorm::new(init, width, epsilon));
        let memory = config.memory.as_ref().filter(|memory| memory.layers.contains(&index));
        let feed_forward = match config.experts_of(index) {
            Some(experts) => BlockFeedForward::Experts(Experts::new(
                config,
                experts,
                &init.child("feed_forward"),
                precision,
            )),
            None => BlockFeedForward::Dense(FeedForward::new(
                &init.child("feed_forward"),
                config,
                config.feed_forward.width,
                precision,
            )),
        };
        Self {
            memory: memory.map(|memory| BlockMemory::new(config, memory, init, precision)),
            attention: Attention::new(config, index, &init.child("attention"), precision),
            attention_norm: RmsNorm::new(init, width, epsilon),
            attention_post_norm: post_norm(),
            attention_streams: streams("attention_streams", 2 * index),
            feed_forward,
            feed_forward_norm: RmsNorm::new(init, width, epsilon),
            feed_forward_post_norm: post_norm(),
            feed_forward_streams: streams("feed_forward_streams", 2 * index + 1),
        }
    }

    /// Whether the block takes the rows of a memory.
    pub(crate) fn reads_rows(&self) -> bool {
        self.memory.as_ref().is_some_and(BlockMemory::reads_rows)
    }

    /// From now on reads nothing from its memory.
    pub(crate) fn switch_memory_off(&mut self) {
        self.memory = self.memory.take().and_then(BlockMemory::switched_off);
    }

    /// What the memory makes of streams `[tokens, n·width]`.
    pub(crate) fn remember(
        &self,
        x: Tensor<2>,
        sequences: &Sequences,
        rows: Option<&MemoryRows>,
    ) -> Tensor<2> {
        match &self.memory {
            Some(memory) => memory.remember(x, sequences, rows),
            None => x,
        }
    }

    /// Attention and feed-forward over streams `[tokens, n·width]`; what the routing gives, too.
    pub(crate) fn forward(
        &self,
        x: Tensor<2>,
        sequences: &Sequences,
        rotary: Option<&Rotary>,
        rows: Option<&MemoryRows>,
    ) -> (Tensor<2>, Option<Routing>) {
        let values = self.memory.as_ref().and_then(|memory| memory.values(rows));
        let x = around(x, self.attention_streams.as_ref(), |h| {
            let h = self.attention_norm.forward(h);
            let y = self.attention.forward_adding(h, sequences, rotary, values);
            normed(y, self.attention_post_norm.as_ref())
        });
        let mut routing = None;
        let x = around(x, self.feed_forward_streams.as_ref(), |h| {
            let h = self.feed_forward_norm.forward(h);
            let y = match &self.feed_forward {
                BlockFeedForward::Dense(dense) => dense.forward(h),
                BlockFeedForward::Experts(experts) => {
                    let (logits, choice) = experts.route(h.clone());
                    let balance = experts.balance_loss(&logits, &choice, sequences);
                    let y = experts.apply(h, logits, &choice);
                    routing = Some(Routing { choice, balance });
                    y
                }
            };
            normed(y, self.feed_forward_post_norm.as_ref())
        });
        (x, routing)
    }
}

/// What the routing of a block with experts gives.
pub(crate) struct Routing {
    /// Which experts saw which token.
    pub(crate) choice: Choice,
    /// The loss that balances the experts within each sequence, if there is one.
    pub(crate) balance: Option<Tensor<1>>,
}

impl DeclareTraining for Block {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        self.memory.declare_training(plan);
        self.attention.declare_training(plan);
        self.attention_norm.declare_training(plan);
        self.attention_post_norm.declare_training(plan);
        self.attention_streams.declare_training(plan);
        match &self.feed_forward {
            BlockFeedForward::Dense(dense) => dense.declare_training(plan),
            BlockFeedForward::Experts(experts) => experts.declare_training(plan),
        }
        self.feed_forward_norm.declare_training(plan);
        self.feed_forward_post_norm.declare_training(plan);
        self.feed_forward_streams.declare_training(plan);
    }
}

/// `layer` around the residual: `x + layer(x)`, or its hyper-connected form.
fn around(
    x: Tensor<2>,
    streams: Option<&HyperConnection>,
    layer: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    match streams {
        Some(streams) => {
            let coefficients = streams.coefficients(x.clone());
            let y = layer(streams.read(x.clone(), &coefficients));
            streams.write(x, y, &coefficients)
        }
        None => x.clone() + layer(x),
    }
}

/// `y`, normalised where there is a norm.
fn normed(y: Tensor<2>, norm: Option<&RmsNorm>) -> Tensor<2> {
    match norm {
        Some(norm) => norm.forward(y),
        None => y,
    }
}
