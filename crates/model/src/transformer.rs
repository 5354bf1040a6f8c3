//! The language model: embedding, blocks with memory, head.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};

use crate::block::{Block, BlockFeedForward, Routing};
use crate::host::values;
use crate::init::Init;
use crate::memory_rows::MemoryRows;
use crate::ops::{TargetScore, cross_entropy, embed, rows_product, select, target_scores, token_losses};
use crate::rms_norm::RmsNorm;
use crate::rotary::Rotary;
use crate::sequences::Sequences;
use crate::targets::Targets;
use crate::training::{DeclareTraining, TrainingPlan};
use engram_config::{ConfigError, ModelConfig, Precision};

/// A transformer language model with conditional memory.
#[derive(Module, Debug)]
pub struct LanguageModel {
    /// Token embedding, `[vocabulary, width]`.
    pub embedding: Param<Tensor<2>>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Norm before the head.
    pub norm: RmsNorm,
    /// Output head, `[width, vocabulary]`; none: the transposed embedding.
    pub head: Option<Param<Tensor<2>>>,
    /// Rotary positions by block; blocks that have the same share them.
    #[module(skip)]
    rotaries: Vec<Option<Rotary>>,
    embedding_scale: Option<f32>,
    streams: usize,
    width: usize,
    bf16: bool,
}

/// What a forward pass reports beside its result.
#[derive(Debug, Default)]
pub struct Trace {
    /// Tokens that each expert saw, by block with experts.
    pub loads: Vec<(usize, Vec<u64>)>,
    /// Losses that balance experts within each sequence, one for each block that has such a loss. They are not part of
    /// what [`LanguageModel::loss`] gives.
    pub balance: Vec<Tensor<1>>,
    /// Gates `[tokens, gates]` by memory layer, when asked for.
    pub gates: Option<Vec<(usize, Vec<f32>)>>,
    /// Mean of the streams after every block, `[tokens, width]`, when asked for.
    pub states: Option<Vec<Tensor<2>>>,
}

impl Trace {
    /// A trace that also keeps the gates.
    pub fn with_gates() -> Self {
        Self { gates: Some(Vec::new()), ..Self::default() }
    }

    /// A trace that also keeps the states between blocks.
    pub fn with_states() -> Self {
        Self { states: Some(Vec::new()), ..Self::default() }
    }
}

/// A batch of token sequences, with the memory rows of each memory layer in order.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// Tokens, `[tokens]`.
    pub ids: &'a [u32],
    /// The sequences that they make up.
    pub sequences: &'a Sequences,
    /// One for each layer of [`MemoryConfig::layers`](crate::MemoryConfig::layers).
    pub memory: &'a [MemoryRows],
}

impl LanguageModel {
    /// A model with the weights that `seed` gives. On a device with autodiff it can be trained.
    ///
    /// # Errors
    /// When the configuration describes no model.
    pub fn new(
        config: &ModelConfig,
        device: &Device,
        seed: u64,
        precision: Precision,
    ) -> Result<Self, ConfigError> {
        Self::build(config, &Init::new(device, seed), precision)
    }

    /// A model whose weights are all zero, for others to take their place.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn blank(config: &ModelConfig, device: &Device, precision: Precision) -> Result<Self, ConfigError> {
        Self::build(config, &Init::blank(device), precision)
    }

    fn build(config: &ModelConfig, init: &Init, precision: Precision) -> Result<Self, ConfigError> {
        config.validate()?;
        if let Some(key) = config.untrainable() {
            let reason = "describes a pretrained model of a kind that is decoded, but not trained here";
            return Err(ConfigError::new(key, reason));
        }
        let (width, vocabulary) = (config.width, config.vocabulary);
        Ok(Self {
            embedding: init.normal("embedding", [vocabulary, width], config.init.embedding),
            blocks: (0..config.blocks)
                .map(|index| Block::new(config, index, &init.child("blocks").child(index), precision))
                .collect(),
            norm: RmsNorm::new(init, width, config.norm_epsilon),
            head: (!config.tied_head).then(|| init.normal("head", [width, vocabulary], config.init.head)),
            rotaries: Rotary::of_blocks(config),
            embedding_scale: config.embedding_scale,
            streams: config.streams(),
            width,
            bf16: precision == Precision::Bf16,
        })
    }

    /// Hidden states before the head, `[tokens, width]`.
    ///
    /// # Panics
    /// When a token lies outside the vocabulary, the sequences have other tokens or one is longer than the context, or
    /// the memory rows are not those of this model's layers: what feeds the model checks its input.
    pub fn hidden(&self, tokens: Tokens<'_>, trace: &mut Trace) -> Tensor<2> {
        let rows = self.rows_by_block(tokens.memory);
        let mut x = self.enter(tokens);
        for (index, rows) in rows.into_iter().enumerate() {
            x = self.pass(index, x, tokens.sequences, rows, trace);
        }
        self.leave(x)
    }

    /// The streams before the first block, `[tokens, n·width]`.
    pub(crate) fn enter(&self, tokens: Tokens<'_>) -> Tensor<2> {
        assert_eq!(tokens.ids.len(), tokens.sequences.tokens(), "the sequences have other tokens");
        let x = embed(self.embedding.val(), tokens.ids.into());
        let x = match self.embedding_scale {
            Some(scale) => x.mul_scalar(scale),
            None => x,
        };
        if self.streams == 1 { x } else { x.repeat_dim(1, self.streams) }
    }

    /// The streams after block `index`, from those before it.
    pub(crate) fn pass(
        &self,
        index: usize,
        x: Tensor<2>,
        sequences: &Sequences,
        rows: Option<&MemoryRows>,
        trace: &mut Trace,
    ) -> Tensor<2> {
        let block = &self.blocks[index];
        if let (Some(memory), Some(rows), Some(gates)) = (&block.memory, rows, &mut trace.gates) {
            gates.extend(memory.gates(x.clone(), rows).map(|of_memory| (index, of_memory)));
        }
        let x = block.remember(x, sequences, rows);
        let (x, routing) = block.forward(x, sequences, self.rotaries[index].as_ref(), rows);
        if let Some(states) = &mut trace.states {
            states.push(self.merge(x.clone()));
        }
        if let Some(Routing { choice, balance }) = routing {
            trace.loads.push((index, choice.loads()));
            trace.balance.extend(balance);
        }
        x
    }

    /// Hidden states before the head, `[tokens, width]`, from the streams after the last block.
    pub(crate) fn leave(&self, x: Tensor<2>) -> Tensor<2> {
        self.norm.forward(self.merge(x))
    }

    /// The rows that each block reads of those of the memory layers, in order.
    pub(crate) fn rows_by_block<'a>(&self, memory: &'a [MemoryRows]) -> Vec<Option<&'a MemoryRows>> {
        let mut memory = memory.iter();
        let rows =
            |block: &Block| block.reads_rows().then(|| memory.next().expect("rows for every memory layer"));
        let rows = self.blocks.iter().map(rows).collect();
        assert!(memory.next().is_none(), "rows for more memory layers than the model has");
        rows
    }

    /// Mean cross-entropy of the next tokens `targets`, `[tokens]`, in nats per token.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn loss(&self, tokens: Tokens<'_>, targets: Arc<[u32]>, trace: &mut Trace) -> Tensor<1> {
        self.loss_counting(tokens, &targets.into(), trace)
    }

    /// [`loss`](Self::loss), with the mean over the targets that count; 0 if none does.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn loss_counting(&self, tokens: Tokens<'_>, targets: &Targets, trace: &mut Trace) -> Tensor<1> {
        self.loss_of(self.hidden(tokens, trace), targets)
    }

    /// [`loss_counting`](Self::loss_counting) of hidden states before the head. There are logits only of tokens whose
    /// targets count.
    pub(crate) fn loss_of(&self, hidden: Tensor<2>, targets: &Targets) -> Tensor<1> {
        let of = |hidden, targets| cross_entropy(hidden, self.head_weight(), targets, self.bf16);
        let ids = targets.ids();
        match targets.counted() {
            None => of(hidden, Arc::clone(ids)),
            // A graph to all weights, with gradients of zero.
            Some(places) if places.is_empty() => {
                of(select(hidden, [0].into()), [ids[0]].into()).mul_scalar(0.0)
            }
            Some(places) => {
                let counted = places.iter().map(|&place| ids[place as usize]).collect();
                of(select(hidden, Arc::clone(places)), counted)
            }
        }
    }

    /// Cross-entropy of every next token, `[tokens]`, in nats, without gradients.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn token_losses(&self, tokens: Tokens<'_>, targets: &[u32], trace: &mut Trace) -> Vec<f32> {
        token_losses(self.hidden(tokens, trace), self.head_weight(), targets, self.bf16)
    }

    /// How `targets` fare, without gradients: each a row of the batch, `[tokens]`, and the token that may follow
    /// there.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), or when there is no target or a row is not there.
    pub fn target_scores(
        &self,
        tokens: Tokens<'_>,
        targets: &[(usize, u32)],
        trace: &mut Trace,
    ) -> Vec<TargetScore> {
        let (rows, targets): (Vec<i32>, Vec<u32>) =
            targets.iter().map(|&(row, target)| (row as i32, target)).unzip();
        let hidden = self.hidden(tokens, trace);
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &hidden.device());
        target_scores(hidden.select(0, rows), self.head_weight(), &targets, self.bf16)
    }

    /// Logits of the token after each sequence's last, `[sequences, vocabulary]`.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden).
    pub fn next_logits(&self, tokens: Tokens<'_>, trace: &mut Trace) -> Vec<f32> {
        let last = tokens.sequences.lengths().scan(-1, |last, time| {
            *last += time as i32;
            Some(*last)
        });
        let last: Vec<i32> = last.collect();
        let hidden = self.hidden(tokens, trace);
        let last = Tensor::<1, Int>::from_data(last.as_slice(), &hidden.device());
        values(rows_product(hidden.select(0, last), self.head_weight(), self.bf16))
    }

    /// Logits, `[tokens, vocabulary]`, of states between blocks, `[tokens, width]`, as if no block followed.
    pub fn lens(&self, states: Tensor<2>) -> Tensor<2> {
        rows_product(self.norm.forward(states), self.head_weight(), self.bf16)
    }

    /// Moves every balancing bias by `rate` against the loads of a step (see [`Trace::loads`]).
    pub fn rebalance(&mut self, loads: &[(usize, Vec<u64>)], rate: f32) {
        for (index, loads) in loads {
            if let BlockFeedForward::Experts(experts) = &mut self.blocks[*index].feed_forward {
                experts.rebalance(loads, rate);
            }
        }
    }

    /// Switches the memory off: from now on the model takes no rows, and computes what it would if a gated memory
    /// added nothing, or if all rows of a form without gates were zero (arXiv 2601.07372, section 6.3).
    pub fn switch_memory_off(&mut self) {
        self.blocks.iter_mut().for_each(Block::switch_memory_off);
    }

    /// Mean of the streams, `[tokens, width]`.
    fn merge(&self, x: Tensor<2>) -> Tensor<2> {
        if self.streams == 1 {
            return x;
        }
        let tokens = x.dims()[0];
        x.reshape([tokens, self.streams, self.width]).mean_dim(1).reshape([tokens, self.width])
    }

    /// The head, `[width, vocabulary]`.
    pub(crate) fn head_weight(&self) -> Tensor<2> {
        match &self.head {
            Some(head) => head.val(),
            None => self.embedding.val().transpose(),
        }
    }
}

impl DeclareTraining for LanguageModel {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam(&self.embedding);
        self.blocks.declare_training(plan);
        self.norm.declare_training(plan);
        self.head.iter().for_each(|head| plan.adam(head));
    }
}
