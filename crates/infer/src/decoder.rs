//! The model, one chunk of each sequence at a time.
//!
//! Computes what [`LanguageModel`] computes over a whole sequence, from what the [`Cache`] keeps of the positions
//! before: of latent attention the latent and the rotary key alone, with the projections to keys and values
//! absorbed into queries and outputs (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
//!
//! Every sum of a position runs in an order of its own: its logits have the same bits whatever is computed beside
//! it, and however its sequence is cut into chunks and pages.

use engram_config::{AttentionConfig, LatentConfig, MemoryConfig, ModelConfig, YarnConfig};
use engram_kernels::{
    CachedAttentionShape, HyperShape, HyperWeights, PackedMatrix, Seen, WeightFormat, cached_attention,
    embedding, head_products, hyper_coefficients_of_product, hyper_read, hyper_write, rms_norm,
};
use engram_model::{
    Attention, Block, BlockFeedForward, HyperConnection, LanguageModel, LatentAttention, PlainAttention,
    RmsNorm, Rotary,
};
use engram_store::StoreError;

use crate::cache::{Cache, CacheLayout, Place, Sequence};
use crate::experts::ExpertsDecoder;
use crate::feed_forward::FeedForwardDecoder;
use crate::memory_decoder::MemoryDecoder;
use crate::row_fetch::RowFetch;
use crate::weights::{pack, transpose, values};

/// A model's weights, laid out for decoding.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    /// `[vocabulary, width]`
    embedding: Vec<f32>,
    blocks: Vec<DecoderBlock>,
    norm: Norm,
    head: PackedMatrix,
    angles: Positions,
}

#[derive(Debug)]
struct DecoderBlock {
    memory: Option<MemoryDecoder>,
    attention: AttentionDecoder,
    attention_norm: Norm,
    attention_streams: Option<Streams>,
    feed_forward: FeedForwardKind,
    feed_forward_norm: Norm,
    feed_forward_streams: Option<Streams>,
}

#[derive(Debug)]
enum FeedForwardKind {
    Dense(FeedForwardDecoder),
    Experts(ExpertsDecoder),
}

/// A memory that training and evaluation know, to compare with, but the decoder does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this model's memory departs from the published forms in `{key}`: it can be trained and measured, but not decoded \
     token by token"
)]
pub struct UnpublishedMemory {
    /// The key of the configuration.
    pub key: &'static str,
}

/// The next tokens of one sequence, for whose positions there is room in the cache.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// What has been computed of it.
    pub sequence: &'a Sequence,
    /// The tokens that follow, at least one.
    pub tokens: &'a [u32],
    /// Whether the memory is read.
    pub memory: bool,
    /// Of how many tokens, the last ones, the logits are wanted.
    pub logits: usize,
}

/// What a step computes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// `[Σ logits, vocabulary]`: chunk after chunk, each in its tokens' order.
    pub logits: Vec<f32>,
    /// Gates of each memory layer, `[tokens, streams]`; zeros where the memory is off.
    pub gates: Vec<Vec<f32>>,
}

impl Decoder {
    /// Lays out the weights of `model`, which `config` describes, in `format`.
    ///
    /// # Errors
    /// When the memory is of no published form.
    pub fn new(
        model: &LanguageModel,
        config: &ModelConfig,
        format: WeightFormat,
    ) -> Result<Self, UnpublishedMemory> {
        if let Some(key) = config.memory.as_ref().and_then(MemoryConfig::departs) {
            return Err(UnpublishedMemory { key });
        }
        let embedding = values(&model.embedding);
        let (width, vocabulary) = (config.width, config.vocabulary);
        let head = match &model.head {
            Some(head) => values(head),
            None => transpose(&embedding, vocabulary, width),
        };
        let mut convolutions = config.blocks;
        let block = |block: &Block| DecoderBlock::new(block, config, format, &mut convolutions);
        Ok(Self {
            blocks: model.blocks.iter().map(block).collect(),
            norm: Norm::new(&model.norm, config),
            head: PackedMatrix::new(&head, width, vocabulary, format),
            angles: Positions::new(config),
            embedding,
            config: config.clone(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What has to be kept of a position, in pages of `page` positions: an entry of each block's attention, then one
    /// of each short convolution.
    pub fn cache_layout(&self, page: usize) -> CacheLayout {
        let attention = self.blocks.iter().map(|block| block.attention.entry());
        let memories = self.blocks.iter().filter_map(|block| block.memory.as_ref());
        CacheLayout { page, parts: attention.chain(memories.filter_map(MemoryDecoder::entry)).collect() }
    }

    /// Bytes of the packed weights, and of the embedding.
    pub fn bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(DecoderBlock::bytes).sum();
        blocks + self.head.bytes() + size_of_val(&self.embedding[..])
    }

    /// Computes `chunks`, writing to the positions of `cache` that were reserved for them. `rows` bring the memory
    /// rows of the chunks that have their memory on, in their order.
    ///
    /// # Errors
    /// When rows cannot be had. What was reserved may then hold anything; no position that counts was touched.
    ///
    /// # Panics
    /// When a token is outside the vocabulary, a sequence longer than the context, a chunk empty or not reserved,
    /// or the rows are not those of the chunks: who calls checks its input.
    pub fn step(
        &self,
        cache: &mut Cache,
        chunks: &[Chunk<'_>],
        rows: &mut [RowFetch],
    ) -> Result<StepOutput, StoreError> {
        let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
        let places: Vec<Place<'_>> = chunks.iter().flat_map(Chunk::places).collect();
        let on: Vec<usize> = (0..)
            .zip(chunks.iter().flat_map(|chunk| chunk.tokens.iter().map(|_| chunk.memory)))
            .filter_map(|(row, on)| on.then_some(row))
            .collect();
        let mut output = StepOutput::default();
        let mut x = self.embed(&tokens);
        let mut memory_index = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            if let Some(memory) = &block.memory {
                let mut e = Vec::new();
                for rows in rows.iter_mut() {
                    rows.take(memory_index, &mut e)?;
                }
                output.gates.push(memory.add(&mut x, &e, &on, &places, cache));
                memory_index += 1;
            }
            x = around(x, block.attention_streams.as_ref(), |h| {
                block.attention.forward(
                    &block.attention_norm.apply(h),
                    index,
                    &places,
                    chunks,
                    &self.angles,
                    cache,
                )
            });
            x = around(x, block.feed_forward_streams.as_ref(), |h| {
                let h = block.feed_forward_norm.apply(h);
                match &block.feed_forward {
                    FeedForwardKind::Dense(dense) => dense.forward(&h),
                    FeedForwardKind::Experts(experts) => experts.forward(&h),
                }
            });
        }
        output.logits = self.logits(&x, chunks);
        Ok(output)
    }

    /// `[tokens, streams · width]`: every stream begins with the token's embedding.
    fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let (width, streams) = (self.config.width, self.config.streams());
        let one = embedding(&self.embedding, tokens, width);
        if streams == 1 {
            return one;
        }
        one.chunks_exact(width).flat_map(|token| token.repeat(streams)).collect()
    }

    /// Logits of the tokens that want them.
    fn logits(&self, x: &[f32], chunks: &[Chunk<'_>]) -> Vec<f32> {
        let (width, streams) = (self.config.width, self.config.streams());
        let mut wanted = Vec::new();
        let mut end = 0;
        for chunk in chunks {
            end += chunk.tokens.len();
            for row in end - chunk.logits..end {
                let row = &x[row * streams * width..][..streams * width];
                wanted.extend((0..width).map(|i| {
                    let sum: f32 = row.iter().skip(i).step_by(width).sum();
                    if streams == 1 { sum } else { sum / streams as f32 }
                }));
            }
        }
        if wanted.is_empty() { Vec::new() } else { self.head.product(&self.norm.apply(wanted)) }
    }
}

impl<'a> Chunk<'a> {
    fn places(&self) -> impl Iterator<Item = Place<'a>> + use<'a> {
        let (pages, first) = (self.sequence.pages(), self.sequence.len());
        (0..self.tokens.len()).map(move |index| Place { pages, position: first + index })
    }
}

impl DecoderBlock {
    fn new(block: &Block, config: &ModelConfig, format: WeightFormat, convolutions: &mut usize) -> Self {
        let streams =
            |streams: &Option<HyperConnection>| streams.as_ref().map(|streams| Streams::new(streams, config));
        let memory = block.memory.as_ref().zip(config.memory.as_ref());
        let memory = memory.map(|(memory, of)| {
            let decoder = MemoryDecoder::new(memory, of, config, *convolutions, format);
            *convolutions += usize::from(decoder.entry().is_some());
            decoder
        });
        Self {
            memory,
            attention: AttentionDecoder::new(&block.attention, config, format),
            attention_norm: Norm::new(&block.attention_norm, config),
            attention_streams: streams(&block.attention_streams),
            feed_forward: match &block.feed_forward {
                BlockFeedForward::Dense(dense) => {
                    FeedForwardKind::Dense(FeedForwardDecoder::new(dense, format))
                }
                BlockFeedForward::Experts(experts) => {
                    FeedForwardKind::Experts(ExpertsDecoder::new(experts, config, format))
                }
            },
            feed_forward_norm: Norm::new(&block.feed_forward_norm, config),
            feed_forward_streams: streams(&block.feed_forward_streams),
        }
    }

    fn bytes(&self) -> usize {
        let feed_forward = match &self.feed_forward {
            FeedForwardKind::Dense(dense) => dense.bytes(),
            FeedForwardKind::Experts(experts) => experts.bytes(),
        };
        let streams = [&self.attention_streams, &self.feed_forward_streams];
        feed_forward
            + self.attention.bytes()
            + self.memory.as_ref().map_or(0, MemoryDecoder::bytes)
            + streams.into_iter().flatten().map(|streams| streams.projection.bytes()).sum::<usize>()
    }
}

/// Attention of one block.
#[derive(Debug)]
struct AttentionDecoder {
    kind: AttentionKind,
    output: PackedMatrix,
    shape: CachedAttentionShape,
    scale: f32,
}

#[derive(Debug)]
enum AttentionKind {
    Latent(Box<Latent>),
    Plain(Box<Plain>),
}

/// Projections of plain attention.
#[derive(Debug)]
struct Plain {
    query: PackedMatrix,
    key: PackedMatrix,
    value: PackedMatrix,
}

/// Latent attention, its projections to keys and values absorbed.
#[derive(Debug)]
struct Latent {
    query_down: Option<(PackedMatrix, Norm)>,
    query_up: PackedMatrix,
    latent_down: PackedMatrix,
    latent_norm: Norm,
    /// Transposed key projection of each head, `[content, latent]`: queries meet latents instead of keys.
    absorbed_key: Vec<PackedMatrix>,
    /// Value projection of each head, `[latent, value]`, after the attention instead of before.
    absorbed_value: Vec<PackedMatrix>,
    content: usize,
    rotary: usize,
}

impl AttentionDecoder {
    fn new(attention: &Attention, config: &ModelConfig, format: WeightFormat) -> Self {
        match attention {
            Attention::Latent(latent) => Self::latent(latent, config, format),
            Attention::Plain(plain) => Self::plain(plain, config, format),
        }
    }

    fn latent(attention: &LatentAttention, config: &ModelConfig, format: WeightFormat) -> Self {
        // Every field is named: one that is added changes what has to be computed here.
        let AttentionConfig::Latent(LatentConfig {
            heads,
            query_rank: _,
            latent_rank,
            content_width,
            rotary_width,
            value_width,
            ..
        }) = config.attention
        else {
            unreachable!("the model was built from this configuration")
        };
        let up = values(&attention.latent_up.weight);
        let per_head = content_width + value_width;
        let part = |head: usize, first: usize, count: usize| -> Vec<f32> {
            let rows = up.chunks_exact(heads * per_head);
            rows.flat_map(|row| &row[head * per_head + first..][..count]).copied().collect()
        };
        let absorbed_key = (0..heads).map(|head| {
            let key = transpose(&part(head, 0, content_width), latent_rank, content_width);
            PackedMatrix::new(&key, content_width, latent_rank, format)
        });
        let absorbed_value = (0..heads).map(|head| {
            PackedMatrix::new(&part(head, content_width, value_width), latent_rank, value_width, format)
        });
        let query_down = attention.query_down.as_ref().zip(attention.query_norm.as_ref());
        let latent = Latent {
            query_down: query_down.map(|(down, norm)| (pack(down, format), Norm::new(norm, config))),
            query_up: pack(&attention.query_up, format),
            latent_down: pack(&attention.latent_down, format),
            latent_norm: Norm::new(&attention.latent_norm, config),
            absorbed_key: absorbed_key.collect(),
            absorbed_value: absorbed_value.collect(),
            content: content_width,
            rotary: rotary_width,
        };
        let entry = latent_rank + rotary_width;
        Self {
            kind: AttentionKind::Latent(Box::new(latent)),
            output: pack(&attention.output, format),
            shape: CachedAttentionShape {
                heads,
                key_heads: 1,
                key: entry,
                value: latent_rank,
                value_start: 0,
                entry,
            },
            scale: ((content_width + rotary_width) as f32).sqrt().recip()
                * config.attention.yarn().map_or(1.0, YarnConfig::inverse_temperature),
        }
    }

    fn plain(attention: &PlainAttention, config: &ModelConfig, format: WeightFormat) -> Self {
        let (heads, key_heads) = (config.attention.heads(), config.attention.key_heads());
        let (width, _) = config.attention.head_widths();
        Self {
            kind: AttentionKind::Plain(Box::new(Plain {
                query: pack(&attention.query, format),
                key: pack(&attention.key, format),
                value: pack(&attention.value, format),
            })),
            output: pack(&attention.output, format),
            shape: CachedAttentionShape {
                heads,
                key_heads,
                key: width,
                value: width,
                value_start: key_heads * width,
                entry: 2 * key_heads * width,
            },
            scale: (width as f32).sqrt().recip(),
        }
    }

    /// Values kept of a position.
    fn entry(&self) -> usize {
        self.shape.entry
    }

    fn bytes(&self) -> usize {
        let kind = match &self.kind {
            AttentionKind::Latent(latent) => latent.bytes(),
            AttentionKind::Plain(plain) => plain.query.bytes() + plain.key.bytes() + plain.value.bytes(),
        };
        kind + self.output.bytes()
    }

    /// `[rows, width]` to the same, keeping the rows' entries in part `part` of the cache.
    fn forward(
        &self,
        h: &[f32],
        part: usize,
        places: &[Place<'_>],
        chunks: &[Chunk<'_>],
        angles: &Positions,
        cache: &mut Cache,
    ) -> Vec<f32> {
        let (queries, entries): (_, Vec<f32>) = match &self.kind {
            AttentionKind::Latent(latent) => latent.project(h, places, angles),
            AttentionKind::Plain(plain) => {
                let CachedAttentionShape { heads, key_heads, value_start: width, .. } = self.shape;
                let queries = angles.turn_heads(plain.query.product(h), places, heads);
                let keys = angles.turn_heads(plain.key.product(h), places, key_heads);
                let values = plain.value.product(h);
                let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
                (queries, rows.flat_map(|(key, value)| key.iter().chain(value).copied()).collect())
            }
        };
        for (place, entry) in places.iter().zip(entries.chunks_exact(self.shape.entry)) {
            cache.position_mut(place.pages, part, place.position).copy_from_slice(entry);
        }
        let pages: Vec<Vec<&[f32]>> = chunks
            .iter()
            .map(|chunk| chunk.sequence.pages().iter().map(|&page| cache.part(page, part)).collect())
            .collect();
        let seen: Vec<Seen<'_>> = chunks
            .iter()
            .zip(&pages)
            .flat_map(|(chunk, pages)| {
                chunk.places().map(move |place| Seen { pages, first: 0, count: place.position + 1 })
            })
            .collect();
        let attended = cached_attention(&queries, &seen, self.shape, self.scale);
        let heads = match &self.kind {
            AttentionKind::Latent(latent) => latent.values(&attended),
            AttentionKind::Plain(_) => attended,
        };
        self.output.product(&heads)
    }
}

impl Latent {
    /// Queries `[rows, heads, latent + rotary]` and entries `[rows, latent + rotary]`.
    fn project(&self, h: &[f32], places: &[Place<'_>], angles: &Positions) -> (Vec<f32>, Vec<f32>) {
        let (heads, latent) = (self.absorbed_key.len(), self.absorbed_key[0].outputs());
        let (own, entry) = (self.content + self.rotary, latent + self.rotary);
        let projected = match &self.query_down {
            Some((down, norm)) => self.query_up.product(&norm.apply(down.product(h))),
            None => self.query_up.product(h),
        };
        let mut queries = vec![0.0; places.len() * heads * entry];
        head_products(&projected, [heads * own, own], &self.absorbed_key, &mut queries, entry);
        let rows =
            queries.chunks_exact_mut(heads * entry).zip(projected.chunks_exact(heads * own)).zip(places);
        for ((queries, projected), place) in rows {
            for (query, projected) in queries.chunks_exact_mut(entry).zip(projected.chunks_exact(own)) {
                angles.turn(place.position, &projected[self.content..], &mut query[latent..]);
            }
        }
        let down = self.latent_down.product(h);
        let latents = down.chunks_exact(entry).flat_map(|row| &row[..latent]).copied().collect();
        let latents = self.latent_norm.apply(latents);
        let mut entries = down.clone();
        let rows =
            entries.chunks_exact_mut(entry).zip(down.chunks_exact(entry)).zip(latents.chunks_exact(latent));
        for (((entry, down), normed), place) in rows.zip(places) {
            entry[..latent].copy_from_slice(normed);
            angles.turn(place.position, &down[latent..], &mut entry[latent..]);
        }
        (queries, entries)
    }

    /// From attended latents `[rows, heads, latent]` to the heads' values `[rows, heads · value]`.
    fn values(&self, attended: &[f32]) -> Vec<f32> {
        let (heads, first) = (self.absorbed_value.len(), &self.absorbed_value[0]);
        let (latent, value) = (first.inputs(), first.outputs());
        let mut out = vec![0.0; attended.len() / latent * value];
        head_products(attended, [heads * latent, latent], &self.absorbed_value, &mut out, value);
        out
    }

    fn bytes(&self) -> usize {
        let heads =
            self.absorbed_key.iter().chain(&self.absorbed_value).map(PackedMatrix::bytes).sum::<usize>();
        let down = self.query_down.as_ref().map_or(0, |(down, _)| down.bytes());
        heads + down + self.query_up.bytes() + self.latent_down.bytes()
    }
}

/// A hyper-connection: streams around a layer (arXiv 2512.24880).
#[derive(Debug)]
struct Streams {
    projection: PackedMatrix,
    /// φ as it is, whose shape the kernel checks.
    phi: Vec<f32>,
    scale: [f32; 3],
    bias: Vec<f32>,
    shape: HyperShape,
}

impl Streams {
    fn new(streams: &HyperConnection, config: &ModelConfig) -> Self {
        let hyper = config.hyper_connections.as_ref();
        let (n, width) = (config.streams(), config.width);
        let phi = values(&streams.projection);
        let scale = values(&streams.scale);
        Self {
            // Never rounded: it decides how streams mix, and is small.
            projection: PackedMatrix::new(&phi, n * width, 2 * n + n * n, WeightFormat::F32),
            phi,
            scale: [scale[0], scale[1], scale[2]],
            bias: values(&streams.bias),
            shape: HyperShape {
                streams: n,
                width,
                epsilon: config.norm_epsilon,
                iterations: hyper.map_or(1, |hyper| hyper.sinkhorn_iterations),
            },
        }
    }
}

/// `x + layer(x)`, or its hyper-connected form, `[rows, streams · width]`.
fn around(mut x: Vec<f32>, streams: Option<&Streams>, layer: impl FnOnce(Vec<f32>) -> Vec<f32>) -> Vec<f32> {
    match streams {
        Some(streams) => {
            let weights = HyperWeights { phi: &streams.phi, alpha: streams.scale, bias: &streams.bias };
            let product = streams.projection.product(&x);
            let coefficients = hyper_coefficients_of_product(&x, product, weights, streams.shape);
            let y = layer(hyper_read(&x, &coefficients, streams.shape.streams));
            hyper_write(&x, &y, &coefficients, streams.shape.streams)
        }
        None => {
            let y = layer(x.clone());
            x.iter_mut().zip(&y).for_each(|(x, y)| *x += y);
            x
        }
    }
}

/// An RMS norm.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    fn new(norm: &RmsNorm, config: &ModelConfig) -> Self {
        Self { weight: values(&norm.weight), epsilon: config.norm_epsilon }
    }

    /// `[rows, width]`, normalised row by row.
    fn apply(&self, x: Vec<f32>) -> Vec<f32> {
        rms_norm(&x, Some(&self.weight), self.weight.len(), self.epsilon).output
    }
}

/// Rotary positions of the whole context.
#[derive(Debug)]
pub(crate) struct Positions {
    rotary: Rotary,
    width: usize,
    context: usize,
}

impl Positions {
    fn new(config: &ModelConfig) -> Self {
        let ((width, _), context) = (config.attention.rotary(), config.context);
        Self { rotary: Rotary::of_model(config), width, context }
    }

    fn turn(&self, position: usize, input: &[f32], output: &mut [f32]) {
        self.rotary.angles(self.context).turn(position, input, output);
    }

    /// All heads of `x` `[rows, heads, width]`.
    fn turn_heads(&self, mut x: Vec<f32>, places: &[Place<'_>], heads: usize) -> Vec<f32> {
        let mut turned = vec![0.0; self.width];
        for (row, place) in x.chunks_exact_mut(heads * self.width).zip(places) {
            for head in row.chunks_exact_mut(self.width) {
                self.turn(place.position, head, &mut turned);
                head.copy_from_slice(&turned);
            }
        }
        x
    }
}
