//! Gemma 3, text alone (arXiv 2503.19786).

use engram_config::{Activation, AttentionConfig, ModelConfig, PlainConfig};

use super::parts::{Architecture, Storage, Stored, GGUF, HUB, Rotary, gguf_rotary, plain, scaling, sliding_layers};
use crate::error::Result;
use crate::settings::Settings;

/// Of so many blocks the last sees all.
const PATTERN: usize = 6;
/// What files leave out.
const HEAD: usize = 256;
const SCALAR: f64 = 256.0;
const WINDOW: usize = 4096;
const BASE: f32 = 1_000_000.0;
const LOCAL_BASE: f32 = 10_000.0;
/// Blocks of the 27B, whose GGUF files do not say that their scores are scaled by the width of an even share.
const LARGEST: usize = 62;

pub(super) fn gemma3(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &HUB, Some(HEAD))?;
    for key in ["hidden_activation", "hidden_act"] {
        settings.only(key, &["gelu_pytorch_tanh"])?;
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if settings.float(key)?.is_some() {
            return Err(settings.wrong(key, "is given: capped logits are not known"));
        }
    }
    for key in ["attention_bias", "use_bidirectional_attention"] {
        if settings.flag(key)? == Some(true) {
            return Err(settings.wrong(key, "is true: this is not known"));
        }
    }
    let scalar = settings.float("query_pre_attn_scalar")?.unwrap_or(SCALAR);
    attention.scale = usual(&attention, (scalar as f32).sqrt().recip());
    let (global, local_base) = rotary(settings, &model)?;
    Rotary { base: global.base.or(Some(BASE)), ..global }.apply(settings, &mut attention)?;
    let local = match sliding_layers(settings, model.blocks)? {
        Some(local) => local,
        None => sliding(settings.integer("sliding_window_pattern")?.unwrap_or(PATTERN), model.blocks),
    };
    // Newer files have both; the list counts.
    settings.integer("sliding_window_pattern")?;
    let window = settings.integer("sliding_window")?.unwrap_or(WINDOW);
    finish(&mut model, attention, window, local, local_base);
    let storage = Storage { norms_without_one: true, ..Storage::default() };
    Ok(Architecture { model, storage, notes: Vec::new() })
}

pub(super) fn gemma3_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &GGUF, Some(HEAD))?;
    let head_width = attention.head_width;
    if settings.integer("attention.value_length")?.is_some_and(|other| other != head_width) {
        let reason = format!("is not {head_width}: other values than keys are not known");
        return Err(settings.wrong("attention.value_length", &reason));
    }
    for key in ["final_logit_softcapping", "attn_logit_softcapping"] {
        if settings.float(key)?.is_some_and(|cap| cap != 0.0) {
            return Err(settings.wrong(key, "is given: capped logits are not known"));
        }
    }
    let rotary = gguf_rotary(settings, stored, head_width, model.context)?;
    Rotary { base: rotary.base.or(Some(BASE)), ..rotary }.apply(settings, &mut attention)?;
    if model.blocks == LARGEST {
        let share = model.width / attention.heads;
        attention.scale = usual(&attention, (share as f32).sqrt().recip());
    }
    let local_base = settings.float("rope.freq_base_swa")?.map_or(LOCAL_BASE, |base| base as f32);
    let pattern = settings.integer("attention.sliding_window_pattern")?.unwrap_or(PATTERN);
    let window = settings.integer("attention.sliding_window")?.unwrap_or(WINDOW);
    let local = sliding(pattern, model.blocks);
    finish(&mut model, attention, window, local, local_base);
    Ok(Architecture { model, storage: Storage::default(), notes: Vec::new() })
}

/// The rotary positions of the blocks that see all, and the base of the others.
fn rotary(settings: &Settings, model: &ModelConfig) -> Result<(Rotary, f32)> {
    let base = settings.float("rope_theta")?.map(|base| base as f32);
    let local = settings.float("rope_local_base_freq")?.map(|base| base as f32);
    if let Some(by_kind) = settings.table("rope_parameters")? {
        let of = |kind: &str| match by_kind.table(kind)? {
            Some(table) => scaling(&table, model.context, None),
            None => Err(by_kind.missing(kind)),
        };
        let (global, sliding) = (of("full_attention")?, of("sliding_attention")?);
        by_kind.refuse_others()?;
        if sliding.scaling.is_some() {
            return Err(by_kind.wrong("sliding_attention", "is scaled: only the layers that see all may be"));
        }
        let local = sliding.base.or(local).unwrap_or(LOCAL_BASE);
        return Ok((Rotary { base: global.base.or(base), ..global }, local));
    }
    let global = match settings.table("rope_scaling")? {
        Some(table) => scaling(&table, model.context, None)?,
        None => Rotary { base: None, scaling: None, part: None, score_factor: 1.0, context: None },
    };
    Ok((Rotary { base: global.base.or(base), ..global }, local.unwrap_or(LOCAL_BASE)))
}

/// A scale that differs from 1/√head_width.
fn usual(attention: &PlainConfig, scale: f32) -> Option<f32> {
    (scale != (attention.head_width as f32).sqrt().recip()).then_some(scale)
}

/// Blocks that see the window alone.
fn sliding(pattern: usize, blocks: usize) -> Vec<usize> {
    (0..blocks).filter(|block| pattern == 0 || !(block + 1).is_multiple_of(pattern)).collect()
}

fn finish(model: &mut ModelConfig, mut attention: PlainConfig, window: usize, local: Vec<usize>, base: f32) {
    model.embedding_scale = Some((model.width as f32).sqrt());
    model.post_norms = true;
    model.feed_forward.activation = Activation::Geglu;
    attention.query_key_norm = true;
    // The window also says whose base is the local one: it is kept even where no text is so long.
    if !local.is_empty() {
        attention.window = Some(window);
        attention.local_blocks = Some(local).filter(|local| local.len() < model.blocks);
        attention.local_rotary_base = Some(base);
    }
    model.attention = AttentionConfig::Plain(attention);
}
