//! A run's configuration file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, Result};
use crate::model::ModelConfig;
use crate::optimizer::OptimizerConfig;
use crate::precision::{Precision, PrecisionConfig};
use crate::rows::{RowOptimizerKind, RowTraining};
use crate::schedule::Schedule;
use crate::text::TextConfig;
use crate::toml_file::{load_toml, locate};

/// Everything that decides a run: one TOML file, copied into every checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The model.
    pub model: ModelConfig,
    /// Where texts begin and end, if not as usual.
    #[serde(default, skip_serializing_if = "TextConfig::is_default")]
    pub text: TextConfig,
    /// What it learns from.
    pub data: DataConfig,
    /// How it learns.
    pub train: TrainConfig,
}

/// The configuration in a checkpoint: that of the run that made it; or of a model trained elsewhere, which has neither
/// data nor a course of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The model.
    pub model: ModelConfig,
    /// Where texts begin and end, if not as usual.
    #[serde(default, skip_serializing_if = "TextConfig::is_default")]
    pub text: TextConfig,
    /// What it learned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataConfig>,
    /// How it learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainConfig>,
}

/// Prepared token shards and the tokenizer that made them (`engram data prepare`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Shards to train on.
    pub train: PathBuf,
    /// Held-out shards; none: no held-out losses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid: Option<PathBuf>,
    /// The tokenizer, a Hugging Face `tokenizer.json`.
    pub tokenizer: PathBuf,
}

impl DataConfig {
    /// Takes relative paths from the folder of the file at `path`, which they were read from.
    pub fn resolve(&mut self, path: &Path) {
        let folder = path.parent().unwrap_or(Path::new(""));
        self.paths_mut().for_each(|data| *data = folder.join(&data));
    }

    /// All paths.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        [&mut self.train, &mut self.tokenizer].into_iter().chain(&mut self.valid)
    }

    /// The held-out shards, for what needs some.
    ///
    /// # Errors
    /// When there are none.
    pub fn held_out(&self) -> std::result::Result<&Path, ConfigError> {
        let reason = "is missing: name held-out shards (`engram data prepare --hold-out`)";
        self.valid.as_deref().ok_or_else(|| ConfigError::new("data.valid", reason))
    }
}

/// How a model learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of weights, rows and the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Sequences per step, each of `model.context` tokens.
    pub batch: usize,
    /// Sequences that are computed at once: a step computes one micro-batch after another and sums their gradients, to
    /// save memory. Where it does not divide `batch`, the last has fewer. None: all at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// What checkpoints have that were written before there was `micro_batch`; see [`RunConfig::load_saved`].
    #[serde(default, skip_serializing)]
    accumulation: Option<usize>,
    /// Whether the documents packed into a window are sequences of their own, which do not see each other; see
    /// [`Packing`](crate::Packing). Held-out losses are then taken so, too.
    #[serde(default, skip_serializing_if = "is_false")]
    pub documents_apart: bool,
    /// Whether what a block computes is computed again for its gradients instead of kept, so that long sequences fit in
    /// memory. Losses and gradients stay as they are; a step costs one more forward pass.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recompute: bool,
    /// Steps in a row that may be skipped because their loss or gradient is not finite; one more ends the run. With 0
    /// the first such step does.
    #[serde(default = "ten")]
    pub skip_limit: u64,
    /// Factor on the peak rates over the run.
    pub schedule: Schedule,
    /// Rates and constants of the weights' optimisers.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// How memory rows learn.
    #[serde(default)]
    pub memory: RowTraining,
    /// Numbers that matrix products are computed in.
    #[serde(default)]
    pub precision: PrecisionConfig,
    /// Steps between held-out losses.
    #[serde(default = "every")]
    pub evaluate_every: u64,
    /// Held-out tokens per evaluation at most, in whole windows spread evenly over the text; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate_tokens: Option<usize>,
    /// Steps between checkpoints.
    #[serde(default = "every")]
    pub checkpoint_every: u64,
    /// Checkpoints kept.
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
    /// Sequences that are computed at once.
    pub fn windows_at_once(&self) -> usize {
        self.micro_batch.unwrap_or(self.batch)
    }

    /// Says in today's keys what was written in those of before.
    fn modernise(&mut self) {
        if let Some(parts) = self.accumulation.take().filter(|&parts| parts > 1) {
            self.micro_batch = Some(self.batch.div_ceil(parts));
        }
    }
}

impl RunConfig {
    /// As [`load`](Self::load), for the `run.toml` of a checkpoint, which may have been written before a key got its
    /// name of today.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_saved(path: &Path) -> Result<Self> {
        let (source, mut config) = load_toml::<Self>(path)?;
        config.data.resolve(path);
        config.train.modernise();
        config.validate().map_err(|error| locate(&source, &error))?;
        Ok(config)
    }

    /// Reads and validates a configuration. Relative paths in it are taken from the file's own folder.
    ///
    /// # Errors
    /// When the file cannot be read, or a key or value in it cannot be used: named with its line.
    pub fn load(path: &Path) -> Result<Self> {
        let (source, mut config) = load_toml::<Self>(path)?;
        config.data.resolve(path);
        config.validate().map_err(|error| locate(&source, &error))?;
        Ok(config)
    }

    /// Refuses what cannot be trained.
    ///
    /// # Errors
    /// The first offending key.
    pub fn validate(&self) -> std::result::Result<(), ConfigError> {
        self.model.validate()?;
        if let Some(key) = self.model.untrainable() {
            let reason = "describes a pretrained model of a kind that is not trained here: leave it out";
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
            let reason = format!("is {}: at most {}, the largest number of TOML", train.seed, i64::MAX);
            return Err(ConfigError::new("train.seed", reason));
        }
        if train.evaluate_tokens == Some(0) {
            return Err(ConfigError::new("train.evaluate_tokens", "is 0: must be at least 1"));
        }
        if let Some(parts) = train.accumulation {
            let micro_batch = train.batch.div_ceil(parts.max(1));
            let reason = format!(
                "is no longer a key: write `micro_batch = {micro_batch}`, the number of sequences computed at once, \
                 or leave it out to compute all at once"
            );
            return Err(ConfigError::new("train.accumulation", reason));
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
                "is \"frozen\", but rows begin at zero and would stay there: set `model.memory.row_init`";
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
    /// When the file cannot be read, or describes no model: named with its line.
    pub fn load(path: &Path) -> Result<Self> {
        let (source, mut config) = load_toml::<Self>(path)?;
        config.train.iter_mut().for_each(TrainConfig::modernise);
        config.model.validate().map_err(|error| locate(&source, &error))?;
        Ok(config)
    }

    /// The precision to compute in on a device that is a GPU or not.
    pub fn precision(&self, gpu: bool) -> Precision {
        self.train.as_ref().map_or(PrecisionConfig::Auto, |train| train.precision).resolve(gpu)
    }

    /// The configuration as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("a configuration is representable as TOML")
    }
}

/// Reads a model's configuration alone: a file with a `[model]` table, whatever else it holds.
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
