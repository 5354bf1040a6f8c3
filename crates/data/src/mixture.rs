//! Windows of several sources, mixed by weight in an order given by a formula.
//!
//! Window n, counted from 0, comes from one of the sources that are below their share, `weight · (n + 1) > drawn`: from
//! the one whose next window is due first, at `(drawn + 1) / weight`; of equals, the first. Each source is thus within
//! one window of its share after any number of windows (Tijdeman, "The chairman assignment problem", 1980). The rule
//! "largest `weight · (n + 1) − drawn`" is simpler, but with three or more sources it falls behind by more than a window.
//!
//! The numbers of windows drawn follow from the samplers' positions, so that these are the whole state.

use crate::error::{Error, Result};
use crate::sampler::{Sampler, SamplerState, mix};

/// Draws windows from several sources.
///
/// ```
/// # use engram_data::Mixture;
/// // Two windows of the first source for each of the second, of 64 tokens each.
/// let mut mixture = Mixture::new(7, 64, &[(2.0, 10_000), (1.0, 5_000)])?;
/// let sources: Vec<usize> = (0..6).map(|_| mixture.next_window().source).collect();
/// assert_eq!(sources, [0, 0, 1, 0, 0, 1]);
/// # Ok::<(), engram_data::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Mixture {
    sources: Vec<Share>,
}

/// A source, and how much of it was drawn.
#[derive(Debug, Clone, PartialEq)]
struct Share {
    /// All weights sum to 1.
    weight: f64,
    sampler: Sampler,
    /// Windows drawn.
    drawn: u64,
}

/// A window of training tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Index of its source.
    pub source: usize,
    /// Position of its first token in the source.
    pub start: u64,
}

impl Mixture {
    /// A mixture at its beginning, of sources given by their weights and numbers of tokens, in windows of `context`
    /// inputs. The first source's windows come in the order of a [`Sampler`] with the same seed: a source alone is
    /// drawn as without a mixture.
    ///
    /// # Errors
    /// No source, a weight that is not above 0 and finite, a context of 0, or a source of fewer tokens than a window.
    pub fn new(seed: u64, context: usize, sources: &[(f64, u64)]) -> Result<Self> {
        if sources.is_empty() {
            return Err(Error::option("source", 0, "at least one is needed"));
        }
        let all: f64 = sources.iter().map(|(weight, _)| weight).sum();
        let share = |(index, &(weight, tokens)): (usize, &(f64, u64))| {
            if !(weight > 0.0 && all.is_finite()) {
                return Err(Error::option("weight", weight, "must be above 0 and finite"));
            }
            let sampler = Sampler::new(seed_of(seed, index), context, 1, tokens)?;
            Ok(Share { weight: weight / all, sampler, drawn: 0 })
        };
        let sources: Result<_> = sources.iter().enumerate().map(share).collect();
        Ok(Self { sources: sources? })
    }

    /// The same mixture with windows of the sources so marked at multiples of the context; see [`Sampler::aligned`].
    ///
    /// # Panics
    /// When there is not a mark for each source.
    #[must_use]
    pub fn aligned(mut self, marks: &[bool]) -> Self {
        assert_eq!(marks.len(), self.sources.len(), "a mark for each source");
        for (share, &aligned) in self.sources.iter_mut().zip(marks) {
            share.sampler = share.sampler.clone().aligned(aligned);
        }
        self
    }

    /// The same mixture with its samplers at other positions, as if it had advanced there.
    ///
    /// # Errors
    /// Not a position for each source, or one that its epoch does not have: the states belong to other data.
    pub fn at(mut self, states: &[SamplerState]) -> Result<Self> {
        if states.len() != self.sources.len() {
            let reason = format!("the mixture has {} sources", self.sources.len());
            return Err(Error::option("positions", states.len(), reason));
        }
        for (share, &state) in self.sources.iter_mut().zip(states) {
            share.sampler = share.sampler.clone().at(state)?;
            let finished = (0..state.epoch).map(|epoch| share.sampler.windows(epoch));
            share.drawn = finished.fold(state.position, u64::saturating_add);
        }
        Ok(self)
    }

    /// The positions of the sources' samplers.
    pub fn states(&self) -> Vec<SamplerState> {
        self.sources.iter().map(|share| share.sampler.state()).collect()
    }

    /// How often the data of the source that was used most have been used.
    pub fn epochs(&self) -> f64 {
        self.sources.iter().map(|share| share.sampler.epochs()).fold(0.0, f64::max)
    }

    /// The next window.
    pub fn next_window(&mut self) -> Window {
        let count = self.sources.iter().map(|share| share.drawn).sum::<u64>() + 1;
        // A source that is below its share sorts before one that is not.
        let order = |share: &Share| {
            let is_ahead = share.weight * count as f64 <= share.drawn as f64;
            (is_ahead, (share.drawn + 1) as f64 / share.weight)
        };
        let mut source = 0;
        for other in 1..self.sources.len() {
            if order(&self.sources[other]) < order(&self.sources[source]) {
                source = other;
            }
        }
        let share = &mut self.sources[source];
        share.drawn += 1;
        Window { source, start: share.sampler.next_starts()[0] }
    }
}

/// The seed of the source at `index`: sources of equal lengths are drawn in different orders.
fn seed_of(seed: u64, index: usize) -> u64 {
    match index {
        0 => seed,
        index => mix(seed ^ mix(index as u64)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mixture(seed: u64, weights: &[f64]) -> Mixture {
        let sources: Vec<_> =
            weights.iter().enumerate().map(|(index, &weight)| (weight, 90 + 17 * index as u64)).collect();
        Mixture::new(seed, 8, &sources).unwrap()
    }

    #[test]
    fn the_order_is_fixed_for_good() {
        // A change of these numbers changes every resumed training.
        let mut mixture = Mixture::new(42, 16, &[(2.0, 1000), (1.0, 1000), (1.0, 500)]).unwrap();
        let mut next = || mixture.next_window();
        let windows: Vec<_> = (0..8).map(|_| next()).map(|window| (window.source, window.start)).collect();
        let expected = [(0, 305), (1, 687), (0, 529), (2, 418), (0, 673), (1, 159), (0, 481), (2, 290)];
        assert_eq!(windows, expected);
    }

    #[test]
    fn a_rule_of_largest_lag_alone_would_fall_behind() {
        // With these weights, the largest `weight · (n + 1) − drawn` lags by more than a window.
        let weights = [0.013, 0.565, 0.024, 0.393, 0.002, 0.003];
        let (mut mixture, mut drawn) = (mixture(0, &weights), [0.0; 6]);
        for count in 1..2000 {
            drawn[mixture.next_window().source] += 1.0;
            let lag =
                weights.iter().zip(drawn).map(|(weight, drawn)| f64::abs(weight * f64::from(count) - drawn));
            assert!(lag.fold(0.0, f64::max) < 1.0 + 1e-9, "after {count} windows: {drawn:?}");
        }
    }

    #[test]
    fn what_cannot_be_mixed_is_refused() {
        let refused = |sources: &[(f64, u64)], expected: &str| {
            let message = Mixture::new(0, 8, sources).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        };
        refused(&[], "source = 0");
        refused(&[(1.0, 100), (0.0, 100)], "weight = 0: ");
        refused(&[(f64::NAN, 100)], "weight = NaN: ");
        refused(&[(f64::INFINITY, 100)], "weight = inf: ");
        refused(&[(1.0, 100), (1.0, 8)], "context = 8: the data has 8 tokens");
        let two = mixture(0, &[1.0, 1.0]);
        let message = two.at(&[SamplerState::default()]).unwrap_err().to_string();
        assert!(message.starts_with("positions = 1: "), "{message}");
    }

    proptest! {
        #[test]
        fn every_source_is_within_a_window_of_its_share(
            weights in proptest::collection::vec(0.001..1.0f64, 1..12), count in 1..400u32,
        ) {
            let all: f64 = weights.iter().sum();
            let (mut mixture, mut drawn) = (mixture(3, &weights), vec![0u32; weights.len()]);
            for count in 1..=count {
                drawn[mixture.next_window().source] += 1;
                for (weight, &drawn) in weights.iter().zip(&drawn) {
                    let share = weight / all * f64::from(count);
                    prop_assert!((share - f64::from(drawn)).abs() < 1.0 + 1e-9, "{share} {drawn}");
                }
            }
        }

        #[test]
        fn going_on_is_going_on(
            seed: u64, weights in proptest::collection::vec(0.01..1.0f64, 1..6), stop in 0..150usize,
        ) {
            let mut whole = mixture(seed, &weights);
            let all: Vec<_> = (0..200).map(|_| whole.next_window()).collect();
            let mut first = mixture(seed, &weights);
            (0..stop).for_each(|_| _ = first.next_window());
            let mut resumed = mixture(seed, &weights).at(&first.states()).unwrap();
            prop_assert_eq!(&resumed, &first);
            let rest: Vec<_> = (stop..200).map(|_| resumed.next_window()).collect();
            prop_assert_eq!(&all[stop..], &rest[..]);
        }

        #[test]
        fn a_source_alone_is_drawn_as_without_a_mixture(seed: u64, weight in 0.01..9.0f64) {
            let mut alone = Mixture::new(seed, 8, &[(weight, 300)]).unwrap();
            let mut sampler = Sampler::new(seed, 8, 4, 300).unwrap();
            for _ in 0..30 {
                let starts: Vec<_> = (0..4).map(|_| alone.next_window().start).collect();
                prop_assert_eq!(starts, sampler.next_starts());
                prop_assert_eq!(&alone.states(), &[sampler.state()]);
            }
        }
    }
}
