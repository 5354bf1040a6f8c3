use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use engram_config::{Account, load_model_config};
use serde::Serialize;

use super::{print, print_json};
use crate::number::short;
use crate::table::Table;

/// Show parameters and operations per token of configurations, side by side.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram params configs/engram-27b.toml
  engram params configs/dense-4b.toml configs/moe-27b.toml configs/engram-27b.toml configs/engram-40b.toml
  engram params configs/quickstart-memory.toml --json")]
pub(crate) struct Params {
    /// Configuration files; only their `[model]` is read.
    #[arg(value_name = "CONFIG", required = true)]
    configs: Vec<PathBuf>,
    /// Print exact numbers as JSON.
    #[arg(long)]
    json: bool,
}

/// Parameters and operations of one configuration.
#[derive(Debug, Serialize)]
struct Costs {
    config: PathBuf,
    /// All parameters, memory included.
    total_parameters: u64,
    /// Those of the blocks and head that a token meets.
    active_parameters: u64,
    /// All others: resting experts, memory tables, the embedding.
    sparse_parameters: u64,
    expert_parameters: u64,
    memory_parameters: u64,
    vocabulary_parameters: u64,
    /// Rows of each memory layer's table.
    memory_rows: Vec<u64>,
    memory_rows_per_token: u64,
    forward_flops_per_token: u64,
    training_flops_per_token: u64,
}

impl Params {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let costs = self.configs.iter().map(|path| Costs::load(path)).collect::<anyhow::Result<Vec<_>>>()?;
        if self.json { print_json(&costs) } else { print(table(&costs).to_string()) }
    }
}

impl Costs {
    fn load(path: &Path) -> anyhow::Result<Self> {
        let model = load_model_config(path)?;
        let memory_rows = model.table_rows().with_context(|| path.display().to_string())?;
        let account = Account::of(&model, &memory_rows);
        Ok(Self {
            config: path.to_owned(),
            total_parameters: account.total,
            active_parameters: account.active,
            sparse_parameters: account.sparse(),
            expert_parameters: account.experts,
            memory_parameters: account.memory,
            vocabulary_parameters: account.vocabulary,
            memory_rows,
            memory_rows_per_token: account.rows_per_token,
            forward_flops_per_token: account.forward_flops,
            training_flops_per_token: account.training_flops(),
        })
    }
}

fn table(costs: &[Costs]) -> Table {
    let name = |costs: &Costs| {
        let name = costs.config.file_stem().unwrap_or(costs.config.as_os_str());
        name.to_string_lossy().into_owned()
    };
    let mut table = Table::new(std::iter::once("parameters".to_owned()).chain(costs.iter().map(name)));
    let mut row = |label: &str, value: &dyn Fn(&Costs) -> String| {
        table.row(std::iter::once(label.to_owned()).chain(costs.iter().map(value)));
    };
    row("total", &|costs| short(costs.total_parameters));
    row("active per token", &|costs| short(costs.active_parameters));
    row("sparse", &|costs| short(costs.sparse_parameters));
    row("  routed experts", &|costs| short(costs.expert_parameters));
    row("  memory", &|costs| short(costs.memory_parameters));
    row("embedding and head", &|costs| short(costs.vocabulary_parameters));
    row("memory rows", &|costs| short(costs.memory_rows.iter().sum()));
    row("memory rows per token", &|costs| costs.memory_rows_per_token.to_string());
    row("FLOPs per token, forward", &|costs| short(costs.forward_flops_per_token));
    row("FLOPs per token, training", &|costs| short(costs.training_flops_per_token));
    table
}
