//! Corpora to checkpoints: tokens, schedules, optimisers, the training loop.
//!
//! A [`Corpus`] streams documents from text, JSON lines and Parquet files. A [`Tokenizer`] is trained on it
//! or loaded; [`prepare`] turns the corpus into [`TokenShards`], memory-mapped, with the boundaries and the
//! bytes of documents; a [`Sampler`] gives training windows in a random order of which two numbers tell where
//! it is; a [`Schedule`] says which share of the peak rate a step trains with.
//!
//! A [`RunConfig`] describes a run, and a [`Trainer`] carries it out: [`Optimizer`] trains the weights, and
//! [`MemoryTables`] the memory rows, which it fetches for the next batch while this one computes. A [`Checkpoint`]
//! holds everything, so that a run that was killed goes on as if it had not been. [`Trained`] is what comes out: it
//! is evaluated ([`HeldOut`]), continues a text ([`generate`], the plain way), and shows its gates.
//!
//! ```
//! use std::ops::ControlFlow::Continue;
//! use engram_train::{Corpus, PrepareOptions, Sampler, TokenShards, Tokenizer, TokenizerTraining, prepare};
//!
//! let folder = tempfile::tempdir()?;
//! let text = folder.path().join("whale.txt");
//! std::fs::write(&text, "Call me Ishmael. Some years ago, never mind how long precisely. ".repeat(50))?;
//!
//! let corpus = Corpus::open(&[&text])?;
//! let training = TokenizerTraining { vocabulary: 280, ..Default::default() };
//! let tokenizer = Tokenizer::train(&corpus, &training, &mut |_| Continue(()))?;
//! let data = folder.path().join("data");
//! prepare(&corpus, &tokenizer, &data, &PrepareOptions::default(), &mut |_| Continue(()))?;
//!
//! let shards = TokenShards::open(&data.join("train"))?;
//! shards.check_tokenizer(&tokenizer)?;
//! let mut sampler = Sampler::new(42, 64, 2, shards.len())?;
//! let batch = sampler.next_batch(&shards)?;
//! assert_eq!(batch.tokens.len(), 2 * 65);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod checkpoint;
mod config;
mod corpus;
mod data_error;
mod error;
mod evaluate;
mod files;
mod generate;
mod lookup;
mod optimizer;
mod packing;
mod parameters;
mod sampler;
mod schedule;
mod shards;
mod tables;
mod text_bounds;
mod tokenizer;
mod trained;
mod trainer;

pub use checkpoint::{Checkpoint, CheckpointWriter};
pub use config::{
    CheckpointConfig, DataConfig, PrecisionConfig, RunConfig, TrainConfig, load_model_config, load_toml,
    locate,
};
pub use corpus::{Corpus, Documents};
pub use data_error::Error as DataError;
pub use engram_model::TargetScore;
pub use error::{Error, Result};
pub use evaluate::{HeldOut, VisitLosses, Windows, held_out_loss, token_losses};
pub use generate::{Sampling, generate};
pub use lookup::RowPlaces;
pub use optimizer::{Gradients, Optimizer, OptimizerConfig, global_norm};
pub use packing::Packing;
pub use parameters::{HostTensor, export, export_gradients, import};
pub use sampler::{Batch, Sampler, SamplerState, validation_windows};
pub use schedule::{Decay, Schedule, StepDown, WsdShape};
pub use shards::{
    DataIdentity, PrepareOptions, PrepareProgress, PrepareSummary, ShardDocument, SplitSummary, TokenShards,
    prepare,
};
pub use tables::{
    Fetched, FrozenTables, MemoryTables, RowOptimizerKind, RowStorage, RowTraining, addressing, fetch,
};
pub use text_bounds::{Begin, BeginConfig, TextConfig};
pub use tokenizer::{END_OF_TEXT, PAD, Tokenizer, TokenizerHash, TokenizerProgress, TokenizerTraining};
pub use trained::{LayerGates, Trained};
pub use trainer::{NewContext, Pace, StepReport, Trainer};
