//! How memory rows learn, and where they live meanwhile.

use serde::{Deserialize, Serialize};

/// How memory rows are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowTraining {
    /// The rows' rate as a multiple of the weights' (`optimizer.adam_rate`); the paper takes 5.
    #[serde(default = "default_rate_factor")]
    pub rate_factor: f32,
    /// The rows' optimiser.
    #[serde(default)]
    pub optimizer: RowOptimizerKind,
    /// Where rows and their optimiser's state live.
    #[serde(default)]
    pub storage: RowStorage,
}

/// The rows' optimiser. Neither decays rows nor clips their gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowOptimizerKind {
    /// Two moments per value.
    #[default]
    Adam,
    /// One second moment per row.
    RowWiseAdam,
    /// One moment per value, with steps balanced between rows and columns, as DeepSeek-V4.1's tables learn.
    BalancedMomentum,
    /// Rows stay as they were drawn: a control.
    Frozen,
}

/// Where a table being trained lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowStorage {
    /// In memory, on huge pages where the system has them.
    #[default]
    Ram,
    /// In a mapped scratch file in the run's folder, for tables larger than memory.
    Mapped,
}

impl Default for RowTraining {
    fn default() -> Self {
        Self {
            rate_factor: default_rate_factor(),
            optimizer: RowOptimizerKind::default(),
            storage: RowStorage::default(),
        }
    }
}

fn default_rate_factor() -> f32 {
    5.0
}
