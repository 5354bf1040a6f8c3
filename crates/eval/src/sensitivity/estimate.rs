//! Values over questions or over tasks, with standard errors.

use serde::Serialize;

use crate::ratio::{equal_parts, ratio_with_error};
use crate::statistics::student_quantile;

/// A value with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
    /// Degrees of freedom of the error.
    pub degrees: f64,
}

impl Estimate {
    /// The sum of amounts over the sum of sizes, from `(amount, size)` of independent questions. The error is that of
    /// the ratio when each is left out in turn; its degrees of freedom are the number of equivalent equal questions
    /// minus one. None for fewer than two questions, or if all sizes are 0.
    pub fn ratio(amounts: &[(f64, f64)]) -> Option<Self> {
        let total: f64 = amounts.iter().map(|(_, of)| of).sum();
        let (value, error) = ratio_with_error(amounts);
        let degrees = equal_parts(amounts.iter().map(|(_, of)| *of)) - 1.0;
        error.filter(|_| total > 0.0).map(|error| Self { value, error, degrees })
    }

    /// The mean of a sample; none for fewer than two.
    pub fn sample(values: &[f64]) -> Option<Self> {
        Self::ratio(&values.iter().map(|&value| (value, 1.0)).collect::<Vec<_>>())
    }

    /// The mean of independent estimates that are the whole population: its error comes from their errors alone. None
    /// if there are no estimates.
    pub fn mean(of: &[Self]) -> Option<Self> {
        let weight = 1.0 / of.len() as f64;
        Self::sum(of.iter().map(|estimate| (weight, *estimate)))
    }

    /// This minus an independent one.
    pub fn less(self, other: Self) -> Self {
        Self::sum([(1.0, self), (-1.0, other)].into_iter()).unwrap_or(self)
    }

    /// Σ w·e of independent estimates. Variances add, and degrees of freedom follow Welch and Satterthwaite.
    fn sum(terms: impl Iterator<Item = (f64, Self)> + Clone) -> Option<Self> {
        let fewest = terms.clone().map(|(_, estimate)| estimate.degrees).reduce(f64::min)?;
        let value = terms.clone().map(|(weight, estimate)| weight * estimate.value).sum();
        let variances = terms.map(|(weight, estimate)| ((weight * estimate.error).powi(2), estimate.degrees));
        let (variance, spread) = variances.fold((0.0, 0.0), |(sum, spread), (variance, degrees)| {
            (sum + variance, spread + variance * variance / degrees)
        });
        let degrees = if spread > 0.0 { variance * variance / spread } else { fewest };
        Some(Self { value, error: variance.sqrt(), degrees })
    }

    /// The 95 % confidence interval: Student's t.
    pub fn interval(&self) -> (f64, f64) {
        let reach = self.error * student_quantile(self.degrees, 0.05);
        (self.value - reach, self.value + reach)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found}, not {expected}");
    }

    #[test]
    fn ratios_by_hand() {
        // 3 of 4 right answers remain: residuals 0.25, 0.25, −0.75, 0.25, each divided by the three others.
        let kept = [(1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)];
        let found = Estimate::ratio(&kept).unwrap();
        close(found.value, 0.75);
        close(found.error, (3.0_f64 / 4.0 * (3.0 * 0.0625 + 0.5625)).sqrt() / 3.0);
        close(found.degrees, 3.0);
        assert_eq!(Estimate::ratio(&kept[..1]), None, "one question has no error");
        assert_eq!(Estimate::ratio(&[(0.0, 0.0); 3]), None, "nothing can remain of nothing");
        let sample = Estimate::sample(&[1.0, 2.0, 6.0]).unwrap();
        close(sample.value, 3.0);
        close(sample.error, (7.0_f64 / 3.0).sqrt());
    }

    #[test]
    fn errors_of_independent_estimates_add_in_squares() {
        let estimate = |value, error, degrees| Estimate { value, error, degrees };
        let mean = Estimate::mean(&[estimate(1.0, 0.3, 9.0), estimate(3.0, 0.4, 9.0)]).unwrap();
        close(mean.value, 2.0);
        close(mean.error, 0.25);
        // 0.0625² / ((0.0225² + 0.04²) / 9)
        close(mean.degrees, 0.0625_f64.powi(2) / ((0.0225_f64.powi(2) + 0.04_f64.powi(2)) / 9.0));
        let less = estimate(1.0, 0.3, 9.0).less(estimate(3.0, 0.4, 9.0));
        close(less.value, -2.0);
        close(less.error, 0.5);
        assert_eq!(estimate(2.0, 0.0, 3.0).less(estimate(1.0, 0.0, 5.0)), estimate(1.0, 0.0, 3.0));
        assert_eq!(Estimate::mean(&[]), None);
        // Student's t with nine degrees of freedom: 2.2622.
        let (low, high) = estimate(1.0, 0.3, 9.0).interval();
        assert!((low - (1.0 - 2.26216 * 0.3)).abs() < 1e-5 && (high - (1.0 + 2.26216 * 0.3)).abs() < 1e-5);
    }

    #[test]
    fn intervals_miss_the_truth_as_often_as_they_say() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut uniform = move || random.random::<f64>() - 0.5;
        let (trials, mut missed) = (2000, 0);
        for _ in 0..trials {
            // Two tasks against one, with few questions whose lengths correlate with the amounts. The true value is
            // 0.2.
            let mut task = |questions: usize, per_token: f64| {
                let question = |_| {
                    let tokens = (4.0 + 6.0 * uniform()).ceil();
                    (tokens * (per_token + uniform()), tokens)
                };
                Estimate::ratio(&(0..questions).map(question).collect::<Vec<_>>()).unwrap()
            };
            let facts = Estimate::mean(&[task(12, 0.1), task(30, 0.5)]).unwrap();
            let (low, high) = facts.less(task(15, 0.1)).interval();
            missed += usize::from(!(low..=high).contains(&0.2));
        }
        let share = missed as f64 / f64::from(trials);
        assert!((0.03..0.08).contains(&share), "{share}");
    }
}
