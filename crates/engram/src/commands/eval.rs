mod compare;
mod facts;
mod ruler;
mod tasks;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use engram_data::TokenShards;
use engram_eval::tasks::Measure;
use engram_train::{HeldOut, Trained};

use super::{print, print_json};
use crate::device::DeviceKind;
use crate::interrupt;
use crate::number::short;
use crate::progress::Progress;
use crate::table::Table;

/// Ways to evaluate a checkpoint.
#[derive(Debug, Subcommand)]
pub(crate) enum Eval {
    Loss(Loss),
    Tasks(tasks::Tasks),
    Compare(compare::Compare),
    Ruler(ruler::Ruler),
    Facts(facts::Facts),
}

/// Measure a checkpoint's loss on token shards, in nats per token and bits per byte.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval loss runs/small data/valid
  engram eval loss runs/small data/valid --without-memory
  engram eval loss runs/small/checkpoints/step-00001000 data/valid --tokens 100000 --json")]
pub(crate) struct Loss {
    /// A checkpoint, or a run's folder (its newest checkpoint is used).
    checkpoint: PathBuf,
    /// Prepared shards: one file, or the folder of one split.
    shards: PathBuf,
    /// Maximum number of tokens to predict, in whole windows spread evenly over the text.
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Switch the memory off.
    #[arg(long)]
    without_memory: bool,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Eval {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Loss(command) => command.run(),
            Self::Tasks(command) => command.run(),
            Self::Compare(command) => command.run(),
            Self::Ruler(command) => command.run(),
            Self::Facts(command) => command.run(),
        }
    }
}

impl Loss {
    fn run(self) -> anyhow::Result<()> {
        let mut model = Trained::open(&self.checkpoint, &self.device.open()?)?;
        if self.without_memory {
            model.switch_memory_off()?;
        }
        let shards = TokenShards::open(&self.shards)?;
        interrupt::listen()?;
        let loss = measure(&model, &shards, self.tokens)?;
        if self.json {
            return print_json(&loss);
        }
        let mut table = Table::new(["held-out loss", ""]);
        table.row(["nats per token".to_owned(), format!("{:.4}", loss.nats_per_token)]);
        table.row(["bits per byte".to_owned(), format!("{:.4}", loss.bits_per_byte)]);
        table.row(["tokens predicted".to_owned(), loss.tokens.to_string()]);
        table.row(["bytes of text".to_owned(), loss.bytes.to_string()]);
        print(table.to_string())
    }
}

/// A measure's value and its standard error; accuracies in per cent.
fn with_error(measure: Measure, value: f64, error: Option<f64>) -> (String, String) {
    let text = |value: f64| match measure.is_accuracy() {
        true => format!("{:.2} %", 100.0 * value),
        false => format!("{value:.4}"),
    };
    (text(value), error.map_or(String::new(), text))
}

/// Measures the loss and shows progress.
pub(super) fn measure(
    model: &Trained,
    shards: &TokenShards,
    limit: Option<usize>,
) -> anyhow::Result<HeldOut> {
    let mut progress = Progress::new(shards.len());
    let mut report = |done: u64, total: u64| {
        progress.show(done, || format!("evaluating: {} of {} tokens", short(done), short(total)));
        !interrupt::asked()
    };
    Ok(model.evaluate(shards, limit, &mut report)?)
}
