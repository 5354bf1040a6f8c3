//! Rows of n-gram tables that are added without keys and gates: what a memory is compared with.
//!
//! With e the rows of a token's n-grams side by side, S of them, and x its residual streams:
//!
//! * **Added**: `x_m ← x_m + (1/S)·Σ e_s`. Rows are as wide as a stream, and nothing else is learned.
//! * **Over-encoding** (arXiv 2501.16975, section 3.2, in the averaged form that arXiv 2601.07372, section 3.2,
//!   compares with): `x_m ← (x_m + Σ W_s·e_s) / (1 + S)` at the input embedding.
//! * **Attention values**: `W·e` is added to the values of the block's attention, head by head.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::init::Init;
use crate::memory_rows::{MemoryRows, silence};
use crate::ops::rows_product;
use crate::training::{DeclareTraining, Matrices, TrainingPlan};
use engram_config::{MemoryConfig, MemoryForm, ModelConfig, Precision};

/// Adds one layer's rows to the residual streams, or to the values of its attention.
#[derive(Module, Debug)]
pub struct NgramEmbedding {
    /// From a token's rows side by side to a stream or to the heads' values, `[d_mem, ·]`, the matrices of all slots
    /// on each other; none: rows are added as they are.
    pub projection: Option<Param<Tensor<2>>>,
    #[module(skip)]
    target: Target,
    memory_width: usize,
    slots: usize,
    streams: usize,
    silent: bool,
    bf16: bool,
}

/// Where rows are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Streams,
    Embedding,
    Values,
}

impl NgramEmbedding {
    /// The module of `memory`, the memory of `config`, which must be valid and of a form without gates.
    pub(crate) fn new(
        config: &ModelConfig,
        memory: &MemoryConfig,
        init: &Init,
        precision: Precision,
    ) -> Self {
        let (heads, (_, value_width)) = (config.attention.key_heads(), config.attention.head_widths());
        let deviation = |inputs: usize| (inputs as f32).sqrt().recip();
        // An over-encoding sums one matrix per slot, as an embedding sums one row; the others are one matrix.
        let (target, projection) = match memory.form {
            MemoryForm::Paper | MemoryForm::V41 | MemoryForm::Added => (Target::Streams, None),
            MemoryForm::OverEncoding => {
                (Target::Embedding, Some((config.width, deviation(memory.row_width))))
            }
            MemoryForm::AttentionValues => {
                (Target::Values, Some((heads * value_width, deviation(memory.width()))))
            }
        };
        let projection = projection
            .map(|(outputs, deviation)| init.normal("projection", [memory.width(), outputs], deviation));
        Self {
            projection,
            target,
            memory_width: memory.width(),
            slots: memory.slots(),
            streams: config.streams(),
            silent: false,
            bf16: precision == Precision::Bf16,
        }
    }

    /// The streams `x`, `[batch·time, M·width]`, with the rows in them, where that is their place.
    pub fn forward(&self, x: Tensor<2>, rows: Option<&MemoryRows>) -> Tensor<2> {
        let added = rows.map(|rows| self.project(rows));
        let all_streams = |added: Tensor<2>| added.repeat_dim(1, self.streams);
        match (self.target, added) {
            (Target::Values, _) | (Target::Streams, None) => x,
            (Target::Streams, Some(added)) => x + all_streams(added),
            (Target::Embedding, added) => {
                let sum = added.map(all_streams).map_or(x.clone(), |added| x + added);
                sum.div_scalar(1.0 + self.slots as f32)
            }
        }
    }

    /// What is added to the values of the block's attention, `[batch·time, key_heads·value]`, where that is the
    /// rows' place.
    pub fn values(&self, rows: Option<&MemoryRows>) -> Option<Tensor<2>> {
        rows.filter(|_| self.target == Target::Values).map(|rows| self.project(rows))
    }

    /// Whether rows are read.
    pub(crate) fn reads(&self) -> bool {
        !self.silent
    }

    /// Reads no rows from now on: as if all were zero.
    pub(crate) fn switch_off(&mut self) {
        self.silent = true;
    }

    /// `W·e`, or the mean of the rows where there is no W, `[batch·time, ·]`.
    fn project(&self, rows: &MemoryRows) -> Tensor<2> {
        let e = rows.concatenated(self.memory_width);
        let e = match &rows.dead {
            Some(dead) => silence(e, dead),
            None => e,
        };
        match &self.projection {
            Some(projection) => rows_product(e, projection.val(), self.bf16),
            None => {
                let (tokens, width) = (e.dims()[0], self.memory_width / self.slots);
                e.reshape([tokens, self.slots, width]).mean_dim(1).reshape([tokens, width])
            }
        }
    }
}

impl DeclareTraining for NgramEmbedding {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        let Some(projection) = &self.projection else { return };
        let [_, columns] = projection.val().dims();
        let matrices = match self.target {
            // Σ W_s·e_s: one matrix per slot.
            Target::Embedding => Matrices::stacked(self.slots, columns),
            Target::Streams | Target::Values => Matrices::whole(columns),
        };
        plan.muon(projection, matrices);
    }
}
