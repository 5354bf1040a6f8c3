//! Training windows in a random order that is a formula: any window of any epoch is known from a few numbers.
//!
//! An epoch cuts the tokens into windows of `context + 1` tokens that overlap by one (the last target of one is the
//! first input of the next), from an offset that differs per epoch, and goes through them in the order of a
//! pseudo-random permutation. No list of windows is kept, so the state of a sampler is two numbers, and going on from
//! them is going on as if nothing had happened.

use serde::{Deserialize, Serialize};

use crate::data_error::{Error, Result};
use crate::shards::TokenShards;

/// Where a [`Sampler`] is: what a checkpoint keeps of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Times that all windows have been used.
    pub epoch: u64,
    /// Windows of this epoch that have been used.
    pub position: u64,
}

/// Batches of training windows, without replacement within an epoch.
///
/// ```
/// # use engram_train::Sampler;
/// let mut sampler = Sampler::new(7, 128, 4, 1_000_000)?;
/// let first = sampler.next_starts();
/// assert_eq!(first.len(), 4);
///
/// let resumed = Sampler::new(7, 128, 4, 1_000_000)?.at(sampler.state())?;
/// assert_eq!(resumed.clone().next_starts(), sampler.next_starts());
/// # Ok::<(), engram_train::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    seed: u64,
    context: u64,
    batch: usize,
    tokens: u64,
    state: SamplerState,
}

/// Windows of tokens, one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `[windows, context + 1]`: a window's first `context` tokens are inputs, its last `context` are their targets.
    pub tokens: Vec<u32>,
    /// Position of each window's first token in the data.
    pub starts: Vec<u64>,
    /// Inputs per window.
    pub context: usize,
}

impl Sampler {
    /// A sampler at the start of its first epoch, over `tokens` tokens.
    ///
    /// # Errors
    /// A context or batch of 0, or fewer tokens than one window has.
    pub fn new(seed: u64, context: usize, batch: usize, tokens: u64) -> Result<Self> {
        if batch == 0 {
            return Err(Error::option("batch", batch, "at least 1 window"));
        }
        let context = checked_context(context, tokens)?;
        Ok(Self { seed, context, batch, tokens, state: SamplerState::default() })
    }

    /// The same sampler elsewhere: after this, all is as if it had come there by itself.
    ///
    /// # Errors
    /// A position that the epoch does not have: the state is of another sampler or of other data.
    pub fn at(mut self, state: SamplerState) -> Result<Self> {
        let windows = self.windows(state.epoch);
        if state.position > windows {
            let reason = format!("epoch {} has {windows} windows; the state is of other data", state.epoch);
            return Err(Error::option("position", state.position, reason));
        }
        self.state = state;
        Ok(self)
    }

    /// Where the sampler is.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Number of windows of an epoch; it differs by at most one between epochs, with their offsets.
    pub fn windows(&self, epoch: u64) -> u64 {
        (self.tokens - 1 - self.offset(epoch)) / self.context
    }

    /// Positions of the first tokens of the next batch's windows. A batch may end one epoch and begin the next.
    pub fn next_starts(&mut self) -> Vec<u64> {
        (0..self.batch).map(|_| self.next_start()).collect()
    }

    /// The next batch.
    ///
    /// # Errors
    /// Shards of another length than the sampler's, or damaged ones; the state is then unchanged.
    pub fn next_batch(&mut self, shards: &TokenShards) -> Result<Batch> {
        if shards.len() != self.tokens {
            let reason = format!("the data have {} tokens", shards.len());
            return Err(Error::option("tokens", self.tokens, reason));
        }
        let mut ahead = self.clone();
        let batch = Batch::read(shards, ahead.next_starts(), self.context as usize)?;
        self.state = ahead.state;
        Ok(batch)
    }

    fn next_start(&mut self) -> u64 {
        if self.state.position == self.windows(self.state.epoch) {
            self.state = SamplerState { epoch: self.state.epoch + 1, position: 0 };
        }
        let SamplerState { epoch, position } = self.state;
        self.state.position += 1;
        let window = permute(position, self.windows(epoch), mix(self.seed ^ mix(epoch)));
        self.offset(epoch) + window * self.context
    }

    /// The epoch's first window starts here; there is always room for one window after it.
    fn offset(&self, epoch: u64) -> u64 {
        let choices = self.context.min(self.tokens - self.context);
        mix(mix(self.seed ^ mix(epoch)) ^ 0x6f66_6673_6574) % choices
    }
}

impl Batch {
    /// The windows of `context + 1` tokens that start at `starts`.
    ///
    /// # Errors
    /// Those of [`TokenShards::read`].
    pub fn read(shards: &TokenShards, starts: Vec<u64>, context: usize) -> Result<Self> {
        let mut tokens = vec![0; starts.len() * (context + 1)];
        for (start, window) in starts.iter().zip(tokens.chunks_exact_mut(context + 1)) {
            shards.read(*start, window)?;
        }
        Ok(Self { tokens, starts, context })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is no window.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }
}

/// Positions of validation windows of `context + 1` tokens, in order, overlapping by one token only. With a `limit`,
/// that many of them, spread evenly over the data; a rest shorter than a window is left out.
///
/// # Errors
/// A context or limit of 0, or fewer tokens than one window has.
pub fn validation_windows(tokens: u64, context: usize, limit: Option<u64>) -> Result<Vec<u64>> {
    let context = checked_context(context, tokens)?;
    let all = (tokens - 1) / context;
    let count = match limit {
        Some(0) => return Err(Error::option("limit", 0, "at least 1 window")),
        Some(limit) => limit.min(all),
        None => all,
    };
    let nth = |index: u64| (u128::from(index) * u128::from(all) / u128::from(count)) as u64;
    Ok((0..count).map(|index| nth(index) * context).collect())
}

fn checked_context(context: usize, tokens: u64) -> Result<u64> {
    match context as u64 {
        0 => Err(Error::option("context", context, "at least 1 token")),
        wide if wide >= tokens => {
            let reason =
                format!("the data have {tokens} tokens, and a window needs one more than the context");
            Err(Error::option("context", context, reason))
        }
        fits => Ok(fits),
    }
}

/// The image of `index` under a pseudo-random permutation of `0..count`: a Feistel network permutes the smallest
/// square of a power of two that holds `count`, and is applied again until the image is inside (fewer than four times
/// on average).
fn permute(index: u64, count: u64, key: u64) -> u64 {
    const ROUNDS: u64 = 6;
    let half = (u64::BITS - (count - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut image = index;
    loop {
        let (mut left, mut right) = (image >> half, image & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(key ^ mix(right ^ round << 40)) & mask));
        }
        image = left << half | right;
        if image < count {
            return image;
        }
    }
}

/// A bijective mixing of 64 bits (the finaliser of SplitMix64, with its increment).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
