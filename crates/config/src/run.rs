//! A run's configuration file.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::data::DataConfig;
use crate::error::{ConfigError, Result};
use crate::model::ModelConfig;
use crate::optimizer::OptimizerConfig;
use crate::precision::{Precision, PrecisionConfig};
use crate::rows::{RowOptimizerKind, RowTraining};
use crate::schedule::Schedule;
use crate::text::TextConfig;
use crate::toml_file::{load_toml, locate};

/// Everything that decides a run. One TOML file, copied into every checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The model.
    pub model: ModelConfig,
    /// The tokens around a text, if not the default ones.
    #[serde(default, skip_serializing_if = "TextConfig::is_default")]
    pub text: TextConfig,
    /// The training data.
    pub data: DataConfig,
    /// The training.
    pub train: TrainConfig,
}

/// The configuration in a checkpoint: that of the run that wrote it, or that of a pretrained model, which has neither
/// data nor training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The model.
    pub model: ModelConfig,
    /// The tokens around a text, if not the default ones.
    #[serde(default, skip_serializing_if = "TextConfig::is_default")]
    pub text: TextConfig,
    /// The training data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataConfig>,
    /// The training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainConfig>,
}

/// How a model learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of weights, rows and the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// Number of steps of the whole run.
    pub steps: u64,
    /// Sequences per step, each of `model.context` tokens.
    pub batch: usize,
    /// Sequences computed at once. A step computes its micro-batches one after another and sums their gradients, which
    /// saves memory. If it does not divide `batch`, the last one has fewer. Default: the whole batch at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// Whether the documents packed into a window are separate sequences, which do not see each other; see
    /// [`Packing`](crate::Packing). Applies to held-out losses, too.
    #[serde(default, skip_serializing_if = "is_false")]
    pub documents_apart: bool,
    /// Activation checkpointing: whether a block's activations are computed again in the backward pass instead of kept,
    /// to save memory. Losses and gradients stay the same. A step costs one more forward pass.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recompute: bool,
    /// Number of successive steps that may be skipped because their loss or gradient is not finite. One more ends the
    /// run. With 0, the first such step ends it.
    #[serde(default = "ten")]
    pub skip_limit: u64,
    /// Schedule: the factor on the peak rates over the run.
    pub schedule: Schedule,
    /// Rates and constants of the weights' optimisers.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// How memory rows learn.
    #[serde(default)]
    pub memory: RowTraining,
    /// Precision of matrix products.
    #[serde(default)]
    pub precision: PrecisionConfig,
    /// Number of steps between held-out losses.
    #[serde(default = "every")]
    pub evaluate_every: u64,
    /// Maximum number of held-out tokens per evaluation and source, in whole windows spread evenly over the text.
    /// Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate_tokens: Option<usize>,
    /// Number of steps between checkpoints.
    #[serde(default = "every")]
    pub checkpoint_every: u64,
    /// Number of checkpoints to keep.
    #[serde(default = "two")]
    pub keep: usize,
}

fn ten() -> u64 {
    10
}
fn two() -> usize {
    2
}
fn every() -> u64 {
    500
}
fn is_false(value: &bool) -> bool {
    !value
}

impl TrainConfig {
    /// Sequences computed at once.
    pub fn windows_at_once(&self) -> usize {
        self.micro_batch.unwrap_or(self.batch)
    }
}

impl RunConfig {
    /// Reads and validates a configuration. Relative paths in it start at the file's own folder.
    ///
    /// # Errors
    /// When the file cannot be read, or a key or value is invalid. The error names its line.
    pub fn load(path: &Path) -> Result<Self> {
        let (source, mut config) = load_toml::<Self>(path)?;
        config.data.resolve(path);
        config.validate().map_err(|error| locate(&source, &error))?;
        Ok(config)
    }

    /// Refuses configurations that cannot be trained.
    ///
    /// # Errors
    /// The first invalid key.
    pub fn validate(&self) -> std::result::Result<(), ConfigError> {
        self.model.validate()?;
        self.data.validate()?;
        if let Some(key) = self.model.untrainable() {
            let reason = "is only for pretrained models and cannot be trained: leave it out";
            return Err(ConfigError::new(key, reason));
        }
        let train = &self.train;
        let at_least_one = [
            ("train.steps", train.steps),
            ("train.batch", train.batch as u64),
            ("train.micro_batch", train.windows_at_once() as u64),
            ("train.evaluate_every", train.evaluate_every),
            ("train.checkpoint_every", train.checkpoint_every),
            ("train.keep", train.keep as u64),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::new(*key, "is 0: must be at least 1"));
        }
        if i64::try_from(train.seed).is_err() {
            let reason =
                format!("is {}, but must be at most {}, the largest number of TOML", train.seed, i64::MAX);
            return Err(ConfigError::new("train.seed", reason));
        }
        if train.evaluate_tokens == Some(0) {
            return Err(ConfigError::new("train.evaluate_tokens", "is 0: must be at least 1"));
        }
        if train.windows_at_once() > train.batch {
            let reason =
                format!("is more than the batch of {}: leave it out to compute all at once", train.batch);
            return Err(ConfigError::new("train.micro_batch", reason));
        }
        train.memory.validate()?;
        let rows = self.model.memory.as_ref().map(|memory| memory.row_init);
        if train.memory.optimizer == RowOptimizerKind::Frozen && rows == Some(0.0) {
            let reason =
                "is \"frozen\", but rows start at zero and would stay zero: set `model.memory.row_init`";
            return Err(ConfigError::new("train.memory.optimizer", reason));
        }
        train.schedule.validate(train.steps)?;
        train.optimizer.validate()
    }

    /// The configuration as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a configuration is representable as TOML")
    }
}

impl CheckpointConfig {
    /// Reads and validates the configuration of a checkpoint.
    ///
    /// # Errors
    /// When the file cannot be read, or describes no model. The error names the line.
    pub fn load(path: &Path) -> Result<Self> {
        let (source, config) = load_toml::<Self>(path)?;
        config.model.validate().map_err(|error| locate(&source, &error))?;
        Ok(config)
    }

    /// The precision for a GPU or another device.
    pub fn precision(&self, gpu: bool) -> Precision {
        self.train.as_ref().map_or(PrecisionConfig::Auto, |train| train.precision).resolve(gpu)
    }

    /// The configuration as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a configuration is representable as TOML")
    }
}

/// Reads only a model's configuration: a file with a `[model]` table. Other tables are ignored.
///
/// # Errors
/// As [`RunConfig::load`].
pub fn load_model_config(path: &Path) -> Result<ModelConfig> {
    #[derive(Deserialize)]
    struct ModelOnly {
        model: ModelConfig,
    }
    let (source, ModelOnly { model }) = load_toml(path)?;
    model.validate().map_err(|error| locate(&source, &error))?;
    Ok(model)
}
