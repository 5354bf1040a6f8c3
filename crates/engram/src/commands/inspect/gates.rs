use std::path::{Path, PathBuf};

use clap::Args;
use engram_data::{Begin, TokenShards};
use engram_eval::gates::{LayerNgrams, NgramOptions, most_open};
use engram_import::Model;
use engram_infer::{Dtype, Event, Request};
use engram_train::Trained;
use serde::Serialize;

use crate::commands::{print, print_json, text_or_stdin};
use crate::device::DeviceKind;
use crate::failure::refuse;
use crate::files::write_file;
use crate::gate_map::{self, Canvas};
use crate::gate_page;
use crate::gate_text::{GateLayer, GateText, visible};
use crate::interrupt;
use crate::note::note;
use crate::number::short;
use crate::opened_memories::MemoryOptions;
use crate::progress::Progress;
use crate::served::{self, Served};
use crate::table::Table;

/// Show where the memory opens: in a text, as a heat map of its gates on the terminal or an HTML page; in a corpus, as
/// a list of the n-grams at which it opens most.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram inspect gates runs/quickstart/memory 'Only Alexander the Great could tame the horse Bucephalus.'
  engram inspect gates runs/small --html gates.html < chapter.txt
  engram inspect gates runs/small --shards data/valid --top 50 --least 10")]
pub(crate) struct Gates {
    /// A checkpoint, a run's folder (its newest checkpoint), or a model from outside with --memory or --overlay.
    checkpoint: PathBuf,
    /// The text, read as the beginning of a document. Without it, or with `-`, standard input is read.
    text: Option<String>,
    /// List the n-grams of these prepared shards at which the memory opens most.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["text", "html", "stream"])]
    shards: Option<PathBuf>,
    /// Read only the first N tokens of the shards.
    #[arg(long, value_name = "N", requires = "shards")]
    tokens: Option<usize>,
    /// Number of n-grams to list.
    #[arg(long, value_name = "N", default_value_t = 20, requires = "shards")]
    top: usize,
    /// Leave out n-grams that occur fewer than N times.
    #[arg(long, value_name = "N", default_value_t = 5, requires = "shards")]
    least: u64,
    /// Write an HTML page with the gates of every layer and stream.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Show one residual stream, counted from 0, instead of the mean of all.
    #[arg(long, value_name = "N")]
    stream: Option<usize>,
    #[command(flatten)]
    memory: MemoryOptions,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Gates {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let by_engine = self.memory.are_given() || Model::is_outside(&self.checkpoint);
        if let Some(shards) = &self.shards {
            if by_engine {
                return refuse("--shards lists n-grams of a checkpoint's own memory: name a text instead");
            }
            return self.list(&TokenShards::open(shards)?);
        }
        if by_engine && self.device != DeviceKind::Cpu {
            return refuse("gates of adapters are computed on the processor: leave --device out");
        }
        let text = text_or_stdin(self.text.as_deref())?;
        let gates = match by_engine {
            true => gates_by_engine(&self.checkpoint, &self.memory, &text)?,
            false => gates(&Trained::open(&self.checkpoint, &self.device.open()?)?, &text)?,
        };
        let streams = gates.layers.first().and_then(|layer| layer.gates.first()).map_or(0, Vec::len);
        if let Some(stream) = self.stream.filter(|&stream| streams > 0 && stream >= streams) {
            return refuse(format!("--stream {stream}: the model has {streams} gates, counted from 0"));
        }
        if let Some(path) = &self.html {
            let title = "Where the memory opens";
            let lead = format!(
                "Gates of {} over a text: the stronger the colour, the further the gate opens.",
                self.checkpoint.display()
            );
            write_file(path, &gate_page::page(title, &lead, std::slice::from_ref(&gates)))?;
            note(format_args!("wrote {}", path.display()));
        }
        match self.json {
            true => print_json(&gates),
            false => print(gate_map::draw(&[gates], self.stream, Canvas::of_stdout())),
        }
    }
}

impl Gates {
    /// Lists the n-grams of `shards` at which the memory opens most.
    fn list(&self, shards: &TokenShards) -> anyhow::Result<()> {
        let model = Trained::open(&self.checkpoint, &self.device.open()?)?;
        let options = NgramOptions { tokens: self.tokens, least: self.least, top: self.top };
        interrupt::listen()?;
        let mut progress = Progress::new(self.tokens.map_or(shards.len(), |tokens| tokens as u64));
        let layers = most_open(&model, shards, &options, &mut |done, total| {
            progress.show(done, || format!("reading gates: {} of {} tokens", short(done), short(total)));
            !interrupt::asked()
        })?;
        let listings: Vec<Listing> = layers.iter().map(|layer| Listing::of(&model, layer)).collect();
        if self.json {
            return print_json(&listings);
        }
        let tables: Vec<String> = listings.iter().map(Listing::table).collect();
        print(tables.join("\n"))
    }
}

/// One layer's n-grams, as text.
#[derive(Debug, Serialize)]
struct Listing {
    /// The block, counted from 0.
    layer: usize,
    /// Mean gate over all tokens.
    mean_gate: f64,
    ngrams: Vec<ListedNgram>,
}

#[derive(Debug, Serialize)]
struct ListedNgram {
    text: String,
    /// Mean gate at its last token.
    gate: f64,
    occurrences: u64,
}

impl Listing {
    fn of(model: &Trained, layer: &LayerNgrams) -> Self {
        let text = |tokens: &[u32]| {
            let bytes: Vec<u8> =
                tokens.iter().flat_map(|&token| model.tokenizer().token_bytes(token).to_vec()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let ngrams = layer.ngrams.iter().map(|ngram| ListedNgram {
            text: text(&ngram.tokens),
            gate: ngram.gate,
            occurrences: ngram.count,
        });
        Self { layer: layer.layer, mean_gate: layer.mean, ngrams: ngrams.collect() }
    }

    fn table(&self) -> String {
        let heading = format!("layer {}, mean gate {:.3}", self.layer, self.mean_gate);
        let mut table = Table::new([heading.as_str(), "gate", "times"]);
        for ngram in &self.ngrams {
            let text = format!("“{}”", visible(&ngram.text));
            table.row([text, format!("{:.3}", ngram.gate), ngram.occurrences.to_string()]);
        }
        table.to_string()
    }
}

/// The gates over `text`, the beginning of a document, by the model at `path` with the named memory.
fn gates_by_engine(path: &Path, memory: &MemoryOptions, text: &str) -> anyhow::Result<GateText> {
    let model = served::open(path)?;
    let served = Served::mapped(&model, memory, Dtype::F32)?;
    let Some(facts) = served.facts.memory.clone() else {
        return refuse(format!("{}: this model has no memory: name one by --memory", path.display()));
    };
    let tokenizer = model.tokenizer();
    let (Begin::Always(begin) | Begin::IfEmpty(begin)) = model.begin();
    let mut prompt = vec![begin];
    prompt.extend(tokenizer.encode(text)?);
    if prompt.len() == 1 {
        return refuse("the text is empty");
    }
    let streams = served.facts.streams;
    let mut layers: Vec<GateLayer> =
        facts.layers.iter().map(|&layer| GateLayer { layer, gates: Vec::new() }).collect();
    let tokens = prompt[1..].iter().map(|&token| tokenizer.token_bytes(token));
    let tokens = tokens.map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect();
    let (engine, _) = served.for_one()?;
    let mut events = match engine.submit(Request { gates: true, ..Request::new(prompt, 0) }) {
        Ok(events) => events,
        Err(refusal) => return refuse(refusal.to_string()),
    };
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Gates(told) => {
                for (layer, gates) in layers.iter_mut().zip(&told.layers) {
                    layer.gates.extend(gates.chunks(streams).map(<[f32]>::to_vec));
                }
            }
            Event::Done(_) => {
                // What stands before a document is not shown.
                layers.iter_mut().for_each(|layer| drop(layer.gates.remove(0)));
                return Ok(GateText { layers, max_order: facts.max_order, tokens });
            }
            Event::Failed(failure) => return Err(failure.into()),
            Event::Token(_) | Event::PromptLogprobs(_) => {}
        }
    }
    Err(engram_infer::Failure::Stopped.into())
}

/// The gates over `text`, the beginning of a document.
pub(in crate::commands) fn gates(model: &Trained, text: &str) -> anyhow::Result<GateText> {
    let tokenizer = model.tokenizer();
    // Tokens before the document, such as the end of another, are not shown.
    let (Begin::Always(begin) | Begin::IfEmpty(begin)) = model.begin();
    let mut tokens = vec![begin];
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
