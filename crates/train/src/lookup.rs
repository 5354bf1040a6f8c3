//! Which n-gram's rows a position reads.
//!
//! Its own, in every model that is meant to remember. As a control, the rows of another: as many, of the same table,
//! as often used, but at the wrong place. What such a memory gains over none is not knowledge of n-grams.

use engram_address::Addressing;
use engram_config::MemoryConfig;
use engram_data::PermutedPlaces;

use crate::error::Result;

/// Where the positions of a sequence have their rows from.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowPlaces {
    /// None: every position reads the rows of its own n-grams.
    permuted: Option<PermutedPlaces>,
}

impl RowPlaces {
    /// As `memory` has it.
    pub fn of(memory: &MemoryConfig) -> Self {
        Self { permuted: PermutedPlaces::of(memory) }
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
        addressing.row_ids_into(layer, &[permuted.padding()], &mut padding)?;
        for (position, ids) in ids.chunks_exact_mut(slots).enumerate() {
            let source = permuted.source(position);
            ids.copy_from_slice(source.map_or(&padding, |source| &own[source * slots..][..slots]));
        }
        Ok(())
    }
}
