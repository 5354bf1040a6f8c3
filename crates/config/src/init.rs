//! The size of a model's initial weights.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// Standard deviations of the initial weights. Norms start at one, biases at zero.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// Token embedding.
    #[serde(default = "default_embedding")]
    pub embedding: f32,
    /// Untied output head.
    #[serde(default = "default_embedding")]
    pub head: f32,
    /// Projections of attention, feed-forward and experts, times the root of their number of inputs.
    #[serde(default = "default_projection")]
    pub projection: f32,
    /// Like `projection`, for those that write to the residual stream. Default: 1/√(2·blocks), so that their sum does
    /// not grow with depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<f32>,
}

fn default_embedding() -> f32 {
    0.02
}
fn default_projection() -> f32 {
    1.0
}

impl Default for InitConfig {
    fn default() -> Self {
        Self {
            embedding: default_embedding(),
            head: default_embedding(),
            projection: default_projection(),
            output: None,
        }
    }
}

impl InitConfig {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let deviations = [
            ("embedding", Some(self.embedding)),
            ("head", Some(self.head)),
            ("projection", Some(self.projection)),
            ("output", self.output),
        ];
        let wrong = |deviation: &f32| !(*deviation >= 0.0 && deviation.is_finite());
        match deviations.iter().find(|(_, deviation)| deviation.as_ref().is_some_and(wrong)) {
            Some((key, _)) => Err(ConfigError::new(format!("model.init.{key}"), "must be at least 0")),
            None => Ok(()),
        }
    }
}
