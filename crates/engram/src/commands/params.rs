use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use engram_config::{Account, RunConfig, TrainingMemory, load_model_config, load_toml};
use serde::Serialize;

use super::{print, print_json};
use crate::machine::Memory;
use crate::number::{bytes, short};
use crate::table::Table;

/// Show parameters, operations per token and training memory of configurations, side by side.
///
/// Training memory is a lower bound, by part. It is shown for files that describe a whole run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram params configs/engram-27b.toml
  engram params configs/dense-4b.toml configs/moe-27b.toml configs/engram-27b.toml configs/engram-40b.toml
  engram params configs/quickstart-memory.toml --json")]
pub(crate) struct Params {
    /// Configuration files; `[model]` is enough.
    #[arg(value_name = "CONFIG", required = true)]
    configs: Vec<PathBuf>,
    /// Print exact numbers as JSON.
    #[arg(long)]
    json: bool,
}

/// Parameters and operations of one configuration.
#[derive(Debug, Serialize)]
struct Costs {
    config: String,
    /// All parameters, memory included.
    total_parameters: u64,
    /// Parameters of the blocks and head that a token uses.
    active_parameters: u64,
    /// All others: inactive experts, memory tables, the embedding.
    sparse_parameters: u64,
    expert_parameters: u64,
    memory_parameters: u64,
    vocabulary_parameters: u64,
    /// Rows of each memory layer's table.
    memory_rows: Vec<u64>,
    memory_rows_per_token: u64,
    forward_flops_per_token: u64,
    training_flops_per_token: u64,
    /// Lower bound of the memory for training in bytes, by part; none for a file with only a model.
    training_memory: Option<TrainingMemory>,
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
        let training_memory = match describes_run(path)? {
            true => Some(TrainingMemory::of(&RunConfig::load(path)?)?),
            false => None,
        };
        Ok(Self {
            config: path.display().to_string(),
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
            training_memory,
        })
    }
}

/// Whether the file describes a whole run, not only a model and not a study.
fn describes_run(path: &Path) -> anyhow::Result<bool> {
    let (_, tables) = load_toml::<toml::Table>(path)?;
    let of_run = ["model", "text", "data", "train"];
    Ok(["data", "train"].iter().all(|key| tables.contains_key(*key))
        && tables.keys().all(|key| of_run.contains(&key.as_str())))
}

fn table(costs: &[Costs]) -> Table {
    let name = |costs: &Costs| {
        let path = Path::new(&costs.config);
        path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
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
    if costs.iter().any(|costs| costs.training_memory.is_some()) {
        let of = |part: &dyn Fn(&TrainingMemory) -> u64, costs: &Costs| {
            costs.training_memory.as_ref().map_or(String::new(), |memory| bytes(part(memory)))
        };
        row("memory for training, at least", &|costs| of(&TrainingMemory::total, costs));
        for (part, name) in TrainingMemory::PARTS.into_iter().enumerate() {
            row(&format!("  {name}"), &|costs| of(&|memory| memory.parts()[part].1, costs));
        }
        if let Some(machine) = Memory::of_this_machine().usable() {
            let fits = |memory: &TrainingMemory| if memory.total() <= machine { "yes" } else { "no" };
            row(&format!("fits this machine ({})", bytes(machine)), &|costs| {
                costs.training_memory.as_ref().map_or(String::new(), |memory| fits(memory).to_owned())
            });
        }
    }
    table
}
