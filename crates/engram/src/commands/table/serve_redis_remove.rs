use clap::Args;
use engram_store::{ContentHash, RedisTable, StoredContent, TableOrigin};
use serde::Serialize;

use super::origin::OriginOptions;
use super::tier::ClusterOptions;
use crate::commands::{print, print_json};
use crate::failure::refuse;
use crate::interrupt;
use crate::number::short;
use crate::progress::Passage;
use crate::table::Table;

/// Show or remove a table's rows in a Redis Cluster.
///
/// Loading a table under another's name keeps the old rows, because programs may still read them. Without --all,
/// --superseded or --content this command removes nothing and shows what is there.
///
/// Programs that have a removed table open get errors from then on, never wrong rows. After an interruption, run the
/// command again.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table serve-redis-remove --node redis://127.0.0.1:7000 --checkpoint runs/small --layer 1
  engram table serve-redis-remove --node redis://127.0.0.1:7000 --checkpoint runs/small --layer 1 --superseded
  engram table serve-redis-remove --node redis://127.0.0.1:7000 --identity $(printf %064d 7) --layer 1 --all")]
pub(crate) struct ServeRedisRemove {
    #[command(flatten)]
    origin: OriginOptions,
    #[command(flatten)]
    cluster: ClusterOptions,
    /// Remove all rows of the layer, including those of the current table.
    #[arg(long, conflicts_with_all = ["superseded", "content"])]
    all: bool,
    /// Remove rows that another table replaced, or whose loading never finished.
    #[arg(long, conflicts_with = "content")]
    superseded: bool,
    /// Remove the rows of the table file with this content hash (see `engram table info`).
    #[arg(long, value_name = "HEX")]
    content: Option<ContentHash>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A table in the cluster, or one that was removed from it.
#[derive(Debug, Serialize)]
struct Content {
    content: String,
    /// Redis values that hold its rows.
    values: u64,
    /// Whether readers could open it.
    offered: bool,
    removed: bool,
}

impl ServeRedisRemove {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (nodes, limit) = (self.cluster.nodes()?, self.cluster.limit()?);
        let origin = self.origin.load()?.origin;
        interrupt::listen()?;
        let before = RedisTable::contents(&nodes, &origin, limit)?;
        if let Some(wanted) = self.content.filter(|wanted| before.iter().all(|own| own.content != *wanted)) {
            return refuse(format!("the cluster holds no rows of {origin} with the content {wanted}"));
        }
        let wanted = |own: &StoredContent| match self.content {
            Some(content) => own.content == content,
            None => self.all || (self.superseded && !own.offered),
        };
        if before.iter().any(wanted) {
            let total = before.iter().filter(|own| wanted(own)).map(|own| own.values).sum();
            let mut passage = Passage::new("removing", total, 1);
            RedisTable::remove(&nodes, &origin, wanted, limit, &mut |at| passage.show(at.done, at.total))?;
        }
        let contents: Vec<Content> = before.iter().map(|own| Content::new(own, wanted(own))).collect();
        if self.json { print_json(&contents) } else { print(text(&origin, &contents)) }
    }
}

impl Content {
    fn new(own: &StoredContent, removed: bool) -> Self {
        Self { content: own.content.to_string(), values: own.values, offered: own.offered, removed }
    }
}

fn text(origin: &TableOrigin, contents: &[Content]) -> String {
    if contents.is_empty() {
        return format!("the cluster holds no rows of {origin}\n");
    }
    let mut table = Table::new(["content", "values", "state"]);
    for Content { content, values, offered, removed } in contents {
        let state = match (removed, offered) {
            (true, _) => "removed",
            (false, true) => "offered",
            (false, false) => "superseded",
        };
        table.row([content.clone(), short(*values), state.to_owned()]);
    }
    table.to_string()
}
