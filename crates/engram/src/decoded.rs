//! A checkpoint that is asked, and whose texts a decoder continues: each token from what is kept of those before it,
//! not from the whole text.

use std::cell::OnceCell;
use std::future::poll_fn;
use std::task::Poll;

use engram_eval::tasks::{Begin, Cost, Error, Request, Result, Scorer};
use engram_infer::{Engine, EngineOptions, Event, Sampling};
use engram_model::TargetScore;
use engram_train::Trained;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::interrupt;
use crate::served::Served;

/// Scores as [`Trained`] does, and continues texts by an engine, with the same tokens but for ties that rounding
/// decides.
pub(crate) struct Decoded {
    trained: Trained,
    /// Started with the first text: most tasks ask for none.
    engine: OnceCell<(Engine, Runtime)>,
}

/// Texts that are continued at once, where the cache has room for as many.
const TEXTS: usize = 16;

/// Tokens of a prompt that are read in a step. Nobody waits for the texts beside it, so that it may be a long one.
const CHUNK: usize = 512;

impl Decoded {
    /// Of a checkpoint whose memory, if it has one, is of a published form.
    pub(crate) fn new(trained: Trained) -> Self {
        Self { trained, engine: OnceCell::new() }
    }

    fn engine(&self) -> anyhow::Result<&(Engine, Runtime)> {
        if let Some(engine) = self.engine.get() {
            return Ok(engine);
        }
        let served = Served::mapped(&self.trained)?;
        let own = EngineOptions::default();
        let context = served.context_bytes(own.page);
        let options = EngineOptions {
            running: TEXTS,
            waiting: 1,
            cache_bytes: own.cache_bytes.min(TEXTS * context).max(context),
            chunk: CHUNK,
            prompt_tokens: CHUNK,
            ..own
        };
        let engine = Engine::start(served.model, options)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        Ok(self.engine.get_or_init(|| (engine, runtime)))
    }

    fn request(&self, prompt: &[u32], limit: usize) -> engram_infer::Request {
        engram_infer::Request {
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            end_tokens: vec![self.trained.tokenizer().end_of_text()],
            ..engram_infer::Request::new(prompt.to_vec(), limit)
        }
    }
}

impl Scorer for Decoded {
    fn identity(&self) -> String {
        Scorer::identity(&self.trained)
    }

    fn context(&self) -> usize {
        self.trained.context()
    }

    fn begin(&self) -> Begin {
        Scorer::begin(&self.trained)
    }

    fn cost(&self) -> Cost {
        self.trained.cost()
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.trained.encode(text)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.trained.decode(tokens)
    }

    fn score(&self, batch: &[&Request]) -> Result<Vec<Vec<TargetScore>>> {
        self.trained.score(batch)
    }

    fn proceed(
        &self,
        prompts: &[&[u32]],
        limit: usize,
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        let (engine, runtime) = self.engine().map_err(|error| Error::Answers(error.into()))?;
        let mut texts: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        let mut left = prompts.iter().enumerate();
        let mut open: Vec<(usize, UnboundedReceiver<Event>)> = Vec::new();
        loop {
            // One prompt after another: what begins as one before it did is not computed again.
            let is_read = |(index, _): &(usize, _)| !texts[*index].is_empty();
            if open.len() < TEXTS
                && open.iter().all(is_read)
                && let Some((index, prompt)) = left.next()
            {
                let events = engine.submit(self.request(prompt, limit));
                open.push((index, events.map_err(|refusal| Error::Answers(refusal.into()))?));
            }
            if open.is_empty() {
                return Ok(texts);
            }
            if interrupt::asked() {
                return Err(Error::Interrupted);
            }
            let (at, event) = runtime.block_on(next(&mut open));
            let index = open[at].0;
            let done = match event {
                Some(Event::Token(token)) => {
                    texts[index].push(token.id);
                    finished(index, &texts[index])
                }
                Some(Event::Gates(_) | Event::PromptLogprobs(_)) => false,
                Some(Event::Done(_)) => true,
                Some(Event::Failed(failure)) => return Err(Error::Answers(failure.into())),
                None => return Err(Error::Answers(engram_infer::Failure::Stopped.into())),
            };
            if done {
                // No longer listened to, a text is no longer continued.
                open.swap_remove(at);
            }
        }
    }
}

/// The first event that is there of any text, with its place in `open`; none: its text goes on no more.
async fn next(open: &mut [(usize, UnboundedReceiver<Event>)]) -> (usize, Option<Event>) {
    poll_fn(|context| {
        for (at, (_, events)) in open.iter_mut().enumerate() {
            if let Poll::Ready(event) = events.poll_recv(context) {
                return Poll::Ready((at, event));
            }
        }
        Poll::Pending
    })
    .await
}
