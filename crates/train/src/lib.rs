//! Batches to checkpoints: optimisers, schedules, the training loop.
//!
//! A [`RunConfig`](engram_config::RunConfig) describes a run, and a [`Trainer`] carries it out: [`Optimizer`] trains the weights, and
//! [`MemoryTables`] the memory rows, which it fetches for the next batch while this one computes. A [`Checkpoint`](engram_import::Checkpoint)
//! holds everything, so that a run that was killed goes on as if it had not been. [`Trained`] is what comes out: it
//! is evaluated ([`HeldOut`]) and shows its gates.
//!
//! A [`Grafter`] trains a memory for a model that exists. A [`Teacher`] teaches [`Facts`] to a model that exists, through memory rows alone.

mod census;
mod dense_adam;
mod error;
mod evaluate;
mod fact_texts;
mod facts;
mod fresh_memory;
mod frozen;
mod graft;
mod lesson;
mod lookup;
mod low_rank;
mod machine_memory;
mod neutral;
mod ngram_count;
mod optimizer;
mod parameters;
mod run_lock;
mod settings;
mod soft_targets;
mod sources;
mod tables;
mod taught_rows;
mod teach;
mod trained;
mod trainer;
mod tune;

pub use error::{Error, Result};
pub use evaluate::{Choice, HeldOut, VisitLosses, Windows, held_out_loss, token_losses};
pub use facts::{Fact, Facts};
pub use frozen::frozen;
pub use graft::{AnswerLoss, DocumentLosses, GraftStep, Grafter, Grafting};
pub use lookup::RowPlaces;
pub use neutral::NeutralChange;
pub use ngram_count::NgramCount;
pub use optimizer::{Gradients, Optimizer, global_norm};
pub use parameters::{export, export_gradients, import};
pub use run_lock::RunLock;
pub use settings::{SettingChange, setting_changes};
pub use tables::{Fetched, FrozenTables, MemoryTables, addressing, fetch};
pub use taught_rows::TaughtRows;
pub use teach::{Preparation, TaughtMemory, TeachReport, Teacher};
pub use trained::{LayerGates, Trained};
pub use trainer::{Continuation, Evaluation, NewContext, Pace, Repetition, Resumption, StepReport, Trainer};
pub use tune::{Tuner, Tuning};
