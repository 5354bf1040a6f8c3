//! A request that has a place: what has been computed of it, and what it draws.

use std::ops::Range;
use std::time::{Duration, Instant};

use engram_address::History;
use engram_data::TokenBytes;
use tokio::sync::mpsc::UnboundedSender;

use crate::cache::Sequence;
use crate::grammar::{Grammar, GrammarState};
use crate::metrics::Metrics;
use crate::request::{Event, Failure, Finish, GeneratedToken, Request, Summary};
use crate::row_fetch::{Needed, RowFetch, RowIds, RowTiers};
use crate::sampling::{Sampler, TokenLogprob};
use crate::step_rows::Target;
use crate::stop_strings::StopStrings;
use crate::text_stream::TextStream;

/// Another choice for the same prompt: it begins where the prompt has been read.
pub(crate) type Fork = (Request, UnboundedSender<Event>);

/// A request that has a place, or had one and waits to get it back.
pub(crate) struct Running {
    /// Its number in the order in which requests came.
    pub(crate) order: u64,
    pub(crate) request: Request,
    pub(crate) events: UnboundedSender<Event>,
    /// Other choices that wait for the end of the prompt.
    pub(crate) forks: Vec<Fork>,
    pub(crate) since: Instant,
    /// Prompt, then continuation.
    pub(crate) tokens: Vec<u32>,
    /// What has been computed of them.
    pub(crate) sequence: Sequence,
    /// Row ids, if a memory is read.
    pub(crate) history: Option<History>,
    /// The next chunk to be read, whose rows are on their way.
    pub(crate) next: Option<NextChunk>,
    /// Positions that have room in the cache for the next step.
    pub(crate) room: usize,
    /// Length that is expected, to tell whether there is room for others.
    pub(crate) goal: usize,
    sampler: Sampler,
    /// How far it has come in the form that it has to have.
    grammar: Option<GrammarState>,
    text: TextStream,
    stop: StopStrings,
    /// Tokens to draft next.
    pub(crate) drafts: usize,
    /// Positions of which logits have been scored, or gates sent.
    pub(crate) reported: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) drafted: [usize; 2],
    pub(crate) row_wait: Duration,
    last_token: Option<Instant>,
    /// The end token that was drawn, if likelihoods were asked for.
    pub(crate) end: Option<(u32, TokenLogprob)>,
    pub(crate) outcome: Option<Outcome>,
}

pub(crate) struct NextChunk {
    pub(crate) count: usize,
    pub(crate) rows: Option<RowFetch>,
}

impl NextChunk {
    pub(crate) fn is_ready(&self) -> bool {
        self.rows.as_ref().is_none_or(RowFetch::is_ready)
    }
}

pub(crate) enum Outcome {
    Done(Finish),
    Failed(Failure),
    Cancelled,
}

impl Running {
    pub(crate) fn new(order: u64, (request, events): Fork, since: Instant) -> Self {
        Self {
            order,
            forks: Vec::new(),
            tokens: request.prompt.clone(),
            sequence: Sequence::default(),
            history: None,
            next: None,
            room: 0,
            goal: 0,
            sampler: Sampler::new(request.sampling, &request.prompt).with_bias(request.logit_bias.clone()),
            grammar: request.grammar.as_ref().map(Grammar::begin),
            text: TextStream::default(),
            stop: StopStrings::new(request.stop.clone()),
            drafts: 0,
            reported: 0,
            cached_tokens: 0,
            drafted: [0; 2],
            row_wait: Duration::ZERO,
            last_token: None,
            outcome: None,
            end: None,
            request,
            events,
            since,
        }
    }

    /// Whether only its newest token has not been computed, so that the next is due.
    pub(crate) fn is_due(&self) -> bool {
        self.outcome.is_none()
            && self.next.is_none()
            && self.generated() > 0
            && self.sequence.len() + 1 == self.tokens.len()
    }

    /// Positions of the next step: the token that is due with as many drafts as there may be, or the next chunk.
    pub(crate) fn wanted(&self) -> usize {
        if self.is_due() {
            let left = self.request.max_tokens - self.generated();
            return 1 + self.drafts.min(left - 1);
        }
        self.next.as_ref().filter(|_| self.outcome.is_none()).map_or(0, |next| next.count)
    }

    /// Tokens of which the cache may be asked: those after them have to be computed, since something of them is told.
    pub(crate) fn known(&self) -> &[u32] {
        if self.request.gates || self.request.prompt_logprobs.is_some() && self.is_reading_prompt() {
            return &self.tokens[..(self.reported + 1).min(self.tokens.len())];
        }
        &self.tokens
    }

    /// Whether tokens of the prompt are still to be scored.
    fn is_reading_prompt(&self) -> bool {
        self.reported + 1 < self.request.prompt.len()
    }

    /// Tokens of the prompt that the chunk at `start` scores: each by the position before it.
    pub(crate) fn targets_of(&self, start: usize, count: usize) -> Vec<Target> {
        let Some(top) = self.request.prompt_logprobs else { return Vec::new() };
        let prompt = &self.request.prompt;
        let positions = start.max(self.reported)..(start + count).min(prompt.len() - 1);
        positions
            .map(|position| Target { after: position - start, token: prompt[position + 1], top })
            .collect()
    }

    /// Whether a token is drawn after the first `end` tokens.
    pub(crate) fn draws_after(&self, end: usize) -> bool {
        end == self.tokens.len() && self.request.max_tokens > 0
    }

    /// Asks for the rows of the next chunk.
    pub(crate) fn ask(&mut self, chunk: Range<usize>, tiers: Option<&RowTiers>) {
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

    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    pub(crate) fn fail(&mut self, error: impl ToString) {
        self.outcome = Some(Outcome::Failed(Failure::Rows(error.to_string())));
    }

    /// Tells all choices of the prompt. Whoever has stopped receiving does not mind.
    pub(crate) fn tell(&self, event: &Event) {
        for events in std::iter::once(&self.events).chain(self.forks.iter().map(|(_, events)| events)) {
            let _ = events.send(event.clone());
        }
    }

    /// Gives the place to another choice, if whoever asked for this one has left while the prompt is read.
    pub(crate) fn hand_over(&mut self) {
        self.forks.retain(|(_, events)| !events.is_closed());
        if self.events.is_closed() && !self.forks.is_empty() {
            let (request, events) = self.forks.remove(0);
            self.sampler =
                Sampler::new(request.sampling, &request.prompt).with_bias(request.logit_bias.clone());
            self.grammar = request.grammar.as_ref().map(Grammar::begin);
            self.stop = StopStrings::new(request.stop.clone());
            (self.request, self.events) = (request, events);
        }
    }

    /// Another choice, whose prompt has been read here; `sequence` holds the same positions.
    pub(crate) fn fork(&self, (request, events): Fork, sequence: Sequence) -> Self {
        Self {
            sequence,
            history: self.history.clone(),
            goal: self.goal,
            drafts: self.drafts,
            reported: self.reported,
            cached_tokens: self.cached_tokens,
            row_wait: self.row_wait,
            ..Self::new(self.order, (request, events), self.since)
        }
    }

    /// Draws the token that is due from the first of `logits`, and one after each draft from the others. Stops at the first
    /// draft that is wrong. Gives how many drafts were right.
    pub(crate) fn draw_with_drafts(
        &mut self,
        drafted: &[u32],
        logits: &[&[f32]],
        token_bytes: &TokenBytes,
        metrics: &Metrics,
    ) -> usize {
        let mut right = 0;
        for logits in logits {
            let token = self.draw(logits, token_bytes, metrics);
            if self.outcome.is_some() || drafted.get(right) != Some(&token) {
                break;
            }
            right += 1;
        }
        right
    }

    /// Draws the next token, sends it, and ends the request if it is the last.
    pub(crate) fn draw(&mut self, logits: &[f32], token_bytes: &TokenBytes, metrics: &Metrics) -> u32 {
        if logits.iter().any(|logit| logit.is_nan()) {
            self.outcome = Some(Outcome::Failed(Failure::NotANumber));
            return 0;
        }
        let early = self.generated() < self.request.min_tokens;
        let (ends, mut too_complex) = (&self.request.end_tokens, None);
        let is_free = !early && self.grammar.is_none();
        let mut forbid = |logits: &mut [f32]| {
            let kept = self.grammar.as_mut().map_or(Ok(true), |grammar| grammar.keep(logits, ends));
            // What is complete ends, however short it is.
            let goes_on = kept.unwrap_or_else(|error| {
                too_complex = Some(error);
                false
            });
            for &token in ends.iter().filter(|_| early && goes_on) {
                logits[token as usize] = f32::NEG_INFINITY;
            }
        };
        let id = if is_free {
            self.sampler.draw(logits)
        } else {
            self.sampler.draw_among(logits, Some(&mut forbid))
        };
        let ends_here = ends.contains(&id);
        let taken = match (&mut self.grammar, too_complex) {
            (_, Some(error)) => Err(error),
            (Some(grammar), None) if !ends_here => grammar.take(id),
            _ => Ok(false),
        };
        let complete = match taken {
            Ok(complete) => complete,
            Err(error) => {
                self.outcome = Some(Outcome::Failed(Failure::Grammar(error.to_string())));
                return 0;
            }
        };
        self.tokens.push(id);
        metrics.generated_tokens.add(1);
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => metrics.first_token.add_time(now - self.since),
            Some(last) => metrics.between_tokens.add_time(now - last),
        }
        let logprob = self.request.logprobs.map(|top| TokenLogprob::of(logits, id, top));
        if ends_here {
            self.end = logprob.map(|logprob| (id, logprob));
            self.outcome = Some(Outcome::Done(Finish::Stop));
            return id;
        }
        let (text, stopped) = self.stop.push(&self.text.push(token_bytes.get(id)));
        let _ = self.events.send(Event::Token(GeneratedToken { id, text, logprob }));
        if stopped || complete {
            self.outcome = Some(Outcome::Done(Finish::Stop));
        } else if self.generated() == self.request.max_tokens {
            self.outcome = Some(Outcome::Done(Finish::Length));
        }
        id
    }

    pub(crate) fn summary(&mut self, finish: Finish) -> Summary {
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
            end: self.end.take(),
        }
    }
}
