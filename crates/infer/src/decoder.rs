//! The model, one chunk of each sequence at a time.
//!
//! Computes what the model computes over a whole sequence, from what the [`Cache`] keeps of the positions before.
//!
//! Every sum of a position runs in an order of its own: its logits have the same bits whatever is computed beside
//! it, and however its sequence is cut into chunks and pages.

use engram_config::{BlockRotary, MemoryConfig, ModelConfig};
use engram_kernels::with_awake_threads;
use engram_store::StoreError;

use crate::block::Block;
use crate::cache::{Cache, CacheLayout};
use crate::memory::{Memory, memories_of};
use crate::norm::Norm;
use crate::rotary::RowAngles;
use crate::row_fetch::RowFetch;
use crate::rows;
use crate::step_rows::{Chunk, StepRows, Target};
use crate::token_embedding::TokenEmbedding;
use crate::token_score::{self, TokenScore};
use crate::weights::{All, Dtype, WeightError, WeightSource};

/// A model's weights, laid out for decoding.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    embedding: TokenEmbedding,
    blocks: Vec<Block>,
    /// The model's own, if it has one, or those that were added.
    memories: Vec<Memory>,
    norm: Norm,
    /// The rotary positions that blocks have, each once.
    rotaries: Vec<BlockRotary>,
    /// Which of them each block has.
    rotary_of: Vec<Option<usize>>,
    dtype: Dtype,
}

/// What a step computes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// `[Σ logits, vocabulary]`: chunk after chunk, each in its tokens' order.
    pub logits: Vec<f32>,
    /// `[Σ targets]`: chunk after chunk, in their order.
    pub scores: Vec<TokenScore>,
    /// Gates of each memory layer, `[tokens, streams]`: zeros where the memory is off or nothing is read, as all rows are
    /// zero; ones where it has no gates. Where memories have different numbers of layers, those that one has not are zeros.
    pub gates: Vec<Vec<f32>>,
}

impl Decoder {
    /// Packs the weights of the model that `config` describes, to be computed with as `dtype` says.
    ///
    /// # Errors
    /// When a weight is missing, of another shape, or has no place in the model.
    pub fn new(config: &ModelConfig, weights: &dyn WeightSource, dtype: Dtype) -> Result<Self, WeightError> {
        let all = All::new(weights, dtype);
        let loader = all.loader();
        let blocks = (0..config.blocks).map(|index| {
            let loader = loader.child("blocks").child(index);
            Block::load(&loader, config, index)
        });
        let own = config.memory.as_ref().map(|memory| Memory::load(&loader, memory, config, config.blocks));
        let (mut rotaries, mut rotary_of) = (Vec::new(), Vec::new());
        for rotary in (0..config.blocks).map(|block| config.attention.rotary_of(block)) {
            rotary_of.push(rotary.map(|rotary| {
                rotaries.iter().position(|known| *known == rotary).unwrap_or_else(|| {
                    rotaries.push(rotary);
                    rotaries.len() - 1
                })
            }));
        }
        let decoder = Self {
            embedding: TokenEmbedding::load(&loader, config)?,
            blocks: blocks.collect::<Result<_, _>>()?,
            memories: own.transpose()?.into_iter().collect(),
            norm: Norm::load(&loader, "norm", config.width, config.norm_epsilon)?,
            rotaries,
            rotary_of,
            config: config.clone(),
            dtype,
        };
        all.finish()?;
        Ok(decoder)
    }

    /// Adds a memory to a model that has none of its own; gives its number among the decoder's memories. `weights` are
    /// those of the memory alone, by the names that they have in a checkpoint.
    ///
    /// # Errors
    /// When a weight is missing, of another shape, or has no place in the memory.
    pub fn add_memory(
        &mut self,
        memory: &MemoryConfig,
        weights: &dyn WeightSource,
    ) -> Result<usize, WeightError> {
        let all = All::new(weights, self.dtype);
        let memory = Memory::load(&all.loader(), memory, &self.config, self.config.blocks)?;
        all.finish()?;
        self.memories.push(memory);
        Ok(self.memories.len() - 1)
    }

    /// What each memory is: the model's own, if it has one, or those that were added.
    pub fn memories(&self) -> impl ExactSizeIterator<Item = &MemoryConfig> {
        self.memories.iter().map(Memory::config)
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What has to be kept of a position, in pages of `page` positions: an entry of each block's attention, then one
    /// of each short convolution.
    pub fn cache_layout(&self, page: usize) -> CacheLayout {
        let attention = self.blocks.iter().map(Block::attention_entry);
        // A sequence reads one memory at most, so that memories share the parts for their convolutions.
        let convolutions = self.memories.iter().map(Memory::convolution_entries);
        let convolutions = convolutions.max_by_key(Vec::len).unwrap_or_default();
        CacheLayout { page, parts: attention.chain(convolutions).collect() }
    }

    /// Bytes of the packed weights, and of the embedding.
    pub fn bytes(&self) -> usize {
        let memories: usize = self.memories.iter().map(Memory::bytes).sum();
        self.embedding.bytes() + self.blocks.iter().map(Block::bytes).sum::<usize>() + memories
    }

    /// Computes `chunks`, writing to the positions of `cache` that were reserved for them. `rows` bring the memory
    /// rows of the chunks that read a memory, in their order; one may bring those of several chunks that follow each other
    /// and read the same memory.
    ///
    /// # Errors
    /// When rows are unavailable. Reserved positions may then hold anything; positions that count are untouched.
    ///
    /// # Panics
    /// When a token is outside the vocabulary, a sequence longer than the context, a chunk empty or not reserved,
    /// or the rows are not those of the chunks: the caller checks its input.
    pub fn step(
        &self,
        cache: &mut Cache,
        chunks: &[Chunk<'_>],
        rows: &mut [RowFetch],
    ) -> Result<StepOutput, StoreError> {
        with_awake_threads(|| self.compute(cache, chunks, rows))
    }

    fn compute(
        &self,
        cache: &mut Cache,
        chunks: &[Chunk<'_>],
        rows: &mut [RowFetch],
    ) -> Result<StepOutput, StoreError> {
        let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
        let step = StepRows::new(chunks);
        let angles: Vec<RowAngles> =
            self.rotaries.iter().map(|rotary| RowAngles::new(rotary, &step.places)).collect();
        let mut output = StepOutput::default();
        let mut x = self.embed(&tokens);
        let mut fetches: Vec<(usize, &mut RowFetch)> =
            memories_of(rows, &step).into_iter().zip(rows.iter_mut()).collect();
        let reading: Vec<Vec<usize>> = (0..self.memories.len()).map(|memory| step.reading(memory)).collect();
        for (index, (block, rotary)) in self.blocks.iter().zip(&self.rotary_of).enumerate() {
            let mut added = None;
            for (memory, on) in reading.iter().enumerate() {
                let Some(layer) = self.memories[memory].layer_before(index) else { continue };
                let e = rows_of_layer(&mut fetches, memory, layer)?;
                let read = self.memories[memory].read(layer, (&mut x, &e), (&step, on), cache);
                add_gates(&mut output.gates, layer, read.0, on, self.config.streams());
                added = added.or(read.1);
            }
            x = block.forward(x, &step, rotary.map(|rotary| &angles[rotary]), added.as_deref(), cache);
        }
        output.logits = self.logits(&x, chunks);
        output.scores = self.scores(&x, chunks);
        Ok(output)
    }

    /// `[tokens, streams · width]`: every stream begins with the token's embedding.
    fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let (width, streams) = (self.config.width, self.config.streams());
        let one = self.embedding.vectors(tokens);
        if streams == 1 {
            return one;
        }
        rows::repeat(&one, width, streams)
    }

    /// Logits of the tokens that want them.
    fn logits(&self, x: &[f32], chunks: &[Chunk<'_>]) -> Vec<f32> {
        let mut end = 0;
        let wanted = chunks.iter().flat_map(|chunk| {
            end += chunk.tokens.len();
            end - chunk.logits..end
        });
        let wanted: Vec<usize> = wanted.collect();
        if wanted.is_empty() { Vec::new() } else { self.embedding.head().product(&self.hidden(x, &wanted)) }
    }

    /// Scores of the tokens that may follow.
    fn scores(&self, x: &[f32], chunks: &[Chunk<'_>]) -> Vec<TokenScore> {
        let targets: Vec<Target> = chunks.iter().flat_map(|chunk| chunk.targets).copied().collect();
        if targets.is_empty() {
            return Vec::new();
        }
        let (rows, places) = token_score::rows_of(chunks);
        token_score::scores(&self.hidden(x, &rows), self.embedding.head(), &targets, &places)
    }

    /// What the head takes of the rows `wanted`: the normalised mean of their streams, `[wanted, width]`.
    fn hidden(&self, x: &[f32], wanted: &[usize]) -> Vec<f32> {
        let (width, streams) = (self.config.width, self.config.streams());
        let mean = |&row: &usize| {
            let row = &x[row * streams * width..][..streams * width];
            (0..width).map(move |i| {
                let sum: f32 = row.iter().skip(i).step_by(width).sum();
                if streams == 1 { sum } else { sum / streams as f32 }
            })
        };
        self.norm.apply(&wanted.iter().flat_map(mean).collect::<Vec<f32>>())
    }
}

/// The rows of layer `layer` that the fetches for `memory` bring, `[on, d_mem]`.
fn rows_of_layer(
    fetches: &mut [(usize, &mut RowFetch)],
    memory: usize,
    layer: usize,
) -> Result<Vec<f32>, StoreError> {
    let mut e = Vec::new();
    for (_, fetch) in fetches.iter_mut().filter(|(of, _)| *of == memory) {
        fetch.take(layer, &mut e)?;
    }
    Ok(e)
}

/// Puts the gates of one memory, at the rows `on` that read it, to those of others.
fn add_gates(all: &mut Vec<Vec<f32>>, layer: usize, gates: Vec<f32>, on: &[usize], streams: usize) {
    let none = gates.len();
    while all.len() <= layer {
        all.push(vec![0.0; none]);
    }
    for &row in on {
        let range = row * streams..(row + 1) * streams;
        all[layer][range.clone()].copy_from_slice(&gates[range]);
    }
}
