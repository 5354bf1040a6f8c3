use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use engram_config::{Account, TrainingMemory, load_model_and_training};
use serde::Serialize;

use super::{print, print_json};
use crate::machine_memory::machine_memory;
use crate::number::{bytes, short};
use crate::table::Table;

/// Show parameters, operations per token and memory for training of configurations, side by side.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram params configs/engram-27b.toml
  engram params configs/dense-4b.toml configs/moe-27b.toml configs/engram-27b.toml configs/engram-40b.toml
  engram params configs/quickstart-memory.toml --json")]
pub(crate) struct Params {
    /// Configuration files; only their `[model]` and `[train]` are read.
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
    /// Bytes that training takes, if the file says how it is trained.
    training_memory: Option<Memory>,
}

/// Bytes that training takes; see [`TrainingMemory`].
#[derive(Debug, Serialize)]
struct Memory {
    weights: u64,
    gradients: u64,
    optimizer_state: u64,
    /// Rows and their state; on disk where the storage is "mapped".
    rows: u64,
    rows_in_memory: bool,
    step_rows_at_most: u64,
    activations_estimate: u64,
    total: u64,
    /// Whether this machine has as much; none: it does not say.
    fits: Option<bool>,
}

impl From<TrainingMemory> for Memory {
    fn from(memory: TrainingMemory) -> Self {
        let TrainingMemory { weights, gradients, optimizer, rows, rows_in_memory, step_rows, activations } =
            memory;
        Self {
            weights,
            gradients,
            optimizer_state: optimizer,
            rows,
            rows_in_memory,
            step_rows_at_most: step_rows,
            activations_estimate: activations,
            total: memory.total(),
            fits: machine_memory().map(|machine| memory.total() <= machine),
        }
    }
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
        let (model, train) = load_model_and_training(path)?;
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
            training_memory: train.map(|train| TrainingMemory::of(&model, &train, &account).into()),
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
    let mut part = |label: &str, value: &dyn Fn(&Memory) -> String| {
        row(label, &|costs| costs.training_memory.as_ref().map_or("–".to_owned(), value));
    };
    part("memory for training", &|memory| bytes(memory.total));
    part("  weights", &|memory| bytes(memory.weights));
    part("  gradients", &|memory| bytes(memory.gradients));
    part("  optimiser state", &|memory| bytes(memory.optimizer_state));
    part("  rows and their state", &|memory| match memory.rows_in_memory {
        true => bytes(memory.rows),
        false => format!("{} on disk", bytes(memory.rows)),
    });
    part("  rows of a step, at most", &|memory| bytes(memory.step_rows_at_most));
    part("  activations, estimated", &|memory| bytes(memory.activations_estimate));
    let machine = machine_memory().map_or("unknown".to_owned(), bytes);
    part(&format!("fits this machine ({machine})"), &|memory| match memory.fits {
        Some(true) => "yes".to_owned(),
        Some(false) => "no".to_owned(),
        None => "unknown".to_owned(),
    });
    table
}
