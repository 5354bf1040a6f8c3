//! A scorer for any model, by the decoder that also serves.

use std::cell::RefCell;

use engram_data::{Begin, Tokenizer};
use engram_infer::{Offline, OfflineError, ScoredText, TokenScore};

use super::error::{Error, Result};
use super::scorer::{Cost, Request, Scorer, TargetScore};

/// A decoder with its tokenizer.
#[derive(Debug)]
pub struct ModelScorer {
    offline: RefCell<Offline>,
    tokenizer: Tokenizer,
    begin: Begin,
    identity: String,
    interrupted: fn() -> bool,
}

impl ModelScorer {
    /// A model with the identity `identity`, whose texts begin with `begin`.
    pub fn new(offline: Offline, tokenizer: Tokenizer, begin: Begin, identity: String) -> Self {
        Self { offline: offline.into(), tokenizer, begin, identity, interrupted: || false }
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Stops continuing texts when `interrupted` returns true.
    pub fn until(self, interrupted: fn() -> bool) -> Self {
        Self { interrupted, ..self }
    }
}

impl Scorer for ModelScorer {
    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn context(&self) -> usize {
        self.offline.borrow().decoder().config().context
    }

    fn begin(&self) -> Begin {
        self.begin
    }

    fn cost(&self) -> Cost {
        Cost::DistinctTokens
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text).map_err(|error| Error::Answers(error.into()))
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens).map_err(|error| Error::Answers(error.into()))
    }

    fn score(&self, batch: &[&Request]) -> Result<Vec<Vec<TargetScore>>> {
        let texts: Vec<ScoredText<'_>> = batch.iter().map(|request| request.text()).collect();
        let scores = self.offline.borrow_mut().score(&texts).map_err(failed)?;
        let target =
            |TokenScore { logprob, likeliest, .. }| TargetScore { log_probability: logprob, likeliest };
        Ok(scores.into_iter().map(|scores| scores.into_iter().map(target).collect()).collect())
    }

    fn proceed(
        &self,
        prompts: &[&[u32]],
        limit: usize,
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        let end = self.tokenizer.end_of_text();
        let mut offline = self.offline.borrow_mut();
        offline.proceed(prompts, (limit, end), finished, &self.interrupted).map_err(failed)
    }
}

fn failed(error: OfflineError) -> Error {
    match error {
        OfflineError::Interrupted => Error::Interrupted,
        OfflineError::Token { .. } | OfflineError::TooLong { .. } | OfflineError::Empty => {
            Error::Mismatch(error.to_string())
        }
        _ => Error::Answers(error.into()),
    }
}
