//! Overlays: small files of changed rows for a table that is only read.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use engram_store::{
    MapOptions, Overlaid, Overlay as OverlayFile, OverlayWriter, QualityMeter, RowSource, Table, TableReader,
};
use serde::Serialize;

use super::{print, print_json};
use crate::failure::refuse;
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::number::bytes;
use crate::progress::Passage;
use crate::table::Table as TextTable;

/// What can be done with overlays.
#[derive(Debug, Subcommand)]
pub(crate) enum Overlay {
    Create(Create),
    Info(Info),
    Diff(Diff),
    Merge(Merge),
    Drop(Drop),
}

/// A table, and the overlays on it.
#[derive(Debug, Args)]
struct Stack {
    /// Table file below all overlays.
    #[arg(long, value_name = "TABLE")]
    table: PathBuf,
    /// Overlays on it, from the lowest to the topmost.
    #[arg(long = "below", value_name = "OVERLAY", num_args = 1..)]
    overlays: Vec<PathBuf>,
}

/// Make an overlay of the rows in which an edited table differs from another, or from one under overlays.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram overlay create edits.overlay --table layer1.table --edited edited.table
  engram overlay create more.overlay --table layer1.table --below edits.overlay --edited again.table")]
pub(crate) struct Create {
    /// Overlay to make.
    #[arg(value_name = "OVERLAY")]
    out: PathBuf,
    #[command(flatten)]
    stack: Stack,
    /// Table file with the rows as they are to be: of the same shape, format and addressing.
    #[arg(long, value_name = "TABLE")]
    edited: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Show what an overlay changes, and what it was made for. The file is checked whole.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram overlay info edits.overlay
  engram overlay info edits.overlay --json")]
pub(crate) struct Info {
    /// Overlay file.
    overlay: PathBuf,
    /// Print JSON, with the ids of all changed rows.
    #[arg(long)]
    json: bool,
}

/// Show how far an overlay moves the rows that it changes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram overlay diff edits.overlay --table layer1.table")]
pub(crate) struct Diff {
    /// Overlay file.
    overlay: PathBuf,
    #[command(flatten)]
    stack: Stack,
    /// Changed rows to list, those that move most first.
    #[arg(long, value_name = "N", default_value_t = 10)]
    rows: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Write a table with its overlays as one new table file.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram overlay merge edited.table --table layer1.table --below edits.overlay more.overlay")]
pub(crate) struct Merge {
    /// Table file to make.
    #[arg(value_name = "TABLE")]
    out: PathBuf,
    #[command(flatten)]
    stack: Stack,
}

/// Write an overlay without some of its changes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram overlay drop edits.overlay fewer.overlay --rows 17 4711")]
pub(crate) struct Drop {
    /// Overlay file.
    overlay: PathBuf,
    /// Overlay to make.
    #[arg(value_name = "NEW")]
    out: PathBuf,
    /// Ids of the rows whose changes are left out.
    #[arg(long, value_name = "ID", required = true, num_args = 1..)]
    rows: Vec<u64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Overlay {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(command) => command.run(),
            Self::Info(command) => OverlayInfo::read(&command.overlay)?.print(command.json),
            Self::Diff(command) => command.run(),
            Self::Merge(command) => command.run(),
            Self::Drop(command) => command.run(),
        }
    }
}

impl Stack {
    fn open(&self) -> anyhow::Result<Overlaid<Table>> {
        let file = TableReader::open(&self.table)?;
        let table = Table::open_with(&self.table, &file.header().origin, &MapOptions::new())?;
        let mut stack = Overlaid::new(table, file.header(), file.content())?;
        for path in &self.overlays {
            stack.push(path)?;
        }
        Ok(stack)
    }
}

impl Create {
    fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let stack = self.stack.open()?;
        interrupt::listen()?;
        let mut passage = Passage::new("comparing", stack.rows(), stack.bytes_per_row() as u64);
        let writer = stack.difference(&self.edited, &mut |at| passage.show(at.done, at.total))?;
        drop(passage);
        if writer.is_empty() {
            return refuse(format!(
                "{}: has the rows of {} already: there is nothing to keep in an overlay",
                self.edited.display(),
                self.stack.table.display()
            ));
        }
        writer.save(&self.out)?;
        OverlayInfo::read(&self.out)?.print(self.json)
    }
}

/// An overlay in numbers.
#[derive(Debug, Serialize)]
struct OverlayInfo {
    overlay: PathBuf,
    changed: usize,
    rows: u64,
    width: usize,
    format: String,
    layer: u64,
    identity: String,
    /// Content of what it was made for.
    below: String,
    content: String,
    file_bytes: u64,
    ids: Vec<u64>,
}

impl OverlayInfo {
    fn read(path: &std::path::Path) -> anyhow::Result<Self> {
        let overlay = OverlayFile::read(path)?;
        let header = overlay.header();
        let row_bytes = header.format.bytes_per_row(header.width);
        Ok(Self {
            overlay: path.to_owned(),
            changed: overlay.ids().len(),
            rows: header.rows,
            width: header.width,
            format: header.format.to_string(),
            layer: header.origin.layer,
            identity: header.origin.identity.to_string(),
            below: overlay.below().to_string(),
            content: overlay.content().to_string(),
            file_bytes: 4096 + (overlay.ids().len() * (8 + row_bytes)) as u64,
            ids: overlay.ids().to_vec(),
        })
    }

    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return print_json(self);
        }
        let mut table = TextTable::new([self.overlay.display().to_string().as_str(), ""]);
        table.row(["changed rows".to_owned(), format!("{} of {}", self.changed, self.rows)]);
        table.row(["values per row".to_owned(), self.width.to_string()]);
        table.row(["format".to_owned(), self.format.clone()]);
        table.row(["file".to_owned(), bytes(self.file_bytes)]);
        table.row(["layer".to_owned(), self.layer.to_string()]);
        table.row(["addressing".to_owned(), self.identity.clone()]);
        table.row(["made for content".to_owned(), self.below.clone()]);
        table.row(["content".to_owned(), self.content.clone()]);
        print(table.to_string())
    }
}

/// How far the rows of an overlay move.
#[derive(Debug, Serialize)]
struct Distances {
    changed: usize,
    /// Root mean square of all movements over that of the rows before.
    relative_rms: f64,
    mean_cosine: f64,
    /// Those that move most.
    rows: Vec<Distance>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Distance {
    row: u64,
    /// Root mean square of the movement.
    rms: f64,
    /// The same of the row before.
    rms_before: f64,
}

impl Diff {
    fn run(self) -> anyhow::Result<()> {
        let mut stack = self.stack.open()?;
        let ids = stack.push(&self.overlay)?.ids().to_vec();
        let width = stack.width();
        let mut after = vec![0.0; ids.len() * width];
        stack.gather(&ids, &mut after)?;
        stack.pop();
        let mut before = vec![0.0; ids.len() * width];
        stack.gather(&ids, &mut before)?;
        let mut meter = QualityMeter::new(width);
        meter.add(0, &before, &after);
        let quality = meter.quality();
        let rms = |values: &mut dyn Iterator<Item = f64>| {
            (values.map(|value| value * value).sum::<f64>() / width as f64).sqrt()
        };
        let pairs = before.chunks_exact(width).zip(after.chunks_exact(width));
        let distance = |(&row, (before, after)): (&u64, (&[f32], &[f32]))| Distance {
            row,
            rms: rms(&mut before.iter().zip(after).map(|(&b, &a)| f64::from(a) - f64::from(b))),
            rms_before: rms(&mut before.iter().map(|&value| f64::from(value))),
        };
        let mut rows: Vec<Distance> = ids.iter().zip(pairs).map(distance).collect();
        rows.sort_by(|one, other| other.rms.total_cmp(&one.rms).then(one.row.cmp(&other.row)));
        rows.truncate(self.rows);
        let (relative_rms, mean_cosine) = (quality.relative_rms_error, quality.mean_cosine);
        let distances = Distances { changed: ids.len(), relative_rms, mean_cosine, rows };
        if self.json { print_json(&distances) } else { print(distances.to_text()) }
    }
}

impl Distances {
    fn to_text(&self) -> String {
        let mut table = TextTable::new(["row", "moves by (RMS)", "RMS before"]);
        for Distance { row, rms, rms_before } in &self.rows {
            table.row([row.to_string(), format!("{rms:.3e}"), format!("{rms_before:.3e}")]);
        }
        format!(
            "{} changed rows; they move by {:.3} of their RMS, mean cosine {:.5}\n\n{table}",
            self.changed, self.relative_rms, self.mean_cosine
        )
    }
}

impl Merge {
    fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let stack = self.stack.open()?;
        if stack.overlays().is_empty() {
            return refuse("name the overlays with --below, from the lowest to the topmost");
        }
        interrupt::listen()?;
        let mut passage = Passage::new("merging", stack.rows(), stack.bytes_per_row() as u64);
        let content = stack.flatten(&self.out, &mut |at| passage.show(at.done, at.total))?;
        drop(passage);
        print(format!("{}: {} rows, content {content}\n", self.out.display(), stack.rows()))
    }
}

impl Drop {
    fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let overlay = OverlayFile::read(&self.overlay)?;
        let mut writer = OverlayWriter::from_overlay(&overlay);
        for &id in &self.rows {
            if !writer.unset(id) {
                return refuse(format!("{}: does not change row {id}", self.overlay.display()));
            }
        }
        writer.save(&self.out)?;
        OverlayInfo::read(&self.out)?.print(self.json)
    }
}
