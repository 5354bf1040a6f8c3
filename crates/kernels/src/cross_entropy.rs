//! The last linear map and the loss in one operation: logits exist for only a few hundred tokens at a time.

use crate::parallel;
use crate::product::{Matrix, MatrixMut, Threads, multiply, transpose_parallel};
use crate::simd::{self, vectorized};

/// Values in a block of logits: 8 MiB, so that it is written, read and used while it is in the last-level cache.
const BLOCK_LOGITS: usize = 1 << 21;
/// Minimum number of tokens in a block, so that products stay efficient with a large vocabulary.
const FEWEST_TOKENS: usize = 64;
/// Number of tokens of a block that one task turns into probabilities.
const TASK_TOKENS: usize = 16;

/// What [`linear_cross_entropy`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearCrossEntropy {
    /// Mean of the losses, in nats.
    pub mean: f32,
    /// `[tokens]`: −log probability of each target, in nats.
    pub losses: Vec<f32>,
    /// Gradients of the mean, if requested.
    pub gradients: Option<LinearCrossEntropyGradients>,
}

/// Gradients of the mean loss.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearCrossEntropyGradients {
    /// `[tokens, width]`: of the hidden states.
    pub hidden: Vec<f32>,
    /// `[width, vocabulary]`: of the weight.
    pub weight: Vec<f32>,
}

/// Cross-entropy of `targets` `[tokens]` under softmax(hidden · weight), with `hidden`
/// `[tokens, width]` and `weight` `[width, vocabulary]`.
///
/// With `gradients`, both gradients of the mean loss come from the same pass over the logits.
///
/// # Panics
/// When there is no token, a target is not below the vocabulary's size, or a slice does not have the stated shape.
pub fn linear_cross_entropy(
    hidden: &[f32],
    weight: &[f32],
    targets: &[u32],
    gradients: bool,
) -> LinearCrossEntropy {
    let problem = Problem::new(hidden, weight, targets);
    let Problem { tokens, width, vocabulary, .. } = problem;
    let block = (BLOCK_LOGITS / vocabulary).clamp(FEWEST_TOKENS, 1024).min(tokens);
    let mut logits = vec![0.0; block * vocabulary];
    let mut losses = vec![0.0; tokens];
    let transposed = if gradients { transpose_parallel(weight, width, vocabulary) } else { Vec::new() };
    let mut found = gradients.then(|| LinearCrossEntropyGradients {
        hidden: vec![0.0; tokens * width],
        weight: vec![0.0; width * vocabulary],
    });
    for (index, losses) in losses.chunks_mut(block).enumerate() {
        let first = index * block;
        let logits = &mut logits[..losses.len() * vocabulary];
        problem.logits(first, logits);
        problem.losses(first, logits, losses, gradients);
        if let Some(found) = &mut found {
            problem.gradients(first, logits, &transposed, found);
        }
    }
    let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / tokens as f64;
    LinearCrossEntropy { mean: mean as f32, losses, gradients: found }
}

/// The score of a target among the logits of its token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetScore {
    /// Logarithm of the target's probability, in nats.
    pub log_probability: f32,
    /// Whether the target is the likeliest; of several equal ones, the first.
    pub likeliest: u32,
}

/// Scores of `targets` `[tokens]` under softmax(hidden · weight). Shapes as for [`linear_cross_entropy`].
///
/// Computes a few thousand words of the vocabulary at a time, for many tokens: each part of the weight is read once for
/// all of them, and the logits are used while they are in cache.
///
/// # Panics
/// As [`linear_cross_entropy`].
pub fn linear_target_scores(hidden: &[f32], weight: &[f32], targets: &[u32]) -> Vec<TargetScore> {
    let problem = Problem::new(hidden, weight, targets);
    let mut logits = vec![0.0; SCORED_TOKENS.min(problem.tokens) * SCORED_WORDS.min(problem.vocabulary)];
    let mut scores = Vec::with_capacity(targets.len());
    for (index, targets) in targets.chunks(SCORED_TOKENS).enumerate() {
        let mut rows = vec![Partial::EMPTY; targets.len()];
        for first in (0..problem.vocabulary).step_by(SCORED_WORDS) {
            let words = SCORED_WORDS.min(problem.vocabulary - first);
            let logits = &mut logits[..targets.len() * words];
            problem.logits_of(index * SCORED_TOKENS, first, logits, words);
            let tasks = (logits.chunks_mut(TASK_TOKENS * words))
                .zip(rows.chunks_mut(TASK_TOKENS))
                .zip(targets.chunks(TASK_TOKENS));
            parallel::for_each(tasks, |((logits, rows), targets)| {
                vectorized(
                    #[inline(always)]
                    || {
                        // Not `for_each`: its closure would be compiled separately, without vectors.
                        for ((logits, row), &target) in logits.chunks_exact_mut(words).zip(rows).zip(targets)
                        {
                            row.add(logits, first, target as usize);
                        }
                    },
                );
            });
        }
        scores.extend(rows.into_iter().map(Partial::score));
    }
    scores
}

/// Numbers of tokens and of words of the vocabulary whose logits exist at a time: 8 MiB.
const SCORED_TOKENS: usize = 1024;
const SCORED_WORDS: usize = 2048;

/// Running state of a token's logits.
#[derive(Clone, Copy)]
struct Partial {
    max: f32,
    /// Of exponentials, relative to `max`.
    sum: f32,
    likeliest: u32,
    of_target: f32,
}

impl Partial {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, likeliest: 0, of_target: f32::NAN };

    /// Adds the logits of the words from `first` on, and overwrites them.
    #[inline(always)]
    fn add(&mut self, logits: &mut [f32], first: usize, target: usize) {
        if let Some(&logit) = target.checked_sub(first).and_then(|index| logits.get(index)) {
            self.of_target = logit;
        }
        let max = simd::max(logits);
        if max > self.max {
            let place = logits.iter().position(|&logit| logit == max).unwrap_or(0);
            self.sum *= simd::exp(self.max - max);
            (self.max, self.likeliest) = (max, (first + place) as u32);
        }
        self.sum += simd::exp_in_place(logits, 1.0, self.max);
    }

    fn score(self) -> TargetScore {
        let log_probability = self.of_target - (self.max + self.sum.ln());
        TargetScore { log_probability, likeliest: self.likeliest }
    }
}

/// The operands and their sizes.
struct Problem<'a> {
    hidden: &'a [f32],
    weight: Matrix<'a>,
    targets: &'a [u32],
    tokens: usize,
    width: usize,
    vocabulary: usize,
}

impl<'a> Problem<'a> {
    fn new(hidden: &'a [f32], weight: &'a [f32], targets: &'a [u32]) -> Self {
        let tokens = targets.len();
        assert!(tokens > 0, "cross-entropy of no tokens");
        assert!(
            !hidden.is_empty() && hidden.len().is_multiple_of(tokens),
            "cross-entropy: {} hidden values for {tokens} tokens",
            hidden.len()
        );
        let width = hidden.len() / tokens;
        assert!(
            !weight.is_empty() && weight.len().is_multiple_of(width),
            "cross-entropy: the weight's {} values are not rows for a width of {width}",
            weight.len()
        );
        let vocabulary = weight.len() / width;
        if let Some((token, target)) = targets.iter().enumerate().find(|&(_, &t)| t as usize >= vocabulary) {
            panic!(
                "cross-entropy: target {target} of token {token} is not below the vocabulary's {vocabulary}"
            );
        }
        let weight = Matrix::new(weight, width, vocabulary);
        Self { hidden, weight, targets, tokens, width, vocabulary }
    }

    /// The hidden states of `tokens` tokens from `first`.
    fn hidden(&self, first: usize, tokens: usize) -> Matrix<'_> {
        Matrix::new(&self.hidden[first * self.width..], tokens, self.width)
    }

    /// Fills `logits` `[_, vocabulary]` for the tokens from `first`.
    fn logits(&self, first: usize, logits: &mut [f32]) {
        let tokens = logits.len() / self.vocabulary;
        let logits = MatrixMut::new(logits, tokens, self.vocabulary);
        multiply(1.0, self.hidden(first, tokens), self.weight, 0.0, logits, Threads::All);
    }

    /// Fills `logits` `[_, words]` for the tokens from `token`, and the words from `word`.
    fn logits_of(&self, token: usize, word: usize, logits: &mut [f32], words: usize) {
        let tokens = logits.len() / words;
        let weight = self.weight.columns(word, words);
        let logits = MatrixMut::new(logits, tokens, words);
        multiply(1.0, self.hidden(token, tokens), weight, 0.0, logits, Threads::All);
    }

    /// Fills `losses` from `logits`; with `slopes`, turns the logits into the loss's gradient.
    fn losses(&self, first: usize, logits: &mut [f32], losses: &mut [f32], slopes: bool) {
        let vocabulary = self.vocabulary;
        let targets = &self.targets[first..][..losses.len()];
        let tasks = (logits.chunks_mut(TASK_TOKENS * vocabulary))
            .zip(losses.chunks_mut(TASK_TOKENS))
            .zip(targets.chunks(TASK_TOKENS));
        let share = 1.0 / self.tokens as f32;
        parallel::for_each(tasks, |((logits, losses), targets)| {
            vectorized(
                #[inline(always)]
                || {
                    let rows = logits.chunks_exact_mut(vocabulary).zip(losses).zip(targets);
                    for ((logits, loss), &target) in rows {
                        *loss = token_loss(logits, target as usize, slopes.then_some(share));
                    }
                },
            );
        });
    }

    /// Adds the contributions of the tokens from `first`, given the gradient of their logits and the transposed weight.
    fn gradients(
        &self,
        first: usize,
        slopes: &[f32],
        transposed: &[f32],
        gradients: &mut LinearCrossEntropyGradients,
    ) {
        let (width, vocabulary) = (self.width, self.vocabulary);
        let tokens = slopes.len() / vocabulary;
        let slopes = Matrix::new(slopes, tokens, vocabulary);
        let hidden = MatrixMut::new(&mut gradients.hidden[first * width..], tokens, width);
        multiply(1.0, slopes, Matrix::new(transposed, vocabulary, width), 0.0, hidden, Threads::All);
        let kept = if first == 0 { 0.0 } else { 1.0 };
        let weight = MatrixMut::new(&mut gradients.weight, width, vocabulary);
        multiply(1.0, self.hidden(first, tokens).transposed(), slopes, kept, weight, Threads::All);
    }
}

/// Loss of one token. With a `share`, replaces its logits by share · (softmax − one-hot target).
#[inline(always)]
fn token_loss(logits: &mut [f32], target: usize, share: Option<f32>) -> f32 {
    let max = simd::max(logits);
    let of_target = logits[target];
    let sum = simd::exp_in_place(logits, 1.0, max);
    if let Some(share) = share {
        let factor = share / sum;
        logits.iter_mut().for_each(|p| *p *= factor);
        logits[target] -= share;
    }
    max + sum.ln() - of_target
}

/// The logarithm of the sum of the exponentials of `logits`. Log-probabilities are logits minus this. NaN if one is
/// NaN, −∞ if there are none.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    vectorized(
        #[inline(always)]
        || {
            let max = simd::max(logits);
            // All logits are −∞, so there is nothing to subtract.
            let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let sum = simd::sum(
                [logits],
                #[inline(always)]
                |[logit]| simd::exp(logit - shift),
            );
            shift + sum.ln()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random};
    use proptest::prelude::*;

    fn naive(hidden: &[f32], weight: &[f32], targets: &[u32]) -> Vec<f32> {
        let width = hidden.len() / targets.len();
        let vocabulary = weight.len() / width;
        (hidden.chunks(width).zip(targets))
            .map(|(h, &target)| {
                let logits: Vec<f64> = (0..vocabulary)
                    .map(|v| {
                        (0..width).map(|i| f64::from(h[i]) * f64::from(weight[i * vocabulary + v])).sum()
                    })
                    .collect();
                let total: f64 = logits.iter().map(|l| l.exp()).sum();
                (total.ln() - logits[target as usize]) as f32
            })
            .collect()
    }

    fn targets(tokens: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
        random(tokens, seed).iter().map(|v| ((v + 1.0) / 2.0 * vocabulary as f32) as u32).collect()
    }

    #[test]
    fn log_sum_exp_is_that_of_f64() {
        for len in [1, 7, 16, 100, 50_000] {
            let logits: Vec<f32> = random(len, 5).iter().map(|v| 20.0 * v + 3.0).collect();
            let expected = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
            let found = f64::from(log_sum_exp(&logits));
            assert!(
                (found - expected).abs() < 3e-6 * (1.0 + expected.abs()),
                "{len}: {found}, not {expected}"
            );
        }
        assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 2.0]), 2.0);
        assert!(log_sum_exp(&[1.0, f32::NAN]).is_nan());
    }

    fn mean(losses: &[f32]) -> f64 {
        losses.iter().map(|&l| f64::from(l)).sum::<f64>() / losses.len() as f64
    }

    proptest! {
        #[test]
        fn losses_and_gradients(
            tokens in 1_usize..30, width in 1_usize..20, vocabulary in 1_usize..50, seed: u64,
        ) {
            let (hidden, weight) = (random(tokens * width, seed), random(width * vocabulary, seed ^ 1));
            let targets = targets(tokens, vocabulary, seed ^ 2);
            let found = linear_cross_entropy(&hidden, &weight, &targets, true);
            assert_close(&found.losses, &naive(&hidden, &weight, &targets), 1e-5);
            prop_assert!((f64::from(found.mean) - mean(&found.losses)).abs() < 1e-6);
            let without = linear_cross_entropy(&hidden, &weight, &targets, false);
            prop_assert_eq!(&without.losses, &found.losses);
            prop_assert!(without.gradients.is_none());
            let gradients = found.gradients.unwrap();
            // Scaled by the number of tokens so that one token's gradient is not lost in rounding.
            let times = |gradient: &[f32]| gradient.iter().map(|g| g * tokens as f32).collect::<Vec<_>>();
            let loss = |h: &[f32], w: &[f32]| {
                mean(&linear_cross_entropy(h, w, &targets, false).losses) * tokens as f64
            };
            assert_gradient("hidden", &hidden, &times(&gradients.hidden), |h| loss(h, &weight));
            assert_gradient("weight", &weight, &times(&gradients.weight), |w| loss(&hidden, w));
        }
    }

    #[test]
    fn blocks_of_tokens_add_up_and_give_the_same_bits_twice() {
        let (tokens, width, vocabulary) = (150, 24, 40_000); // 3 blocks of 64, 64 and 22
        let (hidden, weight) = (random(tokens * width, 1), random(width * vocabulary, 2));
        let targets = targets(tokens, vocabulary, 3);
        let found = linear_cross_entropy(&hidden, &weight, &targets, true);
        assert_eq!(found, linear_cross_entropy(&hidden, &weight, &targets, true));
        assert_close(&found.losses, &naive(&hidden, &weight, &targets), 1e-5);
        let all = found.gradients.unwrap();
        let (mut by_token, mut of_weight) = (Vec::new(), vec![0.0_f64; width * vocabulary]);
        for (hidden, target) in hidden.chunks(width).zip(&targets) {
            let one = linear_cross_entropy(hidden, &weight, &[*target], true).gradients.unwrap();
            by_token.extend(one.hidden.iter().map(|g| g / tokens as f32));
            of_weight.iter_mut().zip(&one.weight).for_each(|(t, g)| *t += f64::from(g / tokens as f32));
        }
        assert_close(&all.hidden, &by_token, 1e-6);
        assert_close(&all.weight, &of_weight.iter().map(|&g| g as f32).collect::<Vec<_>>(), 1e-6);
    }

    #[test]
    fn scores_are_losses_beside_the_likeliest() {
        let (tokens, width, vocabulary) = (1100, 8, 5_000); // Two blocks of tokens, three of words.
        let (hidden, weight) = (random(tokens * width, 1), random(width * vocabulary, 2));
        let first = targets(tokens, vocabulary, 3);
        let scores = linear_target_scores(&hidden, &weight, &first);
        let losses = linear_cross_entropy(&hidden, &weight, &first, false).losses;
        let found: Vec<f32> = scores.iter().map(|score| -score.log_probability).collect();
        assert_close(&found, &losses, 1e-5);
        let likeliest: Vec<u32> = scores.iter().map(|score| score.likeliest).collect();
        let best = linear_target_scores(&hidden, &weight, &likeliest);
        for ((best, score), token) in best.iter().zip(&scores).zip(&likeliest) {
            assert_eq!(best.likeliest, *token);
            assert!(best.log_probability >= score.log_probability);
        }
        let tied = linear_target_scores(&[1.0], &[0.5, 2.0, 2.0], &[2]);
        assert_eq!(tied[0].likeliest, 1);
        assert!(linear_target_scores(&[f32::NAN], &[0.5, 2.0], &[1])[0].log_probability.is_nan());
    }

    /// Errors of one sign add up over the tokens of a text.
    #[test]
    fn scores_under_a_large_vocabulary_are_not_biased() {
        let (tokens, width, vocabulary) = (64, 32, 50_000);
        let hidden: Vec<f32> = random(tokens * width, 1).iter().map(|value| 3.0 * value).collect();
        let weight = random(width * vocabulary, 2);
        let targets = targets(tokens, vocabulary, 3);
        let scores = linear_target_scores(&hidden, &weight, &targets);
        let errors =
            scores.iter().zip(&targets).zip(hidden.chunks_exact(width)).map(|((score, &target), x)| {
                let logit = |word: usize| -> f64 {
                    (0..width).map(|k| f64::from(x[k]) * f64::from(weight[k * vocabulary + word])).sum()
                };
                let sum: f64 = (0..vocabulary).map(|word| logit(word).exp()).sum();
                f64::from(score.log_probability) - (logit(target as usize) - sum.ln())
            });
        let errors: Vec<f64> = errors.collect();
        let mean = errors.iter().sum::<f64>() / tokens as f64;
        let worst = errors.iter().fold(0.0, |worst: f64, error| worst.max(error.abs()));
        assert!(mean.abs() < 1e-6 && worst < 5e-6, "mean {mean:.1e}, worst {worst:.1e}");
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (tokens, width, vocabulary) = (600, 64, 1000);
        let (hidden, weight) = (random(tokens * width, 1), random(width * vocabulary, 2));
        let targets = targets(tokens, vocabulary, 3);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| linear_cross_entropy(&hidden, &weight, &targets, true))
        };
        let one = with(1);
        assert_eq!(one, with(2));
        assert_eq!(one, with(5));
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let found = linear_cross_entropy(&[1.0], &[1e4, -1e4], &[0], true);
        assert_eq!(found.mean, 0.0);
        assert_eq!(linear_cross_entropy(&[1.0], &[1e4, -1e4], &[1], true).mean, 2e4);
    }

    #[test]
    fn a_nan_is_not_hidden() {
        let found = linear_cross_entropy(&[1.0, f32::NAN], &[0.1, 0.2, 0.3], &[2, 1], true);
        assert!(found.losses[0].is_finite() && found.losses[1].is_nan() && found.mean.is_nan());
    }

    #[test]
    #[should_panic(expected = "target 3 of token 1 is not below the vocabulary's 3")]
    fn refuses_a_target_outside_the_vocabulary() {
        linear_cross_entropy(&[1.0, 2.0], &[0.1, 0.2, 0.3], &[2, 3], false);
    }
}
