//! Continuous batching: every step of the model computes the next tokens of all running requests.
//!
//! A thread of its own owns the decoder and its cache. A step takes the token that each request is due, with drafts
//! of those that may follow, and chunks of the prompts that are still to be read, so that a long prompt delays
//! others by no more than a chunk. Requests come and go between steps.
//!
//! A request is let in when the cache has room for all that it may become, so that none is ever thrown out. Memory
//! rows are asked for as soon as tokens are known: those of a prompt's next chunk while this one computes.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use engram_address::History;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::cache::{Cache, Sequence};
use crate::decoder::{Decoder, StepOutput};
use crate::metrics::Metrics;
use crate::prompt_lookup;
use crate::request::{Event, Failure, Finish, GeneratedToken, PositionGates, Refusal, Request, Summary};
use crate::row_fetch::{Needed, RowFetch, RowIds, RowTiers};
use crate::sampling::{Sampler, TokenLogprob};
use crate::step_rows::Chunk;
use crate::stop_strings::StopStrings;
use crate::text_stream::TextStream;

/// A decoder and what it decodes for.
pub struct Model {
    /// The weights.
    pub decoder: Decoder,
    /// Where memory rows come from, if the model has a memory.
    pub rows: Option<RowTiers>,
    /// Bytes of text that each token stands for.
    pub token_bytes: Vec<Vec<u8>>,
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

/// An engine that cannot be had.
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
    /// The thread could not be had.
    #[error("cannot start the engine's thread")]
    Thread(#[source] std::io::Error),
    /// The threads that compute could not be had.
    #[error("cannot start the threads that compute")]
    Pool(#[from] rayon::ThreadPoolBuildError),
}

/// Answers requests. Dropped, it ends what runs.
#[derive(Debug)]
pub struct Engine {
    commands: Option<mpsc::Sender<Waiting>>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the engine's thread and those who ask share.
#[derive(Debug)]
struct Shared {
    metrics: Metrics,
    /// Requests that were taken and do not run yet.
    waiting: AtomicUsize,
    stopping: AtomicBool,
    limits: Limits,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    waiting: usize,
    vocabulary: usize,
    context: usize,
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
        if prompt.saturating_add(max_tokens) > self.context {
            return Err(Refusal::TooLong { context: self.context, prompt, max_tokens });
        }
        let needed = (prompt + max_tokens).div_ceil(self.page);
        if needed > self.pages {
            return Err(Refusal::Cache { needed, pages: self.pages });
        }
        Ok(())
    }
}

struct Waiting {
    request: Request,
    events: UnboundedSender<Event>,
    since: Instant,
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// When an option leaves nothing to work with, or the rows are not those of the model.
    pub fn start(model: Model, options: EngineOptions) -> Result<Self, EngineError> {
        let config = model.decoder.config();
        let layers = config.memory.as_ref().map_or(0, |memory| memory.layers.len());
        let widths = model.rows.as_ref().map_or(Vec::new(), RowTiers::widths);
        if widths.len() != layers {
            return Err(EngineError::Rows { layers, found: widths.len() });
        }
        let needed = config.memory.as_ref().map_or(0, |memory| memory.row_width);
        if let Some(&found) = widths.iter().find(|&&width| width != needed) {
            return Err(EngineError::RowWidth { needed, found });
        }
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
        let page_bytes = 4 * layout.page_values();
        let pages = options.cache_bytes / page_bytes;
        if pages == 0 {
            let (name, found) = ("cache_bytes", options.cache_bytes);
            return Err(EngineError::Option { name, found, least: page_bytes });
        }
        let limits = Limits {
            waiting: options.waiting,
            vocabulary: config.vocabulary,
            context: config.context,
            page: options.page,
            pages,
        };
        let shared = Arc::new(Shared {
            metrics: Metrics::default(),
            waiting: AtomicUsize::new(0),
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
            promised: 0,
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
    /// When it cannot be, or not now.
    pub fn submit(&self, request: Request) -> Result<UnboundedReceiver<Event>, Refusal> {
        let refused = |refusal| {
            self.shared.metrics.refused.add(1);
            Err(refusal)
        };
        if let Err(refusal) = self.shared.limits.check(&request) {
            return refused(refusal);
        }
        if self.shared.stopping.load(SeqCst) {
            return refused(Refusal::Stopping);
        }
        let most = self.shared.limits.waiting;
        let room =
            self.shared.waiting.fetch_update(SeqCst, SeqCst, |count| (count < most).then_some(count + 1));
        if let Err(waiting) = room {
            return refused(Refusal::Busy { waiting });
        }
        let (events, receiver) = unbounded_channel();
        let waiting = Waiting { request, events, since: Instant::now() };
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(waiting).is_ok());
        if sent { Ok(receiver) } else { refused(Refusal::Stopping) }
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
    queue: mpsc::Receiver<Waiting>,
    shared: Arc<Shared>,
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
    /// Pages that running requests hold or may yet ask for.
    promised: usize,
}

/// A request that has a place.
struct Running {
    request: Request,
    events: UnboundedSender<Event>,
    since: Instant,
    /// Prompt, then continuation.
    tokens: Vec<u32>,
    /// What has been computed of them.
    sequence: Sequence,
    /// Row ids, if the memory is on.
    history: Option<History>,
    /// The next chunk of the prompt, whose rows are on their way.
    next: Option<NextChunk>,
    sampler: Sampler,
    text: TextStream,
    stop: StopStrings,
    /// Tokens to draft next.
    drafts: usize,
    cached_tokens: usize,
    drafted: [usize; 2],
    row_wait: Duration,
    last_token: Option<Instant>,
    outcome: Option<Outcome>,
}

struct NextChunk {
    count: usize,
    rows: Option<RowFetch>,
}

impl NextChunk {
    fn is_ready(&self) -> bool {
        self.rows.as_ref().is_none_or(RowFetch::is_ready)
    }
}

enum Outcome {
    Done(Finish),
    Failed(Failure),
    Cancelled,
}

/// What one request has in a step.
struct Part {
    running: usize,
    /// Its next tokens, drafts at the end.
    tokens: Vec<u32>,
    drafts: usize,
    /// Tokens whose logits are wanted.
    logits: usize,
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
                Ok(waiting) => self.waiting.push_back(waiting),
                Err(_) => return false,
            }
        }
        self.waiting.extend(self.queue.try_iter());
        true
    }

    /// Ends requests that are done, failed, late or deserted.
    fn let_go(&mut self) {
        let now = Instant::now();
        let late = |request: &Request| request.deadline.is_some_and(|deadline| deadline <= now);
        let mut kept = VecDeque::new();
        for waiting in self.waiting.drain(..) {
            if waiting.events.is_closed() {
                self.shared.metrics.cancelled.add(1);
            } else if late(&waiting.request) {
                self.shared.metrics.failed.add(1);
                let _ = waiting.events.send(Event::Failed(Failure::Deadline));
            } else {
                kept.push_back(waiting);
                continue;
            }
            self.shared.waiting.fetch_sub(1, SeqCst);
        }
        self.waiting = kept;
        for index in (0..self.running.len()).rev() {
            let running = &mut self.running[index];
            if running.outcome.is_none() && running.events.is_closed() {
                running.outcome = Some(Outcome::Cancelled);
            } else if running.outcome.is_none() && late(&running.request) {
                running.outcome = Some(Outcome::Failed(Failure::Deadline));
            }
            if running.outcome.is_some() {
                let running = self.running.remove(index);
                self.finish(running);
            }
        }
    }

    fn finish(&mut self, mut running: Running) {
        self.promised -= self.pages_of(&running.request);
        let metrics = &self.shared.metrics;
        // Whoever has stopped receiving does not mind.
        match running.outcome.take() {
            Some(Outcome::Done(finish)) => {
                metrics.done.add(1);
                let summary = running.summary(finish);
                let _ = running.events.send(Event::Done(summary));
            }
            Some(Outcome::Failed(failure)) => {
                metrics.failed.add(1);
                let _ = running.events.send(Event::Failed(failure));
            }
            Some(Outcome::Cancelled) | None => metrics.cancelled.add(1),
        }
        self.cache.release(running.sequence);
    }

    fn pages_of(&self, request: &Request) -> usize {
        (request.prompt.len() + request.max_tokens).div_ceil(self.options.page)
    }

    /// Lets requests in, in the order in which they came, while there is room.
    fn let_in(&mut self) {
        while self.running.len() < self.options.running
            && let Some(waiting) = self.waiting.front()
            && self.promised + self.pages_of(&waiting.request) <= self.cache.pages()
            && let Some(waiting) = self.waiting.pop_front()
        {
            self.shared.waiting.fetch_sub(1, SeqCst);
            self.promised += self.pages_of(&waiting.request);
            let running = self.begin(waiting);
            self.running.push(running);
        }
    }

    fn begin(&mut self, waiting: Waiting) -> Running {
        let Waiting { request, events, since } = waiting;
        // Gates are not kept: whoever wants them has the whole prompt computed.
        let known = if request.gates { &[][..] } else { &request.prompt[..] };
        let sequence = self.cache.begin(request.root(), known);
        let rows = self.model.rows.as_ref().filter(|_| request.memory);
        let mut running = Running {
            tokens: request.prompt.clone(),
            sampler: Sampler::new(request.sampling, &request.prompt),
            stop: StopStrings::new(request.stop.clone()),
            history: rows.map(|rows| rows.addressing().history()),
            cached_tokens: sequence.len(),
            text: TextStream::default(),
            drafts: self.options.drafts.min(1),
            drafted: [0; 2],
            row_wait: Duration::ZERO,
            last_token: None,
            outcome: None,
            next: None,
            request,
            events,
            since,
            sequence,
        };
        self.shared.metrics.prompt_tokens.add(running.tokens.len());
        self.shared.metrics.cached_tokens.add(running.cached_tokens);
        if running.request.max_tokens == 0 {
            running.outcome = Some(Outcome::Done(Finish::Length));
            return running;
        }
        let start = running.cached_tokens;
        let history = running.history.as_mut();
        if let Some(Err(error)) = history.map(|history| history.extend(&running.tokens[..start]).map(|_| ()))
        {
            running.fail(error);
        }
        running
    }

    /// One step of the model for all that run.
    fn step(&mut self) {
        let start = Instant::now();
        // For newcomers; what others need now they asked for in the step before.
        self.ask_ahead(&[]);
        let (mut parts, due_rows) = self.plan();
        if parts.is_empty() {
            return;
        }
        self.ask_ahead(&parts);
        let mut rows: Vec<RowFetch> = due_rows.into_iter().collect();
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
    /// or are on their way if there is nothing else to do. With the rows of the former.
    fn plan(&mut self) -> (Vec<Part>, Option<RowFetch>) {
        let mut parts = Vec::new();
        let mut ids = RowIds::default();
        let mut any = false;
        for (index, running) in self.running.iter_mut().enumerate().filter(|(_, running)| running.is_due()) {
            let left = running.request.max_tokens - running.generated();
            let most = running.drafts.min(left - 1);
            let mut tokens = running.tokens[running.sequence.len()..].to_vec();
            tokens.extend_from_slice(prompt_lookup::draft(&running.tokens, most));
            if let (Some(tiers), Some(history)) = (&self.model.rows, &mut running.history) {
                if let Err(error) = ids.add(history, &tokens, tiers) {
                    running.fail(error);
                    continue;
                }
                any = true;
            }
            let (drafts, logits) = (tokens.len() - 1, tokens.len());
            parts.push(Part { running: index, tokens, drafts, logits, rows: None });
        }
        let mut rows = None;
        if let Some(tiers) = self.model.rows.as_ref().filter(|_| any) {
            match tiers.fetch(ids, Needed::Now) {
                Ok(fetch) => rows = Some(fetch),
                Err(error) => {
                    parts.drain(..).for_each(|part| self.running[part.running].fail(&error));
                }
            }
        }
        let ready = |running: &Running| {
            running.outcome.is_none() && running.next.as_ref().is_some_and(NextChunk::is_ready)
        };
        let busy = !parts.is_empty() || self.running.iter().any(ready);
        let mut left = self.options.prompt_tokens;
        for (index, running) in self.running.iter_mut().enumerate() {
            let fits = (ready(running) || !busy && running.outcome.is_none())
                && running.next.as_ref().is_some_and(|next| next.count <= left);
            let Some(next) = running.next.take_if(|_| fits) else { continue };
            left -= next.count;
            let start = running.sequence.len();
            let tokens = running.tokens[start..start + next.count].to_vec();
            let logits = usize::from(start + next.count == running.tokens.len());
            parts.push(Part { running: index, tokens, drafts: 0, logits, rows: next.rows });
        }
        (parts, rows)
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
                running.ask(start..start + count, self.model.rows.as_ref());
            }
            left = left.saturating_sub(running.next.as_ref().map_or(0, |next| next.count));
        }
    }

    fn compute(&mut self, parts: &[Part], rows: &mut [RowFetch]) -> Result<StepOutput, Failure> {
        for part in parts {
            let sequence = &mut self.running[part.running].sequence;
            // There is room: it was promised when the request was let in.
            self.cache
                .reserve(sequence, part.tokens.len())
                .map_err(|error| Failure::Rows(error.to_string()))?;
        }
        let chunks: Vec<Chunk<'_>> = parts
            .iter()
            .map(|part| {
                let running = &self.running[part.running];
                let memory = running.history.is_some();
                let (tokens, logits) = (&part.tokens[..], part.logits);
                Chunk { sequence: &running.sequence, tokens, memory, logits, targets: &[] }
            })
            .collect();
        let output = self.model.decoder.step(&mut self.cache, &chunks, rows);
        output.map_err(|error| Failure::Rows(error.to_string()))
    }

    /// Draws tokens from the logits, keeps the drafts that are right, and takes back the others.
    fn take(&mut self, parts: &[Part], output: &StepOutput) {
        let vocabulary = self.model.decoder.config().vocabulary;
        let streams = self.model.decoder.config().streams();
        let (mut logits, mut row) = (output.logits.chunks_exact(vocabulary), 0);
        for part in parts {
            let running = &mut self.running[part.running];
            let of_part: Vec<&[f32]> = logits.by_ref().take(part.logits).collect();
            let first = running.sequence.len();
            let drafted = &part.tokens[part.tokens.len() - part.drafts..];
            let mut right = 0;
            for (index, logits) in of_part.iter().enumerate() {
                let token = running.draw(logits, &self.model.token_bytes, &self.shared.metrics);
                if running.outcome.is_some() || drafted.get(index) != Some(&token) {
                    break;
                }
                right += 1;
            }
            let computed = part.tokens.len() - (part.drafts - right);
            if running.request.gates {
                let range = row * streams..(row + computed) * streams;
                let layers = output.gates.iter().map(|gates| gates[range.clone()].to_vec()).collect();
                let _ = running.events.send(Event::Gates(PositionGates { first, layers }));
            }
            row += part.tokens.len();
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
        }
    }

    fn measure(&self) {
        let metrics = &self.shared.metrics;
        metrics.running.set(self.running.len());
        metrics.waiting.set(self.shared.waiting.load(SeqCst));
        metrics.pages_in_use.set(self.cache.pages_in_use());
    }
}

impl Running {
    /// Whether its prompt has been read, so that its next token is due.
    fn is_due(&self) -> bool {
        self.outcome.is_none() && self.generated() > 0
    }

    /// Asks for the rows of the prompt's next chunk.
    fn ask(&mut self, chunk: Range<usize>, tiers: Option<&RowTiers>) {
        let count = chunk.len();
        let rows = match (tiers, &mut self.history) {
            (Some(tiers), Some(history)) => {
                let mut ids = RowIds::default();
                let added = ids.add(history, &self.tokens[chunk], tiers);
                let fetched = added.map_err(|error| error.to_string());
                match fetched
                    .and_then(|()| tiers.fetch(ids, Needed::Later).map_err(|error| error.to_string()))
                {
                    Ok(rows) => Some(rows),
                    Err(error) => return self.fail(error),
                }
            }
            _ => None,
        };
        self.next = Some(NextChunk { count, rows });
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    fn fail(&mut self, error: impl ToString) {
        self.outcome = Some(Outcome::Failed(Failure::Rows(error.to_string())));
    }

    /// Draws the next token, sends it, and ends the request if it is the last.
    fn draw(&mut self, logits: &[f32], token_bytes: &[Vec<u8>], metrics: &Metrics) -> u32 {
        let id = self.sampler.draw(logits);
        self.tokens.push(id);
        metrics.generated_tokens.add(1);
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => metrics.first_token.add_time(now - self.since),
            Some(last) => metrics.between_tokens.add_time(now - last),
        }
        if self.request.end_tokens.contains(&id) {
            self.outcome = Some(Outcome::Done(Finish::Stop));
            return id;
        }
        let bytes = token_bytes.get(id as usize).map_or(&[][..], Vec::as_slice);
        let (text, stopped) = self.stop.push(&self.text.push(bytes));
        let logprob = self.request.logprobs.map(|top| TokenLogprob::of(logits, id, top));
        let _ = self.events.send(Event::Token(GeneratedToken { id, text, logprob }));
        if stopped {
            self.outcome = Some(Outcome::Done(Finish::Stop));
        } else if self.generated() == self.request.max_tokens {
            self.outcome = Some(Outcome::Done(Finish::Length));
        }
        id
    }

    fn summary(&mut self, finish: Finish) -> Summary {
        let rest = std::mem::take(&mut self.text).finish();
        // A stop string has taken all that followed it.
        let text = match finish {
            Finish::Stop if self.stop.is_stopped() => String::new(),
            _ => {
                let (text, stopped) = self.stop.push(&rest);
                if stopped { text } else { text + &self.stop.finish() }
            }
        };
        Summary {
            finish,
            text,
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.cached_tokens,
            completion_tokens: self.generated(),
            drafted: self.drafted,
            row_wait: self.row_wait,
        }
    }
}
