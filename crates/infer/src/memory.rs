//! The memories that a decoder can read: the model's own, or others that were added to it.
//!
//! A sequence reads one of them or none. Rows of a step that read different memories are computed by the weights of
//! each, so that every row has the bits that it has alone.

use engram_config::{MemoryConfig, ModelConfig};

use crate::cache::Cache;
use crate::gated_memory::GatedMemory;
use crate::ngram_embedding::NgramEmbedding;
use crate::row_fetch::RowFetch;
use crate::step_rows::StepRows;
use crate::weights::{Loader, WeightError};

/// One memory: what reads rows before the attention of some blocks.
#[derive(Debug)]
pub(crate) struct Memory {
    config: MemoryConfig,
    /// Of each block in `config.layers`.
    layers: Vec<MemoryLayer>,
}

/// How rows of tables are read before one block.
#[derive(Debug)]
enum MemoryLayer {
    Gated(Box<GatedMemory>),
    Ngrams(NgramEmbedding),
}

impl Memory {
    /// The memory `config` of a model. Parts of the cache from `convolutions` on are for its short convolutions.
    pub(crate) fn load(
        loader: &Loader<'_>,
        config: &MemoryConfig,
        model: &ModelConfig,
        mut convolutions: usize,
    ) -> Result<Self, WeightError> {
        let layer = |&block: &usize| {
            let loader = loader.child("blocks").child(block);
            if config.form.is_gated() {
                let gated = GatedMemory::load(&loader.child("memory"), config, model, convolutions)?;
                convolutions += usize::from(gated.entry().is_some());
                Ok(MemoryLayer::Gated(Box::new(gated)))
            } else {
                // Older checkpoints name these weights `ngrams`.
                let named = |child: &str| NgramEmbedding::load(&loader.child(child), config, model);
                Ok(MemoryLayer::Ngrams(named("memory").or_else(|error| named("ngrams").map_err(|_| error))?))
            }
        };
        let layers = config.layers.iter().map(layer).collect::<Result<_, _>>()?;
        Ok(Self { config: config.clone(), layers })
    }

    pub(crate) fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// Values that each of its short convolutions keeps of a position.
    pub(crate) fn convolution_entries(&self) -> Vec<usize> {
        let entry = |layer: &MemoryLayer| match layer {
            MemoryLayer::Gated(gated) => gated.entry(),
            MemoryLayer::Ngrams(_) => None,
        };
        self.layers.iter().filter_map(entry).collect()
    }

    pub(crate) fn bytes(&self) -> usize {
        let bytes = |layer: &MemoryLayer| match layer {
            MemoryLayer::Gated(gated) => gated.bytes(),
            MemoryLayer::Ngrams(ngrams) => ngrams.bytes(),
        };
        self.layers.iter().map(bytes).sum()
    }

    /// Which of its layers is read before `block`, if one is.
    pub(crate) fn layer_before(&self, block: usize) -> Option<usize> {
        self.config.layers.iter().position(|&layer| layer == block)
    }

    /// Adds to the streams `x` `[rows, streams · width]` what layer `layer` has for the rows `on`: `e` `[on, d_mem]` are
    /// their memory rows. Gives the gates of all rows `[rows, streams]`, and what is added to the values of the block's
    /// attention, where that is its place.
    pub(crate) fn read(
        &self,
        layer: usize,
        (x, e): (&mut [f32], &[f32]),
        (rows, on): (&StepRows<'_>, &[usize]),
        cache: &mut Cache,
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        match &self.layers[layer] {
            MemoryLayer::Gated(gated) => (gated.add(x, e, &rows.places, on, cache), None),
            MemoryLayer::Ngrams(ngrams) => {
                let added = ngrams.add(x, e, on);
                (ngrams.open_gates(rows.places.len(), on), added)
            }
        }
    }
}

/// Which memory each of `fetches` brings rows for: they come in the order of the rows whose memory is on, each for rows
/// of one memory.
///
/// # Panics
/// When they are not the rows of the step.
pub(crate) fn memories_of(fetches: &[RowFetch], rows: &StepRows<'_>) -> Vec<usize> {
    let mut read = rows.memories.iter().flatten();
    let of = |fetch: &RowFetch| {
        let count = fetch.tokens();
        let first = *read.next().expect("rows are fetched for rows of the step");
        let same = read.by_ref().take(count - 1).filter(|&&memory| memory == first).count();
        assert_eq!(same, count - 1, "rows are fetched together for one memory");
        first
    };
    fetches.iter().map(of).collect()
}
