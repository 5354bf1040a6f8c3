//! The memory of a block: a module for each way of reading rows.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::init::Init;
use crate::memory::Memory;
use crate::memory_rows::MemoryRows;
use crate::ngram_embedding::NgramEmbedding;
use crate::sequences::Sequences;
use crate::training::{DeclareTraining, TrainingPlan};
use engram_config::{MemoryConfig, MemoryForm, ModelConfig, Precision};

/// How a block reads its memory.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one per block; a few hundred bytes do not matter")]
pub enum BlockMemory {
    /// Through keys and gates.
    Gated(Memory),
    /// Added as it is or projected.
    Added(NgramEmbedding),
}

impl BlockMemory {
    /// The module for `memory`, the memory of the model `config`.
    pub(crate) fn new(
        config: &ModelConfig,
        memory: &MemoryConfig,
        init: &Init,
        precision: Precision,
    ) -> Self {
        match memory.form {
            MemoryForm::Paper | MemoryForm::V41 => {
                let init = init.child("memory");
                Self::Gated(Memory::new(memory, config.streams(), config.width, &init, precision))
            }
            MemoryForm::Added | MemoryForm::OverEncoding | MemoryForm::AttentionValues => {
                // The seeds of these forms' weights were drawn under this name from the beginning.
                Self::Added(NgramEmbedding::new(config, memory, &init.child("ngrams"), precision))
            }
        }
    }

    /// Streams `x`, `[tokens, n·width]`, with what the memory adds before the block's attention.
    pub(crate) fn remember(
        &self,
        x: Tensor<2>,
        sequences: &Sequences,
        rows: Option<&MemoryRows>,
    ) -> Tensor<2> {
        match (self, rows) {
            (Self::Gated(memory), Some(rows)) => x.clone() + memory.forward(x, sequences, rows),
            (Self::Gated(_), None) => x,
            (Self::Added(ngrams), rows) => ngrams.forward(x, rows),
        }
    }

    /// What is added to the values of the block's attention, `[tokens, key_heads·value]`, where that is the rows' place.
    pub(crate) fn values(&self, rows: Option<&MemoryRows>) -> Option<Tensor<2>> {
        match self {
            Self::Gated(_) => None,
            Self::Added(ngrams) => ngrams.values(rows),
        }
    }

    /// The gates of every token, `[tokens, G]`, of a form that has some.
    pub(crate) fn gates(&self, x: Tensor<2>, rows: &MemoryRows) -> Option<Vec<f32>> {
        match self {
            Self::Gated(memory) => Some(memory.gates(x, rows)),
            Self::Added(_) => None,
        }
    }

    /// Whether rows are read.
    pub(crate) fn reads_rows(&self) -> bool {
        match self {
            Self::Gated(_) => true,
            Self::Added(ngrams) => ngrams.reads(),
        }
    }

    /// The same memory reading nothing from now on; none: the block computes the same without it.
    pub(crate) fn switched_off(self) -> Option<Self> {
        match self {
            Self::Gated(_) => None,
            Self::Added(mut ngrams) => {
                ngrams.switch_off();
                Some(Self::Added(ngrams))
            }
        }
    }
}

impl DeclareTraining for BlockMemory {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        match self {
            Self::Gated(memory) => memory.declare_training(plan),
            Self::Added(ngrams) => ngrams.declare_training(plan),
        }
    }
}
