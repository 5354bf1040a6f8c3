use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use engram_store::TableReader;
use serde::Serialize;

use crate::commands::{print, print_json};
use crate::interrupt;
use crate::number::bytes;
use crate::progress::Passage;

/// Check every byte of table files against their checksums.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table verify layer1.table layer14.table
  engram table verify runs/small/checkpoints/step-00001000/memory.layer1.table --json")]
pub(crate) struct Verify {
    /// Table files.
    #[arg(value_name = "TABLE", required = true)]
    tables: Vec<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// An intact table.
#[derive(Debug, Serialize)]
struct Verified {
    table: PathBuf,
    rows: u64,
    /// Bytes of rows and state read.
    bytes: u64,
    content: String,
}

impl Verify {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        interrupt::listen()?;
        let verified = self.tables.into_iter().map(verify).collect::<anyhow::Result<Vec<_>>>()?;
        if self.json {
            return print_json(&verified);
        }
        let line = |Verified { table, rows, bytes: read, content }: &Verified| {
            format!("{}: intact, {rows} rows, {}, content {content}\n", table.display(), bytes(*read))
        };
        print(verified.iter().map(line).collect::<String>())
    }
}

fn verify(table: PathBuf) -> anyhow::Result<Verified> {
    let reader = TableReader::open(&table)?;
    let file = std::fs::metadata(&table).with_context(|| format!("cannot read {}", table.display()))?;
    let mut passage = Passage::new("verifying", file.len(), 1);
    let mut read = 0;
    reader.verify(&mut |at| {
        read = at.total;
        passage.show(at.done, at.total)
    })?;
    let (rows, content) = (reader.header().rows, reader.content().to_string());
    Ok(Verified { table, rows, bytes: read, content })
}
