//! What a graft did, measured and told.

use std::fmt::Write;
use std::time::Duration;

use engram_train::{HeldOut, NeutralChange, NgramCount};
use serde::Serialize;

use crate::number::{duration, grouped, short};
use crate::table::Table;

/// The report of `engram graft`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) base: String,
    pub(crate) layers: Vec<usize>,
    pub(crate) training_tokens: u64,
    pub(crate) held_out_tokens: u64,
    pub(crate) window: usize,
    pub(crate) steps: u64,
    /// Tokens that the steps read.
    pub(crate) tokens_read: u64,
    pub(crate) ngrams: Vec<NgramCount>,
    pub(crate) held_out_before: HeldOut,
    pub(crate) arms: Vec<Arm>,
}

/// What one way of training reached.
#[derive(Debug, Serialize)]
pub(crate) struct Arm {
    pub(crate) name: String,
    /// Dense parameters that learned.
    pub(crate) dense: usize,
    /// Parameters of rows.
    pub(crate) rows: u64,
    pub(crate) held_out: HeldOut,
    pub(crate) neutral: NeutralChange,
    pub(crate) seconds: f64,
}

impl Report {
    /// The report as text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{} steps over {} tokens of {}; {} held-out tokens; windows of {}",
            self.steps,
            grouped(self.tokens_read),
            grouped(self.training_tokens),
            grouped(self.held_out_before.tokens),
            self.window
        );
        let mut table = Table::new([
            "",
            "dense parameters",
            "in rows",
            "held out, nats",
            "bits per byte",
            "neutral, nats",
            "KL from base",
            "other bits",
            "time",
        ]);
        if let Some(Arm { neutral, .. }) = self.arms.first() {
            let HeldOut { nats_per_token, bits_per_byte, .. } = self.held_out_before;
            let losses = [nats_per_token, bits_per_byte, neutral.base_loss].map(|loss| format!("{loss:.4}"));
            let [held_out, bits, loss] = losses;
            table.row(["base", "0", "0", &held_out, &bits, &loss, "0", "0", ""]);
        }
        for Arm { name, dense, rows, held_out, neutral, seconds } in &self.arms {
            table.row([
                name.clone(),
                short(*dense as u64),
                short(*rows),
                format!("{:.4}", held_out.nats_per_token),
                format!("{:.4}", held_out.bits_per_byte),
                format!("{:.4}", neutral.loss),
                format!("{:.5}", neutral.divergence),
                format!("{} of {}", grouped(neutral.changed as u64), grouped(neutral.positions as u64)),
                duration(Duration::from_secs_f64(*seconds)),
            ]);
        }
        let _ = write!(text, "{table}");
        text
    }
}

/// What to tell of rows that no n-gram of the corpus can use; none where all may be used.
pub(crate) fn unused_rows(counts: &[NgramCount]) -> Option<String> {
    let too_many = counts.iter().filter(|count| count.leaves_rows());
    let told: Vec<String> = too_many
        .map(|NgramCount { order, distinct, rows }| {
            format!("{} different {order}-grams for {} rows of a head", grouped(*distinct), grouped(*rows))
        })
        .collect();
    let told = (!told.is_empty()).then(|| told.join(", "))?;
    Some(format!(
        "warning: the corpus is too small to use all rows: it has {told}; give more text, or lower \
         `memory.rows_per_head`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_compared_with_n_grams() {
        let count = |order, distinct| NgramCount { order, distinct, rows: 5000 };
        assert_eq!(unused_rows(&[count(2, 5000)]), None);
        let told = unused_rows(&[count(2, 5000), count(3, 1234)]).unwrap();
        assert!(told.contains("it has 1,234 different 3-grams for 5,000 rows of a head;"), "{told}");
    }
}
