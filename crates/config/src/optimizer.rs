//! Rates and constants of Muon and Adam.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Rates and constants of both optimisers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak rate of the matrices, trained by Muon.
    #[serde(default = "default_muon_rate")]
    pub muon_rate: f32,
    /// Peak rate of embeddings, head, norms and everything else, trained by Adam.
    #[serde(default = "default_adam_rate")]
    pub adam_rate: f32,
    /// Muon's momentum.
    #[serde(default = "default_momentum")]
    pub momentum: f32,
    /// Adam's decay of the first and second moment.
    #[serde(default = "default_betas")]
    pub betas: [f32; 2],
    /// Adam's epsilon.
    #[serde(default = "default_epsilon")]
    pub epsilon: f32,
    /// Whether Muon orthogonalises the projections of each attention head separately. Default: all heads together.
    #[serde(default, skip_serializing_if = "is_false")]
    pub muon_heads_apart: bool,
    /// Decoupled weight decay of the matrices that Muon trains, per unit of rate.
    #[serde(default = "default_decay")]
    pub weight_decay: f32,
    /// Decoupled weight decay of the embedding, head and other matrices that Adam trains, per unit of rate. Norms,
    /// biases and scales do not decay.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub adam_weight_decay: f32,
    /// Maximum global norm of the weights' gradient, without memory rows. Larger gradients are scaled down.
    #[serde(default = "default_clip")]
    pub clip: f32,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            muon_rate: default_muon_rate(),
            adam_rate: default_adam_rate(),
            momentum: default_momentum(),
            betas: default_betas(),
            epsilon: default_epsilon(),
            muon_heads_apart: false,
            weight_decay: default_decay(),
            adam_weight_decay: 0.0,
            clip: default_clip(),
        }
    }
}

fn default_muon_rate() -> f32 {
    4e-3
}
fn default_adam_rate() -> f32 {
    4e-3
}
fn default_momentum() -> f32 {
    0.95
}
fn default_betas() -> [f32; 2] {
    [0.9, 0.95]
}
fn default_epsilon() -> f32 {
    1e-8
}
fn default_decay() -> f32 {
    0.1
}
fn default_clip() -> f32 {
    1.0
}

fn is_false(value: &bool) -> bool {
    !value
}
fn is_zero(value: &f32) -> bool {
    *value == 0.0
}

impl OptimizerConfig {
    /// Refuses impossible values, named below `train.optimizer.`.
    ///
    /// # Errors
    /// The first invalid key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse =
            |key: &str, reason: &str| Err(ConfigError::new(format!("train.optimizer.{key}"), reason));
        let positive = |value: f32| value > 0.0 && value.is_finite();
        let fraction = |value: f32| (0.0..1.0).contains(&value);
        if !positive(self.muon_rate) {
            return refuse("muon_rate", "must be above 0");
        }
        if !positive(self.adam_rate) {
            return refuse("adam_rate", "must be above 0");
        }
        if !fraction(self.momentum) {
            return refuse("momentum", "must lie in 0..1");
        }
        if !self.betas.iter().all(|&beta| fraction(beta)) {
            return refuse("betas", "must both lie in 0..1");
        }
        if !positive(self.epsilon) {
            return refuse("epsilon", "must be above 0");
        }
        for (key, decay) in
            [("weight_decay", self.weight_decay), ("adam_weight_decay", self.adam_weight_decay)]
        {
            if !(decay >= 0.0 && decay.is_finite()) {
                return refuse(key, "must be at least 0");
            }
        }
        if !positive(self.clip) {
            return refuse("clip", "must be above 0");
        }
        Ok(())
    }
}
