//! The training loop.
//!
//! While a step computes, the next batch is drawn, addressed, and its memory rows are fetched on another thread:
//! ids depend on tokens alone. The update of this step then changes some of the rows already fetched; those few are
//! read again, so that losses are bit for bit those of fetching after the update.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use engram_config::ModelConfig;
use engram_model::{LanguageModel, Sequences, Tokens, Trace};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::evaluate::{Choice, HeldOut, VisitLosses, Windows, held_out_loss, token_losses};
use crate::machine_memory;
use crate::optimizer::{Gradients, Optimizer, global_norm};
use crate::parameters;
use crate::run_lock::RunLock;
use crate::settings::{self, SettingChange, setting_changes};
use crate::sources::{Position, Saved, Source, Sources};
use crate::tables::{self, Fetched, MemoryTables, MicroBatchRows, RowGradients};
use engram_config::{CheckpointConfig, DataConfig, RunConfig, TextConfig, TrainConfig};
use engram_data::{Mixture, Packing, Tokenizer, TokenizerHash};
use engram_import::{Checkpoint, CheckpointWriter};

/// A run in progress.
#[derive(Debug)]
pub struct Trainer {
    config: RunConfig,
    folder: PathBuf,
    _lock: RunLock,
    device: Device,
    tokenizer: Tokenizer,
    /// Absent only while it is being updated, so that its weights are changed in place.
    model: Option<LanguageModel>,
    optimizer: Optimizer,
    memory: Option<MemoryTables>,
    sources: Sources,
    /// The order of the training windows.
    mixture: Mixture,
    state: State,
    /// The next step's batch and rows, fetched ahead.
    ahead: Option<Batch>,
}

/// What the context of a run may be that begins with the weights of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewContext {
    /// As long as the checkpoint's, or another.
    Any,
    /// Longer than the checkpoint's: an extension.
    Longer,
}

/// What a run has besides weights and rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Steps taken.
    step: u64,
    /// Tokens seen.
    tokens: u64,
    /// Position in the data: where the next batch comes from.
    sampler: Position,
    /// The data that this is a position in; none of several sources, whose positions hold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    /// Steps that were skipped, among those taken.
    #[serde(default)]
    skipped: u64,
    /// Of these, the last ones in a row.
    #[serde(default)]
    skipped_in_a_row: u64,
    /// The held-out data of the only source; none where there are none, or the checkpoint is older than this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held_out: Option<String>,
    /// Updates that the optimisers' state is of, from before step 0: those of the runs that this one continues.
    #[serde(default, skip_serializing_if = "is_zero")]
    updates_before: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl State {
    /// Updates that the optimisers' state is of.
    fn updates(&self) -> u64 {
        self.updates_before + self.step - self.skipped
    }

    /// What it says about the data that `config` names.
    fn data<'a>(&'a self, config: &'a DataConfig) -> Saved<'a> {
        let (data, held_out) = (self.data.as_deref(), self.held_out.as_deref());
        Saved { position: &self.sampler, data, held_out, config }
    }
}

/// What is another since the checkpoint that a run was resumed from.
#[derive(Debug, Clone, PartialEq)]
pub struct Resumption {
    /// Settings that differ.
    pub changes: Vec<SettingChange>,
    /// Factor on the peak rates that the next step would have had, and the one that it has now.
    pub schedule: [f32; 2],
    /// Whether the run reads other data from here on, from their beginning.
    pub new_data: bool,
}

/// What a run continues whose optimisers keep the state of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continuation {
    /// Steps of the checkpoint's run.
    pub steps: u64,
    /// Updates of the weights that the optimisers' state is of.
    pub updates: u64,
    /// Whether the run reads the windows that the checkpoint's run read, in their order.
    pub repeats: bool,
}

/// Training data that a run reads more than once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repetition {
    /// The data.
    pub path: PathBuf,
    /// Tokens that the whole run reads of them.
    pub seen: u64,
    /// Tokens that they have.
    pub there: u64,
}

/// The held-out losses of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// The loss. Of several sources, the mean of their losses by their weights.
    pub loss: HeldOut,
    /// The losses of the sources that have a name.
    pub sources: Vec<(String, HeldOut)>,
}

/// The mean of the losses by the sources' weights; none of no losses.
fn mean(losses: &[(&Source, HeldOut)]) -> Option<HeldOut> {
    if let [(_, only)] = losses {
        return Some(*only);
    }
    let all: f64 = losses.iter().map(|(source, _)| source.weight).sum();
    let mean = |value: fn(&HeldOut) -> f64| {
        losses.iter().map(|(source, loss)| source.weight / all * value(loss)).sum()
    };
    let sum = |value: fn(&HeldOut) -> u64| losses.iter().map(|(_, loss)| value(loss)).sum();
    (!losses.is_empty()).then(|| HeldOut {
        nats_per_token: mean(|loss| loss.nats_per_token),
        bits_per_byte: mean(|loss| loss.bits_per_byte),
        tokens: sum(|loss| loss.tokens),
        bytes: sum(|loss| loss.bytes),
    })
}

#[derive(Debug)]
struct Batch {
    /// Inputs, `[batch, context]`.
    inputs: Vec<u32>,
    /// The token after each of them.
    targets: Vec<u32>,
    rows: Fetched,
    /// Which of them each micro-batch reads.
    parts: Vec<MicroBatchRows>,
    /// The order of the windows after this batch was drawn.
    mixture: Mixture,
}

/// One training step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// Mean cross-entropy over the step's batch before the update, in nats per token; not finite only where the step
    /// was skipped.
    #[serde(with = "null_if_not_finite")]
    pub loss: f32,
    /// Global norm of the weights' gradient before clipping; not finite only where the step was skipped.
    #[serde(with = "null_if_not_finite")]
    pub gradient_norm: f32,
    /// Factor on the peak rates.
    pub schedule: f32,
    /// Tokens seen so far.
    pub tokens: u64,
    /// How often the training data have been used so far; above 1 they repeat. Of several sources, that of the one used
    /// most.
    #[serde(default)]
    pub epoch: f64,
    /// Seconds the step took.
    pub seconds: f64,
    /// Whether weights and rows stayed as they were, because the loss or a gradient was not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// JSON has no number for what is not finite.
mod null_if_not_finite {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<f32, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f32::NAN))
    }
}

impl Trainer {
    /// Begins a run in `folder`, which must not hold one.
    ///
    /// # Errors
    /// When the folder holds a run, data or tokenizer cannot be read or do not fit the configuration, or memory
    /// cannot be allocated.
    pub fn new(config: RunConfig, folder: &Path, device: &Device) -> Result<Self> {
        let parts = Parts::open(&config)?;
        machine_memory::check(&config)?;
        let lock = claim(folder)?;
        let memory = match &config.model.memory {
            Some(memory) => {
                let addressing = tables::addressing(memory, parts.tokenizer.inner())?;
                let training = &config.train.memory;
                Some(MemoryTables::new(memory, training, addressing, config.train.seed, folder)?)
            }
            None => None,
        };
        let precision = config.train.precision.resolve(is_gpu(device));
        let model =
            LanguageModel::new(&config.model, &device.clone().autodiff(), config.train.seed, precision)?;
        let optimizer = Optimizer::new(config.train.optimizer.clone(), device);
        let state = parts.state(0, 0);
        Self::assemble(config, folder, lock, device, parts, model, optimizer, memory, state)
    }

    /// Continues from the newest checkpoint of the run in `folder`. `config`, if given, may differ in how often held-out
    /// losses and checkpoints are due, and in where and how the same numbers are computed.
    ///
    /// # Errors
    /// When there is no checkpoint, it is damaged, or does not fit the data or the configuration; when another process
    /// trains in the folder.
    pub fn resume(config: Option<RunConfig>, folder: &Path, device: &Device) -> Result<Self> {
        Self::resume_changing(config, &[], folder, device).map(|(trainer, _)| trainer)
    }

    /// As [`resume`](Self::resume), with the settings changed whose dotted keys are in `allowed`. `data.train` among
    /// them means other data, which are read from their beginning; weights, rows and optimisers keep their state.
    ///
    /// # Errors
    /// As [`resume`](Self::resume); when another setting differs.
    pub fn resume_changing(
        config: Option<RunConfig>,
        allowed: &[String],
        folder: &Path,
        device: &Device,
    ) -> Result<(Self, Resumption)> {
        if !folder.is_dir() {
            return Err(engram_import::Error::NoCheckpoint { path: folder.to_owned() }.into());
        }
        let lock = RunLock::take(folder)?;
        let checkpoint = Checkpoint::open(folder)?;
        let saved = RunConfig::load(&checkpoint.folder().join("run.toml"))?;
        if let Some(config) = &config
            && config.model != saved.model
        {
            return Err(Error::Mismatch(format!(
                "{}: the run's model is another than the configuration's `[model]`; a new model needs a new folder",
                folder.display()
            )));
        }
        if let Some(config) = &config {
            check_text(&saved.text, &config.text, folder)?;
        }
        let config = config.unwrap_or_else(|| saved.clone());
        settings::check_keys(allowed, &saved, &config)?;
        let changes = setting_changes(&saved, &config);
        settings::check(&changes, allowed, folder)?;
        let parts = Parts::open(&config)?;
        machine_memory::check(&config)?;
        if !has_tokenizer(&checkpoint, &config, &parts.tokenizer)? {
            return Err(Error::Mismatch(format!(
                "{}: not the tokenizer that this run began with",
                config.data.tokenizer.display()
            )));
        }
        let (model, mut optimizer, memory) = load(&checkpoint, &config, device, folder, &parts.tokenizer)?;
        let saved_state: State = checkpoint.json("state.json")?;
        let mut state = parts.state(saved_state.step, saved_state.tokens);
        let new_data = !parts.sources.resume(saved_state.data(&saved.data), allowed)?;
        if !new_data {
            state.sampler = parts.sources.position(saved_state.sampler.states());
        }
        optimizer.import(checkpoint.tensors("optimizer.safetensors")?, saved_state.updates());
        (state.skipped, state.skipped_in_a_row) = (saved_state.skipped, saved_state.skipped_in_a_row);
        state.updates_before = saved_state.updates_before;
        let rate = |config: &RunConfig| config.train.schedule.rate(state.step, config.train.steps);
        let resumption = Resumption { changes, schedule: [rate(&saved), rate(&config)], new_data };
        let trainer = Self::assemble(config, folder, lock, device, parts, model, optimizer, memory, state)?;
        Ok((trainer, resumption))
    }

    /// Begins a run in `folder` with the weights and memory of the checkpoint `from`: the model of `config` may differ
    /// from the checkpoint's in its context, of which `context` says what it may be, and in how its rotary positions are
    /// stretched. Optimiser and data begin anew; the memory rows keep their optimiser's state.
    ///
    /// # Errors
    /// As [`new`](Self::new); when the checkpoint is damaged, of another model or tokenizer, positions are stretched
    /// from another context than its own, or the context is not longer where it is to be.
    pub fn from_checkpoint(
        config: RunConfig,
        from: &Path,
        context: NewContext,
        folder: &Path,
        device: &Device,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(from)?;
        let saved = CheckpointConfig::load(&checkpoint.folder().join("run.toml"))?;
        if context == NewContext::Longer {
            check_longer(&saved.model, &config.model, from)?;
        }
        check_model(&saved.model, &config.model, from)?;
        check_text(&saved.text, &config.text, from)?;
        let parts = Parts::open(&config)?;
        if !has_tokenizer(&checkpoint, &config, &parts.tokenizer)? {
            let tokenizer = config.data.tokenizer.display();
            return Err(Error::Mismatch(format!("{tokenizer}: not the tokenizer of {}", from.display())));
        }
        machine_memory::check(&config)?;
        let lock = claim(folder)?;
        let (model, optimizer, memory) = load(&checkpoint, &config, device, folder, &parts.tokenizer)?;
        let state = parts.state(0, 0);
        Self::assemble(config, folder, lock, device, parts, model, optimizer, memory, state)
    }

    /// Begins a run in `folder` that continues from the checkpoint `from`: weights, rows and the state of all
    /// optimisers are the checkpoint's. Steps, schedule and data are those of `config`, from their beginning.
    ///
    /// # Errors
    /// As [`new`](Self::new); when the checkpoint is damaged or has no optimiser state; when the model, its texts or
    /// tokenizer, or what gives the optimisers' state a meaning, differ.
    pub fn continue_from(
        config: RunConfig,
        from: &Path,
        folder: &Path,
        device: &Device,
    ) -> Result<(Self, Continuation)> {
        let checkpoint = Checkpoint::open(from)?;
        let saved = CheckpointConfig::load(&checkpoint.folder().join("run.toml"))?;
        settings::check_continued(&saved, &config, from)?;
        let parts = Parts::open(&config)?;
        let (before, now) = (tokenizer_hash(&checkpoint, &config)?, parts.tokenizer.hash());
        if before != now {
            return Err(Error::Mismatch(format!(
                "data.tokenizer: {before} in {}, now {now} ({}); name the tokenizer that the checkpoint was trained with",
                from.display(),
                config.data.tokenizer.display()
            )));
        }
        machine_memory::check(&config)?;
        let lock = claim(folder)?;
        let (model, mut optimizer, memory) = load(&checkpoint, &config, device, folder, &parts.tokenizer)?;
        let saved_state: State = checkpoint.json("state.json")?;
        let updates = saved_state.updates();
        optimizer.import(checkpoint.tensors("optimizer.safetensors")?, updates);
        let state = State { updates_before: updates, ..parts.state(0, 0) };
        // The order of the windows follows from these, as long as the context is the same.
        let order = |train: &TrainConfig| (train.seed, train.batch);
        let same_data = |data: &DataConfig| parts.sources.are(saved_state.data(data));
        let repeats = saved.data.as_ref().is_some_and(same_data)
            && saved.train.as_ref().is_some_and(|train| order(train) == order(&config.train));
        let continuation = Continuation { steps: saved_state.step, updates, repeats };
        let trainer = Self::assemble(config, folder, lock, device, parts, model, optimizer, memory, state)?;
        Ok((trainer, continuation))
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of a run, each made in one place")]
    fn assemble(
        config: RunConfig,
        folder: &Path,
        lock: RunLock,
        device: &Device,
        parts: Parts,
        model: LanguageModel,
        optimizer: Optimizer,
        memory: Option<MemoryTables>,
        state: State,
    ) -> Result<Self> {
        let Parts { tokenizer, sources } = parts;
        let mixture = sources.mixture(&config, &state.sampler)?;
        Ok(Self {
            config,
            folder: folder.to_owned(),
            _lock: lock,
            device: device.clone(),
            tokenizer,
            model: Some(model),
            optimizer,
            memory,
            sources,
            mixture,
            state,
            ahead: None,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &RunConfig {
        &self.config
    }

    /// The sources whose training data this run reads more than once.
    pub fn repetitions(&self) -> Vec<Repetition> {
        let (train, context) = (&self.config.train, self.config.model.context);
        let all = train.steps.saturating_mul((train.batch * context) as u64);
        let repetition = |source: &Source| Repetition {
            path: source.train.path.clone(),
            seen: (all as f64 * source.weight).round() as u64,
            there: source.train.tokens.len(),
        };
        self.sources.iter().map(repetition).filter(|source| source.seen > source.there).collect()
    }

    /// The named sources that have no held-out data; none if no source has any.
    pub fn sources_without_held_out(&self) -> Vec<&str> {
        if self.sources.iter().all(|source| source.valid.is_none()) {
            return Vec::new();
        }
        let without = self.sources.iter().filter(|source| source.valid.is_none());
        without.filter_map(|source| source.place.name()).collect()
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.state.step
    }

    /// The model as it is now.
    pub fn model(&self) -> &LanguageModel {
        self.model.as_ref().expect("the model is back after every update")
    }

    /// The memory as it is now.
    pub fn memory(&self) -> Option<&MemoryTables> {
        self.memory.as_ref()
    }

    /// The tokenizer of the run.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Steps that were skipped so far.
    pub fn skipped_steps(&self) -> u64 {
        self.state.skipped
    }

    /// One step: forward, backward, update. Where the loss or a gradient is not finite, or a row's gradient is larger than
    /// its optimiser can square, the step is skipped: it counts,
    /// but weights, rows and their optimisers stay as they are.
    ///
    /// # Errors
    /// When more than `train.skip_limit` steps in a row are skipped, or data cannot be read.
    pub fn step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let batch = match self.ahead.take() {
            Some(batch) => batch,
            None => self.draw(self.mixture.clone())?,
        };
        let schedule = self.config.train.schedule.rate(self.state.step, self.config.train.steps);
        let (computed, next) = std::thread::scope(|scope| {
            let this = &*self;
            let next = scope.spawn(|| this.draw(batch.mixture.clone()));
            let computed = this.compute(&batch);
            (computed, next.join())
        });
        let Computed { loss, gradients, row_gradients, loads } = computed?;
        let mut next =
            next.map_err(|_| Error::Mismatch("the thread that fetches ahead panicked".into()))??;
        let gradient_norm = global_norm(&gradients);
        let skipped = !(loss.is_finite() && gradient_norm.is_finite() && row_gradients.can_be_learnt());
        if skipped {
            self.state.skipped_in_a_row += 1;
            if self.state.skipped_in_a_row > self.config.train.skip_limit {
                return Err(Error::Diverged { step: self.state.step });
            }
            self.state.skipped += 1;
        } else {
            self.state.skipped_in_a_row = 0;
            self.learn(gradients, gradient_norm, &loads, schedule);
            if let Some(memory) = &mut self.memory {
                memory.update(
                    &batch.rows,
                    &row_gradients,
                    schedule * self.config.train.optimizer.adam_rate,
                )?;
                memory.refresh(&mut next.rows, &batch.rows)?;
            }
        }
        self.state.step += 1;
        self.state.tokens += batch.inputs.len() as u64;
        self.state.sampler = self.sources.position(batch.mixture.states());
        self.mixture = batch.mixture;
        self.ahead = Some(next);
        let (step, tokens) = (self.state.step, self.state.tokens);
        let (epoch, seconds) = (self.mixture.epochs(), start.elapsed().as_secs_f64());
        Ok(StepReport { step, loss, gradient_norm, schedule, tokens, epoch, seconds, skipped })
    }

    /// Updates the weights and the experts' balance.
    fn learn(&mut self, gradients: Gradients, norm: f32, loads: &[(usize, Vec<u64>)], schedule: f32) {
        let model = self.model.take().expect("the model is back after every update");
        let mut model = self.optimizer.step(model, gradients, norm, schedule);
        if let Some(experts) = &self.config.model.experts {
            model.rebalance(loads, experts.balance_rate);
        }
        self.model = Some(model);
    }

    /// Held-out losses of the model as it is now; none without held-out data.
    ///
    /// # Errors
    /// When data cannot be read, or a loss is not finite.
    pub fn evaluate(&self) -> Result<Option<Evaluation>> {
        let fetch = |tokens: &[u32], sequences: &Sequences| self.fetch(tokens, sequences);
        let (model, windows) = (self.model().valid(), self.windows(Choice::Spread));
        let mut losses = Vec::new();
        for source in self.sources.iter() {
            let Some(valid) = &source.valid else { continue };
            let data = (&valid.tokens, &self.tokenizer);
            let loss = held_out_loss(&model, &self.device, data, windows, fetch, &mut |_, _| true)?;
            losses.push((source, loss));
        }
        let Some(loss) = mean(&losses) else { return Ok(None) };
        let name = |(source, loss): &(&Source, HeldOut)| Some((source.place.name()?.to_owned(), *loss));
        Ok(Some(Evaluation { loss, sources: losses.iter().filter_map(name).collect() }))
    }

    /// The losses of held-out tokens from the first on, as many as [`evaluate`](Self::evaluate) predicts at most. `go_on` is asked now and then whether to.
    ///
    /// # Errors
    /// When there are several sources or no held-out data, they cannot be read, or `go_on` said no.
    pub fn held_out_losses(
        &self,
        visit: &mut VisitLosses<'_>,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<()> {
        let fetch = |tokens: &[u32], sequences: &Sequences| self.fetch(tokens, sequences);
        let (model, windows) = (self.model().valid(), self.windows(Choice::First));
        self.config.data.train_and_held_out()?;
        let Some(valid) = self.sources.iter().find_map(|source| source.valid.as_ref()) else { return Ok(()) };
        token_losses(&model, &self.device, &valid.tokens, windows, fetch, visit, &mut |_, _| go_on())
    }

    /// The windows of held-out text.
    fn windows(&self, choice: Choice) -> Windows {
        let limit = self.config.train.evaluate_tokens;
        Windows { context: self.config.model.context, limit, choice, packing: self.packing() }
    }

    fn packing(&self) -> Packing {
        Packing::new(self.config.train.documents_apart, self.tokenizer.end_of_text())
    }

    fn fetch(&self, tokens: &[u32], sequences: &Sequences) -> Result<Fetched> {
        match &self.memory {
            Some(memory) => memory.fetch(tokens, sequences),
            None => Ok(Fetched::none()),
        }
    }

    /// Writes a checkpoint and removes those beyond the ones to keep.
    ///
    /// # Errors
    /// When the file system refuses; earlier checkpoints stay.
    pub fn save(&self) -> Result<PathBuf> {
        let writer = CheckpointWriter::begin(&self.folder.join("checkpoints"), self.state.step)?;
        writer.file("run.toml", self.absolute_config()?.to_toml().as_bytes())?;
        writer.file("tokenizer.json", self.tokenizer.json())?;
        writer.tensors("model.safetensors", &parameters::export(self.model()))?;
        writer.tensors("optimizer.safetensors", &self.optimizer.export())?;
        if let Some(memory) = &self.memory {
            memory.save(writer.folder())?;
        }
        let state = serde_json::to_vec_pretty(&self.state);
        writer.file("state.json", &state.map_err(|error| Error::weights(&self.folder, error))?)?;
        Ok(writer.finish(self.config.train.keep)?)
    }

    /// The configuration with paths that do not depend on where it lies.
    fn absolute_config(&self) -> Result<RunConfig> {
        let mut config = self.config.clone();
        for path in config.data.paths_mut() {
            *path = absolute(path)?;
        }
        Ok(config)
    }

    /// Draws the next batch of `mixture` and fetches its rows.
    fn draw(&self, mut mixture: Mixture) -> Result<Batch> {
        let width = self.config.model.context + 1;
        let mut windows = vec![0; self.config.train.batch * width];
        for window in windows.chunks_exact_mut(width) {
            self.sources.read(mixture.next_window(), window)?;
        }
        let part = |range: std::ops::Range<usize>| {
            windows
                .chunks_exact(width)
                .flat_map(|window| window[range.clone()].iter().copied())
                .collect::<Vec<_>>()
        };
        let (inputs, targets) = (part(0..width - 1), part(1..width));
        let sequences = Sequences::of_lengths(self.packing().lengths(&inputs, self.config.train.batch));
        let rows = self.fetch(&inputs, &sequences)?;
        let parts = rows.micro_batches(self.config.train.batch, self.config.train.windows_at_once());
        Ok(Batch { inputs, targets, rows, parts, mixture })
    }

    /// Loss and gradients of a batch, one micro-batch after another.
    fn compute(&self, batch: &Batch) -> Result<Computed> {
        let (windows, context) = (self.config.train.batch, self.config.model.context);
        let at_once = self.config.train.windows_at_once();
        let device = self.device.clone().autodiff();
        let mut total = Computed { row_gradients: RowGradients::zeros(&batch.rows), ..Computed::default() };
        for (part, first) in batch.parts.iter().zip((0..windows).step_by(at_once)) {
            let windows_here = at_once.min(windows - first);
            let tokens_here = first * context..(first + windows_here) * context;
            let memory = part.memory_rows(&batch.rows, &device);
            let ids = &batch.inputs[tokens_here.clone()];
            let sequences = Sequences::of_lengths(self.packing().lengths(ids, windows_here));
            let tokens = Tokens { ids, sequences: &sequences, memory: &memory };
            let targets: Arc<[u32]> = batch.targets[tokens_here].into();
            let mut trace = Trace::default();
            let share = windows_here as f32 / windows as f32;
            let (value, mut gradients) = self.differentiate(tokens, targets, share, &mut trace);
            let of_rows = memory.iter().map(|rows| {
                let gradient = rows.rows.grad_remove(&mut gradients)?;
                Some(gradient.into_data().try_into_vec().expect("an f32 tensor"))
            });
            total.row_gradients.add(part, of_rows.collect());
            let gradients = parameters::take_gradients(self.model(), &mut gradients);
            total.add(value * share, gradients, trace.loads);
        }
        Ok(total)
    }

    /// The loss, and the gradients of `share` times the loss.
    fn differentiate(
        &self,
        tokens: Tokens<'_>,
        targets: Arc<[u32]>,
        share: f32,
        trace: &mut Trace,
    ) -> (f32, burn::tensor::Gradients) {
        if self.config.train.recompute {
            return self.model().loss_recomputing(tokens, targets, share, trace);
        }
        let loss = self.model().loss(tokens, targets, trace);
        let balanced = trace.balance.drain(..).fold(loss.clone(), |sum, balance| sum + balance);
        let gradients = balanced.mul_scalar(share).backward();
        // Read last: reading waits for the device.
        (loss.inner().into_scalar(), gradients)
    }
}

/// What a step's forward and backward passes give.
#[derive(Default)]
struct Computed {
    loss: f32,
    gradients: Gradients,
    row_gradients: RowGradients,
    loads: Vec<(usize, Vec<u64>)>,
}

impl Computed {
    /// Adds what a micro-batch gives.
    fn add(&mut self, loss: f32, gradients: Gradients, loads: Vec<(usize, Vec<u64>)>) {
        self.loss += loss;
        if self.gradients.is_empty() {
            (self.gradients, self.loads) = (gradients, loads);
            return;
        }
        for (name, gradient) in gradients {
            let sum = match self.gradients.remove(&name) {
                Some(sum) => sum + gradient,
                None => gradient,
            };
            self.gradients.insert(name, sum);
        }
        for ((_, sum), (_, loads)) in self.loads.iter_mut().zip(loads) {
            sum.iter_mut().zip(loads).for_each(|(sum, load)| *sum += load);
        }
    }
}

/// Data and tokenizer of a run, checked against each other and the model.
struct Parts {
    tokenizer: Tokenizer,
    sources: Sources,
}

impl Parts {
    fn open(config: &RunConfig) -> Result<Self> {
        config.data.clone().paths_mut().try_for_each(|path| absolute(path).map(|_| ()))?;
        let tokenizer = Tokenizer::load_ending(&config.data.tokenizer, config.text.end.as_deref())?;
        let size = tokenizer.vocabulary();
        if size != config.model.vocabulary {
            return Err(Error::Mismatch(format!(
                "{} has {size} tokens, but `model.vocabulary` is {}: make them equal",
                config.data.tokenizer.display(),
                config.model.vocabulary
            )));
        }
        let sources = Sources::open(config, &tokenizer)?;
        Ok(Self { tokenizer, sources })
    }

    /// The state of a run at the beginning of these data.
    fn state(&self, step: u64, tokens: u64) -> State {
        let Self { sources, .. } = self;
        let (sampler, data, held_out) = (sources.beginning(), sources.data(), sources.held_out());
        State { step, tokens, sampler, data, held_out, skipped: 0, skipped_in_a_row: 0, updates_before: 0 }
    }
}

/// A path that does not depend on the folder it is named from, and that a configuration can hold.
fn absolute(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(Error::file("resolve", path))?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(Error::Mismatch(format!(
            "{}: the path is not UTF-8, and a checkpoint's configuration cannot hold it; rename the folder or file",
            absolute.display()
        ))),
    }
}

/// Makes the folder of a new run and takes its lock.
fn claim(folder: &Path) -> Result<RunLock> {
    std::fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    let lock = RunLock::take(folder)?;
    // A damaged checkpoint is still somebody's run.
    match Checkpoint::open(folder) {
        Err(engram_import::Error::NoCheckpoint { .. }) => Ok(lock),
        _ => Err(Error::RunExists { path: folder.to_owned() }),
    }
}

fn load(
    checkpoint: &Checkpoint,
    config: &RunConfig,
    device: &Device,
    scratch: &Path,
    tokenizer: &Tokenizer,
) -> Result<(LanguageModel, Optimizer, Option<MemoryTables>)> {
    let precision = config.train.precision.resolve(is_gpu(device));
    let model = LanguageModel::blank(&config.model, &device.clone().autodiff(), precision)?;
    let source = checkpoint.folder().join("model.safetensors").display().to_string();
    let model = parameters::import(model, checkpoint.tensors("model.safetensors")?, &source)?;
    let memory = match &config.model.memory {
        Some(memory) => {
            let addressing = tables::addressing(memory, tokenizer.inner())?;
            let training = &config.train.memory;
            Some(MemoryTables::load(memory, training, addressing, checkpoint.folder(), scratch)?)
        }
        None => None,
    };
    Ok((model, Optimizer::new(config.train.optimizer.clone(), device), memory))
}

/// Refuses a context that is no longer than the checkpoint's.
fn check_longer(saved: &ModelConfig, model: &ModelConfig, from: &Path) -> Result<()> {
    if model.context > saved.context {
        return Ok(());
    }
    let (context, before, from) = (model.context, saved.context, from.display());
    Err(Error::Mismatch(format!(
        "`model.context` is {context}; that of {from} is {before} already: to train on at the same context, begin with its \
         weights alone (`--from`)"
    )))
}

/// Refuses a model that differs from the checkpoint's in more than the context.
fn check_model(saved: &ModelConfig, model: &ModelConfig, from: &Path) -> Result<()> {
    let from = from.display();
    let mut expected = saved.clone();
    expected.context = model.context;
    if let Some(yarn) = model.attention.yarn() {
        let before = saved.attention.yarn().map_or(saved.context, |yarn| yarn.original_context);
        if yarn.original_context != before {
            let found = yarn.original_context;
            return Err(Error::Mismatch(format!(
                "`model.attention.yarn.original_context` is {found}; {from} was trained with {before}"
            )));
        }
    }
    expected.attention = expected.attention.with_yarn(model.attention.yarn().copied());
    if expected != *model {
        return Err(Error::Mismatch(format!(
            "`[model]` is another than that of {from}: only `context` and `attention.yarn` may change"
        )));
    }
    Ok(())
}

/// Whether the checkpoint's tokenizer, with the texts of `config`, is `tokenizer`.
fn has_tokenizer(checkpoint: &Checkpoint, config: &RunConfig, tokenizer: &Tokenizer) -> Result<bool> {
    Ok(tokenizer_hash(checkpoint, config)? == tokenizer.hash())
}

/// What the checkpoint's tokenizer is, with the texts of `config`.
fn tokenizer_hash(checkpoint: &Checkpoint, config: &RunConfig) -> Result<TokenizerHash> {
    let path = checkpoint.folder().join("tokenizer.json");
    Ok(Tokenizer::load_ending(&path, config.text.end.as_deref())?.hash())
}

/// Refuses texts that begin or end otherwise than those of the checkpoint.
fn check_text(saved: &TextConfig, text: &TextConfig, from: &Path) -> Result<()> {
    if saved == text {
        return Ok(());
    }
    let from = from.display();
    Err(Error::Mismatch(format!(
        "`[text]` is another than that of {from}: copy it from the checkpoint's run.toml"
    )))
}

/// Whether `device` is a GPU.
pub(crate) fn is_gpu(device: &Device) -> bool {
    device.clone().inner() != Device::flex()
}

/// Estimates the time that is left from the steps so far.
#[derive(Debug)]
pub struct Pace {
    begun: Instant,
    first: u64,
}

impl Pace {
    /// Begins to count at `step`.
    pub fn new(step: u64) -> Self {
        Self { begun: Instant::now(), first: step }
    }

    /// Time left at `step` of `total`; none before the first step.
    pub fn left(&self, step: u64, total: u64) -> Option<Duration> {
        let done = step.checked_sub(self.first).filter(|&done| done > 0)?;
        Some(self.begun.elapsed().mul_f64(total.saturating_sub(step) as f64 / done as f64))
    }
}
