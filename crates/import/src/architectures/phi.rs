//! Phi 3 (arXiv 2404.14219).

use engram_config::{AttentionConfig, RotaryScaling};

use super::parts::{Architecture, Storage, Stored, 
    GGUF, HUB, gguf_rotary, hub_rotary, plain, set_window, silu_without_biases, sliding_layers,
};
use crate::error::Result;
use crate::settings::Settings;

pub(super) fn phi3(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &HUB, None)?;
    silu_without_biases(settings)?;
    let rotary = hub_rotary(settings, model.context)?;
    let notes = restrict(&mut model.context, rotary.context);
    rotary.apply(settings, &mut attention)?;
    let local = sliding_layers(settings, model.blocks)?;
    set_window(&mut attention, settings.integer("sliding_window")?, &model, local);
    model.attention = AttentionConfig::Plain(attention);
    Ok(Architecture { model, storage: Storage { fused: true, ..Storage::default() }, notes })
}

pub(super) fn phi3_gguf(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let (mut model, mut attention) = plain(settings, stored, &GGUF, None)?;
    let (head_width, whole) = (attention.head_width, model.context);
    let rotary = gguf_rotary(settings, stored, head_width, whole)?;
    let original = settings.integer("rope.scaling.original_context_length")?;
    let long = matches!(rotary.scaling, Some(RotaryScaling::Factors { .. }));
    let notes = restrict(&mut model.context, original.filter(|_| long));
    rotary.apply(settings, &mut attention)?;
    set_window(&mut attention, settings.integer("attention.sliding_window")?, &model, None);
    model.attention = AttentionConfig::Plain(attention);
    Ok(Architecture { model, storage: Storage { fused: true, ..Storage::default() }, notes })
}

/// Restricts the context to the original one, whose factors are used.
fn restrict(context: &mut usize, original: Option<usize>) -> Vec<String> {
    let Some(original) = original.filter(|original| *original < *context) else { return Vec::new() };
    let note = format!(
        "the context is {original} tokens instead of {context}: LongRoPE's factors for longer texts are not used"
    );
    *context = original;
    vec![note]
}
