//! The command `engram`: trains, examines and uses language models with conditional memory.
//!
//! Thin by design: each command parses, calls the crates, and prints. Results go to standard output, progress and
//! errors to standard error.

mod commands;
mod corpus_rows;
mod decoded;
mod device;
mod device_probe;
mod failure;
mod files;
mod gate_map;
mod gate_page;
mod gate_text;
mod hit_rate_chart;
mod hub;
mod interrupt;
mod loss_chart;
mod machine;
mod metrics;
mod number;
mod progress;
mod provenance;
mod random;
mod run;
mod served;
mod table;

use std::process::ExitCode;

use clap::Parser;

use commands::Command;

/// Language models with conditional memory: train, study and use them.
///
/// `engram quickstart` trains one beside its baseline and shows what the memory does.
#[derive(Debug, Parser)]
#[command(name = "engram", version, arg_required_else_help = true, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    match command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = failure::status(&error);
            if status != 0 {
                eprintln!("error: {}", failure::message(&error));
            }
            ExitCode::from(status)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
