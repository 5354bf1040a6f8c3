//! Measures over many questions, with standard errors, and question-by-question comparison of two models.

use std::collections::BTreeMap;

use serde::Serialize;

use super::error::{Error, Result};
use super::outcome::{Measure, Outcome};
use crate::ratio::{influences, jackknife_error, ratio, ratio_with_error, total};

/// A measure over questions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// The measure.
    pub measure: Measure,
    /// Its value.
    pub value: f64,
    /// Standard error of the value over the choice of questions; none for fewer than two.
    pub standard_error: Option<f64>,
    /// Number of questions.
    pub questions: usize,
}

/// Two models on the same questions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Paired {
    /// The measure.
    pub measure: Measure,
    /// The first model's value.
    pub first: f64,
    /// The second model's value.
    pub second: f64,
    /// Second minus first.
    pub difference: f64,
    /// Standard error of the difference, question by question; none for fewer than two.
    pub standard_error: Option<f64>,
    /// For an accuracy, the number of questions that only the first answered right, and only the second.
    pub only_one_right: Option<[usize; 2]>,
    /// For an accuracy, the probability of a split at least as uneven by chance (McNemar's exact test).
    pub chance: Option<f64>,
    /// Number of questions.
    pub questions: usize,
}

/// Amounts and sizes over questions.
type Amounts = Vec<(f64, f64)>;

/// Every measure that the outcomes have, in a fixed order.
pub fn summarize(outcomes: &[Outcome]) -> Vec<Summary> {
    let mut summaries = Vec::new();
    for (measure, amounts) in by_measure(outcomes) {
        let (ratio, error) = ratio_with_error(&amounts);
        let (value, slope) = transformed(measure, ratio);
        let standard_error = error.map(|error| error * slope);
        summaries.push(Summary { measure, value, standard_error, questions: amounts.len() });
    }
    summaries
}

/// Compares two models' outcomes to the same questions.
///
/// # Errors
/// When the questions differ.
pub fn compare(first: &[Outcome], second: &[Outcome]) -> Result<Vec<Paired>> {
    check_same_questions(first, second)?;
    let (first, second) = (by_measure(first), by_measure(second));
    if !first.iter().map(|(measure, _)| measure).eq(second.iter().map(|(measure, _)| measure)) {
        return Err(Error::Mismatch("the two files have tasks of different forms".into()));
    }
    Ok(first
        .into_iter()
        .zip(second)
        .map(|((measure, first), (_, second))| pair(measure, &first, &second))
        .collect())
}

/// Refuses outcomes that cannot be paired.
pub(crate) fn check_same_questions(first: &[Outcome], second: &[Outcome]) -> Result<()> {
    let questions = |outcomes: &[Outcome]| -> Vec<(usize, usize)> {
        outcomes.iter().map(|outcome| (outcome.question, outcome.line)).collect()
    };
    if questions(first) == questions(second) {
        return Ok(());
    }
    let (first, second) = (first.len(), second.len());
    Err(Error::Mismatch(format!(
        "the two files have different questions ({first} and {second}): run both to the end with the same limit"
    )))
}

fn pair(measure: Measure, first: &Amounts, second: &Amounts) -> Paired {
    let (one, other) = (ratio(first), ratio(second));
    let ((one_value, one_slope), (other_value, other_slope)) =
        (transformed(measure, one), transformed(measure, other));
    let standard_error = || {
        // The change from leaving out a question, in the units of the values.
        let (ours, theirs) = (influences(first)?, influences(second)?);
        let change = |(ours, theirs): (&f64, &f64)| theirs * other_slope - ours * one_slope;
        let differences: Vec<f64> = ours.iter().zip(&theirs).map(change).collect();
        let nothing = ((0.0, 0.0), (0.0, 0.0));
        let count = first.iter().zip(second).filter(|&(&ours, &theirs)| (ours, theirs) != nothing).count();
        jackknife_error(&differences, count)
    };
    let only_one_right = measure.is_accuracy().then(|| {
        let only = |a: &Amounts, b: &Amounts| a.iter().zip(b).filter(|(a, b)| a.0 > b.0).count();
        [only(first, second), only(second, first)]
    });
    Paired {
        measure,
        first: one_value,
        second: other_value,
        difference: other_value - one_value,
        standard_error: standard_error(),
        only_one_right,
        chance: only_one_right.map(|[a, b]| mcnemar(a, b)),
        questions: first.len(),
    }
}

fn by_measure(outcomes: &[Outcome]) -> Vec<(Measure, Amounts)> {
    let mut order = Vec::new();
    let mut amounts: BTreeMap<&str, Amounts> = BTreeMap::new();
    for (measure, amount, of) in outcomes.iter().flat_map(Outcome::measures) {
        if !order.contains(&measure) {
            order.push(measure);
        }
        amounts.entry(measure.name()).or_default().push((amount, of));
    }
    let all = order.into_iter().map(|measure| (measure, amounts.remove(measure.name()).unwrap_or_default()));
    // Without key tokens in any document, there is nothing to measure.
    all.filter(|(_, amounts)| total(amounts) > 0.0).collect()
}

/// The measure of a ratio, and its derivative there.
fn transformed(measure: Measure, ratio: f64) -> (f64, f64) {
    if measure.is_exponential() { (ratio.exp(), ratio.exp()) } else { (ratio, 1.0) }
}

/// The probability that, of a + b throws of a coin, at most min(a, b) fall on the rarer side, whichever it is.
fn mcnemar(a: usize, b: usize) -> f64 {
    let n = a + b;
    // log2 of C(n, k) / 2^n, k by k.
    let mut log = -(n as f64);
    let mut tail = 0.0;
    for k in 0..=a.min(b) {
        tail += log.exp2();
        log += ((n - k) as f64 / (k + 1) as f64).log2();
    }
    (2.0 * tail).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::outcome::Said;

    fn clozes(values: &[(f64, bool)]) -> Vec<Outcome> {
        let outcome = |(question, &(log_probability, greedy))| {
            let said = Said::Cloze { log_probability, tokens: 1, greedy };
            Outcome { question, line: question + 1, said }
        };
        values.iter().enumerate().map(outcome).collect()
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
    }

    #[test]
    fn means_and_their_standard_errors() {
        let outcomes = clozes(&[(-1.0, true), (-2.0, false), (-4.0, true), (-5.0, true)]);
        let [accuracy, perplexity] = summarize(&outcomes)[..] else { panic!() };
        close(accuracy.value, 0.75);
        // Sample variance 0.25, over 4.
        close(accuracy.standard_error.unwrap(), (0.25_f64 / 4.0).sqrt());
        close(perplexity.value, 3.0_f64.exp());
        close(perplexity.standard_error.unwrap(), (10.0_f64 / 3.0 / 4.0).sqrt() * 3.0_f64.exp());
        assert_eq!(summarize(&outcomes[..1])[0].standard_error, None);
        assert!(summarize(&[]).is_empty());
    }

    #[test]
    fn bits_per_byte_weigh_documents_by_their_bytes() {
        let document = |question, bits: f64, bytes| {
            let log_probability = -bits * std::f64::consts::LN_2;
            Outcome { question, line: 1, said: Said::Document { log_probability, tokens: 1, bytes } }
        };
        let summary = summarize(&[document(0, 10.0, 10), document(1, 60.0, 30)])[0];
        close(summary.value, 70.0 / 40.0);
        // Without the first 60/30, without the second 10/10, where both have 70/40.
        close(summary.standard_error.unwrap(), ((0.25_f64.powi(2) + 0.75_f64.powi(2)) / 2.0).sqrt());
    }

    #[test]
    fn pairs_share_their_questions_difficulty() {
        let first = clozes(&[(-1.0, true), (-2.0, false), (-3.0, false), (-4.0, true)]);
        let second = clozes(&[(-0.5, true), (-1.5, true), (-2.5, true), (-3.5, false)]);
        let [accuracy, perplexity] = compare(&first, &second).unwrap()[..] else { panic!() };
        close(accuracy.difference, 0.25);
        assert_eq!(accuracy.only_one_right, Some([1, 2]));
        close(accuracy.chance.unwrap(), 1.0);
        // Differences 0, 1, 1, −1: sample variance 11/12.
        close(accuracy.standard_error.unwrap(), (11.0_f64 / 12.0 / 4.0).sqrt());
        // Every continuation is likelier by half a nat, so the logarithms differ without any error.
        close(perplexity.first, 2.5_f64.exp());
        close(perplexity.second, 2.0_f64.exp());
        assert_eq!(perplexity.only_one_right, None);
        assert!(compare(&first, &second[1..]).unwrap_err().to_string().contains("(4 and 3)"));
    }

    #[test]
    fn documents_without_key_tokens_weigh_nothing() {
        let document = |question, key_log_probability, keys: &[usize]| {
            let keys = keys.to_vec();
            let said = Said::LongDocument { log_probability: -6.0, tokens: 4, key_log_probability, keys };
            Outcome { question, line: 1, said }
        };
        let [long, all] = summarize(&[document(0, -3.0, &[1, 2]), document(1, 0.0, &[])])[..] else {
            panic!()
        };
        close(long.value, 1.5_f64.exp());
        close(all.value, 1.5_f64.exp());
        assert_eq!(summarize(&[document(1, 0.0, &[])]).len(), 1);
    }

    #[test]
    fn chance_is_a_coins() {
        close(mcnemar(0, 0), 1.0);
        close(mcnemar(0, 3), 0.25);
        close(mcnemar(5, 1), 2.0 * 7.0 / 64.0);
        close(mcnemar(1, 5), mcnemar(5, 1));
        assert!(mcnemar(400, 600) < 1e-9);
    }
}
