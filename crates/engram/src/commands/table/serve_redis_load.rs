use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use engram_store::{RedisTable, RowSource, TableHeader};
use serde::Serialize;

use super::tier::ClusterOptions;
use crate::commands::{print, print_json};
use crate::interrupt;
use crate::number::{bytes, short};
use crate::progress::Passage;

/// Copy a table's rows to a Redis Cluster, which serves them to any number of machines.
///
/// Checks the file while copying. Readers see the table only when all its rows are there. Loading the same file again
/// changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table serve-redis-load layer1.table --node redis://127.0.0.1:7000
  engram table bench layer1.table --tier redis --node redis://127.0.0.1:7000 --batch 512")]
pub(crate) struct ServeRedisLoad {
    /// Table file.
    table: PathBuf,
    #[command(flatten)]
    cluster: ClusterOptions,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A table in the cluster.
#[derive(Debug, Serialize)]
struct Loaded {
    table: PathBuf,
    rows: u64,
    bytes_per_row: usize,
    content: String,
    seconds: f64,
}

impl ServeRedisLoad {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (nodes, limit) = (self.cluster.nodes()?, self.cluster.limit()?);
        let header = TableHeader::read(&self.table)?;
        interrupt::listen()?;
        let bytes_per_row = header.format.bytes_per_row(header.width);
        let mut passage = Passage::new("loading", header.rows, bytes_per_row as u64);
        let begun = Instant::now();
        let table = RedisTable::load(&self.table, &nodes, limit, &mut |at| passage.show(at.done, at.total))?;
        let (rows, seconds) = (table.rows(), begun.elapsed().as_secs_f64());
        let content = table.content().to_string();
        if self.json {
            return print_json(&Loaded { table: self.table, rows, bytes_per_row, content, seconds });
        }
        print(format!(
            "{}: {rows} rows, {}, content {content}, are in the cluster; {} rows/s\n",
            self.table.display(),
            bytes(rows * bytes_per_row as u64),
            short((rows as f64 / seconds) as u64),
        ))
    }
}
