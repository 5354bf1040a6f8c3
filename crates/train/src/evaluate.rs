//! Held-out loss, in nats per token and in bits per byte.

use burn::tensor::Device;
use engram_model::{LanguageModel, Tokens, Trace};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::shards::TokenShards;
use crate::tables::Fetched;
use crate::tokenizer::Tokenizer;

/// A loss over held-out text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Mean cross-entropy per predicted token, in nats.
    pub nats_per_token: f64,
    /// Bits per byte of the text that was predicted: comparable between tokenizers.
    pub bits_per_byte: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Bytes of text they stand for; end-of-text tokens stand for none, but their loss counts.
    pub bytes: u64,
}

/// Sequences evaluated at a time.
const BATCH: usize = 16;

/// Evaluates `model`, outside of autodiff, on the first `limit` tokens of `shards` (all, if none) in windows of
/// `context` tokens that follow each other. `fetch` gives the memory rows of `[batch, time]` tokens. `progress` is
/// told tokens done and to do, and stops the evaluation by returning `false`.
///
/// # Errors
/// When there is nothing to predict, rows cannot be read, or `progress` asked to stop.
pub fn held_out_loss(
    model: &LanguageModel,
    device: &Device,
    (shards, tokenizer): (&TokenShards, &Tokenizer),
    (context, limit): (usize, Option<usize>),
    fetch: impl Fn(&[u32], usize) -> Result<Fetched>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<HeldOut> {
    let there = shards.len() as usize;
    let count = limit.map_or(there, |limit| there.min(limit + 1));
    if count < 2 {
        return Err(Error::Mismatch("the held-out text has no token to predict".into()));
    }
    let device = device.clone().inner();
    let (mut nats, mut bytes, mut done) = (0.0, 0, 0);
    let predicted = count - 1;
    while done < predicted {
        // Whole windows in batches; what is left at the end, alone.
        let left = predicted - done;
        let (batch, time) = if left >= context { ((left / context).min(BATCH), context) } else { (1, left) };
        let mut window = vec![0; batch * time + 1];
        shards.read(done as u64, &mut window)?;
        let (inputs, targets) = (&window[..batch * time], &window[1..]);
        let rows = fetch(inputs, batch)?;
        let memory = rows.memory_rows(&rows.leaves(&device), batch, 0..batch);
        let tokens = Tokens { ids: inputs, batch, memory: &memory };
        let losses = model.token_losses(tokens, targets, &mut Trace::default());
        nats += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        bytes += targets.iter().map(|&token| tokenizer.token_bytes(token).len() as u64).sum::<u64>();
        done += batch * time;
        if !progress(done as u64, predicted as u64) {
            return Err(Error::Interrupted);
        }
    }
    Ok(HeldOut {
        nats_per_token: nats / predicted as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / (bytes.max(1)) as f64,
        tokens: predicted as u64,
        bytes,
    })
}
