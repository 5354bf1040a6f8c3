//! Which n-gram's rows a position reads.
//!
//! Its own, in every model that is meant to remember. As a control, the rows of another: as many, of the same table,
//! as often used, but at the wrong place. What such a memory gains over none is not knowledge of n-grams.

use engram_address::Addressing;
use engram_config::{Lookup, MemoryConfig};

use crate::error::Result;
use engram_data::mix;

/// Where the positions of a sequence have their rows from.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowPlaces {
    /// None: every position reads the rows of its own n-grams.
    permuted: Option<Permuted>,
}

#[derive(Debug, Clone, Copy)]
struct Permuted {
    seed: u64,
    max_order: usize,
    pad_id: u32,
}

impl RowPlaces {
    /// As `memory` has it.
    pub fn of(memory: &MemoryConfig) -> Self {
        let MemoryConfig { seed, max_order, pad_id, .. } = *memory;
        let permuted = (memory.lookup == Lookup::Permuted).then_some(Permuted { seed, max_order, pad_id });
        Self { permuted }
    }

    /// Row ids of the memory layer at place `layer` for a sequence, `[time·slots]`.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub(crate) fn row_ids(
        &self,
        addressing: &Addressing,
        layer: usize,
        sequence: &[u32],
        ids: &mut [u64],
    ) -> Result<()> {
        addressing.row_ids_into(layer, sequence, ids)?;
        let Some(permuted) = self.permuted else { return Ok(()) };
        let slots = addressing.layers()[layer].slots();
        let own = ids.to_vec();
        let mut padding = vec![0; slots];
        addressing.row_ids_into(layer, &[permuted.pad_id], &mut padding)?;
        let sources = permuted.sources(sequence.len());
        for (ids, source) in ids.chunks_exact_mut(slots).zip(sources) {
            ids.copy_from_slice(source.map_or(&padding, |source| &own[source * slots..][..slots]));
        }
        Ok(())
    }
}

impl Permuted {
    /// The earlier position whose n-grams each position reads, drawn once for all by the seed. They share no token with
    /// its own, nor with what is to be predicted. Where there is none yet, an n-gram of padding is read.
    fn sources(self, time: usize) -> Vec<Option<usize>> {
        let source = |position: usize| {
            let choices = (position + 1).checked_sub(self.max_order)? as u64;
            // Of 2⁶⁴ numbers hardly more fall on one choice than on another.
            let random = mix(mix(self.seed) ^ position as u64);
            (choices > 0).then(|| (random % choices) as usize)
        };
        (0..time).map(source).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_lie_before_the_n_gram_and_do_not_depend_on_what_follows() {
        let permuted = Permuted { seed: 5, max_order: 3, pad_id: 0 };
        let sources = permuted.sources(300);
        assert_eq!(sources[..3], [None; 3]);
        for (position, source) in sources.iter().enumerate().skip(3) {
            assert!(source.unwrap() + 3 <= position, "{position} reads {source:?}");
        }
        assert_eq!(permuted.sources(40)[..], sources[..40]);
        assert_ne!(Permuted { seed: 6, ..permuted }.sources(300), sources);
        let distinct: std::collections::HashSet<_> = sources.iter().collect();
        assert!(distinct.len() > 100, "all places are read: {}", distinct.len());
    }
}
