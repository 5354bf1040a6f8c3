//! A run's configuration file.

use std::path::{Path, PathBuf};

use engram_model::{ConfigError, ModelConfig, Precision};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optimizer::OptimizerConfig;
use crate::schedule::Schedule;
use crate::tables::{RowOptimizerKind, RowTraining};
use crate::text_bounds::TextConfig;

/// Everything that decides a run: one TOML file, copied into every checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Shards to train on.
    pub train: PathBuf,
    /// Held-out shards.
    pub valid: PathBuf,
    /// The tokenizer, a Hugging Face `tokenizer.json`.
    pub tokenizer: PathBuf,
}

impl DataConfig {
    /// Takes relative paths from the folder of the file at `path`, which they were read from.
    pub fn resolve(&mut self, path: &Path) {
        let folder = path.parent().unwrap_or(Path::new(""));
        for data in [&mut self.train, &mut self.valid, &mut self.tokenizer] {
            *data = folder.join(&data);
        }
    }
}

/// How a model learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of weights, rows and the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Sequences per step, each of `model.context` tokens.
    pub batch: usize,
    /// Parts that a step's sequences are computed in, one after another, to save memory.
    #[serde(default = "one")]
    pub accumulation: usize,
    /// Whether the documents packed into a window are sequences of their own, which do not see each other; see
    /// [`Packing`](crate::Packing). Held-out losses are then taken so, too.
    #[serde(default, skip_serializing_if = "is_false")]
    pub documents_apart: bool,
    /// Whether what a block computes is computed again for its gradients instead of kept, so that long sequences fit in
    /// memory. Losses and gradients stay as they are; a step costs one more forward pass.
    #[serde(default, skip_serializing_if = "is_false")]
    pub recompute: bool,
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
    /// Held-out tokens per evaluation at most; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate_tokens: Option<usize>,
    /// Steps between checkpoints.
    #[serde(default = "every")]
    pub checkpoint_every: u64,
    /// Checkpoints kept.
    #[serde(default = "two")]
    pub keep: usize,
}

/// Numbers that matrix products are computed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrecisionConfig {
    /// f32 on a CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// f32; on a GPU operands of products are rounded to TF32.
    F32,
    /// bf16 operands, f32 weights.
    Bf16,
}

impl PrecisionConfig {
    /// The precision on a device that is a GPU or not.
    pub fn resolve(self, gpu: bool) -> Precision {
        match self {
            Self::Bf16 => Precision::Bf16,
            Self::Auto if gpu => Precision::Bf16,
            Self::Auto | Self::F32 => Precision::F32,
        }
    }
}

fn one() -> usize {
    1
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

impl RunConfig {
    /// Reads and validates a configuration. Relative paths in it are taken from the file's own folder.
    ///
    /// # Errors
    /// When the file cannot be read, or a key or value in it cannot be used: named with its line.
    pub fn load(path: &Path) -> Result<Self> {
        let (text, mut config) = load_toml::<Self>(path)?;
        config.data.resolve(path);
        config.validate().map_err(|error| locate(&text, path, &error))?;
        Ok(config)
    }

    /// Refuses what cannot be trained.
    ///
    /// # Errors
    /// The first offending key.
    pub fn validate(&self) -> std::result::Result<(), ConfigError> {
        self.model.validate()?;
        let train = &self.train;
        let at_least_one = [
            ("train.steps", train.steps),
            ("train.batch", train.batch as u64),
            ("train.accumulation", train.accumulation as u64),
            ("train.evaluate_every", train.evaluate_every),
            ("train.checkpoint_every", train.checkpoint_every),
            ("train.keep", train.keep as u64),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::new(*key, "is 0: must be at least 1"));
        }
        if !train.batch.is_multiple_of(train.accumulation) {
            let reason = format!("does not divide the batch of {}", train.batch);
            return Err(ConfigError::new("train.accumulation", reason));
        }
        if !(train.memory.rate_factor > 0.0 && train.memory.rate_factor.is_finite()) {
            return Err(ConfigError::new("train.memory.rate_factor", "must be above 0"));
        }
        let rows = self.model.memory.as_ref().map(|memory| memory.row_init);
        if train.memory.optimizer == RowOptimizerKind::Frozen && rows == Some(0.0) {
            let reason =
                "is \"frozen\", but rows begin at zero and would stay there: set `model.memory.row_init`";
            return Err(ConfigError::new("train.memory.optimizer", reason));
        }
        train
            .schedule
            .validate(train.steps)
            .map_err(|error| ConfigError::new("train.schedule", error.to_string()))?;
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
        let (text, config) = load_toml::<Self>(path)?;
        config.model.validate().map_err(|error| locate(&text, path, &error))?;
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
    let (text, ModelOnly { model }) = load_toml(path)?;
    model.validate().map_err(|error| locate(&text, path, &error))?;
    Ok(model)
}

/// Reads a TOML file; its text, too, so that what is refused later can be [located](locate).
///
/// # Errors
/// When the file cannot be read, or does not hold a `T`: with the line.
pub fn load_toml<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<(String, T)> {
    let text = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
    let parsed = toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(&text, span.start));
        Error::Config { path: path.to_owned(), line, problem: error.message().trim().to_owned() }
    })?;
    Ok((text, parsed))
}

/// Puts the line of `error`'s key to it; where the key itself is absent, that of its table.
pub fn locate(text: &str, path: &Path, error: &ConfigError) -> Error {
    let line = key_line(text, &error.key);
    Error::Config { path: path.to_owned(), line, problem: error.to_string() }
}

/// Line of the longest prefix of the dotted `key` that the text holds; 1 if none.
fn key_line(text: &str, key: &str) -> usize {
    let Ok(document) = toml::de::DeTable::parse(text) else { return 1 };
    let mut table = document.get_ref();
    let mut line = 1;
    for part in key.split('.') {
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref().as_ref() == part) else {
            break;
        };
        line = line_of(text, name.span().start);
        match value.get_ref() {
            toml::de::DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    line
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}
