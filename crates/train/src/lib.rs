//! Corpora to checkpoints: tokens, schedules, optimisers, the training loop.

mod checkpoint;
mod config;
mod corpus;
mod data_error;
mod error;
mod evaluate;
mod files;
mod generate;
mod optimizer;
mod parameters;
mod sampler;
mod schedule;
mod shards;
mod tables;
mod tokenizer;
mod trained;
mod trainer;

pub use checkpoint::{Checkpoint, CheckpointWriter};
pub use config::{DataConfig, PrecisionConfig, RunConfig, TrainConfig, load_model_config};
pub use corpus::{Corpus, Documents};
pub use data_error::Error as DataError;
pub use error::{Error, Result};
pub use evaluate::{HeldOut, held_out_loss};
pub use generate::{Sampling, generate};
pub use optimizer::{Gradients, Optimizer, OptimizerConfig, global_norm};
pub use parameters::{HostTensor, export, import};
pub use sampler::{Batch, Sampler, SamplerState, validation_windows};
pub use schedule::{Decay, Schedule, StepDown, WsdShape};
pub use shards::{
    DataIdentity, PrepareOptions, PrepareProgress, PrepareSummary, ShardDocument, SplitSummary, TokenShards,
    prepare,
};
pub use tables::{Fetched, FrozenTables, MemoryTables, RowOptimizerKind, RowStorage, RowTraining, addressing, fetch};
pub use tokenizer::{END_OF_TEXT, PAD, Tokenizer, TokenizerHash, TokenizerProgress, TokenizerTraining};
pub use trained::{LayerGates, Trained};
pub use trainer::{Pace, StepReport, Trainer};
