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

/// The windows of held-out text that a loss is taken over. They follow each other and do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens per window.
    pub context: usize,
    /// Tokens predicted at most; none: all.
    pub limit: Option<usize>,
    /// Which windows are taken where not all are.
    pub choice: Choice,
    /// What a window's documents are to the model.
    pub packing: Packing,
}

/// Which windows are taken where not all are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The first, the last of them cut.
    First,
    /// Whole windows, spread evenly over the text: a long first document then counts no more than its share.
    Spread,
}

/// A stretch of text: its first input, and the number of tokens predicted after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    start: usize,
    length: usize,
}

impl Windows {
    /// The stretches of a text of `tokens` tokens, at least two, in order.
    fn stretches(&self, tokens: usize) -> Vec<Stretch> {
        let (context, all) = (self.context, tokens - 1);
        let limit = self.limit.unwrap_or(all).min(all);
        let windows = all / context;
        if self.choice == Choice::First || limit == all || windows == 0 {
            let stretch = |start| Stretch { start, length: context.min(limit - start) };
            return (0..limit).step_by(context).map(stretch).collect();
        }
        // Each stands in the middle of its share of the text.
        let (count, length) = ((limit / context).max(1), context.min(limit));
        let window = |index: usize| (2 * index + 1) * windows / (2 * count);
        (0..count).map(|index| Stretch { start: window(index) * context, length }).collect()
    }
}

/// Windows evaluated at a time, at most.
const BATCH: usize = 16;
/// Tokens of them, unless one window has more: what is kept of a token is kept of all.
const TOKENS: usize = 1 << 14;

/// Evaluates `model`, outside of autodiff, on `windows` of `shards`. Of shards with a loss mask, only the tokens that it
/// counts. `fetch` gives the memory rows of the tokens of
/// some sequences. `progress` is told tokens done and to do, and stops the evaluation by returning `false`.
///
/// # Errors
/// When there is nothing to predict, the loss is not finite, rows cannot be read, or `progress` asked to stop.
pub fn held_out_loss(
    model: &LanguageModel,
    device: &Device,
    (shards, tokenizer): (&TokenShards, &Tokenizer),
    windows: Windows,
    fetch: impl Fn(&[u32], &Sequences) -> Result<Fetched>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<HeldOut> {
    let (mut nats, mut bytes, mut count) = (0.0, 0, 0);
    let mut unread = None;
    let mut add = |first: usize, targets: &[u32], losses: &[f32]| {
        let first = first as u64;
        let counted = match shards.counted(first..first + targets.len() as u64) {
            Ok(counted) => counted,
            Err(error) => return unread = Some(error),
        };
        let counted = || counted.iter().copied();
        let losses = losses.iter().zip(counted()).filter(|(_, counts)| *counts);
        nats += losses.map(|(&loss, _)| f64::from(loss)).sum::<f64>();
        for (&token, _) in targets.iter().zip(counted()).filter(|(_, counts)| *counts) {
            bytes += tokenizer.token_bytes(token).len() as u64;
            count += 1;
        }
    };
    token_losses(model, device, shards, windows, fetch, &mut add, progress)?;
    if let Some(error) = unread {
        return Err(error.into());
    }
    if count == 0 {
        return Err(Error::Mismatch(
            "the held-out windows have no token that the loss counts; evaluate more of them".into(),
        ));
    }
    if !f64::is_finite(nats) {
        return Err(Error::NotFinite("the held-out loss".into()));
    }
    Ok(HeldOut {
        nats_per_token: nats / count as f64,
        bits_per_byte: nats / std::f64::consts::LN_2 / (bytes.max(1)) as f64,
        tokens: count,
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
    windows: Windows,
    fetch: impl Fn(&[u32], &Sequences) -> Result<Fetched>,
    visit: &mut VisitLosses<'_>,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<()> {
    let there = shards.len() as usize;
    if there < 2 || windows.limit == Some(0) {
        return Err(Error::Mismatch("the held-out text has no token to predict".into()));
    }
    let device = device.clone().inner();
    let stretches = windows.stretches(there);
    let predicted: usize = stretches.iter().map(|stretch| stretch.length).sum();
    let most = (TOKENS / windows.context).clamp(1, BATCH);
    let mut done = 0;
    // Windows of equal length in batches; a shorter one at the end, alone.
    for equal in stretches.chunk_by(|one, other| one.length == other.length) {
        for batch in equal.chunks(most) {
            let time = batch[0].length;
            let (mut inputs, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
            let mut window = vec![0; time + 1];
            for stretch in batch {
                shards.read(stretch.start as u64, &mut window)?;
                inputs.extend_from_slice(&window[..time]);
                targets.extend_from_slice(&window[1..]);
                lengths.extend(shards.lengths(windows.packing, stretch.start as u64, &window[..time]));
            }
            let sequences = Sequences::of_lengths(lengths);
            let rows = fetch(&inputs, &sequences)?;
            let memory = rows.memory_rows(&device);
            let tokens = Tokens { ids: &inputs, sequences: &sequences, memory: &memory };
            let losses = model.token_losses(tokens, &targets, &mut Trace::default());
            let each = targets.chunks_exact(time).zip(losses.chunks_exact(time));
            for (stretch, (targets, losses)) in batch.iter().zip(each) {
                visit(stretch.start + 1, targets, losses);
            }
            done += inputs.len();
            if !progress(done as u64, predicted as u64) {
                return Err(Error::Interrupted);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn windows(context: usize, limit: Option<usize>, choice: Choice) -> Windows {
        Windows { context, limit, choice, packing: Packing::Together }
    }

    #[test]
    fn windows_by_hand() {
        let starts = |limit, choice| -> Vec<(usize, usize)> {
            let stretches = windows(10, limit, choice).stretches(101);
            stretches.iter().map(|stretch| (stretch.start, stretch.length)).collect()
        };
        assert_eq!(starts(Some(25), Choice::First), [(0, 10), (10, 10), (20, 5)]);
        assert_eq!(starts(Some(25), Choice::Spread), [(20, 10), (70, 10)]);
        assert_eq!(starts(Some(4), Choice::Spread), [(50, 4)]);
        assert_eq!(starts(None, Choice::Spread).len(), 10);
    }

    proptest! {
        #[test]
        fn stretches_lie_apart_and_over_all_of_the_text(
            context in 1..20usize, tokens in 2..500usize, limit in proptest::option::of(1..600usize), spread: bool,
        ) {
            let choice = if spread { Choice::Spread } else { Choice::First };
            let stretches = windows(context, limit, choice).stretches(tokens);
            let (all, predicted) = (tokens - 1, stretches.iter().map(|stretch| stretch.length).sum::<usize>());
            let limit = limit.unwrap_or(all).min(all);
            prop_assert!(predicted <= limit && predicted + context > limit && predicted > 0);
            prop_assert!(limit < all || predicted == all);
            prop_assert!(stretches.iter().all(|stretch| (1..=context).contains(&stretch.length)));
            prop_assert!(stretches.windows(2).all(|pair| pair[0].start + pair[0].length <= pair[1].start));
            let last = stretches[stretches.len() - 1];
            prop_assert!(last.start + last.length <= all);
            if spread && all >= context {
                // No part of the text that is larger than two shares is without a window.
                let share = all.div_ceil(stretches.len()) + context;
                prop_assert!(stretches[0].start <= share && all - last.start <= share + context);
                prop_assert!(stretches.windows(2).all(|pair| pair[1].start - pair[0].start <= share + context));
            }
        }
    }
}
