//! Attention.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use crate::error::{ConfigError, positive};

/// Attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AttentionConfig {
    /// Multi-head latent attention with decoupled rotary dimensions.
    Latent(LatentConfig),
    /// Plain multi-head attention.
    Plain(PlainConfig),
}

/// Multi-head latent attention with decoupled rotary dimensions (DeepSeek-V2, arXiv 2405.04434, section 2.1).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LatentConfig {
    /// Attention heads.
    pub heads: usize,
    /// Rank of the query's latent. Without it, queries are projected directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_rank: Option<usize>,
    /// Rank of the joint key-value latent. At inference, only the latent is cached.
    pub latent_rank: usize,
    /// Width of a head's content part, which has no position.
    pub content_width: usize,
    /// Width of a head's rotary part. All heads share its key.
    pub rotary_width: usize,
    /// Width of a head's values.
    pub value_width: usize,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rotary_base")]
    pub rotary_base: f32,
    /// Factor of the scores. Default: 1/√(content_width + rotary_width), times YaRN's factor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// Stretches the rotary positions to a longer context than that of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yarn: Option<YarnConfig>,
    /// How a pretrained model stretches its rotary positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_scaling: Option<RotaryScaling>,
}

/// Plain multi-head attention with rotary positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PlainConfig {
    /// Attention heads.
    pub heads: usize,
    /// Heads of keys and values. Successive query heads share one (grouped queries, arXiv 2305.13245). Default: one per
    /// query head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_heads: Option<usize>,
    /// Width of a head.
    pub head_width: usize,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rotary_base")]
    pub rotary_base: f32,
    /// Leading values of a head that are rotated. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_width: Option<usize>,
    /// Whether queries and keys of every head pass an RMS norm before they are rotated (Qwen 3, Gemma 3).
    #[serde(default, skip_serializing_if = "is_false")]
    pub query_key_norm: bool,
    /// Whether queries, keys and values have biases (Qwen 2).
    #[serde(default, skip_serializing_if = "is_false")]
    pub bias: bool,
    /// Whether the output has a bias.
    #[serde(default, skip_serializing_if = "is_false")]
    pub output_bias: bool,
    /// Factor of the scores. Default: 1/√head_width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// Number of positions that a position of a local block sees, including itself. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Blocks, counted from 0, with the window. Default: all blocks, if there is a window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_blocks: Option<Vec<usize>>,
    /// Base of the rotary frequencies of local blocks, which are not stretched. Default: as in the other blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_rotary_base: Option<f32>,
    /// Blocks, counted from 0, whose heads are not rotated and so have no positions (arXiv 2501.18795).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unrotated_blocks: Vec<usize>,
    /// How rotary positions are stretched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary_scaling: Option<RotaryScaling>,
}

/// Stretching of rotary positions (YaRN, arXiv 2309.00071) for a model that continues training here. The defaults are
/// those of the paper's extension to 32k.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct YarnConfig {
    /// How many times longer the context becomes; 1 changes nothing.
    #[serde(default = "default_yarn_scale")]
    pub scale: f32,
    /// The original context: that of the training before.
    pub original_context: usize,
    /// Pairs with fewer turns over the original context are stretched fully.
    #[serde(default = "default_yarn_alpha")]
    pub alpha: f32,
    /// Pairs with more turns are unchanged.
    #[serde(default = "default_yarn_beta")]
    pub beta: f32,
    /// Scores are multiplied by (0.1·factor·ln scale + 1)².
    #[serde(default = "default_yarn_factor")]
    pub factor: f32,
    /// The variable in which the ramp between stretched and unchanged pairs is linear.
    #[serde(default, skip_serializing_if = "YarnRamp::is_default")]
    pub ramp: YarnRamp,
}

/// The variable in which YaRN's ramp is linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum YarnRamp {
    /// A pair's turns over the original context (the paper, section 3.2).
    #[default]
    Turns,
    /// A pair's index, between ends rounded outwards to whole pairs (DeepSeek's code).
    Index,
}

impl YarnRamp {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How pretrained models stretch their rotary positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum RotaryScaling {
    /// Every frequency is divided by the factor (arXiv 2306.15595).
    Linear {
        /// Divisor of the frequencies.
        factor: f32,
    },
    /// Llama 3.1: pairs with fewer than `low` turns over the original context are stretched fully, those with more than
    /// `high` are unchanged. Between them the frequency is interpolated by the turns.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Turns below which a pair is stretched fully.
        low: f32,
        /// Turns above which a pair is unchanged.
        high: f32,
        /// The original context: that of the training before.
        original_context: usize,
    },
    /// YaRN as DeepSeek and the transformers library compute it: the ramp between stretched and unchanged pairs is
    /// linear in the pair's index, not in its turns.
    Yarn {
        /// Divisor of low frequencies.
        factor: f32,
        /// The original context: that of the training before.
        original_context: usize,
        /// Turns over the original context above which a pair is unchanged.
        fast: f32,
        /// Turns below which it is stretched fully.
        slow: f32,
        /// Whether the ramp's ends are rounded outwards to whole pairs.
        truncate: bool,
        /// Factor of cosines and sines.
        amplitude: f32,
    },
    /// Each frequency has its own divisor (LongRoPE, arXiv 2402.13753; `rope_freqs` of GGUF files).
    Factors {
        /// The divisors, one per pair.
        factors: Vec<f32>,
        /// Factor of cosines and sines.
        amplitude: f32,
    },
}

/// The rotary positions of one block.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockRotary {
    /// Leading values of a head that are rotated; value i is paired with i + width/2.
    pub width: usize,
    /// Radians per position of each pair, `[width/2]`.
    pub frequencies: Vec<f64>,
    /// Factor of cosines and sines.
    pub amplitude: f32,
}

fn is_false(value: &bool) -> bool {
    !value
}
fn default_rotary_base() -> f32 {
    10_000.0
}
fn default_yarn_scale() -> f32 {
    10.0
}
fn default_yarn_alpha() -> f32 {
    1.0
}
fn default_yarn_beta() -> f32 {
    32.0
}
fn default_yarn_factor() -> f32 {
    0.707
}

impl AttentionConfig {
    /// Attention heads.
    pub fn heads(&self) -> usize {
        match self {
            Self::Latent(latent) => latent.heads,
            Self::Plain(plain) => plain.heads,
        }
    }

    /// Heads of keys and values: as many as query heads, unless they are shared.
    pub fn key_heads(&self) -> usize {
        match self {
            Self::Plain(plain) => plain.key_heads.unwrap_or(plain.heads),
            Self::Latent(latent) => latent.heads,
        }
    }

    /// Width of one head's queries and keys, and of its values.
    pub fn head_widths(&self) -> (usize, usize) {
        match self {
            Self::Latent(latent) => (latent.content_width + latent.rotary_width, latent.value_width),
            Self::Plain(plain) => (plain.head_width, plain.head_width),
        }
    }

    /// Weights of the projections for each value of the stream, or more, however many.
    pub(crate) fn most_outputs(&self) -> f64 {
        let heads = self.heads() as f64 + 2.0 * self.key_heads() as f64;
        match self {
            Self::Plain(plain) => heads * plain.head_width as f64,
            Self::Latent(latent) => {
                let ranks = latent.query_rank.unwrap_or(1) as f64 + latent.latent_rank as f64;
                let widths = [latent.content_width, latent.rotary_width, latent.value_width];
                heads * ranks * widths.iter().map(|&width| width as f64).sum::<f64>()
            }
        }
    }

    /// Width of the rotary part of a head and the base of its frequencies.
    pub fn rotary(&self) -> (usize, f32) {
        match self {
            Self::Latent(latent) => (latent.rotary_width, latent.rotary_base),
            Self::Plain(plain) => (plain.rotary_width.unwrap_or(plain.head_width), plain.rotary_base),
        }
    }

    /// Factor of the scores.
    pub fn scale(&self) -> f32 {
        let given = match self {
            Self::Latent(latent) => latent.scale,
            Self::Plain(plain) => plain.scale,
        };
        let (key, _) = self.head_widths();
        let usual = || (key as f32).sqrt().recip() * self.yarn().map_or(1.0, YarnConfig::inverse_temperature);
        given.unwrap_or_else(usual)
    }

    /// Number of positions that a position of block `block` sees, including itself; none means all.
    pub fn window_of(&self, block: usize) -> Option<usize> {
        match self {
            Self::Plain(plain) => plain.window.filter(|_| plain.is_local(block)),
            Self::Latent(_) => None,
        }
    }

    /// The rotary positions of block `block`; none if its heads are not rotated.
    pub fn rotary_of(&self, block: usize) -> Option<BlockRotary> {
        let (width, base) = self.rotary();
        let whole = |base: f32, scaling: Option<&RotaryScaling>| BlockRotary {
            width,
            frequencies: match scaling {
                Some(scaling) => scaling.frequencies(width, base),
                None => frequencies(width, base),
            },
            amplitude: scaling.map_or(1.0, RotaryScaling::amplitude),
        };
        match self {
            Self::Latent(LatentConfig { yarn: Some(yarn), .. }) => {
                Some(BlockRotary { width, frequencies: yarn.frequencies(width, base), amplitude: 1.0 })
            }
            Self::Latent(latent) => Some(whole(base, latent.rotary_scaling.as_ref())),
            Self::Plain(plain) if plain.unrotated_blocks.contains(&block) => None,
            Self::Plain(plain) => Some(match plain.local_rotary_base.filter(|_| plain.is_local(block)) {
                Some(base) => whole(base, None),
                None => whole(base, plain.rotary_scaling.as_ref()),
            }),
        }
    }

    /// How rotary positions are stretched, if they are.
    pub fn yarn(&self) -> Option<&YarnConfig> {
        match self {
            Self::Latent(latent) => latent.yarn.as_ref(),
            Self::Plain(_) => None,
        }
    }

    /// The same attention with its positions stretched; plain attention is unchanged.
    pub fn with_yarn(mut self, stretched: Option<YarnConfig>) -> Self {
        if let Self::Latent(latent) = &mut self {
            latent.yarn = stretched;
        }
        self
    }

    /// The first key that only models from outside have, if there is one.
    pub(crate) fn untrainable(&self) -> Option<&'static str> {
        let departures = match self {
            Self::Latent(latent) => vec![
                (latent.scale.is_some(), "model.attention.scale"),
                (latent.rotary_scaling.is_some(), "model.attention.rotary_scaling"),
            ],
            Self::Plain(_) => Vec::new(),
        };
        departures.into_iter().find_map(|(departs, key)| departs.then_some(key))
    }

    pub(crate) fn validate(&self, blocks: usize) -> Result<(), ConfigError> {
        positive("model.attention.heads", self.heads())?;
        let (heads, key_heads) = (self.heads(), self.key_heads());
        positive("model.attention.key_heads", key_heads)?;
        if !heads.is_multiple_of(key_heads) {
            return Err(ConfigError::new(
                "model.attention.key_heads",
                format!("is {key_heads}, but must divide the number of heads, {heads}"),
            ));
        }
        if let Some(yarn) = self.yarn() {
            yarn.validate()?;
        }
        let rotary_key = match self {
            Self::Latent(latent) => latent.validate()?,
            Self::Plain(plain) => plain.validate(blocks)?,
        };
        let (rotary_width, base) = self.rotary();
        positive(rotary_key, rotary_width)?;
        if !rotary_width.is_multiple_of(2) {
            return Err(ConfigError::new(
                rotary_key,
                format!("is {rotary_width}, but must be even: rotary dimensions come in pairs"),
            ));
        }
        check_base("model.attention.rotary_base", base)?;
        let (scale, scaling) = match self {
            Self::Latent(latent) => (latent.scale, &latent.rotary_scaling),
            Self::Plain(plain) => (plain.scale, &plain.rotary_scaling),
        };
        if scale.is_some_and(|scale| !above_zero(scale)) {
            return Err(ConfigError::new("model.attention.scale", "must be above 0"));
        }
        scaling.as_ref().map_or(Ok(()), |scaling| scaling.validate(rotary_width))
    }
}

impl LatentConfig {
    /// The key of the rotary width.
    fn validate(&self) -> Result<&'static str, ConfigError> {
        if let Some(rank) = self.query_rank {
            positive("model.attention.query_rank", rank)?;
        }
        positive("model.attention.latent_rank", self.latent_rank)?;
        positive("model.attention.content_width", self.content_width)?;
        positive("model.attention.value_width", self.value_width)?;
        let stretched = if self.rotary_scaling.is_some() { Some("rotary_scaling") } else { None };
        let stretched = stretched.or_else(|| self.scale.map(|_| "scale"));
        match (stretched, self.yarn) {
            (Some(other), Some(_)) => {
                let reason = format!("excludes `model.attention.{other}`: leave one of them out");
                Err(ConfigError::new("model.attention.yarn", reason))
            }
            _ => Ok("model.attention.rotary_width"),
        }
    }
}

impl PlainConfig {
    /// Attention with `heads` heads of width `head_width`, all rotated, without the options of models from outside.
    pub fn new(heads: usize, head_width: usize) -> Self {
        Self {
            heads,
            key_heads: None,
            head_width,
            rotary_base: default_rotary_base(),
            rotary_width: None,
            query_key_norm: false,
            bias: false,
            output_bias: false,
            scale: None,
            window: None,
            local_blocks: None,
            local_rotary_base: None,
            unrotated_blocks: Vec::new(),
            rotary_scaling: None,
        }
    }

    /// Whether block `block` has the window.
    fn is_local(&self, block: usize) -> bool {
        self.window.is_some() && self.local_blocks.as_ref().is_none_or(|local| local.contains(&block))
    }

    /// The key of the rotary width.
    fn validate(&self, blocks: usize) -> Result<&'static str, ConfigError> {
        positive("model.attention.head_width", self.head_width)?;
        if let Some(window) = self.window {
            positive("model.attention.window", window)?;
        }
        let local = [
            (self.local_blocks.is_some(), "model.attention.local_blocks"),
            (self.local_rotary_base.is_some(), "model.attention.local_rotary_base"),
        ];
        if let (None, Some((_, key))) = (self.window, local.iter().find(|(given, _)| *given)) {
            let reason =
                "is for local blocks, but `model.attention.window` is not set: set it, or leave this out";
            return Err(ConfigError::new(*key, reason));
        }
        if let Some(local) = &self.local_blocks {
            check_blocks("model.attention.local_blocks", local, blocks)?;
        }
        check_blocks("model.attention.unrotated_blocks", &self.unrotated_blocks, blocks)?;
        if let Some(base) = self.local_rotary_base {
            check_base("model.attention.local_rotary_base", base)?;
        }
        match self.rotary_width {
            Some(width) if width > self.head_width => Err(ConfigError::new(
                "model.attention.rotary_width",
                format!("is {width}, but must be at most the head's width, {}", self.head_width),
            )),
            Some(_) => Ok("model.attention.rotary_width"),
            None => Ok("model.attention.head_width"),
        }
    }
}

impl YarnConfig {
    /// Factor of the scores.
    pub fn inverse_temperature(&self) -> f32 {
        (0.1 * self.factor * self.scale.ln() + 1.0).powi(2)
    }

    /// Radians per position of each pair, `[width/2]`. A pair with fewer than α turns over the original context is
    /// slowed down by the scale; one with more than β turns is unchanged; between them, the change is proportional.
    pub fn frequencies(&self, width: usize, base: f32) -> Vec<f64> {
        if self.ramp == YarnRamp::Index {
            let (factor, original_context) = (self.scale, self.original_context);
            let (fast, slow, truncate, amplitude) = (self.beta, self.alpha, true, 1.0);
            let as_deepseek =
                RotaryScaling::Yarn { factor, original_context, fast, slow, truncate, amplitude };
            return as_deepseek.frequencies(width, base);
        }
        let turn = |frequency: f64| {
            let turns = self.original_context as f64 * frequency / TAU;
            let (alpha, beta) = (f64::from(self.alpha), f64::from(self.beta));
            let kept = ((turns - alpha) / (beta - alpha)).clamp(0.0, 1.0);
            frequency + (1.0 - kept) * (frequency / f64::from(self.scale) - frequency)
        };
        frequencies(width, base).into_iter().map(turn).collect()
    }

    fn validate(&self) -> Result<(), ConfigError> {
        positive("model.attention.yarn.original_context", self.original_context)?;
        let checks = [
            ("model.attention.yarn.scale", self.scale >= 1.0 && self.scale.is_finite(), "must be at least 1"),
            ("model.attention.yarn.alpha", self.alpha >= 0.0, "must be at least 0"),
            (
                "model.attention.yarn.alpha",
                self.alpha > 0.0 || self.ramp == YarnRamp::Turns,
                "must be above 0 where `ramp` is \"index\"",
            ),
            (
                "model.attention.yarn.beta",
                self.beta > self.alpha && self.beta.is_finite(),
                "must be above `alpha`",
            ),
            (
                "model.attention.yarn.factor",
                self.factor >= 0.0 && self.factor.is_finite(),
                "must be at least 0",
            ),
        ];
        match checks.iter().find(|(_, right, _)| !right) {
            Some((key, _, reason)) => Err(ConfigError::new(*key, *reason)),
            None => Ok(()),
        }
    }
}

impl RotaryScaling {
    /// Radians per position of each pair, `[width/2]`.
    pub fn frequencies(&self, width: usize, base: f32) -> Vec<f64> {
        let plain = frequencies(width, base);
        match *self {
            Self::Linear { factor } => plain.into_iter().map(|f| f / f64::from(factor)).collect(),
            Self::Llama3 { factor, low, high, original_context } => {
                let [factor, low, high] = [factor, low, high].map(f64::from);
                let stretch = |frequency: f64| {
                    let turns = original_context as f64 * frequency / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - kept) * frequency / factor + kept * frequency
                };
                plain.into_iter().map(stretch).collect()
            }
            Self::Yarn { factor, original_context, fast, slow, truncate, .. } => {
                // The pair, as a real number, with this many turns over the original context.
                let pair = |turns: f32| {
                    let period = original_context as f64 / (f64::from(turns) * TAU);
                    width as f64 * period.ln() / (2.0 * f64::from(base).ln())
                };
                let (first, last) = (pair(fast), pair(slow));
                let (first, last) = if truncate { (first.floor(), last.ceil()) } else { (first, last) };
                let (first, last) = (first.max(0.0), last.min(width as f64 - 1.0));
                let length = if first == last { 0.001 } else { last - first };
                let stretch = |(index, frequency): (usize, f64)| {
                    let stretched = ((index as f64 - first) / length).clamp(0.0, 1.0);
                    frequency / f64::from(factor) * stretched + frequency * (1.0 - stretched)
                };
                plain.into_iter().enumerate().map(stretch).collect()
            }
            Self::Factors { ref factors, .. } => {
                plain.into_iter().zip(factors).map(|(f, factor)| f / f64::from(*factor)).collect()
            }
        }
    }

    /// Factor of cosines and sines.
    pub fn amplitude(&self) -> f32 {
        match *self {
            Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
            Self::Yarn { amplitude, .. } | Self::Factors { amplitude, .. } => amplitude,
        }
    }

    fn validate(&self, width: usize) -> Result<(), ConfigError> {
        let wrong = |key: &str, reason: &str| {
            Err(ConfigError::new(format!("model.attention.rotary_scaling.{key}"), reason.to_owned()))
        };
        if !above_zero(self.amplitude()) {
            return wrong("amplitude", "must be above 0");
        }
        match *self {
            Self::Linear { factor } | Self::Llama3 { factor, .. } | Self::Yarn { factor, .. }
                if !above_zero(factor) =>
            {
                wrong("factor", "must be above 0")
            }
            Self::Llama3 { original_context: 0, .. } | Self::Yarn { original_context: 0, .. } => {
                wrong("original_context", "is 0: must be at least 1")
            }
            Self::Llama3 { low, high, .. } if !(low >= 0.0 && high > low && high.is_finite()) => {
                wrong("high", "must be above `low`")
            }
            Self::Yarn { fast, slow, .. } if !(slow > 0.0 && fast >= slow && fast.is_finite()) => {
                wrong("fast", "must be at least `slow`, and `slow` must be above 0")
            }
            Self::Factors { ref factors, .. } if factors.len() != width / 2 => {
                let reason = format!(
                    "has {} values, but needs one for each of the {} pairs",
                    factors.len(),
                    width / 2
                );
                wrong("factors", &reason)
            }
            Self::Factors { ref factors, .. } if !factors.iter().all(|&factor| above_zero(factor)) => {
                wrong("factors", "must all be above 0")
            }
            _ => Ok(()),
        }
    }
}

/// Radians per position of each pair, `[width/2]`: base^(−2i/width).
fn frequencies(width: usize, base: f32) -> Vec<f64> {
    (0..width / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / width as f64)).collect()
}

fn above_zero(value: f32) -> bool {
    value > 0.0 && value.is_finite()
}

fn check_base(key: &str, base: f32) -> Result<(), ConfigError> {
    if base > 1.0 && base.is_finite() { Ok(()) } else { Err(ConfigError::new(key, "must be above 1")) }
}

fn check_blocks(key: &str, listed: &[usize], blocks: usize) -> Result<(), ConfigError> {
    if !listed.is_sorted_by(|a, b| a < b) {
        return Err(ConfigError::new(key, "must ascend without repeats"));
    }
    match listed.iter().find(|&&block| block >= blocks) {
        Some(block) => {
            let reason = format!("names block {block}, but the {blocks} blocks are counted from 0");
            Err(ConfigError::new(key, reason))
        }
        None => Ok(()),
    }
}
