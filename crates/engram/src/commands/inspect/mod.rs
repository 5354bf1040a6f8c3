//! Looking inside a checkpoint.

mod depth;
mod gates;

use clap::Subcommand;

pub(super) use gates::gates;

/// What of a checkpoint can be looked at.
#[derive(Debug, Subcommand)]
pub(crate) enum Inspect {
    Gates(gates::Gates),
    Depth(depth::Depth),
}

impl Inspect {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Gates(command) => command.run(),
            Self::Depth(command) => command.run(),
        }
    }
}
