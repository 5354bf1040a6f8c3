//! Commands that look inside a checkpoint.

mod depth;
mod gates;
mod sensitivity;

use clap::Subcommand;

pub(super) use gates::gates;

/// What to inspect.
#[derive(Debug, Subcommand)]
pub(crate) enum Inspect {
    Gates(gates::Gates),
    Depth(depth::Depth),
    Sensitivity(sensitivity::Sensitivity),
}

impl Inspect {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Gates(command) => command.run(),
            Self::Depth(command) => command.run(),
            Self::Sensitivity(command) => command.run(),
        }
    }
}
