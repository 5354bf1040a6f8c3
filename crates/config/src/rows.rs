//! How memory rows learn, and where they live during training.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// How memory rows are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RowTraining {
    /// Learning rate of the rows as a multiple of `optimizer.adam_rate`. The paper uses 5.
    #[serde(default = "default_rate_factor")]
    pub rate_factor: f32,
    /// The rows' optimiser.
    #[serde(default)]
    pub optimizer: RowOptimizerKind,
    /// Decay of the first moment, for `adam`. Default: 0.9.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta1: Option<f64>,
    /// Decay of the second moment, for `adam` and `row_wise_adam`. Default: 0.999.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta2: Option<f64>,
    /// Added to the root of the second moment. Default: 1e-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// Which updates correct the bias of `adam`'s moments. Default: the table's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias_correction: Option<BiasCorrection>,
    /// Where rows and their optimiser's state live.
    #[serde(default)]
    pub storage: RowStorage,
}

/// The rows' optimiser. No optimiser decays rows or clips their gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RowOptimizerKind {
    /// Two moments per value: what the paper trains rows with.
    Adam,
    /// One second moment per row, and no first moment. It ends the quick start at a lower loss than Adam, with a
    /// thirty-second of the state.
    #[default]
    RowWiseAdam,
    /// One moment per value, with steps balanced between rows and columns, as in DeepSeek-V4.1.
    BalancedMomentum,
    /// Rows keep their initial values: a control.
    Frozen,
}

/// Which updates are counted to correct the bias of moments that begin at zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum BiasCorrection {
    /// The table's, as in PyTorch's `SparseAdam`. A row that is first touched late takes longer first steps.
    Table,
    /// The row's own.
    Row,
}

impl RowTraining {
    /// Values of optimiser state for a row of `width` values.
    pub fn state_values(&self, width: u64) -> u64 {
        match (self.optimizer, self.bias_correction) {
            // A count of the row's own updates in addition to its moments.
            (RowOptimizerKind::Adam, Some(BiasCorrection::Row)) => 2 * width + 1,
            (RowOptimizerKind::Adam, Some(BiasCorrection::Table) | None) => 2 * width,
            (RowOptimizerKind::BalancedMomentum, _) => width,
            (RowOptimizerKind::RowWiseAdam, _) => 1,
            (RowOptimizerKind::Frozen, _) => 0,
        }
    }

    /// Refuses impossible values, and settings that the optimiser does not use, named below `train.memory.`.
    ///
    /// # Errors
    /// The first invalid key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |key: &str, reason: String| Err(ConfigError::new(format!("train.memory.{key}"), reason));
        if !(self.rate_factor > 0.0 && self.rate_factor.is_finite()) {
            return refuse("rate_factor", "must be above 0".into());
        }
        use RowOptimizerKind::{Adam, RowWiseAdam};
        let settings: [(&str, bool, &[RowOptimizerKind], &str); 4] = [
            ("beta1", self.beta1.is_some(), &[Adam], "\"adam\" has"),
            ("beta2", self.beta2.is_some(), &[Adam, RowWiseAdam], "\"adam\" and \"row_wise_adam\" have"),
            ("epsilon", self.epsilon.is_some(), &[Adam, RowWiseAdam], "\"adam\" and \"row_wise_adam\" have"),
            ("bias_correction", self.bias_correction.is_some(), &[Adam], "\"adam\" has"),
        ];
        for (key, set, of, who) in settings {
            if set && !of.contains(&self.optimizer) {
                let other = "leave it out, or set `optimizer = \"adam\"`";
                return refuse(key, format!("is a setting that only {who}: {other}"));
            }
        }
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if beta.is_some_and(|beta| !(0.0..1.0).contains(&beta)) {
                return refuse(key, "must be at least 0 and below 1".into());
            }
        }
        match self.epsilon {
            Some(epsilon) if !(epsilon > 0.0 && epsilon.is_finite()) => {
                refuse("epsilon", "must be above 0".into())
            }
            _ => Ok(()),
        }
    }
}

/// Where a table lives while it is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RowStorage {
    /// In RAM, on huge pages if the system supports them.
    #[default]
    Ram,
    /// In a mapped scratch file in the run's folder, for tables larger than RAM.
    Mapped,
}

impl Default for RowTraining {
    fn default() -> Self {
        Self {
            rate_factor: default_rate_factor(),
            optimizer: RowOptimizerKind::default(),
            beta1: None,
            beta2: None,
            epsilon: None,
            bias_correction: None,
            storage: RowStorage::default(),
        }
    }
}

fn default_rate_factor() -> f32 {
    5.0
}
