use std::path::PathBuf;

use clap::{Args, Subcommand};
use engram_train::Trained;

use super::{print, print_json, text_or_stdin};
use crate::device::DeviceKind;
use crate::failure::refuse;
use crate::files::write_file;
use crate::gate_map::{self, Canvas};
use crate::gate_page;
use crate::gate_text::{GateLayer, GateText};

/// What of a checkpoint can be looked at.
#[derive(Debug, Subcommand)]
pub(crate) enum Inspect {
    Gates(Gates),
}

/// Show where in a text the memory opens: a heat map of its gates, on the terminal or as an HTML page.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram inspect gates runs/quickstart/memory 'Only Alexander the Great could tame the horse Bucephalus.'
  engram inspect gates runs/small --html gates.html < chapter.txt")]
pub(crate) struct Gates {
    /// A checkpoint, or a run's folder, whose newest is taken.
    checkpoint: PathBuf,
    /// The text, read as the beginning of a document; `-` or none: standard input.
    text: Option<String>,
    /// Write a page to open in a browser; the gates of every layer and stream are in it.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Show one residual stream, from 0, instead of the mean of all.
    #[arg(long, value_name = "N")]
    stream: Option<usize>,
    /// What to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Gates(command) => command.run(),
        }
    }
}

impl Gates {
    fn run(self) -> anyhow::Result<()> {
        let text = text_or_stdin(self.text.as_deref())?;
        let model = Trained::open(&self.checkpoint, &self.device.open()?)?;
        let model_config = &model.config().model;
        let streams = model_config.memory.as_ref().map_or(0, |memory| memory.gates(model_config.streams()));
        if let Some(stream) = self.stream.filter(|&stream| streams > 0 && stream >= streams) {
            return refuse(format!("--stream {stream}: the model has {streams} gates, counted from 0"));
        }
        let gates = gates(&model, &text)?;
        if let Some(path) = &self.html {
            let title = "Where the memory opens";
            let lead = format!(
                "Gates of {} over a text: the more colour, the more is read.",
                self.checkpoint.display()
            );
            write_file(path, &gate_page::page(title, &lead, std::slice::from_ref(&gates)))?;
            eprintln!("wrote {}", path.display());
        }
        match self.json {
            true => print_json(&gates),
            false => print(gate_map::draw(&[gates], self.stream, Canvas::of_stdout())),
        }
    }
}

/// The gates over `text`, the beginning of a document.
pub(super) fn gates(model: &Trained, text: &str) -> anyhow::Result<GateText> {
    let tokenizer = model.tokenizer();
    // A document begins after the end of another, which is not shown.
    let mut tokens = vec![tokenizer.end_of_text()];
    tokens.extend(tokenizer.encode(text)?);
    if tokens.len() == 1 {
        return refuse("the text is empty");
    }
    let layers = model.gates(&tokens)?.into_iter().map(|layer| GateLayer {
        layer: layer.layer,
        gates: layer.gates.chunks(layer.streams).skip(1).map(<[f32]>::to_vec).collect(),
    });
    Ok(GateText {
        layers: layers.collect(),
        max_order: model.config().model.memory.as_ref().map_or(0, |memory| memory.max_order),
        tokens: tokens[1..]
            .iter()
            .map(|&token| String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned())
            .collect(),
    })
}
