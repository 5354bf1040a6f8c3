use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use engram_address::AddressIdentity;
use engram_store::{RowFormat, RowOptimizer, TableReader};
use serde::Serialize;

use crate::commands::{print, print_json};
use crate::number::bytes;
use crate::table::Table;

/// Show the header of a table file: rows, format, addressing, size, and content hash.
///
/// Checks the header, the length and the list of checksums, but reads no rows; `engram table verify` does.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table info layer1.table
  engram table info runs/small/checkpoints/step-00001000/memory.layer1.table --json")]
pub(crate) struct Info {
    /// Table file.
    table: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Facts about a table file.
#[derive(Debug, Serialize)]
pub(super) struct TableInfo {
    table: PathBuf,
    rows: u64,
    width: usize,
    format: RowFormat,
    bytes_per_row: usize,
    file_bytes: u64,
    layer: u64,
    identity: AddressIdentity,
    training: Option<Training>,
    /// Content hash, in hexadecimal.
    content: String,
}

/// Optimiser state behind the rows.
#[derive(Debug, Serialize)]
struct Training {
    optimizer: RowOptimizer,
    step: u64,
}

impl Info {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        TableInfo::read(&self.table)?.print(self.json)
    }
}

impl TableInfo {
    /// Reads the header of the file at `path`.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let reader = TableReader::open(path)?;
        let header = reader.header();
        let metadata = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            table: path.to_owned(),
            rows: header.rows,
            width: header.width,
            format: header.format,
            bytes_per_row: header.format.bytes_per_row(header.width),
            file_bytes: metadata.len(),
            layer: header.origin.layer,
            identity: header.origin.identity,
            training: header.training.map(|(optimizer, step)| Training { optimizer, step }),
            content: reader.content().to_string(),
        })
    }

    /// Prints the facts as text or as JSON.
    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json { print_json(self) } else { print(self.to_table().to_string()) }
    }

    pub(super) fn to_table(&self) -> Table {
        let mut table = Table::new([self.table.display().to_string().as_str(), ""]);
        table.row(["rows".to_owned(), self.rows.to_string()]);
        table.row(["values per row".to_owned(), self.width.to_string()]);
        table.row(["format".to_owned(), self.format.to_string()]);
        table.row(["bytes per row".to_owned(), self.bytes_per_row.to_string()]);
        table.row(["file".to_owned(), bytes(self.file_bytes)]);
        table.row(["layer".to_owned(), self.layer.to_string()]);
        table.row(["addressing".to_owned(), self.identity.to_string()]);
        if let Some(Training { optimizer, step }) = &self.training {
            let name = match optimizer {
                RowOptimizer::Adam { .. } => "Adam",
                RowOptimizer::AdamByRow { .. } => "Adam by row",
                RowOptimizer::RowWiseAdam { .. } => "row-wise Adam",
                RowOptimizer::BalancedMomentum { .. } => "balanced momentum",
                RowOptimizer::Frozen => "none, frozen",
                _ => "another",
            };
            table.row(["optimiser state".to_owned(), format!("{name}, step {step}")]);
        }
        table.row(["content".to_owned(), self.content.clone()]);
        table
    }
}
