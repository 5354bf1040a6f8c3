//! DeepSeek V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437).

use engram_config::{
    AttentionConfig, ExpertGroups, ExpertScore, ExpertsConfig, GroupScore, LatentConfig, ModelConfig,
};

use super::parts::{
    Architecture, GGUF, HUB, Rotary, Storage, Stored, bare, expert_blocks, gguf_rotary, hub_rotary,
    silu_without_biases,
};
use crate::error::Result;
use crate::settings::Settings;

/// What the norms of latents add to the mean square, whatever the other norms do.
const LATENT_EPSILON: f64 = 1e-6;

pub(super) fn deepseek_v2(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let mut architecture = hub(settings, stored)?;
    settings.only("scoring_func", &["softmax"])?;
    settings.only("topk_method", &["greedy", "group_limited_greedy"])?;
    if settings.flag("norm_topk_prob")? == Some(true) {
        return Err(settings.wrong("norm_topk_prob", "is true, which is not known of this architecture"));
    }
    let limited = settings.text("topk_method")? == Some("group_limited_greedy");
    let groups = groups(settings, GroupScore::Best)?.filter(|_| limited);
    set_experts(settings, &mut architecture.model, ExpertScore::Softmax, false, groups)?;
    Ok(architecture)
}

pub(super) fn deepseek_v3(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let mut architecture = hub(settings, stored)?;
    settings.only("scoring_func", &["sigmoid"])?;
    settings.only("topk_method", &["noaux_tc"])?;
    architecture.storage.extra_blocks = settings.integer("num_nextn_predict_layers")?.unwrap_or(0);
    architecture.storage.neighbours = settings.flag("rope_interleave")?.unwrap_or(true);
    let groups = groups(settings, GroupScore::TwoBest)?;
    let normalise = settings.flag("norm_topk_prob")?.unwrap_or(true);
    set_experts(settings, &mut architecture.model, ExpertScore::Sigmoid, normalise, groups)?;
    Ok(architecture)
}

/// What both have.
fn hub(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let mut model = bare(settings, stored, &HUB)?;
    silu_without_biases(settings)?;
    if let Some(epsilon) = settings.float("rms_norm_eps")?.filter(|epsilon| *epsilon != LATENT_EPSILON) {
        let reason = format!(
            "is {epsilon}, but the norms of latents have {LATENT_EPSILON}: two epsilons are not known"
        );
        return Err(settings.wrong("rms_norm_eps", &reason));
    }
    let rotary = hub_rotary(settings, model.context)?;
    // Keys and values have no heads of their own.
    settings.integer("num_key_value_heads")?;
    settings.integer("head_dim")?;
    settings.integer("qk_head_dim")?;
    let latent = LatentConfig {
        heads: settings.needed("num_attention_heads")?,
        query_rank: settings.integer("q_lora_rank")?,
        latent_rank: settings.needed("kv_lora_rank")?,
        content_width: settings.needed("qk_nope_head_dim")?,
        rotary_width: settings.needed("qk_rope_head_dim")?,
        value_width: settings.needed("v_head_dim")?,
        rotary_base: 10_000.0,
        scale: None,
        yarn: None,
        rotary_scaling: None,
    };
    model.attention = AttentionConfig::Latent(stretched(latent, rotary));
    let storage = Storage { neighbours: true, ..Storage::default() };
    Ok(Architecture { model, storage, notes: Vec::new() })
}

pub(super) fn deepseek2_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let mut model = bare(settings, stored, &GGUF)?;
    let extra_blocks = settings.integer("nextn_predict_layers")?.unwrap_or(0);
    model.blocks = model.blocks.saturating_sub(extra_blocks);
    let rotary_width = settings.needed("rope.dimension_count")?;
    let (key, value) = (settings.needed("attention.key_length")?, settings.needed("attention.value_length")?);
    // Files whose keys and values are projected apart say the widths of the absorbed form first.
    let own =
        (settings.integer("attention.key_length_mla")?, settings.integer("attention.value_length_mla")?);
    let (key, value) =
        if stored.keys_values_apart { (own.0.unwrap_or(key), own.1.unwrap_or(value)) } else { (key, value) };
    let content_width = key.checked_sub(rotary_width).ok_or_else(|| {
        settings.wrong(
            "attention.key_length",
            &format!("is {key}, less than the {rotary_width} that are rotated"),
        )
    })?;
    let rotary = gguf_rotary(settings, stored, rotary_width, model.context)?;
    settings.integer("attention.head_count_kv")?;
    let latent = LatentConfig {
        heads: settings.needed("attention.head_count")?,
        query_rank: settings.integer("attention.q_lora_rank")?.filter(|rank| *rank > 0),
        latent_rank: settings.needed("attention.kv_lora_rank")?,
        content_width,
        rotary_width,
        value_width: value,
        rotary_base: 10_000.0,
        scale: None,
        yarn: None,
        rotary_scaling: None,
    };
    model.attention = AttentionConfig::Latent(stretched(latent, rotary));
    gguf_experts(settings, &mut model)?;
    let storage = Storage { neighbours: true, extra_blocks, ..Storage::default() };
    Ok(Architecture { model, storage, notes: Vec::new() })
}

/// Attention with its rotary positions.
fn stretched(latent: LatentConfig, rotary: Rotary) -> LatentConfig {
    let key = (latent.content_width + latent.rotary_width) as f32;
    LatentConfig {
        rotary_base: rotary.base.unwrap_or(latent.rotary_base),
        scale: (rotary.score_factor != 1.0).then(|| key.sqrt().recip() * rotary.score_factor),
        rotary_scaling: rotary.scaling,
        ..latent
    }
}

/// Groups of experts; none where there is one.
fn groups(settings: &Settings, score: GroupScore) -> Result<Option<ExpertGroups>> {
    let (count, active) = (settings.integer("n_group")?, settings.integer("topk_group")?);
    Ok(match (count.unwrap_or(1), active.unwrap_or(1)) {
        (count, active) if count > 1 && active < count => Some(ExpertGroups { count, active, score }),
        _ => None,
    })
}

fn set_experts(
    settings: &Settings,
    model: &mut ModelConfig,
    score: ExpertScore,
    normalise: bool,
    groups: Option<ExpertGroups>,
) -> Result<()> {
    let routed = settings.integer("n_routed_experts")?;
    let first = settings.integer("first_k_dense_replace")?.unwrap_or(0);
    let step = settings.integer("moe_layer_freq")?.unwrap_or(1).max(1);
    let active = settings.integer("num_experts_per_tok")?;
    let width = settings.needed("moe_intermediate_size")?;
    let shared = settings.integer("n_shared_experts")?.unwrap_or(0);
    let scaling = settings.float("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    let Some(routed) = routed else { return Ok(()) };
    let experts = ExpertsConfig {
        first_block: 0,
        dense_blocks: Vec::new(),
        routed,
        active: active.ok_or_else(|| settings.missing("num_experts_per_tok"))?,
        width,
        shared_width: shared.saturating_mul(width),
        score,
        normalise,
        scaling,
        groups,
        balance_rate: 0.0,
        sequence_balance: 0.0,
    };
    let sparse = |block: usize| block >= first && block.is_multiple_of(step);
    model.experts = expert_blocks(experts, &(0..model.blocks).map(sparse).collect::<Vec<_>>());
    Ok(())
}

fn gguf_experts(settings: &Settings, model: &mut ModelConfig) -> Result<()> {
    let Some(routed) = settings.integer("expert_count")?.filter(|count| *count > 0) else { return Ok(()) };
    let score = match settings.integer("expert_gating_func")? {
        None | Some(0 | 1) => ExpertScore::Softmax,
        Some(2) => ExpertScore::Sigmoid,
        Some(other) => {
            let reason = format!("is {other}; 1 (softmax) and 2 (sigmoid) are known");
            return Err(settings.wrong("expert_gating_func", &reason));
        }
    };
    let best = if score == ExpertScore::Sigmoid { GroupScore::TwoBest } else { GroupScore::Best };
    let (count, used) =
        (settings.integer("expert_group_count")?, settings.integer("expert_group_used_count")?);
    let groups = match (count.unwrap_or(1), used.unwrap_or(1)) {
        (count, active) if count > 1 && active < count => Some(ExpertGroups { count, active, score: best }),
        _ => None,
    };
    let width = settings.needed("expert_feed_forward_length")?;
    let shared = settings.integer("expert_shared_count")?.unwrap_or(0);
    let scaling = settings.float("expert_weights_scale")?.filter(|scale| *scale != 0.0).unwrap_or(1.0);
    let experts = ExpertsConfig {
        first_block: 0,
        dense_blocks: Vec::new(),
        routed,
        active: settings.needed("expert_used_count")?,
        width,
        shared_width: shared.saturating_mul(width),
        score,
        normalise: settings.flag("expert_weights_norm")?.unwrap_or(false),
        scaling: scaling as f32,
        groups,
        balance_rate: 0.0,
        sequence_balance: 0.0,
    };
    let first = settings.integer("leading_dense_block_count")?.unwrap_or(0);
    model.experts =
        expert_blocks(experts, &(0..model.blocks).map(|block| block >= first).collect::<Vec<_>>());
    Ok(())
}
