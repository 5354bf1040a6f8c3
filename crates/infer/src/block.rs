//! One block: a memory where it has one, attention, then feed-forward, each around a residual.

use engram_config::{AttentionConfig, MemoryForm, ModelConfig};

use crate::cache::Cache;
use crate::experts::ExpertsDecoder;
use crate::feed_forward::FeedForwardDecoder;
use crate::gated_memory::GatedMemory;
use crate::latent_attention::LatentAttention;
use crate::ngram_embedding::NgramEmbedding;
use crate::norm::Norm;
use crate::plain_attention::PlainAttention;
use crate::rotary::RowAngles;
use crate::step_rows::StepRows;
use crate::streams::{Streams, around};
use crate::weights::{Loader, WeightError};

/// A block's weights, laid out for decoding.
#[derive(Debug)]
pub(crate) struct Block {
    memory: Option<Memory>,
    attention: Attention,
    around_attention: Around,
    feed_forward: FeedForward,
    around_feed_forward: Around,
}

/// How rows of tables are read.
#[derive(Debug)]
enum Memory {
    Gated(Box<GatedMemory>),
    Ngrams(NgramEmbedding),
}

#[derive(Debug)]
enum Attention {
    Latent(Box<LatentAttention>),
    Plain(Box<PlainAttention>),
}

#[derive(Debug)]
enum FeedForward {
    Dense(FeedForwardDecoder),
    Experts(ExpertsDecoder),
}

/// What stands around a layer.
#[derive(Debug)]
struct Around {
    norm: Norm,
    /// Over what the layer computes, before it is added.
    post_norm: Option<Norm>,
    streams: Option<Streams>,
}

impl Block {
    /// Block `index`; `convolutions` is the part of the cache for the next short convolution.
    pub(crate) fn load(
        loader: &Loader<'_>,
        config: &ModelConfig,
        index: usize,
        convolutions: &mut usize,
    ) -> Result<Self, WeightError> {
        let memory = Memory::load(loader, config, index, *convolutions)?;
        *convolutions += usize::from(memory.as_ref().is_some_and(|memory| memory.entry().is_some()));
        let adding = memory.is_some()
            && config.memory.as_ref().is_some_and(|memory| memory.form == MemoryForm::AttentionValues);
        let of_attention = loader.child("attention");
        let attention = match &config.attention {
            AttentionConfig::Latent(latent) => {
                let latent = LatentAttention::load(&of_attention, latent, config, index, adding)?;
                Attention::Latent(Box::new(latent))
            }
            AttentionConfig::Plain(plain) => {
                Attention::Plain(Box::new(PlainAttention::load(&of_attention, plain, config, index)?))
            }
        };
        let of_feed_forward = loader.child("feed_forward");
        let feed_forward = match config.experts_of(index) {
            Some(experts) => FeedForward::Experts(ExpertsDecoder::load(&of_feed_forward, experts, config)?),
            None => {
                let (hidden, activation) = (config.feed_forward.width, config.feed_forward.activation);
                let dense = FeedForwardDecoder::load(&of_feed_forward, config.width, hidden, activation);
                FeedForward::Dense(dense?)
            }
        };
        Ok(Self {
            memory,
            attention,
            around_attention: Around::load(loader, "attention", config)?,
            feed_forward,
            around_feed_forward: Around::load(loader, "feed_forward", config)?,
        })
    }

    /// Whether it takes the rows of a memory.
    pub(crate) fn reads_rows(&self) -> bool {
        self.memory.is_some()
    }

    /// Values that its attention keeps of a position.
    pub(crate) fn attention_entry(&self) -> usize {
        match &self.attention {
            Attention::Latent(latent) => latent.entry(),
            Attention::Plain(plain) => plain.entry(),
        }
    }

    /// Values that its short convolution keeps of a position, if it has one.
    pub(crate) fn convolution_entry(&self) -> Option<usize> {
        self.memory.as_ref().and_then(Memory::entry)
    }

    pub(crate) fn bytes(&self) -> usize {
        let memory = match &self.memory {
            Some(Memory::Gated(gated)) => gated.bytes(),
            Some(Memory::Ngrams(ngrams)) => ngrams.bytes(),
            None => 0,
        };
        let attention = match &self.attention {
            Attention::Latent(latent) => latent.bytes(),
            Attention::Plain(plain) => plain.bytes(),
        };
        let feed_forward = match &self.feed_forward {
            FeedForward::Dense(dense) => dense.bytes(),
            FeedForward::Experts(experts) => experts.bytes(),
        };
        let around = [&self.around_attention, &self.around_feed_forward];
        let streams: usize =
            around.iter().filter_map(|around| around.streams.as_ref()).map(Streams::bytes).sum();
        memory + attention + feed_forward + streams
    }

    /// The streams after the block, `[rows, streams · width]`, and the gates of its memory `[rows, streams]`, if it has
    /// one. `e` `[on, d_mem]` are the memory rows of the rows whose memory is on.
    pub(crate) fn forward(
        &self,
        mut x: Vec<f32>,
        e: &[f32],
        rows: &StepRows<'_>,
        angles: Option<&RowAngles>,
        cache: &mut Cache,
    ) -> (Vec<f32>, Option<Vec<f32>>) {
        let mut added = None;
        let gates = match &self.memory {
            Some(Memory::Gated(gated)) => Some(gated.add(&mut x, e, rows, cache)),
            Some(Memory::Ngrams(ngrams)) => {
                added = ngrams.add(&mut x, e, &rows.on);
                Some(ngrams.open_gates(rows))
            }
            None => None,
        };
        let x = self.around_attention.apply(x, |h| match &self.attention {
            Attention::Latent(latent) => latent.forward(h, rows, angles, added.as_deref(), cache),
            Attention::Plain(plain) => plain.forward(h, rows, angles, added.as_deref(), cache),
        });
        let x = self.around_feed_forward.apply(x, |h| match &self.feed_forward {
            FeedForward::Dense(dense) => dense.forward(h),
            FeedForward::Experts(experts) => experts.forward(h),
        });
        (x, gates)
    }
}

impl Memory {
    /// The memory of block `index`, if it has one.
    fn load(
        loader: &Loader<'_>,
        config: &ModelConfig,
        index: usize,
        part: usize,
    ) -> Result<Option<Self>, WeightError> {
        let Some(memory) = config.memory.as_ref().filter(|memory| memory.layers.contains(&index)) else {
            return Ok(None);
        };
        Ok(Some(if memory.form.is_gated() {
            Self::Gated(Box::new(GatedMemory::load(&loader.child("memory"), memory, config, part)?))
        } else {
            // Checkpoints once had these weights under a name of their own.
            let named = |child: &str| NgramEmbedding::load(&loader.child(child), memory, config);
            Self::Ngrams(named("memory").or_else(|error| named("ngrams").map_err(|_| error))?)
        }))
    }

    fn entry(&self) -> Option<usize> {
        match self {
            Self::Gated(gated) => gated.entry(),
            Self::Ngrams(_) => None,
        }
    }
}

impl Around {
    fn load(loader: &Loader<'_>, layer: &str, config: &ModelConfig) -> Result<Self, WeightError> {
        let norm = |name: String| Norm::load(loader, &name, config.width, config.norm_epsilon);
        Ok(Self {
            norm: norm(format!("{layer}_norm"))?,
            post_norm: config.post_norms.then(|| norm(format!("{layer}_post_norm"))).transpose()?,
            streams: Streams::load(loader, &format!("{layer}_streams"), config)?,
        })
    }

    /// `layer` around the residual streams `x`.
    fn apply(&self, x: Vec<f32>, layer: impl FnOnce(&[f32]) -> Vec<f32>) -> Vec<f32> {
        around(x, self.streams.as_ref(), |h| {
            let y = layer(&self.norm.apply(h));
            match &self.post_norm {
                Some(norm) => norm.apply(&y),
                None => y,
            }
        })
    }
}
