//! The command `engram`: trains, examines and uses language models with conditional memory.
//!
//! Thin by design: each command parses, calls the crates, and prints. Results go to standard output, progress and
//! errors to standard error.

mod commands;
mod corpus_options;
mod corpus_rows;
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
mod json;
mod loss_chart;
mod machine;
mod metrics;
mod note;
mod number;
mod progress;
mod provenance;
mod random;
mod renamed;
mod run;
mod served;
mod shell;
mod table;
mod terminal;

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
    // Before the parser, which knows the new names only.
    let arguments = std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned());
    let run = || {
        renamed::check(arguments)?;
        let Cli { command } = Cli::parse();
        command.run()
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = failure::status(&error);
            if status != 0 {
                note::note(format_args!("error: {}", failure::message(&error)));
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
