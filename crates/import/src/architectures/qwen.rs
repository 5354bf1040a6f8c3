//! Qwen 2 and 2.5 (arXiv 2407.10671), Qwen 3 and its mixtures of experts (arXiv 2505.09388).

use engram_config::{AttentionConfig, ExpertScore, ExpertsConfig, ModelConfig, PlainConfig};

use super::parts::{
    Architecture, GGUF, HUB, Storage, Stored, expert_blocks, gguf_rotary, hub_rotary, plain, set_window,
    silu_without_biases, sliding_layers,
};
use crate::error::Result;
use crate::settings::Settings;

/// Head width of Qwen 3 where a file gives none.
const QWEN3_HEAD: usize = 128;

pub(super) fn qwen2(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (model, mut attention) = hub(settings, stored, None)?;
    attention.bias = true;
    done(model, attention)
}

pub(super) fn qwen3(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (model, mut attention) = hub(settings, stored, Some(QWEN3_HEAD))?;
    attention.query_key_norm = true;
    done(model, attention)
}

pub(super) fn qwen3_moe(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = hub(settings, stored, None)?;
    attention.query_key_norm = true;
    let step = settings.integer("decoder_sparse_step")?.unwrap_or(1).max(1);
    let dense = settings.numbers("mlp_only_layers")?.unwrap_or_default();
    let sparse = |block: usize| (block + 1).is_multiple_of(step) && !dense.contains(&(block as f64));
    let experts = experts(
        settings.needed("num_experts")?,
        settings.needed("num_experts_per_tok")?,
        settings.needed("moe_intermediate_size")?,
        settings.flag("norm_topk_prob")?.unwrap_or(false),
    );
    model.experts = expert_blocks(experts, &(0..model.blocks).map(sparse).collect::<Vec<_>>());
    done(model, attention)
}

pub(super) fn qwen2_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (model, mut attention) = gguf(settings, stored)?;
    attention.bias = true;
    done(model, attention)
}

pub(super) fn qwen3_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (model, mut attention) = gguf(settings, stored)?;
    attention.query_key_norm = true;
    done(model, attention)
}

pub(super) fn qwen3_moe_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = gguf(settings, stored)?;
    attention.query_key_norm = true;
    let (routed, active) = (settings.needed("expert_count")?, settings.needed("expert_used_count")?);
    // Files without it divide by the sum, as ggml does for this architecture.
    let normalise = settings.flag("expert_weights_norm")?.unwrap_or(true);
    let experts = experts(routed, active, settings.needed("expert_feed_forward_length")?, normalise);
    model.experts = expert_blocks(experts, &vec![true; model.blocks]);
    done(model, attention)
}

fn hub(
    settings: &Settings,
    stored: Stored<'_>,
    head_width: Option<usize>,
) -> Result<(ModelConfig, PlainConfig)> {
    let (model, mut attention) = plain(settings, stored, &HUB, head_width)?;
    silu_without_biases(settings)?;
    for key in ["use_mrope", "qkv_bias"] {
        // Qwen 2 has these biases whatever a file says of them.
        if key == "use_mrope" && settings.flag(key)? == Some(true) {
            return Err(settings.wrong(key, "is true: positions in several dimensions are not known"));
        }
        settings.value(key);
    }
    hub_rotary(settings, model.context)?.apply(settings, &mut attention)?;
    let window = settings.integer("sliding_window")?;
    let used = settings.flag("use_sliding_window")?.unwrap_or(false);
    let first = settings.integer("max_window_layers")?.unwrap_or(0);
    let local = sliding_layers(settings, model.blocks)?;
    let local = local.unwrap_or_else(|| (first.min(model.blocks)..model.blocks).collect());
    set_window(&mut attention, window.filter(|_| used), &model, Some(local));
    Ok((model, attention))
}

fn gguf(settings: &Settings, stored: Stored<'_>) -> Result<(ModelConfig, PlainConfig)> {
    let (model, mut attention) = plain(settings, stored, &GGUF, None)?;
    let head_width = attention.head_width;
    if settings.integer("attention.value_length")?.is_some_and(|other| other != head_width) {
        let reason = format!("is not {head_width}: other values than keys are not known");
        return Err(settings.wrong("attention.value_length", &reason));
    }
    gguf_rotary(settings, stored, head_width, model.context)?.apply(settings, &mut attention)?;
    Ok((model, attention))
}

fn experts(routed: usize, active: usize, width: usize, normalise: bool) -> ExpertsConfig {
    ExpertsConfig {
        first_block: 0,
        dense_blocks: Vec::new(),
        routed,
        active,
        width,
        shared_width: 0,
        score: ExpertScore::Softmax,
        normalise,
        scaling: 1.0,
        groups: None,
        balance_rate: 0.0,
        sequence_balance: 0.0,
    }
}

fn done(mut model: ModelConfig, attention: PlainConfig) -> Result<Architecture> {
    model.attention = AttentionConfig::Plain(attention);
    Ok(Architecture { model, storage: Storage::default(), notes: Vec::new() })
}
