//! The n-grams at which a memory opens most (arXiv 2601.07372, section 6.5).

use std::collections::HashMap;

use engram_data::TokenShards;
use engram_train::{Error, Trained};
use serde::Serialize;

use crate::depth::read_window;

/// An n-gram and how far the gate opens at its last token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NgramGate {
    /// Its tokens. The gate is that of the last one.
    pub tokens: Vec<u32>,
    /// Mean gate over its occurrences and the streams.
    pub gate: f64,
    /// Occurrences.
    pub count: u64,
}

/// The n-grams of one memory layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerNgrams {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Mean gate over all tokens and streams.
    pub mean: f64,
    /// Most open first.
    pub ngrams: Vec<NgramGate>,
}

/// Which n-grams to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramOptions {
    /// Maximum number of tokens to read; none means all.
    pub tokens: Option<usize>,
    /// Minimum number of occurrences. The gate at a single one says little.
    pub least: u64,
    /// Number of n-grams to list.
    pub top: usize,
}

/// Sum of gates and number of occurrences.
type Sums = HashMap<Vec<u32>, (f64, u64)>;

/// The n-grams of `shards`, of the longest order of the memory of `model`, at which its gates open most. `progress`
/// gets the tokens done and the total. Returning `false` stops the work.
///
/// # Errors
/// When the model has no gates, the shards do not fit it or cannot be read, or `progress` asked to stop.
pub fn most_open(
    model: &Trained,
    shards: &TokenShards,
    options: &NgramOptions,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Vec<LayerNgrams>, Error> {
    shards.check_tokenizer(model.tokenizer())?;
    let config = &model.config().model;
    let order = config.memory.as_ref().map_or(1, |memory| memory.max_order);
    let there = shards.len() as usize;
    let count = options.tokens.map_or(there, |tokens| tokens.min(there));
    let mut layers: Vec<(usize, Sums, f64)> = Vec::new();
    for window in 0..count.div_ceil(config.context) {
        let tokens = read_window(shards, window, config.context)?;
        let gates = model.gates(&tokens)?;
        layers.resize_with(gates.len(), Default::default);
        for (gates, (layer, sums, total)) in gates.iter().zip(&mut layers) {
            *layer = gates.layer;
            let means = gates.gates.chunks_exact(gates.streams);
            let means: Vec<f64> =
                means.map(|gates| f64::from(gates.iter().sum::<f32>()) / gates.len() as f64).collect();
            *total += means.iter().sum::<f64>();
            for (ngram, mean) in tokens.windows(order).zip(&means[(order - 1).min(means.len())..]) {
                let (sum, count) = sums.entry(ngram.to_vec()).or_default();
                (*sum, *count) = (*sum + mean, *count + 1);
            }
        }
        let done = ((window + 1) * config.context).min(there);
        if !progress(done as u64, count as u64) {
            return Err(Error::Interrupted);
        }
    }
    let read = (count.div_ceil(config.context) * config.context).min(there);
    let list = |(layer, sums, total)| LayerNgrams {
        layer,
        mean: total / read as f64,
        ngrams: ranked(sums, options),
    };
    Ok(layers.into_iter().map(list).collect())
}

/// The most open of the n-grams that are frequent enough; ties in the order of their tokens.
fn ranked(sums: Sums, options: &NgramOptions) -> Vec<NgramGate> {
    let frequent = sums.into_iter().filter(|(_, (_, count))| *count >= options.least);
    let gate = |(tokens, (sum, count))| NgramGate { tokens, gate: sum / count as f64, count };
    let mut ngrams: Vec<NgramGate> = frequent.map(gate).collect();
    ngrams.sort_by(|a, b| b.gate.total_cmp(&a.gate).then_with(|| a.tokens.cmp(&b.tokens)));
    ngrams.truncate(options.top);
    ngrams
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_open_come_first_and_rare_ones_not_at_all() {
        let sums =
            [(vec![1, 2], (1.8, 2)), (vec![1, 3], (0.99, 1)), (vec![4, 5], (2.7, 3)), (vec![0, 2], (0.4, 2))];
        let options = NgramOptions { tokens: None, least: 2, top: 2 };
        let found = ranked(sums.into_iter().collect(), &options);
        let listed: Vec<_> = found.iter().map(|ngram| (ngram.tokens.clone(), ngram.count)).collect();
        assert_eq!(listed, [(vec![1, 2], 2), (vec![4, 5], 3)]);
        assert!((found[0].gate - 0.9).abs() < 1e-12);
    }
}
