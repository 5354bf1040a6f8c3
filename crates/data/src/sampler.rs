//! Training windows in a random order given by a formula: a few numbers determine any window of any epoch.
//!
//! An epoch divides the tokens into windows of `context + 1` tokens that overlap by one (the last target of one is the
//! first input of the next), starting at an offset that differs per epoch. It visits them in the order of a
//! pseudo-random permutation. No list of windows is kept, so the state of a sampler is two numbers, and a resumed
//! sampler continues exactly.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::token_shards::TokenShards;

/// The position of a [`Sampler`], as stored in a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Number of finished epochs.
    pub epoch: u64,
    /// Number of windows of this epoch that have been used.
    pub position: u64,
}

/// Batches of training windows, without replacement within an epoch.
///
/// ```
/// # use engram_data::Sampler;
/// let mut sampler = Sampler::new(7, 128, 4, 1_000_000)?;
/// let first = sampler.next_starts();
/// assert_eq!(first.len(), 4);
///
/// let resumed = Sampler::new(7, 128, 4, 1_000_000)?.at(sampler.state())?;
/// assert_eq!(resumed.clone().next_starts(), sampler.next_starts());
/// # Ok::<(), engram_data::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    seed: u64,
    context: u64,
    batch: usize,
    tokens: u64,
    /// Whether windows begin at multiples of the context in every epoch.
    aligned: bool,
    state: SamplerState,
}

/// Windows of tokens, one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `[windows, context + 1]`. The first `context` tokens of a window are inputs, the last `context` are targets.
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
    /// A context or batch of 0, or fewer tokens than one window needs.
    pub fn new(seed: u64, context: usize, batch: usize, tokens: u64) -> Result<Self> {
        if batch == 0 {
            return Err(Error::option("batch", batch, "must be at least 1"));
        }
        let context = checked_context(context, tokens)?;
        Ok(Self { seed, context, batch, tokens, aligned: false, state: SamplerState::default() })
    }

    /// The same sampler with windows that begin at multiples of the context in every epoch, as those of packed
    /// conversations do.
    #[must_use]
    pub fn aligned(mut self, aligned: bool) -> Self {
        self.aligned = aligned;
        self
    }

    /// The same sampler at another position, as if it had advanced there.
    ///
    /// # Errors
    /// A position that the epoch does not have: the state belongs to another sampler or to other data.
    pub fn at(mut self, state: SamplerState) -> Result<Self> {
        let windows = self.windows(state.epoch);
        if state.position > windows {
            let reason =
                format!("epoch {} has {windows} windows; the state belongs to other data", state.epoch);
            return Err(Error::option("position", state.position, reason));
        }
        self.state = state;
        Ok(self)
    }

    /// The sampler's position.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Number of windows of an epoch. It differs by at most one between epochs, because of their offsets.
    pub fn windows(&self, epoch: u64) -> u64 {
        (self.tokens - 1 - self.offset(epoch)) / self.context
    }

    /// How often the data has been used: whole epochs plus the share of the current one.
    pub fn epochs(&self) -> f64 {
        let SamplerState { epoch, position } = self.state;
        epoch as f64 + position as f64 / self.windows(epoch) as f64
    }

    /// Positions of the first tokens of the next batch's windows. A batch may span two epochs.
    pub fn next_starts(&mut self) -> Vec<u64> {
        (0..self.batch).map(|_| self.next_start()).collect()
    }

    /// The next batch.
    ///
    /// # Errors
    /// Shards whose length differs from the sampler's, or damaged ones. The state is then unchanged.
    pub fn next_batch(&mut self, shards: &TokenShards) -> Result<Batch> {
        if shards.len() != self.tokens {
            let reason = format!("the data has {} tokens", shards.len());
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

    /// Where the epoch's first window starts. At least one window fits after it.
    fn offset(&self, epoch: u64) -> u64 {
        if self.aligned {
            return 0;
        }
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

    /// Whether there are no windows.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }
}

/// Positions of validation windows of `context + 1` tokens, in order, overlapping by one token. With a `limit`, that
/// many of them, spread evenly over the data. A rest shorter than a window is left out.
///
/// # Errors
/// A context or limit of 0, or fewer tokens than one window needs.
pub fn validation_windows(tokens: u64, context: usize, limit: Option<u64>) -> Result<Vec<u64>> {
    let context = checked_context(context, tokens)?;
    let all = (tokens - 1) / context;
    let count = match limit {
        Some(0) => return Err(Error::option("limit", 0, "must be at least 1")),
        Some(limit) => limit.min(all),
        None => all,
    };
    let nth = |index: u64| (u128::from(index) * u128::from(all) / u128::from(count)) as u64;
    Ok((0..count).map(|index| nth(index) * context).collect())
}

fn checked_context(context: usize, tokens: u64) -> Result<u64> {
    match context as u64 {
        0 => Err(Error::option("context", context, "must be at least 1")),
        wide if wide >= tokens => {
            let reason =
                format!("the data has {tokens} tokens, but a window needs one more than the context");
            Err(Error::option("context", context, reason))
        }
        fits => Ok(fits),
    }
}

/// The image of `index` under a pseudo-random permutation of `0..count`. A Feistel network permutes the smallest square
/// of a power of two that holds `count`, and is applied again until the image is inside (fewer than four times on
/// average).
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
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_order_is_fixed_for_good() {
        // A change of these numbers changes every resumed training.
        let mut sampler = Sampler::new(42, 16, 4, 1000).unwrap();
        assert_eq!(sampler.windows(0), 62);
        assert_eq!(sampler.next_starts(), [305, 529, 673, 481]);
        assert_eq!(sampler.next_starts(), [369, 209, 321, 561]);
    }

    #[test]
    fn aligned_windows_begin_at_multiples_of_the_context() {
        let mut sampler = Sampler::new(42, 16, 1, 16 * 7 + 1).unwrap().aligned(true);
        for epoch in 0..3 {
            assert_eq!(sampler.windows(epoch), 7);
            let mut starts: Vec<u64> = (0..7).flat_map(|_| sampler.next_starts()).collect();
            starts.sort();
            assert_eq!(starts, [0, 16, 32, 48, 64, 80, 96]);
        }
    }

    #[test]
    fn seeds_and_epochs_differ() {
        let starts = |seed| Sampler::new(seed, 8, 100, 1000).unwrap().next_starts();
        assert_ne!(starts(1), starts(2));
        let mut sampler = Sampler::new(1, 8, sampler_windows(1, 8, 1000), 1000).unwrap();
        assert_eq!(sampler.epochs(), 0.0);
        let (mut one, mut two) = (sampler.next_starts(), sampler.next_starts());
        assert!((sampler.epochs() - 2.0).abs() < 0.02, "{}", sampler.epochs());
        assert_ne!(one, two);
        one.sort();
        two.sort();
        assert_ne!(one[0], two[0], "the offset of this seed's second epoch is another");
    }

    fn sampler_windows(seed: u64, context: usize, tokens: u64) -> usize {
        Sampler::new(seed, context, 1, tokens).unwrap().windows(0) as usize
    }

    #[test]
    fn an_order_looks_random() {
        // The mean distance between neighbours of a random permutation of n is n/3.
        let count = 10_000;
        let order: Vec<_> = (0..count).map(|index| permute(index, count, 7)).collect();
        let distance: u64 = order.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum();
        let mean = distance as f64 / (count - 1) as f64;
        assert!((mean / (count as f64 / 3.0) - 1.0).abs() < 0.03, "{mean}");
        let fixed = order.iter().enumerate().filter(|(index, image)| *index as u64 == **image).count();
        assert!(fixed < 10, "{fixed}");
    }

    #[test]
    fn what_cannot_be_sampled_is_refused() {
        let refused = |result: Result<Sampler>, expected: &str| {
            let message = result.unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        };
        refused(Sampler::new(0, 0, 1, 10), "context = 0: ");
        refused(Sampler::new(0, 8, 0, 10), "batch = 0: ");
        refused(Sampler::new(0, 10, 1, 10), "context = 10: the data has 10 tokens");
        let beyond = SamplerState { epoch: 0, position: 1000 };
        refused(Sampler::new(0, 9, 1, 10).unwrap().at(beyond), "position = 1000: epoch 0 has 1 windows");
        assert!(validation_windows(10, 10, None).is_err());
        assert!(validation_windows(10, 4, Some(0)).is_err());
    }

    #[test]
    fn validation_goes_through_the_data_in_order() {
        assert_eq!(validation_windows(41, 10, None).unwrap(), [0, 10, 20, 30]);
        assert_eq!(validation_windows(40, 10, None).unwrap(), [0, 10, 20]);
        assert_eq!(validation_windows(41, 10, Some(2)).unwrap(), [0, 20]);
        assert_eq!(validation_windows(41, 10, Some(3)).unwrap(), [0, 10, 20]);
        assert_eq!(validation_windows(41, 10, Some(9)).unwrap(), [0, 10, 20, 30]);
    }

    #[test]
    fn the_state_is_two_numbers() {
        let state = SamplerState { epoch: 3, position: 9 };
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json, r#"{"epoch":3,"position":9}"#);
        assert_eq!(serde_json::from_str::<SamplerState>(&json).unwrap(), state);
    }

    proptest! {
        #[test]
        fn a_permutation_hits_everything_once(count in 1..3000u64, key: u64) {
            let mut images: Vec<_> = (0..count).map(|index| permute(index, count, key)).collect();
            images.sort();
            prop_assert_eq!(images, (0..count).collect::<Vec<_>>());
        }

        #[test]
        fn an_epoch_has_every_window_once(
            seed: u64,
            epoch in 0..5u64,
            context in 1..40usize,
            rest in 1..2000u64,
        ) {
            let tokens = context as u64 + rest;
            let at = SamplerState { epoch, position: 0 };
            let sampler = Sampler::new(seed, context, 1, tokens).unwrap().at(at).unwrap();
            let windows = sampler.windows(epoch);
            let mut one = sampler.clone();
            let mut starts: Vec<_> = (0..windows).flat_map(|_| one.next_starts()).collect();
            prop_assert_eq!(one.state(), SamplerState { epoch, position: windows });
            starts.sort();
            // Windows follow each other from an offset below the context, and no further one would fit.
            prop_assert!(starts[0] < context as u64);
            prop_assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == context as u64));
            let end = starts[starts.len() - 1] + context as u64 + 1;
            prop_assert!(end <= tokens && end + context as u64 > tokens);
        }

        #[test]
        fn going_on_is_going_on(seed: u64, batch in 1..7usize, tokens in 20..400u64, stop in 0..60usize) {
            let fresh = Sampler::new(seed, 8, batch, tokens).unwrap();
            let mut whole = fresh.clone();
            let all: Vec<_> = (0..80).map(|_| whole.next_starts()).collect();
            let mut first = fresh.clone();
            (0..stop).for_each(|_| _ = first.next_starts());
            let mut resumed = fresh.at(first.state()).unwrap();
            let rest: Vec<_> = (stop..80).map(|_| resumed.next_starts()).collect();
            prop_assert_eq!(&all[stop..], &rest[..]);
        }
    }
}
