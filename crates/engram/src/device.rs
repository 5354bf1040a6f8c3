//! The device to compute on.

use burn::tensor::Device;
use clap::ValueEnum;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceKind {
    /// The CPU, in f32.
    Cpu,
    /// The first NVIDIA GPU, in bf16 with f32 weights. Needs a build with `--features cuda`.
    Cuda,
}

impl DeviceKind {
    /// Its name for `--device`.
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
                "--device cuda: built without CUDA; build with `cargo build --release --features cuda`",
            ),
        }
    }
}
