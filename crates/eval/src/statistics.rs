//! Differences of held-out losses, paired over seeds and documents, with their errors.
//!
//! Two arms trained with the same seed see the same data in the same order, and are measured on the same documents. So
//! the difference of their losses varies much less than the losses do. Everything that a study claims is a *contrast*,
//! a weighted sum Σ c_a·L_a of the arms' mean losses whose weights add up to 0: a difference (1 and −1), or the slope
//! of a fitted line (weights of least squares).
//!
//! Seeds and documents are both samples, and their variances add:
//!
//! * over S seeds: with L_as as the loss of arm a and seed s in nats per token, `L_as = μ_a + β_s + ε_as`. The effect
//!   β_s of a seed on all arms cancels in a contrast. The variance σ² of ε is that of the residuals of all A arms, with
//!   (A−1)(S−1) degrees of freedom, and `v_s = σ² · Σ c_a² / S`. This assumes equally noisy arms, and makes three seeds
//!   bearable;
//! * over documents of T_d tokens, T in all, on the contrast's means over seeds x_d: the error of their ratio, with
//!   each document left out in turn ([`crate::ratio`]). Documents of unequal length have the precision of fewer equal
//!   ones, `n = T² / Σ T_d²` (Kish), so there are `n − 1` degrees of freedom.
//!
//! Noise that affects both is counted in both, so the standard error `√(v_s + v_d)` is too large rather than too small.
//! Intervals are those of Student's t with the degrees of freedom of Welch and Satterthwaite. With one seed, an
//! interval covers documents only.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

use crate::ratio::{equal_parts, ratio_with_error};

/// A contrast of mean losses, in nats per token (times the unit of its weights).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The estimate.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
    /// Degrees of freedom of the error.
    pub degrees: f64,
    /// Number of seeds.
    pub seeds: usize,
}

/// Losses on the same documents of all arms with the same seeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// Sums of cross-entropies in nats, `[arm][seed][document]`.
    losses: Vec<Vec<Vec<f64>>>,
    /// Tokens of each document.
    tokens: Vec<f64>,
}

impl Panel {
    /// From sums of cross-entropies `[arm][seed][document]`, in nats, and the tokens of each document. None if there
    /// are no tokens, or the numbers of seeds or documents differ. Documents without a token are left out.
    pub fn new(mut losses: Vec<Vec<Vec<f64>>>, mut tokens: Vec<f64>) -> Option<Self> {
        let seeds = losses.first()?.len();
        let whole = |arm: &Vec<Vec<f64>>| {
            arm.len() == seeds && arm.iter().all(|documents| documents.len() == tokens.len())
        };
        if seeds == 0 || !losses.iter().all(whole) {
            return None;
        }
        for documents in losses.iter_mut().flatten() {
            let mut lengths = tokens.iter();
            documents.retain(|_| lengths.next().is_some_and(|&length| length > 0.0));
        }
        tokens.retain(|&length| length > 0.0);
        (!tokens.is_empty()).then_some(Self { losses, tokens })
    }

    /// The number of documents of equal length with the same precision: `T² / Σ T_d²`.
    pub fn equal_documents(&self) -> f64 {
        equal_parts(self.tokens.iter().copied())
    }

    /// Mean losses of `arm` by seed, in nats per token.
    pub fn by_seed(&self, arm: usize) -> Vec<f64> {
        let all: f64 = self.tokens.iter().sum();
        self.losses[arm].iter().map(|documents| documents.iter().sum::<f64>() / all).collect()
    }

    /// Mean loss of `arm`, in nats per token.
    pub fn mean(&self, arm: usize) -> f64 {
        mean(&self.by_seed(arm))
    }

    /// The difference of arm `a` minus arm `b`.
    pub fn difference(&self, a: usize, b: usize) -> Option<Estimate> {
        let weight = |arm| f64::from(u8::from(arm == a)) - f64::from(u8::from(arm == b));
        self.contrast(&(0..self.losses.len()).map(weight).collect::<Vec<_>>())
    }

    /// The contrast with one weight per arm; the weights must add up to 0. None for one seed and one document, which
    /// give no error.
    pub fn contrast(&self, weights: &[f64]) -> Option<Estimate> {
        let seeds = self.losses[0].len();
        // (x_d, T_d)
        let combined = |(document, &tokens): (usize, &f64)| {
            let arm = |(losses, weight): (&Vec<Vec<f64>>, &f64)| {
                weight * losses.iter().map(|documents| documents[document]).sum::<f64>()
            };
            (self.losses.iter().zip(weights).map(arm).sum::<f64>() / seeds as f64, tokens)
        };
        let combined: Vec<(f64, f64)> = self.tokens.iter().enumerate().map(combined).collect();
        let (value, error) = ratio_with_error(&combined);
        let over_seeds = self.seed_variance().map(|(variance, degrees)| {
            (variance * weights.iter().map(|weight| weight * weight).sum::<f64>() / seeds as f64, degrees)
        });
        let over_documents = error.map(|error| (error * error, self.equal_documents() - 1.0));
        let variances: Vec<(f64, f64)> = over_seeds.into_iter().chain(over_documents).collect();
        let variance: f64 = variances.iter().map(|(variance, _)| variance).sum();
        // Welch and Satterthwaite.
        let spread: f64 = variances.iter().map(|(variance, degrees)| variance * variance / degrees).sum();
        let degrees = if spread > 0.0 { variance * variance / spread } else { variances.first()?.1 };
        Some(Estimate { value, error: variance.sqrt(), degrees, seeds })
    }

    /// σ² of one arm and seed, and its degrees of freedom; none with one seed or one arm.
    fn seed_variance(&self) -> Option<(f64, f64)> {
        let means: Vec<Vec<f64>> = (0..self.losses.len()).map(|arm| self.by_seed(arm)).collect();
        let (arms, seeds) = (means.len(), means[0].len());
        if arms < 2 || seeds < 2 {
            return None;
        }
        let of_seed: Vec<f64> =
            (0..seeds).map(|seed| means.iter().map(|arm| arm[seed]).sum::<f64>() / arms as f64).collect();
        let centre = mean(&of_seed);
        let residuals = means.iter().flat_map(|arm| {
            let of_arm = mean(arm);
            arm.iter().zip(&of_seed).map(move |(loss, seed)| loss - of_arm - seed + centre)
        });
        let degrees = ((arms - 1) * (seeds - 1)) as f64;
        Some((residuals.map(|residual| residual * residual).sum::<f64>() / degrees, degrees))
    }
}

/// Half the width of an interval that misses the true value with probability `risk`, in standard errors with this many
/// degrees of freedom.
pub(crate) fn student_quantile(degrees: f64, risk: f64) -> f64 {
    // The crate refuses only degrees that are not above 0, which no estimate has.
    StudentsT::new(0.0, 1.0, degrees).map_or(f64::INFINITY, |student| student.inverse_cdf(1.0 - risk / 2.0))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

impl Estimate {
    /// The confidence interval that misses the true value with probability `risk`.
    pub fn interval(&self, risk: f64) -> (f64, f64) {
        let reach = self.error * student_quantile(self.degrees, risk);
        (self.value - reach, self.value + reach)
    }

    /// Whether zero lies outside that interval.
    pub fn is_beyond_noise(&self, risk: f64) -> bool {
        let (low, high) = self.interval(risk);
        low > 0.0 || high < 0.0
    }
}

/// Weights with which values at `x` add up to the slope of the best-fitting line.
pub fn slope_weights(x: &[f64]) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let squares: f64 = x.iter().map(|x| (x - mean).powi(2)).sum();
    x.iter().map(|x| (x - mean) / squares).collect()
}

/// Weights with which values at `x` add up to the coefficient of x² of the best-fitting parabola.
pub fn curvature_weights(x: &[f64]) -> Vec<f64> {
    // x² minus what a line explains of it, by least squares.
    let squares: Vec<f64> = x.iter().map(|x| x * x).collect();
    let mean = squares.iter().sum::<f64>() / x.len() as f64;
    let centre = x.iter().sum::<f64>() / x.len() as f64;
    let slope: f64 = slope_weights(x).iter().zip(&squares).map(|(weight, square)| weight * square).sum();
    let rest: Vec<f64> =
        x.iter().zip(&squares).map(|(x, square)| square - mean - slope * (x - centre)).collect();
    let norm: f64 = rest.iter().map(|rest| rest * rest).sum();
    rest.iter().map(|rest| rest / norm).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn panel(losses: &[&[&[f64]]], tokens: &[f64]) -> Panel {
        let arm = |arm: &&[&[f64]]| arm.iter().map(|documents| documents.to_vec()).collect();
        Panel::new(losses.iter().map(arm).collect(), tokens.to_vec()).unwrap()
    }

    #[test]
    fn a_difference_by_hand() {
        // Two seeds, two documents of 10 and 30 tokens; differences in nats: [1, 3] and [2, 2].
        let panel = panel(&[&[&[21.0, 63.0], &[22.0, 62.0]], &[&[20.0, 60.0], &[20.0, 60.0]]], &[10.0, 30.0]);
        let found = panel.difference(0, 1).unwrap();
        // 4/40 with both seeds: no variance over seeds. Over documents: x = [1.5, 2.5], D·T = [1, 3]; without the first
        // 2.5/30, without the second 1.5/10, and as good as 40²/(10² + 30²) = 1.6 documents.
        assert!((found.value - 0.1).abs() < 1e-12);
        let squares: f64 = (2.5 / 30.0 - 0.1_f64).powi(2) + (1.5 / 10.0 - 0.1_f64).powi(2);
        assert!((found.error - (squares / 2.0).sqrt()).abs() < 1e-12);
        assert!((found.degrees - 0.6).abs() < 1e-9);
        assert!(!found.is_beyond_noise(0.05));
        assert!(found.is_beyond_noise(0.5));
    }

    #[test]
    fn an_interval_is_students() {
        let panel = panel(&[&[&[1.0, 3.0]], &[&[0.0; 2]]], &[1.0; 2]);
        let found = panel.difference(0, 1).unwrap();
        assert_eq!((found.value, found.error, found.degrees), (2.0, 1.0, 1.0));
        // Student's t with one degree of freedom: 12.706.
        assert!((found.interval(0.05).1 - (2.0 + 12.7062)).abs() < 1e-4);
    }

    #[test]
    fn documents_without_a_token_say_nothing() {
        let with = panel(&[&[&[1.0, 0.0, 3.0, 2.0]], &[&[0.0; 4]]], &[1.0, 0.0, 1.0, 1.0]);
        let without = panel(&[&[&[1.0, 3.0, 2.0]], &[&[0.0; 3]]], &[1.0; 3]);
        assert_eq!(with, without);
        // All tokens in one document, and one seed: the error is unknown.
        assert_eq!(panel(&[&[&[1.0, 0.0]], &[&[2.0, 0.0]]], &[4.0, 0.0]).difference(0, 1), None);
        assert_eq!(Panel::new(vec![vec![vec![0.0]]], vec![0.0]), None);
    }

    #[test]
    fn what_a_seed_does_to_all_arms_is_no_noise() {
        let same = [[1.0, 1.0], [3.0, 3.0], [7.0, 7.0]];
        let arm =
            |more: f64| same.iter().map(|seed| seed.map(|nats| nats + more).to_vec()).collect::<Vec<_>>();
        let panel = Panel::new(vec![arm(0.0), arm(0.5), arm(2.0)], vec![1.0, 1.0]).unwrap();
        let found = panel.difference(2, 0).unwrap();
        assert_eq!((found.value, found.error, found.degrees), (2.0, 0.0, 4.0));
        assert!(found.is_beyond_noise(1e-9));
    }

    #[test]
    fn variances_of_seeds_are_pooled_over_arms() {
        // Documents agree. Residuals of arm and seed: ±0.5 for the first two arms, 0 for the third.
        let panel = panel(
            &[&[&[1.0, 1.0], &[2.0, 2.0]], &[&[2.0, 2.0], &[1.0, 1.0]], &[&[5.0, 5.0], &[5.0, 5.0]]],
            &[1.0, 1.0],
        );
        let found = panel.difference(2, 0).unwrap();
        // σ² = 4 · 0.25 / 2, and both weights count, over two seeds.
        assert_eq!((found.value, found.degrees, found.seeds), (3.5, 2.0, 2));
        assert!((found.error - 0.5_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn one_seed_rests_on_documents() {
        let panel = panel(&[&[&[1.0, 3.0, 2.0]], &[&[0.0; 3]]], &[1.0; 3]);
        let found = panel.difference(0, 1).unwrap();
        assert_eq!((found.value, found.degrees, found.seeds), (2.0, 2.0, 1));
        assert!((found.error - (3.0_f64 / 2.0 * 2.0 / 9.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_paired_is_no_panel() {
        assert_eq!(Panel::new(Vec::new(), vec![1.0]), None);
        assert_eq!(Panel::new(vec![vec![vec![1.0]], vec![vec![1.0], vec![2.0]]], vec![1.0]), None);
        assert_eq!(Panel::new(vec![vec![vec![1.0, 2.0]]], vec![1.0]), None);
        let one = Panel::new(vec![vec![vec![1.0]], vec![vec![2.0]]], vec![1.0]).unwrap();
        assert_eq!(one.difference(0, 1), None, "one seed, one document: no error");
    }

    proptest! {
        #[test]
        fn polynomials_are_recovered(
            a in -3.0..3.0f64, b in -3.0..3.0f64, c in -3.0..3.0f64,
            x in proptest::collection::btree_set(-50..50i32, 4..9),
        ) {
            let x: Vec<f64> = x.into_iter().map(|x| f64::from(x) / 10.0).collect();
            let sum = |weights: Vec<f64>, y: &dyn Fn(f64) -> f64| -> f64 {
                weights.iter().zip(&x).map(|(weight, &x)| weight * y(x)).sum()
            };
            prop_assert!((sum(slope_weights(&x), &|x| a + b * x) - b).abs() < 1e-6);
            prop_assert!((sum(curvature_weights(&x), &|x| a + b * x + c * x * x) - c).abs() < 1e-5);
        }
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        let equal = missed([1.0; 30]);
        assert!((0.01..0.065).contains(&equal), "{equal}");
        // One document as long as all others together.
        let mut lengths = [1.0; 30];
        lengths[0] = 29.0;
        let unequal = missed(lengths);
        assert!((0.01..0.065).contains(&unequal), "{unequal}");
    }

    /// Share of a thousand draws in which the interval of a difference misses it.
    fn missed(lengths: [f64; 30]) -> f64 {
        use std::num::Wrapping;
        // Four arms with one true loss. Seeds, documents, and arms with either have effects of their own.
        let mut state = Wrapping(9_u64);
        let mut normal = || -> f64 {
            let mut uniform = || {
                state = state * Wrapping(6364136223846793005) + Wrapping(1442695040888963407);
                (state.0 >> 11) as f64 / 2f64.powi(53)
            };
            (0..12).map(|_| uniform()).sum::<f64>() - 6.0
        };
        let (mut missed, trials) = (0, 1000);
        for _ in 0..trials {
            let (seeds, documents): (Vec<f64>, Vec<f64>) =
                ((0..3).map(|_| normal()).collect(), (0..30).map(|_| normal()).collect());
            let mut arm = || -> Vec<Vec<f64>> {
                let likes: Vec<f64> = documents.iter().map(|document| document + 0.5 * normal()).collect();
                seeds
                    .iter()
                    .map(|seed| {
                        let luck = seed + 0.1 * normal();
                        let nats = |(document, length)| length * (document + luck + 0.3 * normal());
                        likes.iter().zip(lengths).map(nats).collect()
                    })
                    .collect()
            };
            let panel = Panel::new((0..4).map(|_| arm()).collect(), lengths.to_vec()).unwrap();
            missed += u32::from(panel.difference(1, 0).unwrap().is_beyond_noise(0.05));
        }
        f64::from(missed) / f64::from(trials)
    }
}
