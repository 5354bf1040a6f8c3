//! Memories as files have them, made ready for a decoder.

use std::collections::HashSet;
use std::sync::Arc;

use engram_data::PermutedPlaces;
use engram_import::StackedMemory;
use engram_store::{
    ContentHash, Overlaid, PrefetchOptions, RowSource, StoreError, TableHeader, TableOrigin, ZeroRows,
};

use crate::row_fetch::{RowTiers, TierError};

/// The rows of one memory layer without overlays, and what overlays on them are made for.
pub struct BaseRows {
    /// The rows.
    pub source: Arc<dyn RowSource>,
    /// The header of their table.
    pub header: TableHeader,
    /// What tells their table from others.
    pub content: ContentHash,
}

impl RowTiers {
    /// The rows of `memory`: those of `tables`, one for each layer, or zeros where there are none, under its overlays.
    ///
    /// # Errors
    /// When an overlay is damaged or was made for other rows, or the tables are not those of the memory.
    pub fn of_memory(
        memory: &StackedMemory,
        tables: Vec<BaseRows>,
        options: &PrefetchOptions,
    ) -> Result<Self, TierError> {
        let addressing = memory.addressing().clone();
        let near = tables.is_empty();
        let tables = if near { zeros(memory)? } else { tables };
        let (mut sources, mut changed): (Vec<Arc<dyn RowSource>>, _) = (Vec::new(), Vec::new());
        for (layer, table) in addressing.layers().iter().zip(tables) {
            let BaseRows { source, header, content } = table;
            let mut stack = Overlaid::new(source, &header, content)?;
            let files = memory.overlays().iter().filter_map(|overlay| overlay.file(layer.layer()));
            files.into_iter().try_for_each(|file| stack.stack(&file).map(|_| ()))?;
            let ids: HashSet<u64> =
                stack.overlays().iter().flat_map(|overlay| overlay.ids()).copied().collect();
            changed.push(ids);
            sources.push(match stack.overlays() {
                [] => stack.into_base(),
                _ => Arc::new(stack),
            });
        }
        let tiers =
            if near { Self::near(addressing, sources)? } else { Self::new(addressing, sources, options)? };
        Ok(tiers.permuted(PermutedPlaces::of(memory.memory())).telling(changed))
    }
}

/// Rows of zero for each layer.
fn zeros(memory: &StackedMemory) -> Result<Vec<BaseRows>, StoreError> {
    let addressing = memory.addressing();
    let layer = |layer: &engram_address::LayerAddress| {
        let origin = TableOrigin { identity: addressing.identity(), layer: layer.layer() as u64 };
        let zeros = ZeroRows::new(layer.rows(), memory.memory().row_width, origin)?;
        let (header, content) = (zeros.header().clone(), zeros.content());
        Ok(BaseRows { source: Arc::new(zeros), header, content })
    };
    addressing.layers().iter().map(layer).collect()
}
