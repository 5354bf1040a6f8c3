//! What a graft changes on text that has nothing to do with it.

use engram_model::{LanguageModel, MemoryRows, Sequences, Tokens, Trace};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::soft_targets::{divergence, host, log_sum};

/// A base and what was made of it, on the same text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct NeutralChange {
    /// Positions compared.
    pub positions: usize,
    /// Loss of the base, in nats per token.
    pub base_loss: f64,
    /// Loss of the result, in nats per token.
    pub loss: f64,
    /// Mean of KL(base ‖ result), in nats.
    pub divergence: f64,
    /// Positions where a logit has other bits.
    pub changed: usize,
}

/// `base` and `model`, both outside of autodiff, on `texts`, each of at least two tokens. `rows` gives the memory rows
/// that `model` reads for a text. `go_on` is asked before each text.
pub(crate) fn neutral_change(
    base: &LanguageModel,
    model: &LanguageModel,
    texts: &[Vec<u32>],
    rows: impl Fn(&[u32]) -> Result<Vec<MemoryRows>>,
    go_on: &dyn Fn() -> bool,
) -> Result<NeutralChange> {
    let mut change = NeutralChange::default();
    let logits = |model: &LanguageModel, text: &[u32], memory: &[MemoryRows]| {
        let tokens = Tokens { ids: text, sequences: &Sequences::equal(1, text.len()), memory };
        host(model.logits(model.hidden(tokens, &mut Trace::default())))
    };
    for text in texts {
        if !go_on() {
            return Err(crate::error::Error::Interrupted);
        }
        let (of_base, of_model) = (logits(base, text, &[]), logits(model, text, &rows(text)?));
        let vocabulary = of_base.len() / text.len();
        let pairs = of_base.chunks_exact(vocabulary).zip(of_model.chunks_exact(vocabulary));
        // The last position has no next token.
        for ((base, model), &next) in pairs.zip(&text[1..]) {
            let loss = |logits: &[f32]| log_sum(logits) - f64::from(logits[next as usize]);
            change.positions += 1;
            change.base_loss += loss(base);
            change.loss += loss(model);
            if base.iter().zip(model).any(|(a, b)| a.to_bits() != b.to_bits()) {
                change.changed += 1;
                change.divergence += divergence(base, model);
            }
        }
    }
    let count = change.positions.max(1) as f64;
    change.base_loss /= count;
    change.loss /= count;
    change.divergence /= count;
    Ok(change)
}
