//! How likely a model finds given tokens: log-probabilities of prompts, and of answers to choose from.

use engram_kernels::{PackedMatrix, log_sum_exp};
use rayon::prelude::*;

use crate::sampling::{LEAST_LOGPROB, TokenLogprob, likeliest_tokens};
use crate::step_rows::{Chunk, Target};

/// How a token fares after what stands before it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScore {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Whether no other token is likelier; of equals the first is.
    pub likeliest: bool,
    /// The likeliest tokens, likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Logits that are in memory at once, about.
const LOGITS: usize = 1 << 22;

/// Rows of a step with targets, ascending, and for every target which of these rows it follows.
pub(crate) fn rows_of(chunks: &[Chunk<'_>]) -> (Vec<usize>, Vec<usize>) {
    let (mut rows, mut places, mut first) = (Vec::new(), Vec::new(), 0);
    for chunk in chunks {
        let start = rows.len();
        let mut wanted: Vec<usize> = chunk.targets.iter().map(|target| first + target.after).collect();
        places.extend(wanted.iter().copied());
        wanted.sort_unstable();
        wanted.dedup();
        rows.extend(wanted);
        for place in places.iter_mut().rev().take(chunk.targets.len()) {
            *place = start + rows[start..].partition_point(|row| row < place);
        }
        first += chunk.tokens.len();
    }
    (rows, places)
}

/// The score of every target. `hidden` `[rows, width]` are the normalised rows that they follow, `places` which of them.
pub(crate) fn scores(
    hidden: &[f32],
    head: &PackedMatrix,
    targets: &[Target],
    places: &[usize],
) -> Vec<TokenScore> {
    let (width, vocabulary) = (head.inputs(), head.outputs());
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|&target| places[target]);
    let mut scores: Vec<Option<TokenScore>> = vec![None; targets.len()];
    let size = (LOGITS / vocabulary).max(1);
    let mut left = &order[..];
    for (block, hidden) in hidden.chunks(size * width).enumerate() {
        let logits = head.product(hidden);
        let end = left.partition_point(|&target| places[target] < (block + 1) * size);
        let (own, later) = left.split_at(end);
        left = later;
        let score = |&target: &usize| {
            let row = places[target] - block * size;
            (target, TokenScore::of(&logits[row * vocabulary..][..vocabulary], targets[target]))
        };
        let own: Vec<(usize, TokenScore)> = own.par_iter().map(score).collect();
        own.into_iter().for_each(|(target, score)| scores[target] = Some(score));
    }
    scores.into_iter().flatten().collect()
}

impl TokenScore {
    fn of(logits: &[f32], target: Target) -> Self {
        let logit = logits[target.token as usize];
        let before = &logits[..target.token as usize];
        let beaten = before.iter().any(|&other| other >= logit) || logits.iter().any(|&other| other > logit);
        let sum = log_sum_exp(logits);
        let top = likeliest_tokens(logits, target.top);
        let top = top.into_iter().map(|token| (token, logits[token as usize] - sum)).collect();
        Self { logprob: logit - sum, likeliest: !beaten, top }
    }
}

impl From<&TokenScore> for TokenLogprob {
    /// The same as a number in any case, for readers who know no infinity.
    fn from(score: &TokenScore) -> Self {
        let finite = |logprob: f32| logprob.max(LEAST_LOGPROB);
        let top = score.top.iter().map(|&(token, logprob)| (token, finite(logprob))).collect();
        Self { logprob: finite(score.logprob), top }
    }
}
