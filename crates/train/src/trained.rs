//! A trained model to look at and to use: a checkpoint without what only training needs.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use engram_address::Addressing;
use engram_model::{LanguageModel, Sequences, TargetScore, Tokens, Trace};

use crate::error::{Error, Result};
use crate::evaluate::{Choice, HeldOut, Windows, held_out_loss};
use crate::lookup::RowPlaces;
use crate::parameters;
use crate::tables::{self, Fetched, FrozenTables};
use crate::trainer::is_gpu;
use engram_config::CheckpointConfig;
use engram_data::{Begin, Packing, TokenShards, Tokenizer};
use engram_import::Checkpoint;

/// A model, its memory, mapped from the checkpoint, and its tokenizer.
#[derive(Debug)]
pub struct Trained {
    config: CheckpointConfig,
    device: Device,
    tokenizer: Tokenizer,
    begin: Begin,
    model: LanguageModel,
    memory: Option<FrozenTables>,
    /// Table files of the memory layers, in order.
    tables: Vec<PathBuf>,
    folder: PathBuf,
    identity: String,
}

/// Gates of one memory layer over a text.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerGates {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Gates per token: one for each residual stream, or one for all.
    pub streams: usize,
    /// `[time, streams]`, each in 0..1.
    pub gates: Vec<f32>,
}

impl Trained {
    /// Opens a checkpoint, or the newest one of a run's folder.
    ///
    /// # Errors
    /// When there is none, or any part is missing, damaged, or does not fit the others.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let folder = checkpoint.folder();
        let config = CheckpointConfig::load(&folder.join("run.toml"))?;
        let tokenizer = Tokenizer::load_ending(&folder.join("tokenizer.json"), config.text.end.as_deref())?;
        let begin = Begin::of(&config.text, &tokenizer)?;
        let device = device.clone().inner();
        let model = LanguageModel::blank(&config.model, &device, config.precision(is_gpu(&device)))?;
        let weights = folder.join("model.safetensors");
        let tensors = checkpoint.tensors("model.safetensors")?;
        let model = parameters::import(model, tensors, &weights.display().to_string())?;
        let memory = match &config.model.memory {
            Some(memory) => {
                let tables = FrozenTables::open(tables::addressing(memory, tokenizer.inner())?, folder)?;
                Some(tables.reading(RowPlaces::of(memory)))
            }
            None => None,
        };
        let layers = config.model.memory.iter().flat_map(|memory| &memory.layers);
        let tables = layers.map(|&layer| folder.join(tables::file_name(layer))).collect();
        let (folder, identity) = (folder.to_owned(), checkpoint.identity()?);
        Ok(Self { config, device, tokenizer, begin, model, memory, tables, folder, identity })
    }

    /// The configuration.
    pub fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// The weights.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// The checkpoint's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The table file of each memory layer, in order.
    pub fn table_files(&self) -> &[PathBuf] {
        &self.tables
    }

    /// What tells this checkpoint from others, and from itself with its memory off; see [`Checkpoint::identity`].
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What stands before a text.
    pub fn begin(&self) -> Begin {
        self.begin
    }

    /// The addressing of the memory, if the model has one.
    pub fn addressing(&self) -> Option<&Addressing> {
        self.memory.as_ref().map(FrozenTables::addressing)
    }

    /// Reads the memory of a layer from another table file from now on, in whatever format. The file says which
    /// layer it is of.
    ///
    /// # Errors
    /// When the model has no memory in that layer, or the file is not a table, is damaged, of another addressing, or
    /// has rows of another width.
    pub fn replace_table(&mut self, path: &Path) -> Result<()> {
        let Some(memory) = &mut self.memory else {
            return Err(Error::Mismatch("this model has no memory, and so no tables".into()));
        };
        let place = memory.replace(path)?;
        self.tables[place] = path.to_owned();
        Ok(())
    }

    /// Switches the memory off: from now on this is a model without one (arXiv 2601.07372, section 6.3).
    ///
    /// # Errors
    /// When the model has none.
    pub fn switch_memory_off(&mut self) -> Result<()> {
        if self.memory.take().is_none() {
            return Err(Error::Mismatch("this model has no memory that could be switched off".into()));
        }
        self.model.switch_memory_off();
        self.config.model.memory = None;
        self.tables.clear();
        self.identity += ", memory off";
        Ok(())
    }

    /// Loss on `shards`, whose documents see each other or not, as in the run that made this; see [`held_out_loss`].
    ///
    /// # Errors
    /// When the shards were made with another tokenizer, or cannot be read.
    pub fn evaluate(
        &self,
        shards: &TokenShards,
        limit: Option<usize>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<HeldOut> {
        shards.check_tokenizer(&self.tokenizer)?;
        let apart = self.config.train.as_ref().is_some_and(|train| train.documents_apart);
        let packing = Packing::new(apart, shards.end_of_text());
        let windows = Windows { context: self.config.model.context, limit, choice: Choice::Spread, packing };
        let fetch = |tokens: &[u32], sequences: &Sequences| self.fetch(tokens, sequences);
        held_out_loss(&self.model, &self.device, (shards, &self.tokenizer), windows, fetch, progress)
    }

    /// Logits of the token after `tokens`, `[vocabulary]`. Only the last `context` tokens are seen.
    ///
    /// # Errors
    /// When `tokens` is empty, or holds one outside the vocabulary.
    pub fn next_logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let seen = self.seen(tokens)?;
        let (rows, _) = self.rows(seen)?;
        let tokens = Tokens { ids: seen, sequences: &Sequences::equal(1, seen.len()), memory: &rows };
        Ok(self.model.next_logits(tokens, &mut Trace::default()))
    }

    /// Gates of every memory layer over `tokens`, which must fit the context.
    ///
    /// # Errors
    /// When the model has no memory or no gates, or the tokens do not fit.
    pub fn gates(&self, tokens: &[u32]) -> Result<Vec<LayerGates>> {
        let streams = match &self.config.model.memory {
            Some(memory) => memory.gates(self.config.model.streams()),
            None => {
                let problem = "this model has no memory, and so no gates: inspect another";
                return Err(Error::Mismatch(problem.into()));
            }
        };
        if streams == 0 {
            let problem = "this model reads its memory without gates: inspect another";
            return Err(Error::Mismatch(problem.into()));
        }
        let seen = self.seen(self.fitting(tokens)?)?;
        let (rows, _) = self.rows(seen)?;
        let mut trace = Trace::with_gates();
        let sequences = Sequences::equal(1, seen.len());
        self.model.hidden(Tokens { ids: seen, sequences: &sequences, memory: &rows }, &mut trace);
        let layers = trace.gates.unwrap_or_default().into_iter();
        Ok(layers.map(|(layer, gates)| LayerGates { layer, streams, gates }).collect())
    }

    /// States after every block, `[time, width]`, over `tokens`, which must fit the context.
    ///
    /// # Errors
    /// When the tokens do not fit.
    pub fn states(&self, tokens: &[u32]) -> Result<Vec<Tensor<2>>> {
        let seen = self.seen(self.fitting(tokens)?)?;
        let (rows, _) = self.rows(seen)?;
        let mut trace = Trace::with_states();
        let sequences = Sequences::equal(1, seen.len());
        self.model.hidden(Tokens { ids: seen, sequences: &sequences, memory: &rows }, &mut trace);
        Ok(trace.states.unwrap_or_default())
    }

    /// What the model would say, `[tokens, vocabulary]`, if no block followed on `states`, `[tokens, width]`.
    pub fn lens(&self, states: Tensor<2>) -> Tensor<2> {
        self.model.lens(states)
    }

    fn fitting<'a>(&self, tokens: &'a [u32]) -> Result<&'a [u32]> {
        let context = self.config.model.context;
        if tokens.len() > context {
            let found = tokens.len();
            let problem = format!("the text has {found} tokens, the model's context {context}: shorten it");
            return Err(Error::Mismatch(problem));
        }
        Ok(tokens)
    }

    /// How `targets` fare: each a row of `tokens`, `[batch·time]`, and the token that may follow there. Sequences must
    /// fit the context.
    ///
    /// # Errors
    /// When there is no target, a token or a row is not there, the sequences are too long, or rows of memory cannot be
    /// read.
    pub fn target_scores(
        &self,
        tokens: &[u32],
        batch: usize,
        targets: &[(usize, u32)],
    ) -> Result<Vec<TargetScore>> {
        let (vocabulary, context) = (self.config.model.vocabulary, self.config.model.context);
        let time = tokens.len() / batch.max(1);
        if time == 0 || time * batch != tokens.len() || time > context {
            let of = tokens.len();
            let problem = format!("{of} tokens are not {batch} sequences of at most {context}");
            return Err(Error::Mismatch(problem));
        }
        let known = |token: u32| (token as usize) < vocabulary;
        let there = |&(row, token): &(usize, u32)| row < tokens.len() && known(token);
        if targets.is_empty() || !targets.iter().all(there) || !tokens.iter().all(|&token| known(token)) {
            let problem = "no target, or a token or a row that is not there".into();
            return Err(Error::Mismatch(problem));
        }
        let sequences = Sequences::equal(batch, time);
        let rows = self.fetch(tokens, &sequences)?;
        let memory = rows.memory_rows(&self.device);
        let tokens = Tokens { ids: tokens, sequences: &sequences, memory: &memory };
        Ok(self.model.target_scores(tokens, targets, &mut Trace::default()))
    }

    fn seen<'a>(&self, tokens: &'a [u32]) -> Result<&'a [u32]> {
        if tokens.is_empty() {
            return Err(Error::Mismatch("there is no token to begin with: give a prompt".into()));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.config.model.vocabulary) {
            return Err(Error::Mismatch(format!("token {token} is outside the model's vocabulary")));
        }
        Ok(&tokens[tokens.len().saturating_sub(self.config.model.context)..])
    }

    fn rows(&self, tokens: &[u32]) -> Result<(Vec<engram_model::MemoryRows>, Fetched)> {
        let fetched = self.fetch(tokens, &Sequences::equal(1, tokens.len()))?;
        Ok((fetched.memory_rows(&self.device), fetched))
    }

    fn fetch(&self, tokens: &[u32], sequences: &Sequences) -> Result<Fetched> {
        match &self.memory {
            Some(memory) => memory.fetch(tokens, sequences),
            None => Ok(Fetched::none()),
        }
    }
}
