//! What is asked of the engine, and what it answers.

use std::time::{Duration, Instant};

use crate::cache::Root;
use crate::grammar::Grammar;
use crate::sampling::{BadParameter, Sampling, TokenLogprob};

/// A text to be continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens of the continuation at most.
    pub max_tokens: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// Texts before which the continuation ends.
    pub stop: Vec<String>,
    /// Tokens that end it, and are not part of it.
    pub end_tokens: Vec<u32>,
    /// Tokens of the continuation before which it does not end by an end token.
    pub min_tokens: usize,
    /// The form that the continuation has, if it has to have one.
    pub grammar: Option<Grammar>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// With the probability of each token, and of so many likeliest ones.
    pub logprobs: Option<usize>,
    /// With the probability of each token of the prompt after those before it, and of so many likeliest ones.
    pub prompt_logprobs: Option<usize>,
    /// With the gates of every position.
    pub gates: bool,
    /// Which of the model's memories is read; none: memory off. The first, where the model has none, is none.
    pub memory: Option<usize>,
    /// When it must be done.
    pub deadline: Option<Instant>,
}

impl Request {
    /// The model's own continuation of `prompt`.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            sampling: Sampling::default(),
            stop: Vec::new(),
            end_tokens: Vec::new(),
            min_tokens: 0,
            grammar: None,
            logit_bias: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            gates: false,
            memory: Some(0),
            deadline: None,
        }
    }

    pub(crate) fn root(&self) -> Root {
        self.memory.map_or(Root::NoMemory, Root::Memory)
    }

    /// Whether both are computed alike up to the end of the prompt.
    pub(crate) fn shares_prompt(&self, other: &Self) -> bool {
        let part = |request: &Self| {
            (request.memory, request.gates, request.prompt_logprobs, request.max_tokens == 0)
        };
        part(self) == part(other) && self.prompt == other.prompt
    }

    /// Whether something is computed even if no token is to follow.
    pub(crate) fn needs_prompt(&self) -> bool {
        self.max_tokens > 0 || self.gates || self.prompt_logprobs.is_some()
    }
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A parameter cannot be.
    #[error(transparent)]
    Parameter(#[from] BadParameter),
    /// The prompt has no token.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// A token that the model does not know.
    #[error("token {token}, at position {position} of the prompt, is outside the vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Tokens of the vocabulary.
        vocabulary: usize,
    },
    /// Prompt and continuation are longer than the model's context.
    #[error(
        "this model's context is {context} tokens, but {prompt} are in the prompt and {max_tokens} are to follow: \
         shorten either"
    )]
    TooLong {
        /// Tokens of the context.
        context: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
    },
    /// The whole cache could not hold it.
    #[error(
        "the request needs {needed} pages of the cache, which has {pages}: shorten it, or enlarge the cache"
    )]
    Cache {
        /// Pages that it would fill.
        needed: usize,
        /// Pages that there are.
        pages: usize,
    },
    /// As many requests wait as may.
    #[error("{waiting} requests wait already: try again later")]
    Busy {
        /// Requests that wait.
        waiting: usize,
    },
    /// A memory that the model does not have.
    #[error("memory {memory} is asked for, but the model has {memories}, counted from 0")]
    Memory {
        /// The memory.
        memory: usize,
        /// Memories of the model.
        memories: usize,
    },
    /// The engine takes no more requests.
    #[error("the server is stopping and takes no more requests")]
    Stopping,
}

/// What comes of a request, one after another; the last is [`Event::Done`] or [`Event::Failed`].
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token of the continuation.
    Token(GeneratedToken),
    /// Gates of positions that have been computed, if they were asked for.
    Gates(PositionGates),
    /// How likely the prompt's next tokens are, if that was asked for. Those of the prompt's first token, which has
    /// nothing before it, are missing: the first event begins with its second token.
    PromptLogprobs(Vec<TokenLogprob>),
    /// The continuation is complete.
    Done(Summary),
    /// It could not be completed.
    Failed(Failure),
}

/// A token of a continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// The token.
    pub id: u32,
    /// Text that is certain now; it may end before the token does, or begin before.
    pub text: String,
    /// How likely it was, if that was asked for.
    pub logprob: Option<TokenLogprob>,
}

/// Gates of consecutive positions.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionGates {
    /// The first position; the prompt begins at 0.
    pub first: usize,
    /// Of each memory layer `[positions, streams]`.
    pub layers: Vec<Vec<f32>>,
    /// Of each memory layer how many of the rows that a position reads an overlay changes, `[positions]`.
    pub changed: Vec<Vec<usize>>,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// By an end token or a stop string, or because its form is complete.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
}

/// A request that is done.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub finish: Finish,
    /// Text that was held back until now.
    pub text: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the cache.
    pub cached_tokens: usize,
    /// Tokens of the continuation; an end token counts.
    pub completion_tokens: usize,
    /// Tokens that were drafted, and those of them that were right.
    pub drafted: [usize; 2],
    /// Time that its steps spent waiting for memory rows.
    pub row_wait: Duration,
    /// The end token that ended it and how likely it was, if likelihoods were asked for.
    pub end: Option<(u32, TokenLogprob)>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Memory rows are unavailable.
    #[error("memory rows are unavailable: {0}")]
    Rows(String),
    /// A logit is not a number.
    #[error(
        "the model computed a logit that is not a number: its weights are damaged, import or train it again"
    )]
    NotANumber,
    /// The form that the answer has to have is too complex to follow.
    #[error("the form of the answer is too complex to follow: {0}")]
    Grammar(String),
    /// A lone request did not fit into the cache.
    #[error("the KV cache has no room for the request")]
    CacheFull,
    /// It was not done in time.
    #[error("the request was not done within its time limit")]
    Deadline,
    /// The engine ended.
    #[error("the server stopped before the request was done")]
    Stopped,
}
