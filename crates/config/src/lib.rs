//! What a model and a run are: configuration files, their checks, and counts of what they cost.
//!
//! A [`RunConfig`] is one TOML file: the model ([`ModelConfig`]), its data, and how it trains ([`TrainConfig`]). Every
//! struct refuses keys that it does not know. Errors name the key, and the file's line where there is a file.
//! [`Account`] states a model's parameters and operations without building it.
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
mod error;
mod feed_forward;
mod model;
mod optimizer;
mod precision;
mod rows;
mod run;
mod schedule;
mod text;
mod toml_file;
mod training_memory;

pub use accounting::Account;
pub use attention::{AttentionConfig, BlockRotary, LatentConfig, PlainConfig, RotaryScaling, YarnConfig};
pub use error::{ConfigError, Error, Result};
pub use feed_forward::{Activation, ExpertGroups, ExpertScore, ExpertsConfig, FeedForwardConfig, GroupScore};
pub use model::*;
pub use optimizer::OptimizerConfig;
pub use precision::{Precision, PrecisionConfig};
pub use rows::{RowOptimizerKind, RowStorage, RowTraining};
pub use run::{CheckpointConfig, DataConfig, RunConfig, TrainConfig, load_model_config};
pub use schedule::{Decay, Schedule, StepDown, WsdShape};
pub use text::{BeginConfig, TextConfig};
pub use toml_file::{load_toml, locate};
pub use training_memory::TrainingMemory;

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
