//! Tables of memory rows: one file per command.

mod bench;
mod convert;
mod create;
mod export;
mod import;
mod info;
mod origin;
mod plan;
mod serve_redis_load;
mod serve_redis_remove;
mod stats;
pub(crate) mod tier;
mod verify;

use clap::Subcommand;

/// Commands for tables.
#[derive(Debug, Subcommand)]
pub(crate) enum Table {
    Create(create::Create),
    Info(info::Info),
    Verify(verify::Verify),
    Convert(convert::Convert),
    Import(import::Import),
    Export(export::Export),
    Stats(stats::Stats),
    Bench(bench::Bench),
    Plan(plan::Plan),
    ServeRedisLoad(serve_redis_load::ServeRedisLoad),
    ServeRedisRemove(serve_redis_remove::ServeRedisRemove),
}

impl Table {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(command) => command.run(),
            Self::Info(command) => command.run(),
            Self::Verify(command) => command.run(),
            Self::Convert(command) => command.run(),
            Self::Import(command) => command.run(),
            Self::Export(command) => command.run(),
            Self::Stats(command) => command.run(),
            Self::Bench(command) => command.run(),
            Self::Plan(command) => command.run(),
            Self::ServeRedisLoad(command) => command.run(),
            Self::ServeRedisRemove(command) => command.run(),
        }
    }
}
