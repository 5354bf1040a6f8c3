//! How the next token is drawn.

use std::collections::HashMap;

use engram_kernels::log_sum_exp;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What decides a draw. Penalties change the logits first; then they are divided by the temperature, and the
/// likeliest tokens are kept by `top_k`, `min_p` and `top_p`, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only so many of the likeliest tokens are considered; none: all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Only tokens at least this times as probable as the likeliest; 0: all.
    pub min_p: f32,
    /// Logits of tokens that occurred, in the prompt too, are divided by it where positive, multiplied where
    /// negative (CTRL, arXiv 1909.05858, section 4.1); 1: no change.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that were generated before.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens for each time that they were generated before.
    pub frequency_penalty: f32,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for Sampling {
    /// The model's own probabilities.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

/// A parameter that no request can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` {problem}")]
pub struct BadParameter {
    /// The parameter.
    pub name: &'static str,
    /// What it is, and what it may be.
    pub problem: String,
}

impl BadParameter {
    pub(crate) fn new(name: &'static str, problem: impl Into<String>) -> Self {
        Self { name, problem: problem.into() }
    }
}

impl Sampling {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The parameter that cannot be, and its range.
    pub fn validate(&self) -> Result<(), BadParameter> {
        let within = |name, value: f32, low: f32, high: f32| match value {
            value if value >= low && value <= high => Ok(()),
            _ => Err(BadParameter::new(name, format!("is {value}, but must be from {low} to {high}"))),
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(BadParameter::new(
                "temperature",
                format!("is {}, but must be 0 or above", self.temperature),
            ));
        }
        if self.top_k == Some(0) {
            return Err(BadParameter::new("top_k", "is 0, which leaves no token: take 1 or more"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let problem = format!("is {}, but must lie above 0 and at most at 1", self.top_p);
            return Err(BadParameter::new("top_p", problem));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let problem = format!("is {}, but must be above 0", self.repetition_penalty);
            return Err(BadParameter::new("repetition_penalty", problem));
        }
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
    }
}

/// Draws the tokens of one answer, one after another: the same logits and seed give the same tokens.
#[derive(Debug)]
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens that occurred, and how often they were generated.
    seen: HashMap<u32, u32>,
    /// Added to logits.
    bias: Vec<(u32, f32)>,
}

/// Takes away what must not come from the logits of all tokens.
type Forbid<'a> = &'a mut dyn FnMut(&mut [f32]);

impl Sampler {
    pub(crate) fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        let seen = prompt.iter().map(|&token| (token, 0)).collect();
        Self { sampling, random, seen, bias: Vec::new() }
    }

    /// The same with `bias` added to the logits of some tokens.
    pub(crate) fn with_bias(self, bias: Vec<(u32, f32)>) -> Self {
        Self { bias, ..self }
    }

    /// The next token, from the logits of all.
    pub(crate) fn draw(&mut self, logits: &[f32]) -> u32 {
        self.draw_among(logits, None)
    }

    /// The next token; `forbid` takes away what must not come.
    pub(crate) fn draw_among(&mut self, logits: &[f32], forbid: Option<Forbid<'_>>) -> u32 {
        let token = if self.has_penalties() || !self.bias.is_empty() || forbid.is_some() {
            let mut logits = logits.to_vec();
            self.penalise(&mut logits);
            for &(token, bias) in &self.bias {
                logits[token as usize] += bias;
            }
            if let Some(forbid) = forbid {
                forbid(&mut logits);
            }
            self.choose(&logits)
        } else {
            self.choose(logits)
        };
        *self.seen.entry(token).or_default() += 1;
        token
    }

    fn has_penalties(&self) -> bool {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }

    fn penalise(&self, logits: &mut [f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.sampling;
        for (&token, &count) in &self.seen {
            let logit = &mut logits[token as usize];
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if count > 0 {
                *logit -= presence_penalty + count as f32 * frequency_penalty;
            }
        }
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature == 0.0 {
            return likeliest(logits);
        }
        draw(logits, &self.sampling, self.random.random::<f32>())
    }
}

/// The likeliest token, the first of equals.
pub(crate) fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// The token that the uniform number `uniform` in 0..1 chooses.
fn draw(logits: &[f32], sampling: &Sampling, uniform: f32) -> u32 {
    let likeliest = likeliest(logits);
    let largest = logits[likeliest as usize];
    let weight = |token: u32| ((logits[token as usize] - largest) / sampling.temperature).exp();
    let mut kept: Vec<(u32, f32)> = (0..logits.len() as u32).map(|token| (token, weight(token))).collect();
    if let Some(k) = sampling.top_k.filter(|&k| k < kept.len()) {
        kept.select_nth_unstable_by(k - 1, better(logits));
        kept.truncate(k);
    }
    kept.retain(|(_, weight)| *weight >= sampling.min_p);
    let mut ranking = Ranking { logits, total: kept.iter().map(|(_, weight)| weight).sum(), kept, sorted: 0 };
    if sampling.top_p < 1.0 {
        ranking.keep(sampling.top_p);
    }
    let mut left = uniform * ranking.total;
    let mut last = None;
    for rank in 0.. {
        let Some((token, weight)) = ranking.get(rank) else { break };
        last = Some(token);
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last.unwrap_or(likeliest)
}

/// Tokens and weights, the likeliest first: sorted as far as anybody looks, which is hardly ever the whole vocabulary.
struct Ranking<'a> {
    logits: &'a [f32],
    kept: Vec<(u32, f32)>,
    total: f32,
    sorted: usize,
}

impl Ranking<'_> {
    fn get(&mut self, rank: usize) -> Option<(u32, f32)> {
        if rank == self.sorted && rank < self.kept.len() {
            let next = (4 * self.sorted).max(256).min(self.kept.len());
            let rest = &mut self.kept[self.sorted..];
            let count = next - self.sorted;
            if count < rest.len() {
                rest.select_nth_unstable_by(count, better(self.logits));
            }
            rest[..count].sort_unstable_by(better(self.logits));
            self.sorted = next;
        }
        self.kept.get(rank).copied()
    }

    /// Keeps the likeliest tokens that together have the share `top_p` of all weights.
    fn keep(&mut self, top_p: f32) {
        let (mut reached, mut rank) = (0.0, 0);
        while reached < top_p * self.total
            && let Some((_, weight)) = self.get(rank)
        {
            reached += weight;
            rank += 1;
        }
        self.kept.truncate(rank);
        self.total = reached;
    }
}

/// The order of tokens by their logits, largest first, and by their ids where those are equal.
fn better(logits: &[f32]) -> impl Fn(&(u32, f32), &(u32, f32)) -> std::cmp::Ordering + Copy {
    |a, b| {
        let logit = |token: u32| logits[token as usize];
        logit(b.0).total_cmp(&logit(a.0)).then(a.0.cmp(&b.0))
    }
}

/// The logarithm of a probability that is 0, for readers who know no infinity.
pub(crate) const LEAST_LOGPROB: f32 = -9999.0;

/// How likely the model finds a token, and which it finds likeliest.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Natural logarithm of the token's probability, before penalties and temperature.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprob {
    /// Of `token`, beside the `top` likeliest.
    pub(crate) fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let sum = log_sum_exp(logits);
        let logprob = |token: u32| (logits[token as usize] - sum).max(LEAST_LOGPROB);
        let top = likeliest_tokens(logits, top).into_iter().map(|token| (token, logprob(token))).collect();
        Self { logprob: logprob(token), top }
    }
}

/// Logits that are passed over at once where none is large enough.
const BLOCK: usize = 64;

/// The `count` likeliest tokens, likeliest first; of equals the first.
pub(crate) fn likeliest_tokens(logits: &[f32], count: usize) -> Vec<u32> {
    let mut found: Vec<(u32, f32)> = Vec::new();
    let enters = |found: &[(u32, f32)], logit: f32| {
        found.len() < count || found.last().is_some_and(|&(_, least)| logit > least)
    };
    for (block, logits) in logits.chunks(BLOCK).enumerate() {
        // Without a branch for each, so that many are compared at once.
        if !logits.iter().fold(false, |any, &logit| any | enters(&found, logit)) {
            continue;
        }
        for (token, &logit) in (block * BLOCK..).zip(logits) {
            if enters(&found, logit) {
                let place = found.partition_point(|&(_, other)| other >= logit);
                found.insert(place, (token as u32, logit));
                found.truncate(count);
            }
        }
    }
    found.into_iter().map(|(token, _)| token).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Logarithms of 0.5, 0.3, 0.2, out of order.
    fn logits() -> Vec<f32> {
        [0.2_f32, 0.5, 0.3].map(f32::ln).to_vec()
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let all = Sampling::default();
        for (uniform, token) in [(0.0, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 0), (0.999, 0)] {
            assert_eq!(draw(&logits(), &all, uniform), token, "at {uniform}");
        }
    }

    #[test]
    fn zero_temperature_takes_the_likeliest() {
        let mut sampler = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, &[]);
        assert_eq!(sampler.draw(&logits()), 1);
        assert_eq!(likeliest(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), 1);
    }

    #[test]
    fn the_tail_can_be_cut() {
        let all = Sampling::default();
        let k = Sampling { top_k: Some(2), ..all };
        assert_eq!(draw(&logits(), &k, 0.62), 1);
        assert_eq!(draw(&logits(), &k, 0.63), 2);
        assert_eq!(draw(&logits(), &Sampling { top_p: 0.5, ..all }, 0.999), 1);
        assert_eq!(draw(&logits(), &Sampling { top_p: 0.6, ..all }, 0.999), 2);
        assert_eq!(draw(&logits(), &Sampling { min_p: 0.5, ..all }, 0.999), 2);
        assert_eq!(draw(&logits(), &Sampling { min_p: 0.7, ..all }, 0.999), 1);
    }

    proptest! {
        /// Sorted as far as anybody looks, it is as if everything were sorted.
        #[test]
        fn a_large_vocabulary_is_drawn_from_in_order(
            seed: u64, size in 1_usize..2000, uniform in 0.0_f32..1.0,
            top_k in prop::option::of(1_usize..600), top_p in prop::option::of(0.05_f32..1.0), flat: bool,
        ) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let width = if flat { 0.01 } else { 8.0 };
            let logits: Vec<f32> = (0..size).map(|_| width * random.random::<f32>()).collect();
            let sampling = Sampling { temperature: 1.0, top_k, top_p: top_p.unwrap_or(1.0), ..Sampling::default() };
            let found = draw(&logits, &sampling, uniform);

            let mut order: Vec<usize> = (0..size).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(top_k.unwrap_or(size));
            let weight = |token: usize| f64::from(logits[token] - logits[order[0]]).exp();
            let whole: f64 = order.iter().map(|&token| weight(token)).sum();
            let share = |rank: usize| order[..rank].iter().map(|&token| weight(token)).sum::<f64>() / whole;
            let kept = (1..=order.len()).find(|&rank| share(rank) >= f64::from(sampling.top_p));
            let total = share(kept.unwrap_or(order.len()));
            let rank = order.iter().position(|&token| token == found as usize).unwrap();
            // Rounding may move what lies at an edge.
            let (from, to) = (share(rank) / total - 1e-4, share(rank + 1) / total + 1e-4);
            prop_assert!((from..to).contains(&f64::from(uniform)), "{uniform} is not in {from}..{to}");
        }
    }

    #[test]
    fn temperature_flattens() {
        let hot = Sampling { temperature: 1e6, ..Sampling::default() };
        assert_eq!(draw(&logits(), &hot, 0.34), 2);
        assert_eq!(draw(&logits(), &hot, 0.67), 0);
    }

    #[test]
    fn penalties_turn_from_what_was_said() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        // Logits are negative here: a penalty multiplies them.
        let mut repeated = Sampler::new(Sampling { repetition_penalty: 2.0, ..greedy }, &[1]);
        assert_eq!(repeated.draw(&logits()), 2);
        let mut present = Sampler::new(Sampling { presence_penalty: 1.0, ..greedy }, &[1]);
        let drawn: Vec<u32> = (0..3).map(|_| present.draw(&logits())).collect();
        assert_eq!(drawn, [1, 2, 0], "the prompt does not count, what was generated does");
        let mut frequent = Sampler::new(Sampling { frequency_penalty: 0.3, ..greedy }, &[]);
        let drawn: Vec<u32> = (0..4).map(|_| frequent.draw(&logits())).collect();
        assert_eq!(drawn, [1, 1, 2, 1]);
    }

    #[test]
    fn a_bias_moves_and_what_is_forbidden_never_comes() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let mut biased = Sampler::new(greedy, &[]).with_bias(vec![(0, 5.0)]);
        assert_eq!(biased.draw(&logits()), 0);
        let mut forbid = |logits: &mut [f32]| logits[..2].fill(f32::NEG_INFINITY);
        for temperature in [0.0, 1.0, 100.0] {
            let mut sampler = Sampler::new(Sampling { temperature, ..Sampling::default() }, &[]);
            assert!((0..30).all(|_| sampler.draw_among(&logits(), Some(&mut forbid)) == 2));
        }
    }

    #[test]
    fn a_seed_repeats_itself() {
        let draws = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }, &[]);
            (0..50).map(|_| sampler.draw(&logits())).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn logprobs_are_logarithms_of_probabilities() {
        let shifted: Vec<f32> = logits().iter().map(|logit| logit + 100.0).collect();
        let found = TokenLogprob::of(&shifted, 0, 2);
        assert!((found.logprob - 0.2_f32.ln()).abs() < 1e-5);
        assert_eq!(found.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 2]);
        assert!((found.top[0].1 - 0.5_f32.ln()).abs() < 1e-5);
        assert!(TokenLogprob::of(&shifted, 0, 0).top.is_empty());
        assert_eq!(TokenLogprob::of(&shifted, 0, 9).top.len(), 3);
        let never = [0.0, f32::NEG_INFINITY, -1e38];
        let found = TokenLogprob::of(&never, 1, 3);
        assert_eq!((found.logprob, found.top[2].1), (LEAST_LOGPROB, LEAST_LOGPROB), "a number in any case");
    }

    proptest! {
        #[test]
        fn the_likeliest_tokens_are_the_first_of_all_in_order(
            logits in proptest::collection::vec((-4_i32..4).prop_map(|logit| logit as f32), 1..300),
            count in 0_usize..20,
        ) {
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            order.truncate(count);
            prop_assert_eq!(likeliest_tokens(&logits, count), order);
        }
    }

    #[test]
    fn impossible_values_are_named() {
        let all = Sampling::default();
        let refused = [
            (Sampling { temperature: -1.0, ..all }, "temperature"),
            (Sampling { temperature: f32::NAN, ..all }, "temperature"),
            (Sampling { top_k: Some(0), ..all }, "top_k"),
            (Sampling { top_p: 0.0, ..all }, "top_p"),
            (Sampling { top_p: 1.1, ..all }, "top_p"),
            (Sampling { min_p: f32::NAN, ..all }, "min_p"),
            (Sampling { repetition_penalty: 0.0, ..all }, "repetition_penalty"),
            (Sampling { presence_penalty: 3.0, ..all }, "presence_penalty"),
            (Sampling { frequency_penalty: f32::INFINITY, ..all }, "frequency_penalty"),
        ];
        for (sampling, name) in refused {
            assert_eq!(sampling.validate().unwrap_err().name, name);
        }
        assert_eq!(all.validate(), Ok(()));
    }
}
