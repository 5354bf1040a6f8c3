//! Effective depth (arXiv 2601.07372, section 6.1): whether early layers of a model with memory do the work of later
//! ones.

mod cka;
pub mod figures;
mod logit_lens;
mod names;

use std::fmt;

use engram_data::TokenShards;
use engram_train::Trained;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

pub use cka::{Aligned, Alignment, FEWEST, States};
pub use logit_lens::{Divergence, LogitLens};
pub use names::name_ends;

/// The tokens at which layers are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// The last tokens of names, as in the paper.
    Names,
    /// All tokens.
    All,
}

/// What to measure, and on how much text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DepthOptions {
    /// The tokens at which layers are compared.
    pub positions: Positions,
    /// Number of these tokens, from the beginning of the text.
    pub samples: usize,
    /// Tokens of a minibatch.
    pub batch: usize,
    /// Most similar layers that a soft alignment averages.
    pub neighbours: usize,
    /// Number of tokens for LogitLens.
    pub lens_tokens: usize,
}

impl Default for DepthOptions {
    /// The paper's values, where it gives them.
    fn default() -> Self {
        Self { positions: Positions::Names, samples: 2048, batch: 128, neighbours: 5, lens_tokens: 8192 }
    }
}

/// Errors of a measurement.
#[derive(Debug, thiserror::Error)]
pub enum DepthError {
    /// The text has too few of the requested tokens.
    #[error(
        "the text has {found} {positions}, but a minibatch has {batch}: use more text, a smaller --batch, or \
         --positions all"
    )]
    TooFew {
        /// Tokens found.
        found: usize,
        /// The kind of tokens.
        positions: Positions,
        /// Tokens of a minibatch.
        batch: usize,
    },
    /// A model or the text cannot be read or does not fit.
    #[error(transparent)]
    Train(#[from] engram_train::Error),
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Names => "names",
            Self::All => "tokens",
        })
    }
}

/// Called with the windows done and the total. Returning `false` stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// LogitLens of `model` on the beginning of `shards`.
///
/// # Errors
/// When the shards do not fit the model or cannot be read, or `progress` asked to stop.
pub fn logit_lens(
    model: &Trained,
    shards: &TokenShards,
    options: &DepthOptions,
    progress: Progress<'_>,
) -> Result<Vec<Divergence>, DepthError> {
    shards.check_tokenizer(model.tokenizer()).map_err(engram_train::Error::from)?;
    let context = model.config().model.context;
    let count = options.lens_tokens.min(shards.len() as usize).div_ceil(context);
    let mut lens = LogitLens::default();
    for window in 0..count {
        let tokens = read_window(shards, window, context)?;
        lens.add(model.states(&tokens)?.into_iter().map(|state| model.lens(state)));
        report(progress, window + 1, count)?;
    }
    Ok(lens.divergences())
}

/// Alignment of the layers of `models`, A and B, on the beginning of `shards`, and the number of tokens used.
///
/// # Errors
/// When the shards do not fit both models, cannot be read, or have too few tokens of the requested kind; or when
/// `progress` asked to stop.
pub fn alignment(
    models: [&Trained; 2],
    shards: &TokenShards,
    options: &DepthOptions,
    progress: Progress<'_>,
) -> Result<(Alignment, usize), DepthError> {
    for model in models {
        shards.check_tokenizer(model.tokenizer()).map_err(engram_train::Error::from)?;
    }
    let samples = Samples::take(models, shards, options, progress)?;
    let mut order: Vec<usize> = (0..samples.count).collect();
    // Tokens of one document are similar, so minibatches mix documents.
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(0));
    let mut alignment = Alignment::default();
    for batch in order.chunks_exact(options.batch) {
        let [a, b] = [0, 1].map(|model| samples.at(model, batch));
        let [a_width, b_width] = samples.widths;
        alignment.add(States { layers: &a, width: a_width }, States { layers: &b, width: b_width });
    }
    Ok((alignment, samples.count / options.batch * options.batch))
}

/// States of both models at the same tokens.
struct Samples {
    count: usize,
    widths: [usize; 2],
    /// `[models][layers][tokens · width]`
    states: [Vec<Vec<f32>>; 2],
}

impl Samples {
    fn take(
        models: [&Trained; 2],
        shards: &TokenShards,
        options: &DepthOptions,
        progress: Progress<'_>,
    ) -> Result<Self, DepthError> {
        // Windows that fit both models.
        let context = models.map(|model| model.config().model.context).into_iter().min().unwrap_or(1);
        let windows = (shards.len() as usize).div_ceil(context);
        let layers = |model: &Trained| vec![Vec::new(); model.config().model.blocks];
        let widths = models.map(|model| model.config().model.width);
        let mut samples = Self { count: 0, widths, states: models.map(layers) };
        for window in 0..windows {
            let tokens = read_window(shards, window, context)?;
            let mut positions = positions(models[0], &tokens, options.positions);
            positions.truncate(options.samples - samples.count);
            if !positions.is_empty() {
                for ((model, width), states) in models.iter().zip(widths).zip(&mut samples.states) {
                    append(model, &tokens, &positions, width, states)?;
                }
            }
            samples.count += positions.len();
            report(progress, samples.count, options.samples)?;
            if samples.count == options.samples {
                break;
            }
        }
        if samples.count < options.batch {
            let (found, positions, batch) = (samples.count, options.positions, options.batch);
            return Err(DepthError::TooFew { found, positions, batch });
        }
        Ok(samples)
    }

    /// One model's states at some of the samples, layer by layer.
    fn at(&self, model: usize, samples: &[usize]) -> Vec<Vec<f32>> {
        let width = self.widths[model];
        let chosen = |states: &Vec<f32>| {
            let rows: Vec<&[f32]> =
                samples.iter().map(|&sample| &states[sample * width..][..width]).collect();
            rows.concat()
        };
        self.states[model].iter().map(chosen).collect()
    }
}

/// Appends the model's states at `positions` of `tokens` to those of every layer.
fn append(
    model: &Trained,
    tokens: &[u32],
    positions: &[usize],
    width: usize,
    layers: &mut [Vec<f32>],
) -> Result<(), DepthError> {
    for (state, layer) in model.states(tokens)?.into_iter().zip(layers) {
        let state: Vec<f32> = state.into_data().iter().collect();
        for position in positions {
            layer.extend_from_slice(&state[position * width..][..width]);
        }
    }
    Ok(())
}

fn positions(model: &Trained, tokens: &[u32], positions: Positions) -> Vec<usize> {
    match positions {
        Positions::All => (0..tokens.len()).collect(),
        Positions::Names => {
            let bytes: Vec<&[u8]> =
                tokens.iter().map(|&token| model.tokenizer().token_bytes(token)).collect();
            name_ends(&bytes)
        }
    }
}

/// Window number `window` of `context` tokens; the last may be shorter.
pub(crate) fn read_window(
    shards: &TokenShards,
    window: usize,
    context: usize,
) -> Result<Vec<u32>, engram_train::Error> {
    let start = window * context;
    let mut tokens = vec![0; context.min(shards.len() as usize - start)];
    shards.read(start as u64, &mut tokens)?;
    Ok(tokens)
}

fn report(progress: Progress<'_>, done: usize, total: usize) -> Result<(), DepthError> {
    match progress(done as u64, total as u64) {
        true => Ok(()),
        false => Err(engram_train::Error::Interrupted.into()),
    }
}
