//! Precision of matrix products.

use serde::{Deserialize, Serialize};

/// The precision of matrix products. Weights, residual and optimiser state are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// f32 throughout. On a GPU, operands of products are rounded to TF32 (see docs/results/gpu.md).
    #[default]
    F32,
    /// Operands of matrix products are rounded to bf16. Master weights stay f32.
    Bf16,
}

/// Precision of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PrecisionConfig {
    /// f32 on a CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// f32. On a GPU, operands of products are rounded to TF32.
    F32,
    /// bf16 operands, f32 weights.
    Bf16,
}

impl PrecisionConfig {
    /// The precision for a GPU or another device.
    pub fn resolve(self, gpu: bool) -> Precision {
        match self {
            Self::Bf16 => Precision::Bf16,
            Self::Auto if gpu => Precision::Bf16,
            Self::Auto | Self::F32 => Precision::F32,
        }
    }
}
