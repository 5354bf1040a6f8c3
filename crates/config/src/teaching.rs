//! How facts are taught to a model through memory rows alone.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::model::{Compression, Gate, GateForm, Lookup, MemoryConfig, MemoryForm, ModelConfig};
use crate::schedule::rise_and_fall;

/// How facts are taught. Every key has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TeachConfig {
    /// Steps, each with one phrasing of every fact.
    pub steps: usize,
    /// Largest rate of Adam.
    pub rate: f32,
    /// Decay of Adam's first moment.
    pub beta1: f32,
    /// Decay of Adam's second moment.
    pub beta2: f32,
    /// Added to the root of Adam's second moment.
    pub epsilon: f32,
    /// Steps over which the rate rises; after them it falls to zero in a line.
    pub warmup: usize,
    /// Weight of the divergence from the base at the other positions of phrasings.
    pub kl_weight: f32,
    /// Questions of other relations about the taught subjects that each fact brings to a step; their answers are to
    /// stay those of the base.
    pub negatives: usize,
    /// Weight of the divergence from the base in those questions.
    pub negative_weight: f32,
    /// What ends an answer: it is trained to follow, so that the answer does not run on. Empty: nothing.
    pub end_mark: String,
    /// Phrasings computed at once. Changes memory and time, and the last bits of sums.
    pub micro_batch: usize,
    /// Steps between two saved states.
    pub save_every: usize,
    /// Order of phrasings, and the projections of a new memory.
    pub seed: u64,
    /// The memory that a model without one is given.
    pub memory: NewMemory,
    /// What the facts are trained into beside it, where that is asked for.
    pub compare: CompareConfig,
}

/// Training of the model's own weights on the same facts. Every rate is tried with the losses of teaching, and again
/// without those that keep other text as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompareConfig {
    /// Rank of an adapter of low rank.
    pub rank: usize,
    /// Its largest rates.
    pub lora_rates: Vec<f32>,
    /// Largest rates of all weights of the blocks.
    pub full_rates: Vec<f32>,
    /// Weights of the divergence from the base, at the other positions of prompts and in questions of other relations.
    pub kl_weights: Vec<f32>,
}

impl Default for CompareConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            lora_rates: vec![1e-4, 3e-4, 1e-3],
            full_rates: vec![1e-5, 3e-5],
            kl_weights: vec![0.0, 1.0],
        }
    }
}

/// A new memory's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NewMemory {
    /// Blocks before which it is read, counted from 0. Default: those at a half and at five sixths of the depth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Longest n-gram.
    pub max_order: usize,
    /// Hash heads per order.
    pub heads: usize,
    /// Values per row.
    pub row_width: usize,
    /// Rows per head. Rows that are not taught are zero and take no room, so that many cost nothing and keep other
    /// n-grams away from those that are taught.
    pub rows_per_head: u64,
}

impl Default for TeachConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            rate: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            warmup: 5,
            kl_weight: 0.1,
            negatives: 0,
            negative_weight: 0.1,
            end_mark: ".".to_owned(),
            micro_batch: 10,
            save_every: 20,
            seed: 0,
            memory: NewMemory::default(),
            compare: CompareConfig::default(),
        }
    }
}

impl Default for NewMemory {
    fn default() -> Self {
        Self { layers: None, max_order: 3, heads: 8, row_width: 64, rows_per_head: 1_000_000_000 }
    }
}

impl NewMemory {
    /// The memory for the model `base`, whose hashes are drawn from `seed`.
    pub fn for_base(&self, base: &ModelConfig, seed: u64) -> MemoryConfig {
        let depth = base.blocks;
        let usual = || {
            let (middle, late) = (depth / 2, depth * 5 / 6);
            if middle == late { vec![late] } else { vec![middle, late] }
        };
        MemoryConfig {
            form: MemoryForm::Paper,
            gate: Gate::default(),
            gate_form: GateForm::default(),
            convolution: Some(false),
            layers: self.layers.clone().unwrap_or_else(usual),
            max_order: self.max_order,
            heads: self.heads,
            row_width: self.row_width,
            rows_per_head: vec![self.rows_per_head; self.max_order.saturating_sub(1)],
            compression: Compression::Normalised,
            lookup: Lookup::default(),
            seed,
            pad_id: 0,
            kernel: 4,
            row_init: 0.0,
        }
    }
}

impl CompareConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.rank == 0 {
            return Err(ConfigError::new("compare.rank", "is 0: must be at least 1"));
        }
        let rates = [("compare.lora_rates", &self.lora_rates), ("compare.full_rates", &self.full_rates)];
        for (key, values) in rates {
            if !values.iter().all(|value| *value > 0.0 && value.is_finite()) {
                return Err(ConfigError::new(key, "must be above 0, each of them"));
            }
        }
        if !self.kl_weights.iter().all(|value| *value >= 0.0 && value.is_finite()) {
            return Err(ConfigError::new("compare.kl_weights", "must be 0 or above, each of them"));
        }
        Ok(())
    }
}

impl TeachConfig {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first offending key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let counts =
            [("steps", self.steps), ("micro_batch", self.micro_batch), ("save_every", self.save_every)];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(ConfigError::new(*key, "is 0: must be at least 1"));
        }
        if self.warmup >= self.steps {
            let reason = format!("is {}, but must be below the {} steps", self.warmup, self.steps);
            return Err(ConfigError::new("warmup", reason));
        }
        for (key, value) in [("rate", self.rate), ("epsilon", self.epsilon)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(ConfigError::new(key, "must be above 0"));
            }
        }
        for (key, value) in [("kl_weight", self.kl_weight), ("negative_weight", self.negative_weight)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(ConfigError::new(key, "must be 0 or above"));
            }
        }
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(ConfigError::new(key, "must be at least 0 and below 1"));
            }
        }
        self.compare.validate()
    }

    /// The rate of step `step`, from 0: it rises over the warm-up and then falls to zero in a line.
    pub fn rate_of(&self, step: usize) -> f32 {
        self.rate * rise_and_fall(step as f64, self.warmup as f64, self.steps as f64) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_and_falls() {
        let config = TeachConfig { steps: 10, warmup: 2, rate: 1.0, ..TeachConfig::default() };
        let rates: Vec<f32> = (0..10).map(|step| config.rate_of(step)).collect();
        assert_eq!(rates, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_key() {
        TeachConfig::default().validate().unwrap();
        for (text, key) in [
            ("steps = 0", "steps"),
            ("steps = 5", "warmup"),
            ("rate = 0.0", "rate"),
            ("kl_weight = -1.0", "kl_weight"),
            ("beta2 = 1.0", "beta2"),
            ("[compare]\nrank = 0", "compare.rank"),
            ("[compare]\nfull_rates = [0.1, 0.0]", "compare.full_rates"),
            ("[compare]\nkl_weights = [-1.0]", "compare.kl_weights"),
        ] {
            let config: TeachConfig = toml::from_str(text).unwrap();
            assert_eq!(config.validate().unwrap_err().key, key);
        }
        assert!(toml::from_str::<TeachConfig>("[memory]\nlayer = 3").is_err());
    }
}
