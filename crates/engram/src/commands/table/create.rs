use std::path::PathBuf;

use clap::Args;
use engram_store::{RowFormat, RowInit, TableWriter};

use super::info::TableInfo;
use super::origin::OriginOptions;
use crate::failure::refuse;
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::progress::Passage;

/// Create a table of zeros or normally distributed values. Memory use does not depend on the table's size.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table create layer1.table --config configs/quickstart-memory.toml --tokenizer tokenizer.json
  engram table create layer1.table --preset v41 --tokenizer tokenizer.json --layer 1
  engram table create big.table --identity $(printf %064d 7) --layer 1 --rows 130150525 --width 256 \\
    --format fp8e4m3 --deviation 0.02")]
pub(crate) struct Create {
    /// Table file to create.
    #[arg(value_name = "TABLE")]
    out: PathBuf,
    #[command(flatten)]
    origin: OriginOptions,
    /// Number of rows. Needed without an addressing that gives it.
    #[arg(long, value_name = "N")]
    rows: Option<u64>,
    /// Values per row. Needed without a configuration that gives it.
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Layout of a row: f32, bf16, f16, fp8e4m3, int8, int4, or fp8e4m3:SCALE. The default is the preset's, or f32.
    #[arg(long)]
    format: Option<RowFormat>,
    /// Standard deviation of the values; 0 writes zeros. The default is the configuration's, or 0.
    #[arg(long, value_name = "D")]
    deviation: Option<f32>,
    /// Seed of the values. A training run with the same seed starts with the same rows.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Create {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let origin = self.origin.load()?;
        let own = origin.loaded.as_ref().map(|loaded| loaded.rows);
        let rows = one("rows", self.rows, origin.rows)?;
        let width = one("width", self.width, own.map(|own| own.width))?;
        let deviation = self.deviation.or(own.map(|own| own.deviation)).unwrap_or(0.0);
        let format = self.format.or(own.map(|own| own.format)).unwrap_or(RowFormat::F32);
        if !(deviation.is_finite() && deviation >= 0.0) {
            return refuse(format!("--deviation is {deviation}, but must be at least 0"));
        }
        let seed = self.seed.wrapping_add(origin.origin.layer);
        let init = match deviation {
            0.0 => RowInit::Zeros,
            deviation => RowInit::Normal { deviation, seed },
        };
        interrupt::listen()?;
        let mut writer = TableWriter::create(&self.out, rows, width, format, origin.origin)?;
        let mut passage = Passage::new("writing", rows, format.bytes_per_row(width) as u64);
        writer.fill(|id, row| init.fill(id, row), &mut |at| passage.show(at.done, at.total))?;
        writer.finish()?;
        drop(passage);
        TableInfo::read(&self.out)?.print(self.json)
    }
}

/// The given number, or the one that the addressing implies. If both exist, they must be equal.
fn one<T: PartialEq + std::fmt::Display>(
    name: &str,
    given: Option<T>,
    follows: Option<T>,
) -> anyhow::Result<T> {
    match (given, follows) {
        (Some(given), Some(follows)) if given != follows => {
            refuse(format!("--{name} {given}: the addressing says {follows}; leave the option out"))
        }
        (Some(value), _) | (None, Some(value)) => Ok(value),
        (None, None) => refuse(format!("--{name} is missing, and no configuration gives it")),
    }
}
