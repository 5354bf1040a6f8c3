//! Grafting: a new memory for a model that exists, trained on a corpus while the model stays as it is.
//!
//! Rows begin at zero, so that the result is the base, bit for bit, until the first step. Only rows, the memory's
//! projections and its gates learn. The value's bias stays zero: where no row was trained, the base speaks. What lies
//! below the first memory is computed without a graph, and nothing is taken back through it.
//!
//! As a comparison, an adapter of low rank can be trained on the same windows instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use engram_address::Addressing;
use engram_config::{Account, GraftConfig, MemoryConfig, ModelConfig, RowTraining};
use engram_data::{Packing, Sampler, SamplerState, TokenShards, Tokenizer};
use engram_import::{Checkpoint, CheckpointWriter, HostTensor, Model};
use engram_kernels::AdamStep;
use engram_model::{LanguageModel, MemoryRows, Sequences, Tokens, Trace};
use serde::{Deserialize, Serialize};

use crate::dense_adam::{DenseAdam, Named, clip};
use crate::error::{Error, Result};
use crate::evaluate::{Choice, HeldOut, Windows, held_out_loss, token_losses};
use crate::fresh_memory;
use crate::frozen::frozen;
use crate::low_rank::LowRank;
use crate::machine_memory;
use crate::neutral::{NeutralChange, neutral_change};
use crate::parameters;
use crate::soft_targets::{Wanted, host, log_sum, soft_targets};
use crate::tables::{Fetched, MemoryTables, MicroBatchRows, RowGradients};

/// What is trained.
#[derive(Debug, Clone)]
pub enum Grafting {
    /// A new memory.
    Memory {
        /// Its configuration.
        config: Box<MemoryConfig>,
        /// From tokens to its rows.
        addressing: Box<Addressing>,
    },
    /// An adapter of low rank, of about as many parameters.
    LowRank {
        /// Parameters.
        parameters: usize,
    },
    /// A new memory, and with it an adapter of low rank, of about as many parameters as the memory has dense ones.
    Both {
        /// The memory's configuration.
        config: Box<MemoryConfig>,
        /// From tokens to its rows.
        addressing: Box<Addressing>,
    },
}

/// Losses on one held-out document.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DocumentLosses {
    /// Tokens predicted.
    pub tokens: u64,
    /// Bytes of text that they stand for.
    pub bytes: u64,
    /// Sum of their cross-entropies, in nats.
    pub nats: f64,
}

/// How likely a model finds the answer to a question.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct AnswerLoss {
    /// Tokens of the answer.
    pub tokens: usize,
    /// Sum of their cross-entropies, in nats.
    pub nats: f64,
    /// Whether each of them is the likeliest one: greedy decoding gives the answer.
    pub likeliest: bool,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GraftStep {
    /// Mean cross-entropy of the step's tokens before the update, in nats per token.
    pub loss: f64,
    /// Global norm of the dense weights' gradient before clipping.
    pub gradient_norm: f32,
    /// Share of the largest rates.
    pub schedule: f32,
}

/// A memory, or an adapter of low rank, being trained.
pub struct Grafter {
    config: GraftConfig,
    device: Device,
    base: LanguageModel,
    /// Absent only while its weights are replaced.
    model: Option<LanguageModel>,
    trained: Trained,
    /// The first block that something trained stands before or in.
    first: usize,
    /// What learns and is not a row, by name; of a memory, all its weights.
    weights: BTreeMap<String, HostTensor>,
    adam: DenseAdam,
    train: TokenShards,
    sampler: Sampler,
    window: usize,
    steps: u64,
    state: State,
}

#[derive(Default)]
struct Trained {
    memory: Option<(MemoryTables, Box<MemoryConfig>)>,
    low: Option<LowRank>,
}

impl Trained {
    /// Whether a weight of the model learns, by itself or by its factors.
    fn learns(&self, name: &str) -> bool {
        self.memory.is_some() && learns(name) || self.low.as_ref().is_some_and(|low| low.changes(name))
    }
}

/// What a saved state says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    step: u64,
    sampler: SamplerState,
    identity: String,
    /// Spent in steps so far.
    seconds: f64,
}

const WEIGHTS: &str = "weights.safetensors";
const ADAM: &str = "adam.safetensors";
const STATE: &str = "state.json";

impl Grafter {
    /// Prepares to train `what` for `model`, which has no memory, on `train`.
    ///
    /// # Errors
    /// When the model cannot be computed with gradients, the text is shorter than a window, or there is too little memory.
    pub fn new(model: &Model, what: Grafting, config: GraftConfig, train: TokenShards) -> Result<Self> {
        config.validate()?;
        let device = Device::flex().autodiff();
        let described = &model.config().model;
        let window = config.window(described.context)?;
        let steps = config.steps_for(train.len(), window);
        let sampler = Sampler::new(config.seed, window, config.batch, train.len())?;
        let base = frozen(model, described, BTreeMap::new(), &device)?;
        let identity = identity(model, &what, &config, steps, &train)?;
        let sizes = (described.streams(), described.width);
        let mut own = base.clone();
        let (mut trained, mut weights, mut first) = (Trained::default(), BTreeMap::new(), 0);
        let (memory, mut parameters) = match what {
            Grafting::Memory { config, addressing } => (Some((config, addressing)), None),
            Grafting::LowRank { parameters } => (None, Some(parameters)),
            Grafting::Both { config, addressing } => (Some((config, addressing)), Some(0)),
        };
        if let Some((memory, addressing)) = memory {
            let rows = config.rows();
            refuse_too_large(described, &memory, &addressing, &rows)?;
            let mut text = vec![0; window + 1];
            train.read(0, &mut text)?;
            let text = (&text[..window], &Sequences::equal(1, window));
            weights = fresh_memory::draw(&mut own, &memory, sizes, config.seed, text, &device)?;
            let tables = MemoryTables::new(&memory, &rows, *addressing, config.seed, Path::new("."))?;
            first = memory.layers[0];
            trained.memory = Some((tables, memory));
            let dense = weights.iter().filter(|(name, _)| learns(name));
            parameters = parameters.map(|_| dense.map(|(_, weight)| weight.values.len()).sum());
        }
        if let Some(parameters) = parameters {
            let low = LowRank::new(&base, config.lora.rank, parameters, &device.clone().inner());
            weights.extend(low.draw(config.seed));
            (trained.low, first) = (Some(low), 0);
        }
        let own = parameters::train_only(own, &|name| trained.learns(name));
        let state = State { step: 0, sampler: sampler.state(), identity, seconds: 0.0 };
        let adam = DenseAdam::default();
        let base = base.valid();
        Ok(Self {
            config,
            device,
            base,
            model: Some(own),
            trained,
            first,
            weights,
            adam,
            train,
            sampler,
            window,
            steps,
            state,
        })
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.state.step
    }

    /// Steps of the whole training.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Whether all steps are taken.
    pub fn is_done(&self) -> bool {
        self.state.step >= self.steps
    }

    /// Seconds that its steps took.
    pub fn seconds(&self) -> f64 {
        self.state.seconds
    }

    /// Tokens of a window.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Tokens to train on.
    pub fn training_tokens(&self) -> u64 {
        self.train.len()
    }

    /// Dense parameters that learn.
    pub fn dense_parameters(&self) -> usize {
        let all = self.weights.iter().filter(|(name, _)| !of_memory(name) || learns(name));
        all.map(|(_, weight)| weight.values.len()).sum()
    }

    /// The rank of an adapter of low rank.
    pub fn rank(&self) -> Option<usize> {
        self.trained.low.as_ref().map(LowRank::rank)
    }

    /// The memory's weights, by the names of a checkpoint; of an adapter of low rank, its factors.
    pub fn weights(&self) -> &BTreeMap<String, HostTensor> {
        &self.weights
    }

    /// Writes the memory's rows to the table file that `path` names for each of its layers.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write_rows(&self, path: impl Fn(usize) -> PathBuf) -> Result<()> {
        match &self.trained.memory {
            Some((tables, _)) => tables.write_rows(path),
            None => Ok(()),
        }
    }

    /// One step: forward, backward down to the first memory, update.
    ///
    /// # Errors
    /// When the loss or a gradient is not finite, or data cannot be read.
    pub fn step(&mut self) -> Result<GraftStep> {
        let begun = Instant::now();
        let batch = self.sampler.next_batch(&self.train)?.tokens;
        let width = self.window + 1;
        let inputs: Vec<u32> =
            batch.chunks_exact(width).flat_map(|window| &window[..width - 1]).copied().collect();
        let targets: Vec<u32> = batch.chunks_exact(width).flat_map(|window| &window[1..]).copied().collect();
        let windows = self.config.batch;
        let rows = self.fetch(&inputs, &Sequences::equal(windows, self.window))?;
        let parts = rows.micro_batches(windows, self.config.micro_batch);
        let mut row_gradients = RowGradients::zeros(&rows);
        let (mut loss, mut gradients) = (0.0, Named::new());
        for (part, first) in parts.iter().zip((0..windows).step_by(self.config.micro_batch)) {
            let here = self.config.micro_batch.min(windows - first);
            let of_part = first * self.window..(first + here) * self.window;
            let text = (&inputs[of_part.clone()], &targets[of_part]);
            let (of_loss, dense, of_rows) = self.differentiate(text, here, inputs.len(), (&rows, part));
            loss += of_loss;
            row_gradients.add(part, of_rows);
            add(&mut gradients, dense);
        }
        let norm = clip(&mut gradients, self.config.clip);
        if !(loss.is_finite() && norm.is_finite() && row_gradients.can_be_learnt()) {
            return Err(Error::Diverged { step: self.state.step });
        }
        let schedule = self.config.schedule(self.state.step, self.steps);
        self.learn(gradients, &rows, &row_gradients, schedule)?;
        self.state.step += 1;
        self.state.sampler = self.sampler.state();
        self.state.seconds += begun.elapsed().as_secs_f64();
        Ok(GraftStep { loss, gradient_norm: norm, schedule })
    }

    /// Saves in `folder` all that is needed to continue.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let writer = CheckpointWriter::begin(folder, self.state.step)?;
        writer.tensors(WEIGHTS, &self.weights)?;
        writer.tensors(ADAM, &self.adam.export())?;
        if let Some((tables, _)) = &self.trained.memory {
            tables.save(writer.folder())?;
        }
        let state = serde_json::to_vec(&self.state).map_err(|error| Error::weights(folder, error))?;
        writer.file(STATE, &state)?;
        writer.finish(1)?;
        Ok(())
    }

    /// Continues from what was saved in `folder`.
    ///
    /// # Errors
    /// When nothing or something else was saved there.
    pub fn resume(&mut self, folder: &Path) -> Result<()> {
        let checkpoint = Checkpoint::open(folder)?;
        let state: State = checkpoint.json(STATE)?;
        if state.identity != self.state.identity {
            let problem = "it was saved for another model, another corpus or other settings; give those again, or \
                           remove it to start again";
            return Err(Error::weights(checkpoint.folder(), problem));
        }
        let weights = checkpoint.tensors(WEIGHTS)?;
        let fits = |(name, weight): (&String, &HostTensor)| {
            weights.get(name).is_some_and(|saved| saved.shape == weight.shape)
        };
        if weights.len() != self.weights.len() || !self.weights.iter().all(fits) {
            return Err(Error::weights(checkpoint.folder(), "its weights are not those of this graft"));
        }
        self.weights = weights;
        self.adam = DenseAdam::import(checkpoint.tensors(ADAM)?);
        if let Some((tables, memory)) = &mut self.trained.memory {
            tables.reload(memory, &self.config.rows(), checkpoint.folder())?;
        }
        self.sampler = self.sampler.clone().at(state.sampler)?;
        self.state = state;
        self.place();
        Ok(())
    }

    /// Loss on `valid`, of the base and of what was trained.
    ///
    /// # Errors
    /// When data cannot be read, the loss is not finite, or `go_on` says no.
    pub fn held_out(
        &self,
        (valid, tokenizer): (&TokenShards, &Tokenizer),
        go_on: &dyn Fn() -> bool,
    ) -> Result<[HeldOut; 2]> {
        let windows = self.windows();
        let own = self.model().valid();
        let none = |_: &[u32], _: &Sequences| Ok(Fetched::none());
        let fetch = |tokens: &[u32], sequences: &Sequences| self.fetch(tokens, sequences);
        let (data, device) = ((valid, tokenizer), &self.device);
        let mut progress = |_, _| go_on();
        let before = held_out_loss(&self.base, device, data, windows, none, &mut progress)?;
        let after = held_out_loss(&own, device, data, windows, fetch, &mut progress)?;
        Ok([before, after])
    }

    /// Losses on the documents of `valid` of which a token is predicted, of the base and of what was trained. Differences
    /// can be paired over them.
    ///
    /// # Errors
    /// As [`held_out`](Self::held_out).
    pub fn documents(
        &self,
        (valid, tokenizer): (&TokenShards, &Tokenizer),
        go_on: &dyn Fn() -> bool,
    ) -> Result<[Vec<DocumentLosses>; 2]> {
        let own = self.model().valid();
        let none = |_: &[u32], _: &Sequences| Ok(Fetched::none());
        let fetch = |tokens: &[u32], sequences: &Sequences| self.fetch(tokens, sequences);
        let data = (valid, tokenizer);
        Ok([
            self.document_losses(&self.base, data, none, go_on)?,
            self.document_losses(&own, data, fetch, go_on)?,
        ])
    }

    fn document_losses(
        &self,
        model: &LanguageModel,
        (valid, tokenizer): (&TokenShards, &Tokenizer),
        fetch: impl Fn(&[u32], &Sequences) -> Result<Fetched>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Vec<DocumentLosses>> {
        let ends: Vec<usize> = valid.documents().map(|document| document.tokens.end as usize).collect();
        let mut losses = vec![DocumentLosses::default(); ends.len()];
        let mut add = |first: usize, targets: &[u32], nats: &[f32]| {
            for ((position, &token), &nats) in (first..).zip(targets).zip(nats) {
                let document = ends.partition_point(|&end| end <= position);
                let Some(found) = losses.get_mut(document) else { continue };
                found.tokens += 1;
                found.bytes += tokenizer.token_bytes(token).len() as u64;
                found.nats += f64::from(nats);
            }
        };
        let mut progress = |_, _| go_on();
        token_losses(model, &self.device, valid, self.windows(), fetch, &mut add, &mut progress)?;
        if !losses.iter().all(|found| found.nats.is_finite()) {
            return Err(Error::NotFinite("the held-out loss".into()));
        }
        losses.retain(|found| found.tokens > 0);
        Ok(losses)
    }

    /// How likely the base and what was trained find the answers to `questions`, each with its prompt of at least one
    /// token.
    ///
    /// # Errors
    /// When rows cannot be read, or `go_on` says no.
    pub fn answers(
        &self,
        questions: &[(&[u32], &[u32])],
        go_on: &dyn Fn() -> bool,
    ) -> Result<[Vec<AnswerLoss>; 2]> {
        let own = self.model().valid();
        let device = self.device.clone().inner();
        let [mut of_base, mut of_own] = [Vec::new(), Vec::new()];
        for &(prompt, answer) in questions {
            if !go_on() {
                return Err(Error::Interrupted);
            }
            let text = [prompt, answer].concat();
            let sequences = Sequences::equal(1, text.len());
            let memory = self.fetch(&text, &sequences)?.memory_rows(&device);
            of_base.push(answer_loss(&self.base, (&text, prompt.len()), &sequences, &[]));
            of_own.push(answer_loss(&own, (&text, prompt.len()), &sequences, &memory));
        }
        Ok([of_base, of_own])
    }

    fn windows(&self) -> Windows {
        let limit = Some(self.config.held_out_tokens);
        Windows { context: self.window, limit, choice: Choice::Spread, packing: Packing::Together }
    }

    /// What changed on `texts`, each of at least two tokens and within the context.
    ///
    /// # Errors
    /// When rows cannot be read, or `go_on` says no.
    pub fn neutral(&self, texts: &[Vec<u32>], go_on: &dyn Fn() -> bool) -> Result<NeutralChange> {
        let device = self.device.clone().inner();
        let rows = |text: &[u32]| {
            let fetched = self.fetch(text, &Sequences::equal(1, text.len()))?;
            Ok(fetched.memory_rows(&device))
        };
        neutral_change(&self.base, &self.model().valid(), texts, rows, go_on)
    }

    fn model(&self) -> &LanguageModel {
        self.model.as_ref().expect("the model is back after every update")
    }

    fn fetch(&self, tokens: &[u32], sequences: &Sequences) -> Result<Fetched> {
        match &self.trained.memory {
            Some((tables, _)) => tables.fetch(tokens, sequences),
            None => Ok(Fetched::none()),
        }
    }

    /// Loss of some windows as their share of `all` tokens; gradients of the dense weights and of the rows.
    fn differentiate(
        &self,
        (inputs, targets): (&[u32], &[u32]),
        windows: usize,
        all: usize,
        (rows, part): (&Fetched, &MicroBatchRows),
    ) -> (f64, Named, Vec<Option<Vec<f32>>>) {
        let (model, sequences) = (self.model(), Sequences::equal(windows, self.window));
        let memory = part.memory_rows(rows, &self.device);
        let states = Tensor::from_inner(model.states_before(self.first, inputs, &sequences));
        let hidden = model.hidden_from(self.first, states, &sequences, &memory);
        let wanted: Vec<(Wanted, f32)> =
            targets.iter().map(|&token| (Wanted::Token(token), 1.0 / all as f32)).collect();
        let inner = self.device.clone().inner();
        let (losses, slope) = soft_targets(model, hidden.clone().inner(), &[], &wanted, &inner);
        // Has the slope as its gradient.
        let mut gradients = (hidden * Tensor::from_inner(slope)).sum().backward();
        let of_rows = memory.iter().map(|rows| rows.rows.grad_remove(&mut gradients).map(host)).collect();
        let (own, of_base): (BTreeMap<_, _>, BTreeMap<_, _>) =
            parameters::take_gradients(model, &mut gradients)
                .into_iter()
                .partition(|(name, _)| of_memory(name));
        let mut dense: Named = own.into_iter().map(|(name, gradient)| (name, flat(gradient))).collect();
        if let Some(low) = &self.trained.low {
            dense.extend(low.gradients(of_base, &self.weights));
        }
        (losses.answers, dense, of_rows)
    }

    fn learn(
        &mut self,
        gradients: Named,
        rows: &Fetched,
        of_rows: &RowGradients,
        schedule: f32,
    ) -> Result<()> {
        let GraftConfig { beta1, beta2, epsilon, ref rates, .. } = self.config;
        if let Some((tables, _)) = &mut self.trained.memory {
            tables.update(rows, of_rows, schedule * rates.rows)?;
        }
        let step = self.state.step + 1;
        let step = |rate: f32| AdamStep { rate: schedule * rate, beta1, beta2, epsilon, decay: 0.0, step };
        let (own, factors): (Named, Named) = gradients.into_iter().partition(|(name, _)| of_memory(name));
        self.adam.step(&mut self.weights, &own, &step(rates.projections));
        self.adam.step(&mut self.weights, &factors, &step(rates.lora));
        self.place();
        Ok(())
    }

    /// Puts the weights into the model.
    fn place(&mut self) {
        let model = self.model.take().expect("the model is back after every update");
        let device = self.device.clone().inner();
        let (trained, weights) = (&self.trained, &self.weights);
        let model = parameters::update(model, &mut |weight, values| match weights.get(&weight.name) {
            Some(own) => Tensor::from_data(TensorData::new(own.values.clone(), [own.values.len()]), &device),
            None => {
                let merged = trained.low.as_ref().and_then(|low| low.merged(&weight.name, weights));
                merged.unwrap_or(values)
            }
        });
        self.model = Some(model);
    }
}

/// Whether a weight of a memory, or of a model with one, learns.
fn learns(name: &str) -> bool {
    of_memory(name) && !name.ends_with(".value_bias")
}

/// How likely `model`, outside of autodiff, finds the tokens of `text` from `first` on.
fn answer_loss(
    model: &LanguageModel,
    (text, first): (&[u32], usize),
    sequences: &Sequences,
    memory: &[MemoryRows],
) -> AnswerLoss {
    let hidden = model.hidden(Tokens { ids: text, sequences, memory }, &mut Trace::default());
    let answer = &text[first..];
    let logits = host(model.logits(hidden.narrow(0, first - 1, answer.len())));
    let vocabulary = logits.len() / answer.len().max(1);
    let mut loss = AnswerLoss { tokens: answer.len(), nats: 0.0, likeliest: true };
    for (logits, &token) in logits.chunks_exact(vocabulary.max(1)).zip(answer) {
        let own = logits[token as usize];
        loss.nats += log_sum(logits) - f64::from(own);
        loss.likeliest &= logits.iter().all(|&other| other <= own);
    }
    loss
}

/// Whether a weight is one of a memory.
fn of_memory(name: &str) -> bool {
    name.contains(".memory.")
}

/// Refuses a memory whose tables do not fit this machine, before they are made.
fn refuse_too_large(
    base: &ModelConfig,
    memory: &MemoryConfig,
    addressing: &Addressing,
    rows: &RowTraining,
) -> Result<()> {
    let count = addressing.layers().iter().map(|layer| layer.rows()).sum::<u64>();
    let each = 4 * (memory.row_width as u64 + rows.state_values(memory.row_width as u64));
    let account = Account::of(&ModelConfig { memory: None, ..base.clone() }, &[]);
    // The base, and the model with the memory, share the base's weights.
    let parts = [("the base's weights", 4 * account.total), ("memory tables", count.saturating_mul(each))];
    let advice = "lower `memory.rows_per_head` or `memory.row_width`, or choose fewer `memory.layers`";
    machine_memory::refuse_beyond("the graft", &parts, advice)
}

fn add(sums: &mut Named, more: Named) {
    for (name, values) in more {
        match sums.get_mut(&name) {
            Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            None => _ = sums.insert(name, values),
        }
    }
}

fn flat(tensor: Tensor<1>) -> Vec<f32> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.into_data().try_into_vec().expect("f32")
}

/// What tells this training from others: a state of one does not continue another.
fn identity(
    model: &Model,
    what: &Grafting,
    config: &GraftConfig,
    steps: u64,
    train: &TokenShards,
) -> Result<String> {
    let text = |value: std::result::Result<String, toml::ser::Error>| {
        value.map_err(|error| Error::Mismatch(error.to_string()))
    };
    let what = match what {
        Grafting::Memory { config, addressing } => {
            format!("{}{}", text(toml::to_string(config.as_ref()))?, addressing.identity())
        }
        Grafting::LowRank { parameters } => format!("low rank {parameters}"),
        Grafting::Both { config, addressing } => {
            format!("both {}{}", text(toml::to_string(config.as_ref()))?, addressing.identity())
        }
    };
    // How much is saved and measured changes nothing that is learned.
    let (save_every, held_out_tokens, neutral_tokens) = (1, 1, 1);
    let config = GraftConfig { save_every, held_out_tokens, neutral_tokens, ..config.clone() };
    let config = text(toml::to_string(&config))?;
    let parts = [model.identity()?, what, config, steps.to_string(), train.identity().to_string()];
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}
