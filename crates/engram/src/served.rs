//! A model ready to generate: weights laid out for decoding, and each memory layer's rows in a tier.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use engram_data::Begin;
use engram_infer::{
    ChatTemplate, Decoder, Dtype, Engine, EngineOptions, Event, Model, Opening, Request, TextCodec,
};
use engram_serve::Facts;

use crate::commands::table::tier::{OpenTier, TierOptions};
use crate::failure::refuse;
use crate::hub;
use crate::interrupt;
use crate::note::note;
use crate::opened_memories::{MemoryOptions, NamedMemory, Opener};
use crate::progress::Busy;

/// The model, and where its memory lives.
#[derive(Debug, Args)]
pub(crate) struct ModelOptions {
    /// A checkpoint, a run's folder (its newest checkpoint), a GGUF file, a folder with config.json, or hf:org/name.
    checkpoint: PathBuf,
    /// Read a memory layer's rows from this table file instead of the checkpoint's. The file names its layer.
    #[arg(long = "table", value_name = "FILE")]
    tables: Vec<PathBuf>,
    /// Precision of the weights.
    #[arg(long, value_enum, default_value = "file")]
    dtype: Numbers,
    #[command(flatten)]
    tier: TierOptions,
    #[command(flatten)]
    memory: MemoryOptions,
}

/// Precisions of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Numbers {
    /// f32 weights and activations.
    F32,
    /// bf16 weights, half the memory of f32. Products and sums stay f32.
    Bf16,
    /// 8 bits and a scale per 32 values, a quarter of the memory of f32. Activations are rounded the same way.
    Int8,
    /// As stored in the file. If weights are quantised, activations are rounded to 8 bits.
    File,
}

impl std::fmt::Display for Numbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

impl Numbers {
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
            Self::Int8 => Dtype::Int8,
            Self::File => Dtype::File,
        }
    }
}

/// A model ready to generate.
pub(crate) struct Served {
    pub(crate) model: Model,
    pub(crate) codec: TextCodec,
    pub(crate) facts: Facts,
    /// The chat template of the checkpoint's tokenizer, or why there is none.
    pub(crate) template: Result<ChatTemplate, String>,
}

impl ModelOptions {
    /// Opens the model.
    pub(crate) fn open(&self) -> anyhow::Result<Served> {
        self.open_with(&[])
    }

    /// Opens the model, and memories that are chosen by a name.
    pub(crate) fn open_with(&self, named: &[NamedMemory]) -> anyhow::Result<Served> {
        let model = open(&self.checkpoint)?;
        let mut decoder = decoder(&model, self.dtype.dtype())?;
        let open_table = |path: &Path, header: &_| self.tier.open(path, header);
        let opener = Opener::new(&model, &mut decoder, &open_table, &self.tables);
        let mut opener = opener.waiting(self.tier.limit()?);
        let own = self.memory.open(&model)?;
        if own.is_none() && !self.tables.is_empty() {
            return refuse("this model has no memory, and so no tables");
        }
        let memory = own.map(|own| opener.open(&own, None)).transpose()?;
        let mut adapters = Vec::new();
        for named in named {
            let facts = opener.open(&named.open(&model)?, Some(&named.name))?;
            adapters.push((named.name.clone(), facts));
        }
        let (memories, metrics) = opener.finish();
        let streams = model.config().model.streams();
        let facts = Facts { streams, memory, adapters, metrics: Some(Box::new(metrics)) };
        Served::of(&model, decoder, memories, facts)
    }

    /// The name of the checkpoint's folder or of the file.
    pub(crate) fn name(&self) -> String {
        let path = self.checkpoint.canonicalize().unwrap_or_else(|_| self.checkpoint.clone());
        path.file_name().map_or_else(|| "engram".into(), |name| name.to_string_lossy().into_owned())
    }
}

/// Opens the model at `path`, or on the hub, and prints its notes.
pub(crate) fn open(path: &Path) -> anyhow::Result<engram_import::Model> {
    let local = hub::local(path)?;
    let busy = Busy::new(format!("opening {}", path.display()));
    let model = engram_import::Model::open(&local)?;
    drop(busy);
    model.notes().iter().for_each(|of_model| note(format_args!("note: {}: {of_model}", path.display())));
    Ok(model)
}

fn decoder(model: &engram_import::Model, dtype: Dtype) -> anyhow::Result<Decoder> {
    let _busy = Busy::new(format!("loading the weights of {}", model.path().display()));
    let decoder = Decoder::new(&model.config().model, model.weights(), dtype);
    decoder.with_context(|| model.path().display().to_string())
}

/// The chat template of a model, or why it has none that can be used.
pub(crate) fn chat_template(model: &engram_import::Model) -> Result<ChatTemplate, String> {
    let none = || "this model has no chat template".to_owned();
    let text = model.chat_template().ok_or_else(none)?;
    match ChatTemplate::from_tokenizer_config(text) {
        Ok(template) => template.ok_or_else(none),
        Err(error) => Err(format!("this model's chat template cannot be used: {error}")),
    }
}

impl Served {
    /// `model` with the memory that `options` name, or its own, whose rows are mapped.
    pub(crate) fn mapped(
        model: &engram_import::Model,
        options: &MemoryOptions,
        dtype: Dtype,
    ) -> anyhow::Result<Self> {
        let mut decoder = decoder(model, dtype)?;
        let open_table = |path: &Path, header: &_| OpenTier::mapped(path, header);
        let mut opener = Opener::new(model, &mut decoder, &open_table, &[]);
        let memory = options.open(model)?.map(|memory| opener.open(&memory, None)).transpose()?;
        let (memories, metrics) = opener.finish();
        let streams = model.config().model.streams();
        let facts = Facts { streams, memory, adapters: Vec::new(), metrics: Some(Box::new(metrics)) };
        Self::of(model, decoder, memories, facts)
    }

    fn of(
        model: &engram_import::Model,
        decoder: Decoder,
        memories: Vec<engram_infer::ModelMemory>,
        facts: Facts,
    ) -> anyhow::Result<Self> {
        let tokenizer = model.tokenizer();
        let token_bytes = tokenizer.all_token_bytes().clone();
        let codec = TextCodec::new(tokenizer.inner(), token_bytes.clone(), tokenizer.end_of_text()).opening(
            match model.begin() {
                Begin::Always(token) => Opening::Always(token),
                Begin::IfEmpty(token) => Opening::IfEmpty(token),
            },
        );
        let codec = codec.ending(model.generation().end_tokens.clone());
        let template = chat_template(model);
        Ok(Self { model: Model { decoder, memories, token_bytes }, codec, facts, template })
    }

    /// An engine for one request at a time with room for one context, and the text codec.
    pub(crate) fn for_one(self) -> anyhow::Result<(Engine, TextCodec)> {
        let own = EngineOptions::default();
        let options =
            EngineOptions { running: 1, waiting: 1, cache_bytes: self.context_bytes(own.page), ..own };
        Ok((Engine::start(self.model, options)?, self.codec))
    }

    /// Bytes of the KV cache for one context, in pages of `page` positions.
    pub(crate) fn context_bytes(&self, page: usize) -> usize {
        let layout = self.model.decoder.cache_layout(page);
        4 * layout.pages_for(self.model.decoder.config().context) * layout.page_values()
    }
}

/// Generated text and its cost.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) row_wait: Duration,
    /// Whether Ctrl-C ended it.
    pub(crate) interrupted: bool,
}

/// Answers `request` and passes each piece of whole characters to `show`.
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
