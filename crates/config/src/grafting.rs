//! How a memory is grafted onto a model that exists.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::model::{MemoryConfig, ModelConfig};
use crate::rows::{RowOptimizerKind, RowTraining};
use crate::schedule::rise_and_fall;
use crate::teaching::NewMemory;

/// How a memory is grafted. Every key has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GraftConfig {
    /// Steps. Default: as many as read the corpus `passes` times. 0 makes a memory that computes what the base does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// How often the corpus is read, where `steps` is not given.
    pub passes: f64,
    /// Windows of text per step.
    pub batch: usize,
    /// Tokens per window. Default: 256, or the model's context where that is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// Windows computed at once. Changes memory and time, and the last bits of sums.
    pub micro_batch: usize,
    /// Share of the corpus's documents that is held out.
    pub hold_out: f64,
    /// Held-out tokens that a loss is taken over, at most.
    pub held_out_tokens: usize,
    /// Tokens of neutral text that base and result are compared on.
    pub neutral_tokens: usize,
    /// Share of the steps over which rates rise; after them they fall to zero in a line.
    pub warmup: f64,
    /// Decay of Adam's first moment.
    pub beta1: f32,
    /// Decay of Adam's second moment.
    pub beta2: f32,
    /// Added to the root of Adam's second moment.
    pub epsilon: f32,
    /// Largest global norm of the gradient of dense weights.
    pub clip: f32,
    /// The optimiser of rows.
    pub row_optimizer: RowOptimizerKind,
    /// Steps between two saved states.
    pub save_every: u64,
    /// Order of windows, the projections of the memory and its hashes.
    pub seed: u64,
    /// Largest rates.
    pub rates: GraftRates,
    /// The new memory.
    pub memory: GraftMemory,
    /// The adapter of low rank that a graft may be compared with.
    pub lora: LowRankConfig,
}

/// Largest rates of Adam.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GraftRates {
    /// The rate of memory rows.
    pub rows: f32,
    /// The rate of the memory's projections and gates.
    pub projections: f32,
    /// The rate of the adapter of low rank.
    pub lora: f32,
}

/// A grafted memory's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GraftMemory {
    /// Blocks before which it is read, counted from 0. Default: the second and the middle one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Longest n-gram.
    pub max_order: usize,
    /// Hash heads per order.
    pub heads: usize,
    /// Values per row.
    pub row_width: usize,
    /// Rows per head.
    pub rows_per_head: u64,
}

/// An adapter of low rank.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LowRankConfig {
    /// Rank. Default: the one whose parameters are nearest to the memory's dense ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
}

impl Default for GraftConfig {
    fn default() -> Self {
        Self {
            steps: None,
            passes: 1.0,
            batch: 8,
            context: None,
            micro_batch: 4,
            hold_out: 0.05,
            held_out_tokens: 16_384,
            neutral_tokens: 4096,
            warmup: 0.05,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            clip: 1.0,
            row_optimizer: RowOptimizerKind::Adam,
            save_every: 200,
            seed: 0,
            rates: GraftRates::default(),
            memory: GraftMemory::default(),
            lora: LowRankConfig::default(),
        }
    }
}

impl Default for GraftRates {
    fn default() -> Self {
        Self { rows: 0.01, projections: 1e-3, lora: 1e-3 }
    }
}

impl Default for GraftMemory {
    fn default() -> Self {
        Self { layers: None, max_order: 3, heads: 8, row_width: 32, rows_per_head: 100_000 }
    }
}

impl GraftMemory {
    /// The memory for the model `base`, whose hashes are drawn from `seed`.
    pub fn for_base(&self, base: &ModelConfig, seed: u64) -> MemoryConfig {
        let usual = || {
            let (second, middle) = (1.min(base.blocks - 1), base.blocks / 2);
            if second < middle { vec![second, middle] } else { vec![second] }
        };
        let memory = NewMemory {
            layers: Some(self.layers.clone().unwrap_or_else(usual)),
            max_order: self.max_order,
            heads: self.heads,
            row_width: self.row_width,
            rows_per_head: self.rows_per_head,
        };
        memory.for_base(base, seed)
    }
}

impl GraftConfig {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first offending key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let counts = [
            ("batch", self.batch as u64),
            ("micro_batch", self.micro_batch as u64),
            ("held_out_tokens", self.held_out_tokens as u64),
            ("neutral_tokens", self.neutral_tokens as u64),
            ("save_every", self.save_every),
            ("context", self.context.unwrap_or(1) as u64),
            ("lora.rank", self.lora.rank.unwrap_or(1) as u64),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(ConfigError::new(*key, "is 0: must be at least 1"));
        }
        let positive = [
            ("passes", self.passes),
            ("epsilon", f64::from(self.epsilon)),
            ("clip", f64::from(self.clip)),
            ("rates.rows", f64::from(self.rates.rows)),
            ("rates.projections", f64::from(self.rates.projections)),
            ("rates.lora", f64::from(self.rates.lora)),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| !(*value > 0.0 && value.is_finite())) {
            return Err(ConfigError::new(*key, "must be above 0"));
        }
        if !(self.hold_out > 0.0 && self.hold_out < 1.0) {
            return Err(ConfigError::new("hold_out", "must be above 0 and below 1"));
        }
        let fractions =
            [("warmup", self.warmup), ("beta1", f64::from(self.beta1)), ("beta2", f64::from(self.beta2))];
        if let Some((key, _)) = fractions.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
            return Err(ConfigError::new(*key, "must be at least 0 and below 1"));
        }
        Ok(())
    }

    /// Tokens per window for a model of `context`.
    ///
    /// # Errors
    /// When the key asks for more than the model has.
    pub fn window(&self, context: usize) -> Result<usize, ConfigError> {
        match self.context {
            Some(window) if window > context => {
                let reason = format!("is {window}, but the model's context is {context}");
                Err(ConfigError::new("context", reason))
            }
            Some(window) => Ok(window),
            None => Ok(256.min(context)),
        }
    }

    /// Steps for a corpus of `tokens` in windows of `window`.
    pub fn steps_for(&self, tokens: u64, window: usize) -> u64 {
        let per_step = (self.batch * window) as f64;
        self.steps.unwrap_or_else(|| (self.passes * tokens as f64 / per_step).ceil() as u64)
    }

    /// Share of the largest rates at step `step`, from 0, of `steps`.
    pub fn schedule(&self, step: u64, steps: u64) -> f32 {
        rise_and_fall(step as f64, self.warmup * steps as f64, steps as f64) as f32
    }

    /// How the rows are trained, at `rates.rows`.
    pub fn rows(&self) -> RowTraining {
        RowTraining { rate_factor: 1.0, optimizer: self.row_optimizer, ..RowTraining::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall() {
        let config = GraftConfig { warmup: 0.2, ..GraftConfig::default() };
        let rates: Vec<f32> = (0..10).map(|step| config.schedule(step, 10)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]);
        let config = GraftConfig { warmup: 0.0, ..GraftConfig::default() };
        assert_eq!((config.schedule(0, 2), config.schedule(1, 2)), (1.0, 0.5));
    }

    #[test]
    fn a_corpus_is_read_as_often_as_asked() {
        let config = GraftConfig { passes: 1.5, batch: 2, ..GraftConfig::default() };
        assert_eq!(config.steps_for(1000, 50), 15);
        assert_eq!(GraftConfig { steps: Some(3), ..config }.steps_for(1000, 50), 3);
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_key() {
        GraftConfig::default().validate().unwrap();
        for (text, key) in [
            ("batch = 0", "batch"),
            ("passes = 0.0", "passes"),
            ("hold_out = 1.0", "hold_out"),
            ("warmup = 1.0", "warmup"),
            ("beta2 = 1.0", "beta2"),
            ("[rates]\nrows = -1.0", "rates.rows"),
            ("[lora]\nrank = 0", "lora.rank"),
        ] {
            let config: GraftConfig = toml::from_str(text).unwrap();
            assert_eq!(config.validate().unwrap_err().key, key);
        }
        let config = GraftConfig { context: Some(100), ..GraftConfig::default() };
        assert_eq!(config.window(60).unwrap_err().key, "context");
        assert_eq!(GraftConfig::default().window(60).unwrap(), 60);
        assert!(toml::from_str::<GraftConfig>("[memory]\nlayer = 3").is_err());
    }
}
