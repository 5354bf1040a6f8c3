//! The interface of a model that can be asked.

use engram_data::Begin;
use engram_infer::ScoredText;

use super::error::Result;

/// A request for the likelihood of a continuation after a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    tokens: Vec<u32>,
    start: usize,
}

impl Request {
    /// `continuation` after `context`; neither may be empty.
    pub fn new(context: &[u32], continuation: &[u32]) -> Option<Self> {
        let nothing = context.is_empty() || continuation.is_empty();
        (!nothing).then(|| Self { tokens: [context, continuation].concat(), start: context.len() })
    }

    /// The tokens that the model reads: all but the last.
    pub fn inputs(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }

    /// All tokens; the targets among them are scored.
    pub(crate) fn text(&self) -> ScoredText<'_> {
        ScoredText { tokens: &self.tokens, first: self.start }
    }

    /// The tokens to score.
    pub fn targets(&self) -> &[u32] {
        &self.tokens[self.start..]
    }

    /// The input position that predicts the first target.
    pub fn first(&self) -> usize {
        self.start - 1
    }
}

/// How likely a token is in its context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetScore {
    /// Logarithm of its probability, in nats.
    pub log_probability: f32,
    /// Whether it is the likeliest; of equal ones, the first.
    pub likeliest: bool,
}

/// How likely a continuation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Likelihood {
    /// Sum of its tokens' log-probabilities, in nats.
    pub log_probability: f64,
    /// Whether each of its tokens is the likeliest.
    pub greedy: bool,
}

impl Likelihood {
    /// The total over a continuation's tokens.
    pub fn of(tokens: &[TargetScore]) -> Self {
        Self {
            log_probability: tokens.iter().map(|token| f64::from(token.log_probability)).sum(),
            greedy: tokens.iter().all(|token| token.likeliest),
        }
    }
}

/// The cost of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Its tokens; a beginning that several requests share counts once.
    DistinctTokens,
    /// The longest request times the number of requests.
    PaddedTokens,
}

/// A language model with its tokenizer.
pub trait Scorer {
    /// Identifies the model.
    fn identity(&self) -> String;

    /// Maximum number of tokens that it reads at once.
    fn context(&self) -> usize;

    /// The token before a text.
    fn begin(&self) -> Begin;

    /// The cost of a batch.
    fn cost(&self) -> Cost;

    /// A text's tokens, without the token before it.
    ///
    /// # Errors
    /// A text without tokens in this vocabulary.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// The text of tokens.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    fn decode(&self, tokens: &[u32]) -> Result<String>;

    /// The likelihood of each token of each request's continuation, in order. Inputs fit the context. The composition
    /// and order of batches change only rounding.
    ///
    /// # Errors
    /// When the model cannot be computed.
    fn score(&self, batch: &[&Request]) -> Result<Vec<Vec<TargetScore>>>;

    /// The likeliest continuation of each prompt, token by token, by at most `limit` tokens, until
    /// `finished(prompt, tokens so far)`, or until the end of the text, which is not returned. Prompts are not empty,
    /// and fit the context with `limit` more tokens.
    ///
    /// # Errors
    /// When the model cannot be computed.
    fn proceed(
        &self,
        prompts: &[&[u32]],
        limit: usize,
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    ) -> Result<Vec<Vec<u32>>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_all_but_its_last_token() {
        let request = Request::new(&[1, 2], &[3, 4]).unwrap();
        assert_eq!((request.inputs(), request.targets(), request.first()), (&[1, 2, 3][..], &[3, 4][..], 1));
        assert!(Request::new(&[], &[1]).is_none() && Request::new(&[1], &[]).is_none());
    }
}
