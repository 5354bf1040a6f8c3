//! What the families share.

use engram_config::{
    Activation, AttentionConfig, ExpertsConfig, FeedForwardConfig, InitConfig, ModelConfig, PlainConfig,
    RotaryScaling,
};

use crate::error::Result;
use crate::settings::Settings;

/// Sizes that a file of weights says itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored<'a> {
    /// Whether the head is a tensor of its own.
    pub(crate) head: bool,
    /// Rows of the embedding, where there is one.
    pub(crate) vocabulary: Option<usize>,
    /// Factors that rotary frequencies are divided by (`rope_freqs` of GGUF files).
    pub(crate) frequency_factors: Option<&'a [f32]>,
    /// Whether keys and values of latent attention are projected by two tensors.
    pub(crate) keys_values_apart: bool,
}

/// How a family's tensors differ from the usual ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Storage {
    /// Queries, keys and values are one tensor, gate and up another (Phi 3).
    pub(crate) fused: bool,
    /// Norms are stored without the 1 that is added to their weights (Gemma, not in GGUF files).
    pub(crate) norms_without_one: bool,
    /// Rotary pairs are neighbours (DeepSeek, and Llama in GGUF files), not half a rotary width apart.
    pub(crate) neighbours: bool,
    /// Blocks behind the last that only serve training or speculation (multi-token prediction).
    pub(crate) extra_blocks: usize,
}

/// A model's shape, and how its tensors are stored.
#[derive(Debug, Clone)]
pub(crate) struct Architecture {
    pub(crate) model: ModelConfig,
    pub(crate) storage: Storage,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
}

/// Names of the settings that every architecture has.
pub(super) struct Names {
    vocabulary: &'static str,
    width: &'static str,
    blocks: &'static str,
    heads: &'static str,
    key_heads: &'static str,
    head_width: &'static str,
    feed_forward: &'static str,
    context: &'static str,
    epsilon: &'static str,
}

pub(super) const HUB: Names = Names {
    vocabulary: "vocab_size",
    width: "hidden_size",
    blocks: "num_hidden_layers",
    heads: "num_attention_heads",
    key_heads: "num_key_value_heads",
    head_width: "head_dim",
    feed_forward: "intermediate_size",
    context: "max_position_embeddings",
    epsilon: "rms_norm_eps",
};

pub(super) const GGUF: Names = Names {
    vocabulary: "vocab_size",
    width: "embedding_length",
    blocks: "block_count",
    heads: "attention.head_count",
    key_heads: "attention.head_count_kv",
    head_width: "attention.key_length",
    feed_forward: "feed_forward_length",
    context: "context_length",
    epsilon: "attention.layer_norm_rms_epsilon",
};

/// A dense model with plain attention, all rotated, to be changed where a family differs. `head_width` is that of heads
/// whose width is not given; none: they share the model's width.
///
/// # Errors
/// A setting that is missing or has no size.
pub(super) fn plain(
    settings: &Settings,
    stored: Stored<'_>,
    names: &Names,
    head_width: Option<usize>,
) -> Result<(ModelConfig, PlainConfig)> {
    let (width, heads) = (settings.needed(names.width)?, settings.needed(names.heads)?);
    let shared = || match width.checked_div(heads) {
        Some(each) if each > 0 => Ok(each),
        _ => Err(settings.wrong(names.heads, &format!("is {heads}, but the width is {width}"))),
    };
    let head_width = match settings.integer(names.head_width)?.or(head_width) {
        Some(given) => given,
        None => shared()?,
    };
    let mut attention = PlainConfig::new(heads, head_width);
    attention.key_heads = settings.integer(names.key_heads)?.filter(|key_heads| *key_heads != heads);
    let model = ModelConfig {
        attention: AttentionConfig::Plain(attention.clone()),
        ..bare(settings, stored, names)?
    };
    Ok((model, attention))
}

/// Sizes that every model has; its attention is a stand-in.
///
/// # Errors
/// A setting that is missing.
pub(super) fn bare(settings: &Settings, stored: Stored<'_>, names: &Names) -> Result<ModelConfig> {
    let given = settings.integer(names.vocabulary)?;
    let vocabulary = match (names.vocabulary == HUB.vocabulary, given, stored.vocabulary) {
        (true, Some(given), _) => given,
        (_, _, Some(rows)) => rows,
        (_, Some(given), None) => given,
        (_, None, None) => return Err(settings.missing(names.vocabulary)),
    };
    let tied = settings.flag("tie_word_embeddings")?;
    if tied == Some(false) && !stored.head {
        let reason =
            "is false, but the files have no head of its own (`lm_head.weight`): they are incomplete";
        return Err(settings.wrong("tie_word_embeddings", reason));
    }
    let epsilon = settings.float(names.epsilon)?.ok_or_else(|| settings.missing(names.epsilon))?;
    Ok(ModelConfig {
        vocabulary,
        width: settings.needed(names.width)?,
        blocks: check_blocks(settings, names)?,
        context: settings.needed(names.context)?,
        norm_epsilon: epsilon as f32,
        tied_head: !stored.head,
        embedding_scale: None,
        post_norms: false,
        init: InitConfig::default(),
        attention: AttentionConfig::Plain(PlainConfig::new(1, 2)),
        feed_forward: FeedForwardConfig {
            width: settings.needed(names.feed_forward)?,
            activation: Activation::Swiglu,
        },
        experts: None,
        hyper_connections: None,
        memory: None,
    })
}

/// Most blocks of a model: lists have an entry for each.
const MOST_BLOCKS: usize = 1 << 12;

fn check_blocks(settings: &Settings, names: &Names) -> Result<usize> {
    let blocks = settings.needed(names.blocks)?;
    if blocks > MOST_BLOCKS {
        return Err(settings.wrong(names.blocks, &format!("is {blocks}: at most {MOST_BLOCKS} are known")));
    }
    Ok(blocks)
}

/// Refuses an activation other than SiLU, and biases of any kind, in a `config.json`.
///
/// # Errors
/// What is not known.
pub(super) fn silu_without_biases(settings: &Settings) -> Result<()> {
    settings.only("hidden_act", &["silu", "swish"])?;
    for key in ["attention_bias", "mlp_bias"] {
        if settings.flag(key)? == Some(true) {
            return Err(settings.wrong(key, "is true: these biases are not known"));
        }
    }
    Ok(())
}

/// Rotary positions as a file gives them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rotary {
    pub(super) base: Option<f32>,
    pub(super) scaling: Option<RotaryScaling>,
    /// The part of a head that is rotated.
    pub(super) part: Option<f64>,
    /// What scores are multiplied by beside the usual scale, as DeepSeek's models have it.
    pub(super) score_factor: f32,
    /// The longest context, where the scaling allows no more.
    pub(super) context: Option<usize>,
}

impl Rotary {
    /// Sets attention's keys.
    ///
    /// # Errors
    /// A part of a head that is not a number of whole pairs.
    pub(super) fn apply(self, settings: &Settings, attention: &mut PlainConfig) -> Result<()> {
        if let Some(base) = self.base {
            attention.rotary_base = base;
        }
        attention.rotary_scaling = self.scaling;
        if let Some(part) = self.part.filter(|part| *part != 1.0) {
            // A quotient of two widths may be a little too small.
            let width = (attention.head_width as f64 * part + 1e-6) as usize;
            if !(part > 0.0 && part < 1.0) || width == 0 {
                return Err(settings
                    .wrong("partial_rotary_factor", &format!("is {part}: must be above 0, at most 1")));
            }
            attention.rotary_width = Some(width);
        }
        Ok(())
    }
}

/// Rotary positions of a `config.json`: `rope_theta` and `rope_scaling`, or `rope_parameters` as newer files have it.
///
/// # Errors
/// A scaling that is not known, or lacks a number.
pub(super) fn hub_rotary(settings: &Settings, context: usize) -> Result<Rotary> {
    let base = settings.float("rope_theta")?;
    let part = settings.float("partial_rotary_factor")?;
    let table = match settings.table("rope_parameters")? {
        Some(table) => Some(table),
        None => settings.table("rope_scaling")?,
    };
    // Phi 3 has it beside the scaling, not in it.
    let original = settings.integer("original_max_position_embeddings")?;
    let mut rotary = match &table {
        Some(table) => scaling(table, context, original)?,
        None => Rotary { base: None, scaling: None, part: None, score_factor: 1.0, context: None },
    };
    rotary.base = rotary.base.or(base.map(|base| base as f32));
    rotary.part = rotary.part.or(part);
    Ok(rotary)
}

/// What a table of scaling says.
///
/// # Errors
/// A kind that is not known, or a number that is missing.
pub(super) fn scaling(table: &Settings, context: usize, original: Option<usize>) -> Result<Rotary> {
    let (newer, older) = (table.text("rope_type")?, table.text("type")?);
    let kind = newer.or(older).unwrap_or("default");
    let number = |key: &str| -> Result<Option<f32>> { Ok(table.float(key)?.map(|value| value as f32)) };
    let needed = |key: &str| -> Result<f32> { number(key)?.ok_or_else(|| table.missing(key)) };
    let mut rotary = Rotary {
        base: number("rope_theta")?,
        scaling: None,
        part: table.float("partial_rotary_factor")?,
        score_factor: 1.0,
        context: None,
    };
    let own_original = table.integer("original_max_position_embeddings")?.or(original);
    rotary.scaling = match kind {
        "default" | "none" => {
            number("factor")?;
            None
        }
        "linear" => Some(needed("factor")?)
            .filter(|factor| *factor != 1.0)
            .map(|factor| RotaryScaling::Linear { factor }),
        "llama3" => Some(RotaryScaling::Llama3 {
            factor: needed("factor")?,
            low: needed("low_freq_factor")?,
            high: needed("high_freq_factor")?,
            original_context: own_original
                .ok_or_else(|| table.missing("original_max_position_embeddings"))?,
        }),
        "yarn" => {
            let factor = needed("factor")?;
            let (scale, all) =
                (number("mscale")?.filter(|m| *m != 0.0), number("mscale_all_dim")?.filter(|m| *m != 0.0));
            let given = number("attention_factor")?;
            let amplitude = given.unwrap_or_else(|| match (scale, all) {
                (Some(scale), Some(all)) => yarn_scale(factor, scale) / yarn_scale(factor, all),
                _ => yarn_scale(factor, 1.0),
            });
            rotary.score_factor = all.map_or(1.0, |all| yarn_scale(factor, all).powi(2));
            Some(RotaryScaling::Yarn {
                factor,
                original_context: own_original.unwrap_or(context),
                fast: number("beta_fast")?.unwrap_or(32.0),
                slow: number("beta_slow")?.unwrap_or(1.0),
                truncate: table.flag("truncate")?.unwrap_or(true),
                amplitude,
            })
        }
        "longrope" | "su" => {
            let original = own_original.ok_or_else(|| table.missing("original_max_position_embeddings"))?;
            let short = table.numbers("short_factor")?.ok_or_else(|| table.missing("short_factor"))?;
            // Those of texts beyond the original context, to which this is restricted.
            table.numbers("long_factor")?;
            let given = (number("attention_factor")?, number("factor")?);
            let stretch = given.1.unwrap_or(context as f32 / original as f32);
            let amplitude = given.0.unwrap_or_else(|| long_amplitude(stretch, original));
            rotary.context = Some(original);
            Some(RotaryScaling::Factors { factors: short.into_iter().map(|f| f as f32).collect(), amplitude })
        }
        other => {
            let key = if newer.is_some() { "rope_type" } else { "type" };
            return Err(table
                .wrong(key, &format!("is `{other}`; known are default, linear, llama3, yarn and longrope")));
        }
    };
    table.refuse_others()?;
    Ok(rotary)
}

/// LongRoPE's √(1 + ln s / ln original) (arXiv 2402.13753).
pub(super) fn long_amplitude(stretch: f32, original: usize) -> f32 {
    if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / (original as f32).ln()).sqrt() }
}

/// YaRN's 0.1·m·ln s + 1.
pub(super) fn yarn_scale(factor: f32, m: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// Rotary positions of a GGUF file.
///
/// # Errors
/// A scaling that is not known.
pub(super) fn gguf_rotary(
    settings: &Settings,
    stored: Stored<'_>,
    head_width: usize,
    context: usize,
) -> Result<Rotary> {
    let number = |key: &str| -> Result<Option<f32>> { Ok(settings.float(key)?.map(|value| value as f32)) };
    let base = number("rope.freq_base")?;
    let width = settings.integer("rope.dimension_count")?.filter(|width| *width != head_width);
    let kind = settings.text("rope.scaling.type")?;
    let factor = number("rope.scaling.factor")?.filter(|factor| *factor != 0.0);
    // An older name of the same.
    let factor = factor.or(number("rope.scale_linear")?).filter(|factor| *factor != 0.0 && *factor != 1.0);
    let original = settings.integer("rope.scaling.original_context_length")?;
    let amplitude = number("rope.scaling.attn_factor")?.unwrap_or(1.0);
    let logarithm = number("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
    let bounds = (number("rope.scaling.yarn_beta_fast")?, number("rope.scaling.yarn_beta_slow")?);
    for key in ["rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"] {
        if number(key)?.is_some_and(|value| value != 1.0) {
            return Err(settings.wrong(key, "is not 1: such a scaling is not known"));
        }
    }
    let mut rotary = Rotary { base, scaling: None, part: None, score_factor: 1.0, context: None };
    rotary.part = width.map(|width| width as f64 / head_width as f64);
    rotary.scaling = match (kind, factor, stored.frequency_factors) {
        (None | Some("linear" | "yarn"), None, None) => None,
        (None | Some("linear" | "longrope"), _, Some(factors)) => {
            Some(RotaryScaling::Factors { factors: factors.to_vec(), amplitude })
        }
        (None | Some("linear"), Some(factor), None) => Some(RotaryScaling::Linear { factor }),
        (Some("yarn"), Some(factor), None) => {
            // ggml multiplies by 1 + 0.1·ln s in the rotation, and takes it back where a file says how scores grow.
            let plain = if logarithm == 0.0 { yarn_scale(factor, 1.0) } else { 1.0 };
            rotary.score_factor = if factor > 1.0 { (1.0 + logarithm * factor.ln()).powi(2) } else { 1.0 };
            Some(RotaryScaling::Yarn {
                factor,
                original_context: original.unwrap_or(context),
                fast: bounds.0.unwrap_or(32.0),
                slow: bounds.1.unwrap_or(1.0),
                truncate: true,
                amplitude: amplitude * plain,
            })
        }
        (kind, _, factors) => {
            let beside = if factors.is_some() { " beside frequency factors" } else { "" };
            let kind = kind.unwrap_or("linear");
            return Err(settings
                .wrong("rope.scaling.type", &format!("is `{kind}`{beside}: such a scaling is not known")));
        }
    };
    Ok(rotary)
}

/// Blocks whose `layer_types` say that they see a window alone; none where the file has no such list.
///
/// # Errors
/// A kind of layer that is not known, or a list of another length.
pub(super) fn sliding_layers(settings: &Settings, blocks: usize) -> Result<Option<Vec<usize>>> {
    let Some(kinds) = settings.texts("layer_types")? else { return Ok(None) };
    if kinds.len() != blocks {
        let reason = format!("has {} entries, but there are {blocks} layers", kinds.len());
        return Err(settings.wrong("layer_types", &reason));
    }
    if let Some(other) =
        kinds.iter().find(|kind| !matches!(kind.as_str(), "full_attention" | "sliding_attention"))
    {
        let reason = format!("has `{other}`; known are full_attention and sliding_attention");
        return Err(settings.wrong("layer_types", &reason));
    }
    let sliding = kinds.iter().enumerate().filter(|(_, kind)| *kind == "sliding_attention");
    Ok(Some(sliding.map(|(block, _)| block).collect()))
}

/// Sets the window of these blocks, where it is shorter than the context.
pub(super) fn set_window(
    attention: &mut PlainConfig,
    window: Option<usize>,
    model: &ModelConfig,
    local: Option<Vec<usize>>,
) {
    let local = local.filter(|local| local.len() < model.blocks);
    let nobody = local.as_ref().is_some_and(Vec::is_empty);
    if let Some(window) = window.filter(|window| *window < model.context && !nobody) {
        attention.window = Some(window);
        attention.local_blocks = local;
    }
}

/// The blocks with experts as `first_block` and `dense_blocks`; none where no block has any.
pub(super) fn expert_blocks(experts: ExpertsConfig, sparse: &[bool]) -> Option<ExpertsConfig> {
    let first_block = sparse.iter().position(|sparse| *sparse)?;
    let dense = sparse.iter().enumerate().skip(first_block).filter(|(_, sparse)| !**sparse);
    let dense_blocks = dense.map(|(block, _)| block).collect();
    Some(ExpertsConfig { first_block, dense_blocks, ..experts })
}
