//! Continuous batching: every step of the model computes the next tokens of all running requests.
//!
//! A thread of its own owns the decoder and its cache. A step takes the token that each request is due, with drafts
//! of those that may follow, and chunks of the prompts that are still to be read, so that a long prompt delays
//! others by no more than a chunk. Requests come and go between steps.
//!
//! A request takes the pages of the cache that it needs now. When they run out the youngest loses its place: it keeps
//! its tokens, and computes them again once there is room, with the same bits. Several choices for one prompt read it
//! once. Memory rows are asked for as soon as tokens are known: those of a prompt's next chunk while this one computes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use engram_data::TokenBytes;

use crate::cache::{Cache, Sequence};
use crate::decoder::{Decoder, StepOutput};
use crate::metrics::Metrics;
use crate::prompt_lookup;
use crate::request::{Event, Failure, Finish, PositionGates, Refusal, Request};
use crate::row_fetch::{Needed, RowFetch, RowIds, RowTiers};
use crate::running::{Fork, NextChunk, Outcome, Running};
use crate::sampling::{BadParameter, TokenLogprob};
use crate::step_rows::{Chunk, Target};

/// A decoder and what it decodes for.
pub struct Model {
    /// The weights.
    pub decoder: Decoder,
    /// The memories that requests can choose from.
    pub memories: Vec<ModelMemory>,
    /// Bytes of text that each token stands for.
    pub token_bytes: TokenBytes,
}

/// A memory that requests can choose.
#[derive(Debug)]
pub struct ModelMemory {
    /// Which of the decoder's memories it is; several may differ by their rows alone.
    pub weights: usize,
    /// Where its rows come from.
    pub rows: RowTiers,
}

impl Model {
    /// A model whose requests choose between the decoder's first memory, whose rows come from `rows`, and none.
    pub fn new(decoder: Decoder, rows: Option<RowTiers>, token_bytes: TokenBytes) -> Self {
        let memories = rows.into_iter().map(|rows| ModelMemory { weights: 0, rows }).collect();
        Self { decoder, memories, token_bytes }
    }

    /// The memory that a request reads, if it reads one.
    fn memory(&self, request: &Request) -> Option<&ModelMemory> {
        request.memory.and_then(|memory| self.memories.get(memory))
    }

    /// Refuses rows that are not those of the decoder's memories.
    fn check(&self) -> Result<(), EngineError> {
        let known: Vec<_> = self.decoder.memories().collect();
        if self.memories.is_empty() && self.decoder.config().memory.is_some() {
            return Err(EngineError::Rows {
                layers: known.first().map_or(0, |own| own.layers.len()),
                found: 0,
            });
        }
        for memory in &self.memories {
            let widths = memory.rows.widths();
            let layers = known.get(memory.weights).map_or(0, |known| known.layers.len());
            if widths.len() != layers {
                return Err(EngineError::Rows { layers, found: widths.len() });
            }
            let needed = known.get(memory.weights).map_or(0, |known| known.row_width);
            if let Some(&found) = widths.iter().find(|&&width| width != needed) {
                return Err(EngineError::RowWidth { needed, found });
            }
        }
        Ok(())
    }
}

/// Limits of an [`Engine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Requests that run at once.
    pub running: usize,
    /// Requests that may wait for a place.
    pub waiting: usize,
    /// Positions of a page of the cache.
    pub page: usize,
    /// Bytes of the cache.
    pub cache_bytes: usize,
    /// Tokens of a prompt that are read in a step.
    pub chunk: usize,
    /// Tokens of all prompts that are read in a step, at least a chunk.
    pub prompt_tokens: usize,
    /// Tokens drafted at most; 0: none.
    pub drafts: usize,
    /// Threads that compute.
    pub threads: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            running: 64,
            waiting: 256,
            page: 16,
            cache_bytes: 1 << 30,
            chunk: 128,
            prompt_tokens: 256,
            drafts: 4,
            threads: rayon::current_num_threads(),
        }
    }
}

/// An engine that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An option leaves nothing to work with.
    #[error("`{name}` is {found}, but must be at least {least}")]
    Option {
        /// The option.
        name: &'static str,
        /// What it is.
        found: usize,
        /// The smallest value.
        least: usize,
    },
    /// An option asks for more than can be addressed.
    #[error("`{name}` is {found}, which is more than can be addressed")]
    TooLarge {
        /// The option.
        name: &'static str,
        /// What it is.
        found: usize,
    },
    /// The model has a memory, but no rows were given, or the other way round.
    #[error("the model has {layers} memory layers, but tables of rows for {found}")]
    Rows {
        /// Memory layers of the model.
        layers: usize,
        /// Tables given.
        found: usize,
    },
    /// Rows of another width than the model takes.
    #[error("the rows of a table have {found} values, but the model takes {needed}")]
    RowWidth {
        /// What the model takes.
        needed: usize,
        /// What the table has.
        found: usize,
    },
    /// The thread does not start.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// The threads that compute do not start.
    #[error("cannot start the threads that compute")]
    Pool(#[from] rayon::ThreadPoolBuildError),
}

/// Answers requests. Dropped, it ends what runs.
#[derive(Debug)]
pub struct Engine {
    commands: Option<mpsc::Sender<Arrived>>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the engine's thread and those who ask share.
#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    /// Requests that were taken and are not done.
    taken: AtomicUsize,
    stopping: AtomicBool,
    limits: Limits,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Requests that run at once, and those that may wait besides.
    running: usize,
    waiting: usize,
    vocabulary: usize,
    context: usize,
    memories: usize,
    page: usize,
    pages: usize,
}

impl Limits {
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        request.sampling.validate()?;
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        let unknown = request.prompt.iter().position(|&token| token as usize >= self.vocabulary);
        if let Some(position) = unknown {
            let token = request.prompt[position];
            return Err(Refusal::Token { token, position, vocabulary: self.vocabulary });
        }
        if let Some(memory) = request.memory.filter(|&memory| memory >= self.memories.max(1)) {
            return Err(Refusal::Memory { memory, memories: self.memories });
        }
        if prompt.saturating_add(max_tokens) > self.context {
            return Err(Refusal::TooLong { context: self.context, prompt, max_tokens });
        }
        let needed = (prompt + max_tokens).div_ceil(self.page);
        if needed > self.pages {
            return Err(Refusal::Cache { needed, pages: self.pages });
        }
        match request.logit_bias.iter().find(|(token, _)| *token as usize >= self.vocabulary) {
            Some((token, _)) => {
                let problem = format!("names token {token}, outside the vocabulary of {}", self.vocabulary);
                Err(BadParameter::new("logit_bias", problem).into())
            }
            None => Ok(()),
        }
    }
}

/// Choices for one prompt, as they were submitted.
struct Arrived {
    choices: Vec<Fork>,
    since: Instant,
}

/// A request without a place.
enum Waiting {
    /// It never had one.
    New { order: u64, arrived: Arrived },
    /// It lost it, and keeps what it has drawn.
    Preempted(Box<Running>),
}

impl Waiting {
    fn order(&self) -> u64 {
        match self {
            Self::New { order, .. } => *order,
            Self::Preempted(running) => running.order,
        }
    }
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// When an option leaves nothing to work with, or the rows are not those of the model.
    pub fn start(model: Model, options: EngineOptions) -> Result<Self, EngineError> {
        model.check()?;
        let config = model.decoder.config();
        for (name, found) in [("running", options.running), ("page", options.page), ("chunk", options.chunk)]
        {
            if found == 0 {
                return Err(EngineError::Option { name, found, least: 1 });
            }
        }
        if options.prompt_tokens < options.chunk {
            let (name, found) = ("prompt_tokens", options.prompt_tokens);
            return Err(EngineError::Option { name, found, least: options.chunk });
        }
        let layout = model.decoder.cache_layout(options.page);
        let Some(page_bytes) = layout.page_bytes() else {
            let (name, found) = ("page", options.page);
            return Err(EngineError::TooLarge { name, found });
        };
        let pages = options.cache_bytes / page_bytes;
        if pages == 0 {
            let (name, found) = ("cache_bytes", options.cache_bytes);
            return Err(EngineError::Option { name, found, least: page_bytes });
        }
        if u32::try_from(pages).is_err() {
            let (name, found) = ("cache_bytes", options.cache_bytes);
            return Err(EngineError::TooLarge { name, found });
        }
        let limits = Limits {
            running: options.running,
            waiting: options.waiting,
            vocabulary: config.vocabulary,
            context: config.context,
            memories: model.memories.len(),
            page: options.page,
            pages,
        };
        let shared = Arc::new(Shared {
            metrics: Metrics::default(),
            taken: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            limits,
        });
        shared.metrics.pages.set(pages);
        let (commands, queue) = mpsc::channel();
        let work = Worker {
            cache: Cache::new(layout, pages),
            model,
            options,
            queue,
            shared: Arc::clone(&shared),
            waiting: VecDeque::new(),
            running: Vec::new(),
            arrivals: 0,
            usual_length: FIRST_LENGTH,
            blocked: None,
        };
        // Threads of its own, of which the engine's work is one: handing work from outside costs each product.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build()?;
        let thread =
            std::thread::Builder::new().name("engine".into()).spawn(move || pool.install(|| work.run()));
        Ok(Self { commands: Some(commands), shared, thread: Some(thread.map_err(EngineError::Thread)?) })
    }

    /// Takes a request. What comes of it is received; whoever stops receiving cancels it.
    ///
    /// # Errors
    /// When it is impossible, or there is no room for it now.
    pub fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, Refusal> {
        let receivers = self.submit_all(vec![request])?;
        receivers.into_iter().next().ok_or(Refusal::Stopping)
    }

    /// Takes all of several requests, or none. Neighbours with the same prompt read it once.
    ///
    /// # Errors
    /// When one is impossible, or there is no room for all of them now.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<Vec<UnboundedReceiver<Event>>, Refusal> {
        let refused = |refusal| {
            self.shared.metrics.refused.add(requests.len());
            Err(refusal)
        };
        if let Some(refusal) = requests.iter().find_map(|request| self.shared.limits.check(request).err()) {
            return refused(refusal);
        }
        if self.shared.stopping.load(SeqCst) {
            return refused(Refusal::Stopping);
        }
        let Limits { running, waiting, .. } = self.shared.limits;
        let (count, most) = (requests.len(), running.saturating_add(waiting));
        let room = |taken: usize| taken.checked_add(count).filter(|&taken| taken <= most);
        if let Err(taken) = self.shared.taken.fetch_update(SeqCst, SeqCst, room) {
            return refused(Refusal::Busy { waiting: taken.saturating_sub(running) });
        }
        let (mut receivers, mut groups) = (Vec::new(), Vec::<Arrived>::new());
        for request in requests {
            let (events, receiver) = unbounded_channel();
            receivers.push(receiver);
            match groups.last_mut() {
                Some(group) if group.choices[0].0.shares_prompt(&request) => {
                    group.choices.push((request, events));
                }
                _ => groups.push(Arrived { choices: vec![(request, events)], since: Instant::now() }),
            }
        }
        for group in groups {
            if self.commands.as_ref().is_none_or(|commands| commands.send(group).is_err()) {
                self.shared.metrics.refused.add(count);
                return Err(Refusal::Stopping);
            }
        }
        Ok(receivers)
    }

    /// Takes no more requests; those that were taken are answered.
    pub fn stop(&self) {
        self.shared.stopping.store(true, SeqCst);
    }

    /// Whether its thread still works: it ends when the engine is dropped, or by an error in the program.
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Longest sequence in tokens.
    pub fn context(&self) -> usize {
        self.shared.limits.context
    }

    /// Longest sequence that the cache has room for, in tokens; at most [`context`](Self::context).
    pub fn longest(&self) -> usize {
        let Limits { context, page, pages, .. } = self.shared.limits;
        context.min(page.saturating_mul(pages))
    }

    /// What it has counted so far.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

/// The engine's thread.
struct Worker {
    model: Model,
    cache: Cache,
    options: EngineOptions,
    queue: mpsc::Receiver<Arrived>,
    shared: Arc<Shared>,
    /// In the order in which they came.
    waiting: VecDeque<Waiting>,
    /// In the order in which they came.
    running: Vec<Running>,
    arrivals: u64,
    /// Tokens that an answer usually has.
    usual_length: f64,
    /// Which request had no room last time, with so many pages left and so many others running.
    blocked: Option<(u64, usize, usize)>,
}

/// Tokens that an answer is expected to have before any was given, and at least and at most.
const FIRST_LENGTH: f64 = 64.0;
const USUAL_LENGTHS: (usize, usize) = (16, 1024);

/// What one request has in a step.
struct Part {
    running: usize,
    /// Its next tokens, drafts at the end.
    tokens: Vec<u32>,
    drafts: usize,
    /// Tokens whose logits are wanted.
    logits: usize,
    /// Tokens of the prompt that are scored.
    targets: Vec<Target>,
    /// Rows of its own; those of tokens that are due come together.
    rows: Option<RowFetch>,
}

impl Worker {
    fn run(mut self) {
        loop {
            if !self.receive() {
                break;
            }
            self.let_go();
            self.let_in();
            self.step();
            self.let_go();
            self.measure();
        }
    }

    /// Takes what was submitted, waiting if there is nothing else to do; `false` when nothing will ever come.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.queue.recv() {
                Ok(arrived) => self.arrive(arrived),
                Err(_) => return false,
            }
        }
        while let Ok(arrived) = self.queue.try_recv() {
            self.arrive(arrived);
        }
        true
    }

    fn arrive(&mut self, arrived: Arrived) {
        self.arrivals += 1;
        self.waiting.push_back(Waiting::New { order: self.arrivals, arrived });
    }

    /// Ends requests that are done, failed, late or deserted.
    fn let_go(&mut self) {
        let now = Instant::now();
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting {
                Waiting::New { order, arrived } => {
                    if let Some(arrived) = self.still_wanted(arrived, now) {
                        self.waiting.push_back(Waiting::New { order, arrived });
                    }
                }
                Waiting::Preempted(mut running) => {
                    Self::judge(&mut running, now);
                    if running.outcome.is_some() {
                        self.finish(*running);
                    } else {
                        self.waiting.push_back(Waiting::Preempted(running));
                    }
                }
            }
        }
        for index in (0..self.running.len()).rev() {
            Self::judge(&mut self.running[index], now);
            if self.running[index].outcome.is_some() {
                let running = self.running.remove(index);
                self.finish(running);
            }
        }
    }

    /// Ends a request that is late or deserted.
    fn judge(running: &mut Running, now: Instant) {
        running.hand_over();
        if running.outcome.is_none() && running.events.is_closed() {
            running.outcome = Some(Outcome::Cancelled);
        } else if running.outcome.is_none() && is_late(&running.request, now) {
            running.outcome = Some(Outcome::Failed(Failure::Deadline));
        }
    }

    /// What is left of a waiting prompt's choices.
    fn still_wanted(&self, arrived: Arrived, now: Instant) -> Option<Arrived> {
        let Arrived { choices, since } = arrived;
        let (metrics, before) = (&self.shared.metrics, choices.len());
        let mut kept = Vec::new();
        for (request, events) in choices {
            if events.is_closed() {
                metrics.cancelled.add(1);
            } else if is_late(&request, now) {
                metrics.failed.add(1);
                let _ = events.send(Event::Failed(Failure::Deadline));
            } else {
                kept.push((request, events));
            }
        }
        self.shared.taken.fetch_sub(before - kept.len(), SeqCst);
        (!kept.is_empty()).then_some(Arrived { choices: kept, since })
    }

    fn finish(&mut self, mut running: Running) {
        let (metrics, count) = (&self.shared.metrics, 1 + running.forks.len());
        match running.outcome.take() {
            Some(Outcome::Done(finish)) => {
                metrics.done.add(count);
                let weight = 0.1;
                self.usual_length += weight * (running.generated() as f64 - self.usual_length);
                let summary = running.summary(finish);
                running.tell(&Event::Done(summary));
            }
            Some(Outcome::Failed(failure)) => {
                metrics.failed.add(count);
                running.tell(&Event::Failed(failure));
            }
            Some(Outcome::Cancelled) | None => metrics.cancelled.add(count),
        }
        self.shared.taken.fetch_sub(count, SeqCst);
        self.cache.release(running.sequence);
        self.blocked = None;
    }

    /// Lets requests in, in the order in which they came, while there is room.
    fn let_in(&mut self) {
        while self.running.len() < self.options.running
            && let Some(waiting) = self.waiting.pop_front()
        {
            let running = match waiting {
                Waiting::New { order, arrived: Arrived { mut choices, since } } => {
                    let mut running = Running::new(order, choices.remove(0), since);
                    running.forks = choices;
                    running
                }
                Waiting::Preempted(running) => *running,
            };
            if let Err(waiting) = self.begin(running) {
                self.waiting.push_front(waiting);
                break;
            }
        }
    }

    /// Gives `running` a place if the cache has room for what it is expected to become, besides what all others are.
    /// With nothing else to do it gets one in any case.
    fn begin(&mut self, mut running: Running) -> Result<(), Waiting> {
        let back = |running: Running| {
            Err(match running.tokens.len() == running.request.prompt.len() && running.reported == 0 {
                true => {
                    let Running { order, request, events, forks, since, .. } = running;
                    let choices = std::iter::once((request, events)).chain(forks).collect();
                    Waiting::New { order, arrived: Arrived { choices, since } }
                }
                false => Waiting::Preempted(Box::new(running)),
            })
        };
        let (order, others) = (running.order, self.running.len());
        let left = self.cache.pages_left();
        if self.blocked.is_some_and(|blocked| blocked.0 == order && left <= blocked.1 && others == blocked.2)
        {
            return back(running);
        }
        let sequence = self.cache.begin(running.request.root(), running.known());
        running.goal = self.goal(&running);
        let growth = self.growth(running.goal, &sequence) + running.forks.len() * (1 + self.usual_pages());
        let promised: usize = self
            .running
            .iter()
            .map(|other| self.growth(other.goal.max(other.tokens.len()), &other.sequence))
            .sum();
        if others > 0 && promised + growth > self.cache.pages_left() {
            self.cache.release(sequence);
            self.blocked = Some((order, self.cache.pages_left(), others));
            return back(running);
        }
        self.enter(running, sequence);
        Ok(())
    }

    fn usual_pages(&self) -> usize {
        self.usual_tokens().div_ceil(self.options.page)
    }

    /// Tokens that an answer usually has. Answers that still run count as well: long ones end late, so the first to end
    /// are the short ones.
    fn usual_tokens(&self) -> usize {
        let given: usize = self.running.iter().map(Running::generated).sum();
        let mean = given / self.running.len().max(1);
        (self.usual_length as usize).max(mean).clamp(USUAL_LENGTHS.0, USUAL_LENGTHS.1)
    }

    /// Length that a request is expected to reach: one that lost its place should get as far again before it does so
    /// once more.
    fn goal(&self, running: &Running) -> usize {
        let generated = running.generated();
        let more = self.usual_tokens().max(generated).min(running.request.max_tokens - generated);
        running.tokens.len() + more
    }

    /// Pages that a sequence needs to reach `goal` positions.
    fn growth(&self, goal: usize, sequence: &Sequence) -> usize {
        self.cache.layout().pages_for(goal).saturating_sub(sequence.pages().len())
    }

    fn enter(&mut self, mut running: Running, sequence: Sequence) {
        let metrics = &self.shared.metrics;
        if running.generated() == 0 && running.reported == 0 {
            running.cached_tokens = sequence.len();
            running.drafts = self.options.drafts.min(1);
            metrics.prompt_tokens.add(running.tokens.len());
            metrics.cached_tokens.add(sequence.len());
        } else {
            metrics.recomputed_tokens.add(running.tokens.len() - sequence.len());
        }
        running.history =
            self.model.memory(&running.request).map(|memory| memory.rows.addressing().history());
        let known = sequence.len();
        running.sequence = sequence;
        if !running.request.needs_prompt() {
            running.outcome = Some(Outcome::Done(Finish::Length));
        } else if let Some(history) = &mut running.history
            && let Err(error) = history.extend(&running.tokens[..known]).map(|_| ())
        {
            running.fail(error);
        }
        let place = self.running.partition_point(|other| other.order <= running.order);
        self.running.insert(place, running);
    }

    /// Takes a request's place away. What it has drawn stays; what was computed of it is computed again.
    fn preempt(&mut self, index: usize) {
        let mut running = self.running.remove(index);
        self.cache.release(std::mem::take(&mut running.sequence));
        (running.next, running.history) = (None, None);
        self.shared.metrics.preempted.add(1);
        self.blocked = None;
        let place = self.waiting.partition_point(|other| other.order() < running.order);
        self.waiting.insert(place, Waiting::Preempted(Box::new(running)));
    }

    /// Reserves the pages of the next step, for the oldest first. Where there are none the youngest loses its place.
    fn make_room(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            let running = &mut self.running[index];
            let wanted = running.wanted();
            // Drafts are worth less than another's place.
            let least = if running.is_due() { wanted.min(1) } else { wanted };
            let mut reserve = |count| self.cache.reserve(&mut running.sequence, count).map(|()| count);
            match reserve(wanted).or_else(|_| reserve(least)) {
                Ok(room) => {
                    running.room = room;
                    index += 1;
                }
                Err(_) if self.running.len() == 1 => {
                    self.running[0].outcome = Some(Outcome::Failed(Failure::CacheFull));
                    return;
                }
                Err(_) => self.preempt(self.running.len() - 1),
            }
        }
    }

    /// One step of the model for all that run.
    fn step(&mut self) {
        let start = Instant::now();
        // For newcomers; what others need now they asked for in the step before.
        self.ask_ahead(&[]);
        self.make_room();
        let (mut parts, mut rows) = self.plan();
        if parts.is_empty() {
            return;
        }
        self.ask_ahead(&parts);
        rows.extend(parts.iter_mut().filter_map(|part| part.rows.take()));
        let output = self.compute(&parts, &mut rows);
        let waited: Duration = rows.iter().map(RowFetch::waited).sum();
        let metrics = &self.shared.metrics;
        metrics.steps.add(1);
        metrics.batch.add(parts.iter().map(|part| part.tokens.len()).sum::<usize>() as f64);
        metrics.row_wait.add_time(waited);
        metrics.step_time.add_time(start.elapsed());
        for part in &parts {
            self.running[part.running].row_wait += waited;
        }
        match output {
            Ok(output) => self.take(&parts, &output),
            Err(failure) => {
                parts.iter().for_each(|part| {
                    self.running[part.running].outcome = Some(Outcome::Failed(failure.clone()))
                });
            }
        }
    }

    /// What each request has in the next step: tokens that are due first, then chunks of prompts whose rows are there,
    /// or are on their way if there is nothing else to do. With the rows of the former, memory by memory.
    fn plan(&mut self) -> (Vec<Part>, Vec<RowFetch>) {
        let (mut parts, mut rows) = (Vec::new(), Vec::new());
        let due = self.running.iter().enumerate().filter(|(_, running)| running.is_due());
        let mut due: Vec<(Option<usize>, usize)> =
            due.map(|(index, running)| (running.request.memory, index)).collect();
        due.sort();
        for due in due.chunk_by(|one, other| one.0 == other.0) {
            let due: Vec<usize> = due.iter().map(|&(_, index)| index).collect();
            self.plan_due(&due, &mut parts, &mut rows);
        }
        let ready = |running: &Running| {
            running.outcome.is_none() && running.next.as_ref().is_some_and(NextChunk::is_ready)
        };
        let busy = !parts.is_empty() || self.running.iter().any(ready);
        let mut left = self.options.prompt_tokens;
        for (index, running) in self.running.iter_mut().enumerate() {
            let fits = (ready(running) || !busy && running.outcome.is_none())
                && running.next.as_ref().is_some_and(|next| next.count <= left.min(running.room));
            let Some(next) = running.next.take_if(|_| fits) else { continue };
            left -= next.count;
            let start = running.sequence.len();
            let tokens = running.tokens[start..start + next.count].to_vec();
            let targets = running.targets_of(start, next.count);
            let logits = usize::from(running.draws_after(start + next.count));
            parts.push(Part { running: index, tokens, drafts: 0, logits, targets, rows: next.rows });
        }
        (parts, rows)
    }

    /// Adds the tokens that are due of the requests `due`, which read the same memory or none, and their rows.
    fn plan_due(&mut self, due: &[usize], parts: &mut Vec<Part>, rows: &mut Vec<RowFetch>) {
        let memory = due.first().and_then(|&index| self.model.memory(&self.running[index].request));
        let (first, mut ids) = (parts.len(), RowIds::default());
        for &index in due {
            let running = &mut self.running[index];
            let most = running.room.saturating_sub(1);
            let mut tokens = running.tokens[running.sequence.len()..].to_vec();
            tokens.extend_from_slice(prompt_lookup::draft(&running.tokens, most));
            if let (Some(memory), Some(history)) = (memory, &mut running.history)
                && let Err(error) = ids.add(history, &tokens, &memory.rows)
            {
                running.fail(error);
                continue;
            }
            let (drafts, logits) = (tokens.len() - 1, tokens.len());
            parts.push(Part { running: index, tokens, drafts, logits, targets: Vec::new(), rows: None });
        }
        if let Some(memory) = memory.filter(|_| parts.len() > first) {
            match memory.rows.fetch(ids, Needed::Now) {
                Ok(fetch) => rows.push(fetch),
                Err(error) => {
                    parts.drain(first..).for_each(|part| self.running[part.running].fail(&error));
                }
            }
        }
    }

    /// Asks for the rows of chunks of prompts, as many as the step after `parts` can take and in its order: more would
    /// stand in the way of rows that are needed before.
    fn ask_ahead(&mut self, parts: &[Part]) {
        let mut left = self.options.prompt_tokens;
        for (index, running) in self.running.iter_mut().enumerate() {
            if running.outcome.is_some() || running.is_due() {
                continue;
            }
            if running.next.is_none() {
                let part = parts.iter().find(|part| part.running == index);
                let start = running.sequence.len() + part.map_or(0, |part| part.tokens.len());
                let count = self.options.chunk.min(running.tokens.len() - start);
                if count == 0 || count > left {
                    continue;
                }
                let memory = self.model.memory(&running.request);
                running.ask(start..start + count, memory.map(|memory| &memory.rows));
            }
            left = left.saturating_sub(running.next.as_ref().map_or(0, |next| next.count));
        }
    }

    fn compute(&mut self, parts: &[Part], rows: &mut [RowFetch]) -> Result<StepOutput, Failure> {
        let chunks: Vec<Chunk<'_>> = parts
            .iter()
            .map(|part| {
                let running = &self.running[part.running];
                let memory = self.model.memory(&running.request).map(|memory| memory.weights);
                let (tokens, logits, targets) = (&part.tokens[..], part.logits, &part.targets[..]);
                Chunk { sequence: &running.sequence, tokens, memory, logits, targets }
            })
            .collect();
        let output = self.model.decoder.step(&mut self.cache, &chunks, rows);
        output.map_err(|error| Failure::Rows(error.to_string()))
    }

    /// Scores prompts and draws tokens from the logits, keeps the drafts that are right, and takes back the others.
    fn take(&mut self, parts: &[Part], output: &StepOutput) {
        let vocabulary = self.model.decoder.config().vocabulary;
        let (mut logits, mut scores) = (output.logits.chunks_exact(vocabulary), output.scores.iter());
        let drawn: Vec<Vec<&[f32]>> =
            parts.iter().map(|part| logits.by_ref().take(part.logits).collect()).collect();
        for part in parts {
            let scored: Vec<_> = scores.by_ref().take(part.targets.len()).map(TokenLogprob::from).collect();
            if !scored.is_empty() {
                self.running[part.running].tell(&Event::PromptLogprobs(scored));
            }
        }
        let rights = self.draw_all(parts, &drawn);
        let (mut row, mut forks) = (0, Vec::new());
        for (part, drawn) in parts.iter().zip(&drawn) {
            let right = rights[part.running];
            let first = self.running[part.running].sequence.len();
            let computed = part.tokens.len() - (part.drafts - right);
            self.send_gates(part.running, output, row, computed);
            row += part.tokens.len();
            let running = &mut self.running[part.running];
            running.reported = running.reported.max(first + computed);
            self.cache.commit(&mut running.sequence, first + computed, &running.tokens);
            let wrong = part.drafts - right;
            if let Some(Err(error)) = running.history.as_mut().map(|history| history.rollback(wrong)) {
                running.fail(error);
            }
            running.drafted[0] += part.drafts;
            running.drafted[1] += right;
            self.shared.metrics.drafted_tokens.add(part.drafts);
            self.shared.metrics.accepted_tokens.add(right);
            if part.drafts > 0 {
                // Drafts cost most where they are wrong: as many as were right, and one more.
                running.drafts = self.options.drafts.min(right + 1);
            }
            if running.request.max_tokens == 0 && running.sequence.len() == running.tokens.len() {
                running.outcome.get_or_insert(Outcome::Done(Finish::Length));
            } else if let Some(logits) = drawn.last().filter(|_| !running.forks.is_empty()) {
                forks.extend(self.fork(part.running, logits));
            }
        }
        self.place(forks);
    }

    /// Draws the tokens of all parts, each as long as its drafts were right; gives how many were of each that runs.
    /// Threads share the parts, since a draw looks at the whole vocabulary.
    fn draw_all(&mut self, parts: &[Part], drawn: &[Vec<&[f32]>]) -> Vec<usize> {
        let (token_bytes, metrics) = (&self.model.token_bytes, &self.shared.metrics);
        let mut part_of = vec![None; self.running.len()];
        for (part, logits) in parts.iter().zip(drawn) {
            part_of[part.running] = Some((&part.tokens[part.tokens.len() - part.drafts..], logits));
        }
        let each = self.running.par_iter_mut().zip(part_of).with_max_len(1);
        each.map(|(running, part)| {
            part.map_or(0, |(drafted, logits)| {
                running.draw_with_drafts(drafted, logits, token_bytes, metrics)
            })
        })
        .collect()
    }

    /// Sends the gates of the positions of a part that were not sent before; its first row is `row`.
    fn send_gates(&self, index: usize, output: &StepOutput, row: usize, computed: usize) {
        let running = &self.running[index];
        let (streams, start) = (self.model.decoder.config().streams(), running.sequence.len());
        let skip = running.reported.saturating_sub(start);
        if running.request.gates && skip < computed {
            let range = (row + skip) * streams..(row + computed) * streams;
            let own = self.model.memory(&running.request);
            // Where the model's own memory is off, its gates are told: none is open.
            let is_own = self.model.decoder.config().memory.is_some();
            let own = own.or(self.model.memories.first().filter(|_| is_own));
            let count = own.map_or(0, |memory| memory.rows.widths().len());
            let gates = |layer: usize| match output.gates.get(layer) {
                Some(gates) => gates[range.clone()].to_vec(),
                None => vec![0.0; range.len()],
            };
            let layers = (0..count).map(gates).collect();
            let positions = start + skip..start + computed;
            let changed = self
                .model
                .memory(&running.request)
                .map(|memory| memory.rows.changed(&running.tokens, positions.clone()).unwrap_or_default());
            let changed = changed.unwrap_or_else(|| vec![vec![0; positions.len()]; count]);
            running.tell(&Event::Gates(PositionGates { first: positions.start, layers, changed }));
        }
    }

    /// The other choices of a prompt that has been read, each with its first token.
    fn fork(&mut self, index: usize, logits: &[f32]) -> Vec<Running> {
        let choices = std::mem::take(&mut self.running[index].forks);
        let lead = &self.running[index];
        let begin = |choice| {
            let mut fork = lead.fork(choice, self.cache.fork(&lead.sequence));
            fork.draw(logits, &self.model.token_bytes, &self.shared.metrics);
            fork
        };
        choices.into_iter().map(begin).collect()
    }

    /// Gives forks their places; those for which there is none wait for one.
    fn place(&mut self, forks: Vec<Running>) {
        for fork in forks {
            let place = self.running.partition_point(|other| other.order <= fork.order);
            self.running.insert(place, fork);
        }
        while self.running.len() > self.options.running {
            self.preempt(self.running.len() - 1);
        }
    }

    fn measure(&self) {
        let metrics = &self.shared.metrics;
        metrics.running.set(self.running.len());
        metrics.waiting.set(self.shared.taken.load(SeqCst).saturating_sub(self.running.len()));
        metrics.pages_in_use.set(self.cache.pages_in_use());
    }
}

fn is_late(request: &Request, now: Instant) -> bool {
    request.deadline.is_some_and(|deadline| deadline <= now)
}
