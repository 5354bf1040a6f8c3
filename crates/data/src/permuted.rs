//! The control for a memory: each position reads the rows of other n-grams.

use engram_config::{Lookup, MemoryConfig};

use crate::sampler::mix;

/// The earlier position whose rows each position reads, if not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermutedPlaces {
    seed: u64,
    max_order: usize,
    pad_id: u32,
}

impl PermutedPlaces {
    /// The control of `memory`; none if every position reads the rows of its own n-grams.
    pub fn of(memory: &MemoryConfig) -> Option<Self> {
        let MemoryConfig { seed, max_order, pad_id, .. } = *memory;
        (memory.lookup == Lookup::Permuted).then_some(Self { seed, max_order, pad_id })
    }

    /// The earlier position whose n-grams `position` reads, drawn once by the seed. These n-grams share no token with
    /// its own, nor with the next token. If there is no such position yet, an n-gram of padding is read.
    pub fn source(&self, position: usize) -> Option<usize> {
        let choices = (position + 1).checked_sub(self.max_order)? as u64;
        // Of 2⁶⁴ numbers hardly more fall on one choice than on another.
        let random = mix(mix(self.seed) ^ position as u64);
        (choices > 0).then(|| (random % choices) as usize)
    }

    /// The token whose n-grams are read if there is no earlier position.
    pub fn padding(&self) -> u32 {
        self.pad_id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_lie_before_the_n_gram() {
        let permuted = PermutedPlaces { seed: 5, max_order: 3, pad_id: 0 };
        let sources: Vec<_> = (0..300).map(|position| permuted.source(position)).collect();
        assert_eq!(sources[..3], [None; 3]);
        for (position, source) in sources.iter().enumerate().skip(3) {
            assert!(source.unwrap() + 3 <= position, "{position} reads {source:?}");
        }
        let other = PermutedPlaces { seed: 6, ..permuted };
        assert!((0..300).any(|position| other.source(position) != sources[position]));
        let distinct: std::collections::HashSet<_> = sources.iter().collect();
        assert!(distinct.len() > 100, "all places are read: {}", distinct.len());
    }
}
