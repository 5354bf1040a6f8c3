//! A checkpoint made ready to answer: weights laid out for decoding, and each memory layer's rows in a tier.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use clap::{Args, ValueEnum};
use engram_data::Begin;
use engram_import::Checkpoint;
use engram_infer::{
    ChatTemplate, Decoder, Dtype, Engine, EngineOptions, Event, Model, Opening, Request, RowTiers, TextCodec,
};
use engram_serve::Facts;
use engram_store::{PrefetchOptions, RowSource, TableHeader};
use engram_train::Trained;

use crate::commands::chat;
use crate::commands::table::tier::{Counts, OpenTier, TierOptions};
use crate::failure::{Interrupted, refuse};
use crate::interrupt;

/// Which checkpoint answers, and where its memory lives.
#[derive(Debug, Args)]
pub(crate) struct ModelOptions {
    /// A checkpoint, or a run's folder, whose newest is taken.
    checkpoint: PathBuf,
    /// Read a memory layer's rows from this table file instead of the checkpoint's; the file says which layer's.
    #[arg(long = "table", value_name = "FILE")]
    tables: Vec<PathBuf>,
    /// Numbers that weights are kept in.
    #[arg(long, value_enum, default_value = "f32")]
    weights: Weights,
    #[command(flatten)]
    tier: TierOptions,
}

/// Numbers that weights are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Weights {
    /// As they were trained.
    F32,
    /// Rounded to bf16, in half the memory; products and sums stay f32.
    Bf16,
    /// Eight bits and a scale per 32, in a quarter of the memory; what they are multiplied with is rounded alike.
    Int8,
}

impl Weights {
    fn format(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
            Self::Int8 => Dtype::Int8,
        }
    }
}

/// A model that is ready to answer.
pub(crate) struct Served {
    pub(crate) model: Model,
    pub(crate) codec: TextCodec,
    pub(crate) facts: Facts,
    /// Of the checkpoint's tokenizer, if it has one.
    pub(crate) template: Option<ChatTemplate>,
}

impl ModelOptions {
    /// Opens the model.
    pub(crate) fn open(&self) -> anyhow::Result<Served> {
        let mut trained = Trained::open(&self.checkpoint, &Device::flex())?;
        for table in &self.tables {
            trained.replace_table(table)?;
        }
        let mut tiers = Vec::new();
        for path in trained.table_files() {
            tiers.push(self.tier.open(path, &TableHeader::read(path)?)?);
        }
        Served::of(&trained, tiers, self.weights.format())
    }

    /// The name of the checkpoint's folder.
    pub(crate) fn name(&self) -> String {
        let path = self.checkpoint.canonicalize().unwrap_or_else(|_| self.checkpoint.clone());
        path.file_name().map_or_else(|| "engram".into(), |name| name.to_string_lossy().into_owned())
    }
}

/// How long a step waits for memory rows before its requests fail.
const ROW_LIMIT: Duration = Duration::from_secs(15);

impl Served {
    /// `trained` as it is, its rows mapped from the checkpoint.
    pub(crate) fn mapped(trained: &Trained) -> anyhow::Result<Self> {
        let mut tiers = Vec::new();
        for path in trained.table_files() {
            tiers.push(OpenTier::mapped(path, &TableHeader::read(path)?)?);
        }
        Self::of(trained, tiers, Dtype::F32)
    }

    fn of(trained: &Trained, tiers: Vec<OpenTier>, format: Dtype) -> anyhow::Result<Self> {
        let config = &trained.config().model;
        let tokenizer = trained.tokenizer();
        let token_bytes: Vec<Vec<u8>> =
            (0..tokenizer.vocabulary() as u32).map(|token| tokenizer.token_bytes(token).to_vec()).collect();
        let codec = TextCodec::new(tokenizer.inner(), token_bytes.clone(), tokenizer.end_of_text()).opening(
            match trained.begin() {
                Begin::Always(token) => Opening::Always(token),
                Begin::IfEmpty(token) => Opening::IfEmpty(token),
            },
        );
        let (sources, counts): (Vec<Arc<dyn RowSource>>, Vec<_>) =
            tiers.into_iter().map(OpenTier::into_shared).unzip();
        let rows = match trained.addressing() {
            Some(addressing) => {
                let options = PrefetchOptions { time_limit: ROW_LIMIT, ..PrefetchOptions::default() };
                Some(RowTiers::new(addressing.clone(), sources, &options)?)
            }
            None => None,
        };
        let weights = Checkpoint::open(trained.folder())?.tensors("model.safetensors")?;
        let decoder = Decoder::new(config, &weights, format)?;
        let memory_layers = config.memory.as_ref().map_or(Vec::new(), |memory| memory.layers.clone());
        let layers = memory_layers.clone();
        let facts = Facts {
            streams: config.streams(),
            max_order: config.memory.as_ref().map_or(0, |memory| memory.max_order),
            memory_layers,
            metrics: Some(Box::new(move || row_metrics(&layers, &counts))),
        };
        let path = trained.folder().join("tokenizer_config.json");
        let template = if path.is_file() { chat::read(&path)? } else { None };
        Ok(Self { model: Model { decoder, rows, token_bytes }, codec, facts, template })
    }

    /// An engine for one request at a time, with room for one context, and what turns text into tokens.
    pub(crate) fn for_one(self) -> anyhow::Result<(Engine, TextCodec)> {
        let own = EngineOptions::default();
        let options =
            EngineOptions { running: 1, waiting: 1, cache_bytes: self.context_bytes(own.page), ..own };
        Ok((Engine::start(self.model, options)?, self.codec))
    }

    /// Bytes of the cache that one context fills, in pages of `page` positions.
    pub(crate) fn context_bytes(&self, page: usize) -> usize {
        let layout = self.model.decoder.cache_layout(page);
        4 * layout.pages_for(self.model.decoder.config().context) * layout.page_values()
    }
}

/// Hits and misses of the caches of rows.
fn row_metrics(layers: &[usize], counts: &[Counts]) -> String {
    let mut text = String::new();
    let counts: Vec<_> =
        layers.iter().zip(counts).filter_map(|(layer, counts)| Some((layer, counts()?))).collect();
    if counts.is_empty() {
        return text;
    }
    text += "# HELP engram_rows_total Memory rows asked for, by where they were.\n# TYPE engram_rows_total counter\n";
    for (layer, counts) in counts {
        let _ = writeln!(text, "engram_rows_total{{layer=\"{layer}\",from=\"cache\"}} {}", counts.hits);
        let _ = writeln!(text, "engram_rows_total{{layer=\"{layer}\",from=\"tier\"}} {}", counts.misses);
    }
    text
}

/// A text that came from an engine, and what it cost.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) row_wait: Duration,
}

/// Answers `request`, giving each piece of whole characters to `show`.
pub(crate) fn say(
    engine: &Engine,
    request: Request,
    show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Said> {
    let mut events = match engine.submit(request) {
        Ok(events) => events,
        Err(engram_infer::Refusal::Parameter(bad)) => {
            return refuse(format!("--{} {}", bad.name.replace('_', "-"), bad.problem));
        }
        Err(refusal) => return refuse(refusal.to_string()),
    };
    let mut said = Said::default();
    let mut add = |said: &mut Said, text: &str| {
        said.text += text;
        show(text)
    };
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token(token) => {
                said.tokens.push(token.id);
                add(&mut said, &token.text)?;
            }
            Event::Gates(_) => {}
            Event::Done(summary) => {
                add(&mut said, &summary.text)?;
                said.row_wait = summary.row_wait;
                return Ok(said);
            }
            Event::Failed(failure) => return Err(failure.into()),
        }
        if interrupt::asked() {
            return Err(Interrupted(String::new()).into());
        }
    }
    Err(engram_infer::Failure::Stopped.into())
}
