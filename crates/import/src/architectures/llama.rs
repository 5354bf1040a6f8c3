//! Llama (arXiv 2302.13971, 2307.09288, 2407.21783), and what differs from it by little: Mistral (arXiv 2310.06825),
//! SmolLM 2 and 3.

use engram_config::AttentionConfig;

use super::parts::{Architecture, Storage, Stored, 
    GGUF, HUB, gguf_rotary, hub_rotary, plain, set_window, silu_without_biases, sliding_layers,
};
use crate::error::Result;
use crate::settings::Settings;

/// Every how many blocks SmolLM 3 has one without positions.
const UNROTATED: usize = 4;

pub(super) fn llama(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &HUB, None)?;
    silu_without_biases(settings)?;
    hub_rotary(settings, model.context)?.apply(settings, &mut attention)?;
    if settings.flag("rope_interleaved")? == Some(true) {
        return Err(settings.wrong("rope_interleaved", "is true: this is not known"));
    }
    model.attention = AttentionConfig::Plain(attention);
    Ok(Architecture { model, storage: Storage::default(), notes: Vec::new() })
}

pub(super) fn mistral(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &HUB, None)?;
    silu_without_biases(settings)?;
    hub_rotary(settings, model.context)?.apply(settings, &mut attention)?;
    let local = sliding_layers(settings, model.blocks)?;
    set_window(&mut attention, settings.integer("sliding_window")?, &model, local);
    model.attention = AttentionConfig::Plain(attention);
    Ok(Architecture { model, storage: Storage::default(), notes: Vec::new() })
}

pub(super) fn smollm3(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &HUB, None)?;
    silu_without_biases(settings)?;
    hub_rotary(settings, model.context)?.apply(settings, &mut attention)?;
    let interval = settings.integer("no_rope_layer_interval")?.unwrap_or(UNROTATED).max(1);
    let rotated = match settings.numbers("no_rope_layers")? {
        Some(given) if given.len() != model.blocks => {
            let reason = format!("has {} entries, but there are {} layers", given.len(), model.blocks);
            return Err(settings.wrong("no_rope_layers", &reason));
        }
        Some(given) => given.into_iter().map(|rotated| rotated != 0.0).collect(),
        None => every_but(interval, model.blocks),
    };
    attention.unrotated_blocks = false_ones(&rotated);
    let window = settings.integer("sliding_window")?;
    let used = settings.flag("use_sliding_window")?.unwrap_or(false);
    settings.integer("max_window_layers")?;
    let local = sliding_layers(settings, model.blocks)?;
    // Without a list, those without positions see all.
    let local = local.unwrap_or_else(|| (0..model.blocks).filter(|&block| rotated[block]).collect());
    set_window(&mut attention, window.filter(|_| used), &model, Some(local));
    model.attention = AttentionConfig::Plain(attention);
    Ok(Architecture { model, storage: Storage::default(), notes: Vec::new() })
}

pub(super) fn llama_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &GGUF, None)?;
    let head_width = attention.head_width;
    same_width(settings, head_width)?;
    gguf_rotary(settings, stored, head_width, model.context)?.apply(settings, &mut attention)?;
    set_window(&mut attention, settings.integer("attention.sliding_window")?, &model, None);
    model.attention = AttentionConfig::Plain(attention);
    let storage = Storage { neighbours: true, ..Storage::default() };
    Ok(Architecture { model, storage, notes: Vec::new() })
}

pub(super) fn smollm3_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let mut architecture = llama_gguf(settings, stored)?;
    if let AttentionConfig::Plain(attention) = &mut architecture.model.attention {
        // The file does not say it.
        attention.unrotated_blocks = false_ones(&every_but(UNROTATED, architecture.model.blocks));
    }
    Ok(architecture)
}

/// Refuses values of another width than the keys.
fn same_width(settings: &Settings, head_width: usize) -> Result<()> {
    match settings.integer("attention.value_length")? {
        Some(other) if other != head_width => {
            let reason =
                format!("is {other}, but keys have {head_width}: other values than keys are not known");
            Err(settings.wrong("attention.value_length", &reason))
        }
        _ => Ok(()),
    }
}

fn every_but(interval: usize, blocks: usize) -> Vec<bool> {
    (1..=blocks).map(|block| !block.is_multiple_of(interval)).collect()
}

fn false_ones(blocks: &[bool]) -> Vec<usize> {
    blocks.iter().enumerate().filter(|(_, rotated)| !**rotated).map(|(block, _)| block).collect()
}
