//! What models from outside compute, as configurations of our own: a file per family.

mod deepseek;
mod gemma;
mod llama;
mod parts;
mod phi;
mod qwen;
#[cfg(test)]
mod tests;

use crate::error::Result;
use crate::settings::Settings;

pub(crate) use parts::{Architecture, Storage, Stored};

/// Names that `config.json` gives to the architectures that are known.
const HUB: [&str; 10] = [
    "llama",
    "mistral",
    "smollm3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "phi3",
    "deepseek_v2",
    "deepseek_v3",
];

/// Names that GGUF files give to them.
const GGUF: [&str; 8] = ["llama", "smollm3", "qwen2", "qwen3", "qwen3moe", "gemma3", "phi3", "deepseek2"];

/// Refuses the architecture of a `config.json` unless it is known.
///
/// # Errors
/// When it is not, or is missing.
pub(crate) fn check_hub(settings: &Settings) -> Result<()> {
    let kind = settings.text("model_type")?.ok_or_else(|| settings.missing("model_type"))?;
    if HUB.contains(&kind) { Ok(()) } else { Err(unknown(settings, "`model_type`", kind, &HUB)) }
}

/// Reads a `config.json`.
///
/// # Errors
/// The architecture when it is not known, or the first setting that is not.
pub(crate) fn of_hub(settings: &Settings, stored: Stored<'_>) -> Result<Architecture> {
    let kind = settings.text("model_type")?.ok_or_else(|| settings.missing("model_type"))?;
    let architecture = match kind {
        "llama" => llama::llama(settings, stored),
        "mistral" => llama::mistral(settings, stored),
        "smollm3" => llama::smollm3(settings, stored),
        "qwen2" => qwen::qwen2(settings, stored),
        "qwen3" => qwen::qwen3(settings, stored),
        "qwen3_moe" => qwen::qwen3_moe(settings, stored),
        "gemma3_text" => gemma::gemma3(settings, stored),
        "phi3" => phi::phi3(settings, stored),
        "deepseek_v2" => deepseek::deepseek_v2(settings, stored),
        "deepseek_v3" => deepseek::deepseek_v3(settings, stored),
        other => Err(unknown(settings, "`model_type`", other, &HUB)),
    }?;
    finish(settings, architecture)
}

/// Refuses a GGUF file's architecture unless it is known.
///
/// # Errors
/// When it is not.
pub(crate) fn check_gguf(settings: &Settings, architecture: &str) -> Result<()> {
    let known = GGUF.contains(&architecture);
    if known { Ok(()) } else { Err(unknown(settings, "`general.architecture`", architecture, &GGUF)) }
}

/// Reads the metadata of a GGUF file of this architecture.
///
/// # Errors
/// As [`of_hub`].
pub(crate) fn of_gguf(settings: &Settings, architecture: &str, stored: Stored<'_>) -> Result<Architecture> {
    let architecture = match architecture {
        "llama" => llama::llama_gguf(settings, stored),
        "smollm3" => llama::smollm3_gguf(settings, stored),
        "qwen2" => qwen::qwen2_gguf(settings, stored),
        "qwen3" => qwen::qwen3_gguf(settings, stored),
        "qwen3moe" => qwen::qwen3_moe_gguf(settings, stored),
        "gemma3" => gemma::gemma3_gguf(settings, stored),
        "phi3" => phi::phi3_gguf(settings, stored),
        "deepseek2" => deepseek::deepseek2_gguf(settings, stored),
        other => Err(unknown(settings, "`general.architecture`", other, &GGUF)),
    }?;
    finish(settings, architecture)
}

fn finish(settings: &Settings, architecture: Architecture) -> Result<Architecture> {
    settings.refuse_others()?;
    match architecture.model.validate() {
        Ok(()) => Ok(architecture),
        Err(error) => {
            Err(crate::error::Error::model(settings.path(), format!("its settings make no model: {error}")))
        }
    }
}

fn unknown(settings: &Settings, key: &str, found: &str, known: &[&str]) -> crate::error::Error {
    let known = known.join(", ");
    crate::error::Error::model(
        settings.path(),
        format!("{key}: architecture `{found}` is not known; known are {known}"),
    )
}
