//! Configurations of models and runs: their files, their checks, and counts of their cost.
//!
//! A [`RunConfig`] is one TOML file: the model ([`ModelConfig`]), its data, and its training ([`TrainConfig`]). Every
//! struct refuses unknown keys. Errors name the key, and the line of the file if there is one. [`Account`] counts a
//! model's parameters and operations without building it.
//!
//! ```
//! use engram_config::{Account, ModelConfig};
//!
//! let config: ModelConfig = toml::from_str(r#"
//!     vocabulary = 64
//!     width = 16
//!     blocks = 2
//!     context = 8
//!     attention = { kind = "plain", heads = 2, head_width = 8 }
//!     feed_forward = { width = 32 }
//! "#)?;
//! config.validate()?;
//! assert!(Account::of(&config, &[]).total > 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod accounting;
mod attention;
mod data;
mod error;
mod feed_forward;
mod grafting;
mod init;
mod model;
mod old_keys;
mod optimizer;
mod precision;
#[cfg(test)]
mod reference;
mod rows;
mod run;
mod schedule;
mod teaching;
mod text;
mod toml_file;
mod training_memory;

pub use accounting::Account;
pub use attention::{
    AttentionConfig, BlockRotary, LatentConfig, PlainConfig, RotaryScaling, YarnConfig, YarnRamp,
};
pub use data::{DataConfig, DataSource, SourceConfig};
pub use error::{ConfigError, Error, Result};
pub use feed_forward::{Activation, ExpertGroups, ExpertScore, ExpertsConfig, FeedForwardConfig, GroupScore};
pub use grafting::{GraftConfig, GraftMemory, GraftRates, LowRankConfig};
pub use init::InitConfig;
pub use model::*;
pub use optimizer::OptimizerConfig;
pub use precision::{Precision, PrecisionConfig};
pub use rows::{BiasCorrection, RowOptimizerKind, RowStorage, RowTraining};
pub use run::{CheckpointConfig, RunConfig, TrainConfig, load_model_config};
pub use schedule::{Decay, Schedule, StepDown, WsdShape};
pub use teaching::{CompareConfig, NewMemory, TeachConfig};
pub use text::{BeginConfig, TextConfig};
pub use toml_file::{Source, load_toml, locate};
pub use training_memory::TrainingMemory;

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
