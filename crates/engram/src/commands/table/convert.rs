use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use engram_data::TokenShards;
use engram_store::{Quality, RowFormat, StoreError, TableHeader, convert, table_scale};
use engram_train::{HeldOut, Trained};
use serde::Serialize;

use super::info::TableInfo;
use crate::commands::eval::measure;
use crate::commands::{print, print_json};
use crate::device::DeviceKind;
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::progress::Passage;
use crate::table::Table;

/// Convert a table to another format, and report the rounding errors.
///
/// With --model and --data, also measure the loss with the table before and after.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table convert layer1.table layer1.int8.table --format int8
  engram table convert layer1.table layer1.fp8.table --format fp8e4m3:auto --json
  engram table convert runs/small/checkpoints/step-00001000/memory.layer1.table layer1.int4.table \\
    --format int4 --model runs/small --data data/valid")]
pub(crate) struct Convert {
    /// Table file to read.
    #[arg(value_name = "TABLE")]
    source: PathBuf,
    /// Table file to create. Optimiser state is not copied.
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// f32, bf16, f16, fp8e4m3, int8, int4, fp8e4m3:SCALE, or fp8e4m3:auto, which reads the table twice.
    #[arg(long)]
    format: Format,
    /// Also measure the loss of this checkpoint, or of a run's newest, with both tables.
    #[arg(long, value_name = "CHECKPOINT", requires = "data")]
    model: Option<PathBuf>,
    /// Prepared shards to measure the loss on: one file, or the folder of one split.
    #[arg(long, value_name = "SHARDS", requires = "model")]
    data: Option<PathBuf>,
    /// Measure on only the first N tokens.
    #[arg(long, value_name = "N", requires = "model")]
    tokens: Option<usize>,
    /// Device to compute the loss on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy)]
enum Format {
    Of(RowFormat),
    /// fp8 with the scale at which the table's largest value fits.
    OneScale,
}

impl FromStr for Format {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        if name == "fp8e4m3:auto" { Ok(Self::OneScale) } else { name.parse().map(Self::Of) }
    }
}

/// The result of the conversion.
#[derive(Debug, Serialize)]
struct Report {
    table: TableInfo,
    rows_compared: u64,
    mean_error: f64,
    largest_error: f64,
    /// The row with the largest error.
    largest_error_row: u64,
    /// Root mean square of the errors, divided by that of the values.
    relative_rms_error: f64,
    mean_cosine: f64,
    least_cosine: f64,
    least_cosine_row: u64,
    /// Values too large for the format.
    lost: u64,
    /// Values that were already NaN or infinite.
    not_finite: u64,
    loss: Option<Losses>,
}

/// Held-out loss with the old table and with the new one.
#[derive(Debug, Serialize)]
struct Losses {
    before: HeldOut,
    after: HeldOut,
}

impl Convert {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let header = TableHeader::read(&self.source)?;
        interrupt::listen()?;
        let mut judge = self.judge()?;
        let before = judge.as_mut().map(|judge| judge.loss_with(&self.source)).transpose()?;

        let row_bytes = header.format.bytes_per_row(header.width) as u64;
        let passage = |name| Passage::new(name, header.rows, row_bytes);
        let format = match self.format {
            Format::Of(format) => format,
            Format::OneScale => {
                let mut passage = passage("finding the scale");
                let scale = table_scale(&self.source, &mut |at| passage.show(at.done, at.total))?;
                RowFormat::Fp8E4m3OneScale(scale)
            }
        };
        let mut passage = passage("converting");
        let quality = convert(&self.source, &self.out, format, &mut |at| passage.show(at.done, at.total))?;
        drop(passage);

        let after = judge.as_mut().map(|judge| judge.loss_with(&self.out)).transpose()?;
        let loss = before.zip(after).map(|(before, after)| Losses { before, after });
        let report = Report::new(TableInfo::read(&self.out)?, &quality, loss);
        if self.json { print_json(&report) } else { print(report.to_text(&quality)) }
    }

    fn judge(&self) -> anyhow::Result<Option<Judge>> {
        let (Some(model), Some(data)) = (&self.model, &self.data) else { return Ok(None) };
        let model = Trained::open(model, &self.device.open()?)?;
        let shards = TokenShards::open(data)?;
        Ok(Some(Judge { model, shards, tokens: self.tokens }))
    }
}

/// A model and its evaluation data.
struct Judge {
    model: Trained,
    shards: TokenShards,
    tokens: Option<usize>,
}

impl Judge {
    fn loss_with(&mut self, table: &Path) -> anyhow::Result<HeldOut> {
        self.model.replace_table(table)?;
        measure(&self.model, &self.shards, self.tokens)
    }
}

impl Report {
    fn new(table: TableInfo, quality: &Quality, loss: Option<Losses>) -> Self {
        Self {
            table,
            rows_compared: quality.rows,
            mean_error: quality.mean_error,
            largest_error: quality.largest_error.0,
            largest_error_row: quality.largest_error.1,
            relative_rms_error: quality.relative_rms_error,
            mean_cosine: quality.mean_cosine,
            least_cosine: quality.least_cosine.0,
            least_cosine_row: quality.least_cosine.1,
            lost: quality.lost,
            not_finite: quality.not_finite,
            loss,
        }
    }

    fn to_text(&self, quality: &Quality) -> String {
        let mut text = format!("{}\n{quality}\n", self.table.to_table());
        if let Some(Losses { before, after }) = &self.loss {
            let mut table = Table::new(["held-out loss", "before", "after", "change"]);
            let mut row = |name: &str, value: &dyn Fn(&HeldOut) -> f64| {
                let (before, after) = (value(before), value(after));
                let change = format!("{:+.4}", after - before);
                table.row([name.to_owned(), format!("{before:.4}"), format!("{after:.4}"), change]);
            };
            row("nats per token", &|loss| loss.nats_per_token);
            row("bits per byte", &|loss| loss.bits_per_byte);
            text.push_str(&format!("\n{table}"));
        }
        text
    }
}
