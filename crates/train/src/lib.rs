//! Corpora to checkpoints: tokens, schedules, optimisers, the training loop.

mod corpus;
mod error;
mod files;
mod sampler;
mod schedule;
mod shards;
mod tokenizer;

pub use corpus::{Corpus, Documents};
pub use error::{Error, Result};
pub use sampler::{Batch, Sampler, SamplerState, validation_windows};
pub use schedule::{Decay, Schedule, StepDown, WsdShape};
pub use shards::{
    DataIdentity, PrepareOptions, PrepareProgress, PrepareSummary, ShardDocument, SplitSummary, TokenShards,
    prepare,
};
pub use tokenizer::{END_OF_TEXT, PAD, Tokenizer, TokenizerHash, TokenizerProgress, TokenizerTraining};
