//! Held-out loss, in nats per token and in bits per byte.

use burn::tensor::Device;
use engram_model::{LanguageModel, Sequences, Tokens, Trace};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tables::Fetched;
use engram_data::{Packing, TokenShards, Tokenizer};

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

/// The windows of held-out text that a loss is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens per window. Windows follow each other.
    pub context: usize,
    /// So many of the first tokens; none: all.
    pub limit: Option<usize>,
    /// What a window's documents are to the model.
    pub packing: Packing,
}

/// Windows evaluated at a time, at most.
const BATCH: usize = 16;
/// Tokens of them, unless one window has more: what is kept of a token is kept of all.
const TOKENS: usize = 1 << 14;

/// Evaluates `model`, outside of autodiff, on `windows` of `shards`. `fetch` gives the memory rows of the tokens of
/// some sequences. `progress` is told tokens done and to do, and stops the evaluation by returning `false`.
///
/// # Errors
/// When there is nothing to predict, rows cannot be read, or `progress` asked to stop.
pub fn held_out_loss(
    model: &LanguageModel,
    device: &Device,
    (shards, tokenizer): (&TokenShards, &Tokenizer),
    windows: Windows,
    fetch: impl Fn(&[u32], &Sequences) -> Result<Fetched>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<HeldOut> {
    let (mut nats, mut bytes, mut count) = (0.0, 0, 0);
    let mut add = |_: usize, targets: &[u32], losses: &[f32]| {
        nats += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        bytes += targets.iter().map(|&token| tokenizer.token_bytes(token).len() as u64).sum::<u64>();
        count += targets.len();
    };
    token_losses(model, device, shards, windows, fetch, &mut add, progress)?;
    Ok(HeldOut {
        nats_per_token: nats / count as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / (bytes.max(1)) as f64,
        tokens: count as u64,
        bytes,
    })
}

/// Sees one stretch of predicted tokens after another: the position of its first, its tokens and their losses in nats.
pub type VisitLosses<'a> = dyn FnMut(usize, &[u32], &[f32]) + 'a;

/// The losses that [`held_out_loss`] is the mean of.
///
/// # Errors
/// As [`held_out_loss`].
pub fn token_losses(
    model: &LanguageModel,
    device: &Device,
    shards: &TokenShards,
    Windows { context, limit, packing }: Windows,
    fetch: impl Fn(&[u32], &Sequences) -> Result<Fetched>,
    visit: &mut VisitLosses<'_>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<()> {
    let there = shards.len() as usize;
    let count = limit.map_or(there, |limit| there.min(limit + 1));
    if count < 2 {
        return Err(Error::Mismatch("the held-out text has no token to predict".into()));
    }
    let device = device.clone().inner();
    let mut done = 0;
    let predicted = count - 1;
    let most = (TOKENS / context).clamp(1, BATCH);
    while done < predicted {
        // Whole windows in batches; what is left at the end, alone.
        let left = predicted - done;
        let (batch, time) = if left >= context { ((left / context).min(most), context) } else { (1, left) };
        let mut window = vec![0; batch * time + 1];
        shards.read(done as u64, &mut window)?;
        let (inputs, targets) = (&window[..batch * time], &window[1..]);
        let sequences = Sequences::of_lengths(packing.lengths(inputs, batch));
        let rows = fetch(inputs, &sequences)?;
        let memory = rows.memory_rows(&device);
        let tokens = Tokens { ids: inputs, sequences: &sequences, memory: &memory };
        let losses = model.token_losses(tokens, targets, &mut Trace::default());
        visit(done + 1, targets, &losses);
        done += batch * time;
        if !progress(done as u64, predicted as u64) {
            return Err(Error::Interrupted);
        }
    }
    Ok(())
}
