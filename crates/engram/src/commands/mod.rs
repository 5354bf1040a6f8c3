//! One file per command.

mod addressing;
mod asking;
pub(crate) mod chat;
mod completions;
mod data;
mod divided_corpus;
mod eval;
mod export;
mod generate;
mod graft;
mod import;
mod inspect;
mod overlay;
mod params;
mod quickstart;
mod rows;
mod serve;
mod study;
mod study_graft;
pub(crate) mod table;
mod teach;
mod tokenizer;
mod train;

use std::io::{IsTerminal, Read, Write};

use anyhow::Context;
use clap::Subcommand;
use serde::Serialize;

use crate::failure::refuse;

/// The commands of `engram`. Each is described in its own file.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Quickstart(quickstart::Quickstart),
    /// Train a tokenizer.
    #[command(subcommand)]
    Tokenizer(tokenizer::Tokenizer),
    /// Turn a corpus into token shards.
    #[command(subcommand)]
    Data(data::Data),
    Train(train::Train),
    Graft(graft::Graft),
    Teach(teach::Teach),
    Import(import::Import),
    Export(export::Export),
    Params(params::Params),
    Rows(rows::Rows),
    /// Evaluate a checkpoint: its loss, and its answers to tasks.
    #[command(subcommand)]
    Eval(eval::Eval),
    Generate(generate::Generate),
    Chat(chat::Chat),
    Serve(serve::Serve),
    Study(study::Study),
    /// Create, check, convert and study tables of memory rows.
    #[command(subcommand)]
    Table(table::Table),
    /// Keep edits of a table in a small file of changed rows.
    #[command(subcommand)]
    Overlay(overlay::Overlay),
    /// Look inside a checkpoint.
    #[command(subcommand)]
    Inspect(inspect::Inspect),
    Completions(completions::Completions),
    Man(completions::Man),
}

impl Command {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Quickstart(command) => command.run(),
            Self::Tokenizer(command) => command.run(),
            Self::Data(command) => command.run(),
            Self::Train(command) => command.run(),
            Self::Graft(command) => command.run(),
            Self::Teach(command) => command.run(),
            Self::Import(command) => command.run(),
            Self::Export(command) => command.run(),
            Self::Params(command) => command.run(),
            Self::Rows(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Generate(command) => command.run(),
            Self::Chat(command) => command.run(),
            Self::Serve(command) => command.run(),
            Self::Study(command) => command.run(),
            Self::Table(command) => command.run(),
            Self::Overlay(command) => command.run(),
            Self::Inspect(command) => command.run(),
            Self::Completions(command) => command.run(),
            Self::Man(command) => command.run(),
        }
    }
}

/// The text of an argument, or of standard input if the argument is `-` or missing.
fn text_or_stdin(argument: Option<&str>) -> anyhow::Result<String> {
    let mut input = std::io::stdin();
    match argument {
        Some(text) if text != "-" => return Ok(text.to_owned()),
        None if input.is_terminal() => {
            return refuse("no text: give it as an argument, or on standard input");
        }
        _ => {}
    }
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).context("cannot read standard input")?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => refuse(format!(
            "standard input: invalid UTF-8 at byte {}; convert the text to UTF-8",
            error.utf8_error().valid_up_to()
        )),
    }
}

/// Writes to standard output.
fn print(text: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_ref()).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// Writes `value` to standard output as JSON.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = crate::json::pretty(value)?;
    text.push('\n');
    print(text)
}
