//! A model made ready to answer: weights laid out for decoding, and each memory layer's rows in a tier.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use engram_data::{Begin, PermutedPlaces};
use engram_infer::{
    ChatTemplate, Decoder, Dtype, Engine, EngineOptions, Event, MemoryTables, Model, Opening, Request,
    RowTiers, TextCodec,
};
use engram_serve::Facts;
use engram_store::{PrefetchOptions, RowSource, TableHeader};

use crate::commands::table::tier::{Counts, OpenTier, TierOptions};
use crate::failure::refuse;
use crate::interrupt;
use crate::note::note;

/// Which model answers, and where its memory lives.
#[derive(Debug, Args)]
pub(crate) struct ModelOptions {
    /// A checkpoint, a run's folder, whose newest is taken, a GGUF file, or a folder with config.json.
    checkpoint: PathBuf,
    /// Read a memory layer's rows from this table file instead of the checkpoint's; the file says which layer's.
    #[arg(long = "table", value_name = "FILE")]
    tables: Vec<PathBuf>,
    /// Numbers that weights are kept in.
    #[arg(long, value_enum, default_value = "file")]
    dtype: Numbers,
    #[command(flatten)]
    tier: TierOptions,
}

/// Numbers that weights are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Numbers {
    /// As they are, multiplied with activations as they are.
    F32,
    /// Rounded to bf16, in half the memory of f32; products and sums stay f32.
    Bf16,
    /// Eight bits and a scale per 32, in a quarter of the memory of f32; activations are rounded alike.
    Int8,
    /// As the file has them; where they are quantised, activations are rounded to eight bits.
    File,
}

impl Numbers {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
            Self::Int8 => Dtype::Int8,
            Self::File => Dtype::File,
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
        let model = open(&self.checkpoint)?;
        let mut tables = tables(&model)?;
        for path in &self.tables {
            match &mut tables {
                Some(tables) => tables.replace(path)?,
                None => return refuse("this model has no memory, and so no tables"),
            }
        }
        let files = tables.as_ref().map_or(&[][..], MemoryTables::files);
        let tiers = files.iter().map(|path| self.tier.open(path, &TableHeader::read(path)?));
        let tiers = tiers.collect::<anyhow::Result<_>>()?;
        Served::of(&model, tables, tiers, self.dtype.dtype())
    }

    /// The name of the checkpoint's folder, or of the file.
    pub(crate) fn name(&self) -> String {
        let path = self.checkpoint.canonicalize().unwrap_or_else(|_| self.checkpoint.clone());
        path.file_name().map_or_else(|| "engram".into(), |name| name.to_string_lossy().into_owned())
    }
}

/// How long a step waits for memory rows before its requests fail.
const ROW_LIMIT: Duration = Duration::from_secs(15);

/// Opens the model at `path`, and says what the user should know of it.
pub(crate) fn open(path: &Path) -> anyhow::Result<engram_import::Model> {
    let model = engram_import::Model::open(path)?;
    model.notes().iter().for_each(|of_model| note(format_args!("note: {}: {of_model}", path.display())));
    Ok(model)
}

/// The tables of a model's memory, if it has one.
fn tables(model: &engram_import::Model) -> anyhow::Result<Option<MemoryTables>> {
    let Some(memory) = &model.config().model.memory else { return Ok(None) };
    let Some(checkpoint) = model.checkpoint() else {
        return refuse(format!("{}: its memory has no tables", model.path().display()));
    };
    Ok(Some(MemoryTables::open(memory, model.tokenizer().inner(), checkpoint.folder())?))
}

impl Served {
    /// `model` with its rows mapped from the checkpoint.
    pub(crate) fn mapped(model: &engram_import::Model, dtype: Dtype) -> anyhow::Result<Self> {
        let tables = tables(model)?;
        let files = tables.as_ref().map_or(&[][..], MemoryTables::files);
        let tiers = files.iter().map(|path| OpenTier::mapped(path, &TableHeader::read(path)?));
        let tiers = tiers.collect::<anyhow::Result<_>>()?;
        Self::of(model, tables, tiers, dtype)
    }

    fn of(
        model: &engram_import::Model,
        tables: Option<MemoryTables>,
        tiers: Vec<OpenTier>,
        dtype: Dtype,
    ) -> anyhow::Result<Self> {
        let config = &model.config().model;
        let tokenizer = model.tokenizer();
        let token_bytes: Vec<Vec<u8>> =
            (0..tokenizer.vocabulary() as u32).map(|token| tokenizer.token_bytes(token).to_vec()).collect();
        let codec = TextCodec::new(tokenizer.inner(), token_bytes.clone(), tokenizer.end_of_text()).opening(
            match model.begin() {
                Begin::Always(token) => Opening::Always(token),
                Begin::IfEmpty(token) => Opening::IfEmpty(token),
            },
        );
        let codec = codec.ending(model.generation().end_tokens.clone());
        let (sources, counts): (Vec<Arc<dyn RowSource>>, Vec<_>) =
            tiers.into_iter().map(OpenTier::into_shared).unzip();
        let rows = match tables {
            Some(tables) => {
                let options = PrefetchOptions::default().time_limit(ROW_LIMIT);
                let tiers = RowTiers::new(tables.addressing().clone(), sources, &options)?;
                Some(tiers.permuted(config.memory.as_ref().and_then(PermutedPlaces::of)))
            }
            None => None,
        };
        let decoder = Decoder::new(config, model.weights(), dtype)
            .with_context(|| model.path().display().to_string())?;
        let memory_layers = config.memory.as_ref().map_or(Vec::new(), |memory| memory.layers.clone());
        let layers = memory_layers.clone();
        let facts = Facts {
            streams: config.streams(),
            max_order: config.memory.as_ref().map_or(0, |memory| memory.max_order),
            memory_layers,
            metrics: Some(Box::new(move || row_metrics(&layers, &counts))),
        };
        let template = match model.chat_template() {
            Some(text) => ChatTemplate::from_tokenizer_config(text)
                .with_context(|| format!("{}: chat template", model.path().display()))?,
            None => None,
        };
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
    /// Whether Ctrl-C ended it.
    pub(crate) interrupted: bool,
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
            Event::Gates(_) | Event::PromptLogprobs(_) => {}
            Event::Done(summary) => {
                add(&mut said, &summary.text)?;
                said.row_wait = summary.row_wait;
                return Ok(said);
            }
            Event::Failed(failure) => return Err(failure.into()),
        }
        if interrupt::asked() {
            said.interrupted = true;
            return Ok(said);
        }
    }
    Err(engram_infer::Failure::Stopped.into())
}
