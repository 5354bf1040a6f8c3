//! The device that computes.

use burn::tensor::Device;
use clap::ValueEnum;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceKind {
    /// The processor, in f32.
    Cpu,
    /// The first NVIDIA GPU, in bf16 with f32 weights; needs a build with `--features cuda`.
    Cuda,
}

impl DeviceKind {
    /// As `--device` has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// The device.
    pub(crate) fn open(self) -> anyhow::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Ok(Device::cuda(0)),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda => crate::failure::refuse(
                "--device cuda: this engram was built without it; build with `cargo build --release --features cuda`",
            ),
        }
    }
}
