//! Attention of a step's rows to what the cache keeps of the positions before them.

use engram_kernels::{CachedAttentionShape, Seen, cached_attention};

use crate::cache::Cache;
use crate::step_rows::StepRows;

/// How the heads of a block look back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CachedHeads {
    pub(crate) shape: CachedAttentionShape,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Positions that a position sees, its own included; none: all.
    pub(crate) window: Option<usize>,
    /// Part of the cache that keeps the block's entries.
    pub(crate) part: usize,
}

impl CachedHeads {
    /// Keeps the rows' `entries` `[rows, entry]`, and gives what `queries` `[rows, heads, key]` see: `[rows, heads, value]`.
    pub(crate) fn attend(
        &self,
        queries: &[f32],
        entries: &[f32],
        rows: &StepRows<'_>,
        cache: &mut Cache,
    ) -> Vec<f32> {
        for (place, entry) in rows.places.iter().zip(entries.chunks_exact(self.shape.entry)) {
            cache.position_mut(place.pages, self.part, place.position).copy_from_slice(entry);
        }
        let pages: Vec<Vec<&[f32]>> = rows
            .chunks
            .iter()
            .map(|(pages, _)| pages.iter().map(|&page| cache.part(page, self.part)).collect())
            .collect();
        let of_row =
            rows.chunks.iter().zip(&pages).flat_map(|((_, count), pages)| (0..*count).map(move |_| pages));
        let seen: Vec<Seen<'_>> = rows
            .places
            .iter()
            .zip(of_row)
            .map(|(place, pages)| {
                let count = place.position + 1;
                let first = self.window.map_or(0, |window| count.saturating_sub(window));
                Seen { pages, first, count }
            })
            .collect();
        cached_attention(queries, &seen, self.shape, self.scale)
    }
}
