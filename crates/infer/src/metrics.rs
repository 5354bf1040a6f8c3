//! Counters and histograms, in Prometheus's text format.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A number that only grows, or is set.
#[derive(Debug, Default)]
pub(crate) struct Number(AtomicU64);

impl Number {
    pub(crate) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Relaxed);
    }

    pub(crate) fn set(&self, value: usize) {
        self.0.store(value as u64, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How often values fell below each of some bounds.
#[derive(Debug)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds.
    counts: Vec<AtomicU64>,
    /// In billionths.
    sum: AtomicU64,
}

/// Seconds.
const TIMES: &[f64] = &[
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, value: f64) {
        let place = self.bounds.iter().position(|&bound| value <= bound).unwrap_or(self.bounds.len());
        self.counts[place].fetch_add(1, Relaxed);
        self.sum.fetch_add((value * 1e9) as u64, Relaxed);
    }

    pub(crate) fn add_time(&self, time: Duration) {
        self.add(time.as_secs_f64());
    }

    fn write(&self, text: &mut String, name: &str, help: &str) {
        let mut total = 0;
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            total += count.load(Relaxed);
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {total}");
        }
        total += self.counts[self.bounds.len()].load(Relaxed);
        let sum = self.sum.load(Relaxed) as f64 / 1e9;
        let _ =
            writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {total}\n{name}_sum {sum}\n{name}_count {total}");
    }
}

/// What the engine counts.
#[derive(Debug)]
pub struct Metrics {
    pub(crate) done: Number,
    pub(crate) failed: Number,
    pub(crate) cancelled: Number,
    pub(crate) refused: Number,
    pub(crate) prompt_tokens: Number,
    pub(crate) cached_tokens: Number,
    pub(crate) generated_tokens: Number,
    pub(crate) drafted_tokens: Number,
    pub(crate) accepted_tokens: Number,
    pub(crate) preempted: Number,
    pub(crate) recomputed_tokens: Number,
    pub(crate) steps: Number,
    pub(crate) running: Number,
    pub(crate) waiting: Number,
    pub(crate) pages: Number,
    pub(crate) pages_in_use: Number,
    pub(crate) batch: Histogram,
    pub(crate) step_time: Histogram,
    pub(crate) row_wait: Histogram,
    pub(crate) first_token: Histogram,
    pub(crate) between_tokens: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            done: Number::default(),
            failed: Number::default(),
            cancelled: Number::default(),
            refused: Number::default(),
            prompt_tokens: Number::default(),
            cached_tokens: Number::default(),
            generated_tokens: Number::default(),
            drafted_tokens: Number::default(),
            accepted_tokens: Number::default(),
            preempted: Number::default(),
            recomputed_tokens: Number::default(),
            steps: Number::default(),
            running: Number::default(),
            waiting: Number::default(),
            pages: Number::default(),
            pages_in_use: Number::default(),
            batch: Histogram::new(SIZES),
            step_time: Histogram::new(TIMES),
            row_wait: Histogram::new(TIMES),
            first_token: Histogram::new(TIMES),
            between_tokens: Histogram::new(TIMES),
        }
    }
}

impl Metrics {
    /// Everything, in Prometheus's text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let outcomes = [
            ("done", &self.done),
            ("failed", &self.failed),
            ("cancelled", &self.cancelled),
            ("refused", &self.refused),
        ];
        text += "# HELP engram_requests_total Requests by what became of them.\n# TYPE engram_requests_total counter\n";
        for (outcome, number) in outcomes {
            let _ = writeln!(text, "engram_requests_total{{outcome=\"{outcome}\"}} {}", number.get());
        }
        let counters = [
            ("prompt_tokens", "Tokens of prompts.", &self.prompt_tokens),
            ("cached_prompt_tokens", "Tokens of prompts found in the cache.", &self.cached_tokens),
            ("generated_tokens", "Tokens generated.", &self.generated_tokens),
            ("drafted_tokens", "Tokens drafted by prompt look-up.", &self.drafted_tokens),
            ("accepted_tokens", "Drafted tokens that were right.", &self.accepted_tokens),
            ("preempted_requests", "Times that a request lost its place for want of pages.", &self.preempted),
            ("recomputed_tokens", "Tokens computed again after that.", &self.recomputed_tokens),
            ("steps", "Steps of the model.", &self.steps),
        ];
        for (name, help, number) in counters {
            let name = format!("engram_{name}_total");
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {}", number.get());
        }
        let gauges = [
            ("running_requests", "Requests that the model works on.", &self.running),
            ("waiting_requests", "Requests that wait for a place.", &self.waiting),
            ("cache_pages", "Pages of the cache.", &self.pages),
            ("cache_pages_in_use", "Pages that running requests hold.", &self.pages_in_use),
        ];
        for (name, help, number) in gauges {
            let name = format!("engram_{name}");
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {}", number.get());
        }
        self.batch.write(&mut text, "engram_batch_tokens", "Tokens of a step.");
        self.step_time.write(&mut text, "engram_step_seconds", "Time of a step.");
        self.row_wait.write(&mut text, "engram_row_wait_seconds", "Time that a step waited for memory rows.");
        self.first_token.write(
            &mut text,
            "engram_first_token_seconds",
            "Time from a request to its first token.",
        );
        self.between_tokens.write(
            &mut text,
            "engram_between_tokens_seconds",
            "Time from a token to the next.",
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative() {
        let metrics = Metrics::default();
        for value in [1.0, 2.0, 3.0, 1000.0] {
            metrics.batch.add(value);
        }
        let text = metrics.text();
        for line in [
            "engram_batch_tokens_bucket{le=\"1\"} 1",
            "engram_batch_tokens_bucket{le=\"4\"} 3",
            "engram_batch_tokens_bucket{le=\"+Inf\"} 4",
            "engram_batch_tokens_sum 1006",
            "engram_batch_tokens_count 4",
            "engram_requests_total{outcome=\"done\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
