//! The command `engram`: trains, examines and uses language models with conditional memory.
//!
//! Each command parses its options, calls the crates, and prints. Results go to standard output, progress and errors to
//! standard error.

#[cfg(test)]
mod book;
mod commands;
mod common_text;
mod corpus_options;
mod corpus_rows;
mod device;
mod device_probe;
mod failure;
mod files;
mod gate_map;
mod gate_page;
mod gate_text;
mod graft_report;
mod hub;
mod interrupt;
mod json;
mod loss_chart;
mod machine;
mod metrics;
mod neutral_text;
mod note;
mod number;
mod opened_memories;
mod option_values;
mod progress;
mod provenance;
mod random;
mod renamed;
mod run;
mod served;
mod shell;
mod table;
mod taught_memory;
mod teaching_report;
mod terminal;
mod tuned_weights;
mod work_lock;

use std::process::ExitCode;

use clap::Parser;

use commands::Command;

/// Language models with conditional memory: train, study and use them.
///
/// `engram quickstart` trains a model and its baseline, and shows what the memory does.
#[derive(Debug, Parser)]
#[command(name = "engram", version, arg_required_else_help = true, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    // Before the parser, which knows the new names only.
    let run = || {
        let mut arguments = std::env::args_os();
        let program = arguments.next();
        let arguments = renamed::current(arguments.collect())?;
        let Cli { command } = Cli::parse_from(program.into_iter().chain(arguments));
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
