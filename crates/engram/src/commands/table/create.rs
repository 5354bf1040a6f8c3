use std::path::PathBuf;

use clap::Args;
use engram_store::{RowFormat, RowInit, TableWriter};

use super::info::TableInfo;
use super::origin::OriginOptions;
use crate::failure::refuse;
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::progress::Passage;

/// Make a table of zeros or of normal values, row by row, in memory that does not depend on its size.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table create layer1.table --config configs/quickstart-memory.toml --tokenizer tokenizer.json
  engram table create layer1.table --preset v41 --tokenizer tokenizer.json --layer 1
  engram table create big.table --identity $(printf %064d 7) --layer 1 --rows 130150525 --width 256 \\
    --format fp8e4m3 --deviation 0.02")]
pub(crate) struct Create {
    /// Table file to make.
    #[arg(value_name = "TABLE")]
    out: PathBuf,
    #[command(flatten)]
    origin: OriginOptions,
    /// Rows, where no addressing says how many.
    #[arg(long, value_name = "N")]
    rows: Option<u64>,
    /// Values per row, where no configuration says how many.
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Layout of a row: f32, bf16, f16, fp8e4m3, int8, int4, or fp8e4m3:SCALE. If not given, the preset's, or
    /// f32.
    #[arg(long)]
    format: Option<RowFormat>,
    /// Standard deviation of the values; 0: zeros. If not given, the configuration's, or 0.
    #[arg(long, value_name = "D")]
    deviation: Option<f32>,
    /// Seed of the values; a run of the same seed begins with the same rows.
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
            return refuse(format!("--deviation is {deviation}, but must be 0 or above"));
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

/// The number that is given, or that follows; both only if they are equal.
fn one<T: PartialEq + std::fmt::Display>(
    name: &str,
    given: Option<T>,
    follows: Option<T>,
) -> anyhow::Result<T> {
    match (given, follows) {
        (Some(given), Some(follows)) if given != follows => {
            refuse(format!("--{name} {given}: the addressing's rows say {follows}; leave it out"))
        }
        (Some(value), _) | (None, Some(value)) => Ok(value),
        (None, None) => refuse(format!("say how many with --{name}: no configuration does")),
    }
}
