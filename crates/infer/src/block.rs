//! One block: attention, then feed-forward, each around a residual.

use engram_config::{AttentionConfig, MemoryForm, ModelConfig};

use crate::cache::Cache;
use crate::experts::ExpertsDecoder;
use crate::feed_forward::FeedForwardDecoder;
use crate::latent_attention::LatentAttention;
use crate::norm::Norm;
use crate::plain_attention::PlainAttention;
use crate::rotary::RowAngles;
use crate::step_rows::StepRows;
use crate::streams::{Streams, around};
use crate::weights::{Loader, WeightError};

/// A block's weights, laid out for decoding.
#[derive(Debug)]
pub(crate) struct Block {
    attention: Attention,
    around_attention: Around,
    feed_forward: FeedForward,
    around_feed_forward: Around,
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
    /// Block `index`.
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig, index: usize) -> Result<Self, WeightError> {
        let adding = config.memory.as_ref().is_some_and(|memory| {
            memory.form == MemoryForm::AttentionValues && memory.layers.contains(&index)
        });
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
            attention,
            around_attention: Around::load(loader, "attention", config)?,
            feed_forward,
            around_feed_forward: Around::load(loader, "feed_forward", config)?,
        })
    }

    /// Values that its attention keeps of a position.
    pub(crate) fn attention_entry(&self) -> usize {
        match &self.attention {
            Attention::Latent(latent) => latent.entry(),
            Attention::Plain(plain) => plain.entry(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
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
        attention + feed_forward + streams
    }

    /// The streams after the block, `[rows, streams · width]`. `added` goes to the values of its attention.
    pub(crate) fn forward(
        &self,
        x: Vec<f32>,
        rows: &StepRows<'_>,
        angles: Option<&RowAngles>,
        added: Option<&[f32]>,
        cache: &mut Cache,
    ) -> Vec<f32> {
        let x = self.around_attention.apply(x, |h| match &self.attention {
            Attention::Latent(latent) => latent.forward(h, rows, angles, added, cache),
            Attention::Plain(plain) => plain.forward(h, rows, angles, added, cache),
        });
        self.around_feed_forward.apply(x, |h| match &self.feed_forward {
            FeedForward::Dense(dense) => dense.forward(h),
            FeedForward::Experts(experts) => experts.forward(h),
        })
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
