//! How a model from outside is meant to generate.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::safetensors_folder::json_if_there;

/// What a `generation_config.json`, or a GGUF file, says of generating. Absent: the reader's own default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationSettings {
    /// Tokens that end an answer; the end of a text is among them.
    pub end_tokens: Vec<u32>,
    /// Temperature of sampling; 0 where the likeliest token is always taken.
    pub temperature: Option<f32>,
    /// Tokens to sample from: the likeliest that have this probability together.
    pub top_p: Option<f32>,
    /// Tokens to sample from: so many of the likeliest.
    pub top_k: Option<usize>,
    /// Tokens to sample from: those at least so likely, as a share of the likeliest.
    pub min_p: Option<f32>,
    /// What logits of tokens that occurred are divided by.
    pub repetition_penalty: Option<f32>,
}

/// The file's name, in a folder from the hub and in our checkpoints.
pub(crate) const FILE: &str = "generation_config.json";

impl GenerationSettings {
    /// Those of a folder: its `generation_config.json`, with the ends of `config.json`.
    ///
    /// # Errors
    /// A file that cannot be read, or ends that are not token ids.
    pub(crate) fn of_folder(folder: &Path, config_ends: Option<&Value>) -> Result<Self> {
        let path = folder.join(FILE);
        let file = json_if_there(&path)?.unwrap_or(Value::Null);
        let mut ends = Vec::new();
        for value in [file.get("eos_token_id"), config_ends].into_iter().flatten() {
            ends.extend(
                token_ids(value).ok_or_else(|| Error::model(&path, "`eos_token_id` is not a token id"))?,
            );
        }
        let mut seen = BTreeSet::new();
        ends.retain(|id| seen.insert(*id));
        let number = |key: &str| file.get(key).and_then(Value::as_f64).map(|value| value as f32);
        let sampled = file.get("do_sample").and_then(Value::as_bool);
        Ok(Self {
            end_tokens: ends,
            temperature: if sampled == Some(false) { Some(0.0) } else { number("temperature") },
            top_p: number("top_p"),
            top_k: file.get("top_k").and_then(Value::as_u64).and_then(|value| usize::try_from(value).ok()),
            min_p: number("min_p"),
            repetition_penalty: number("repetition_penalty"),
        })
    }

    /// Those of a GGUF file.
    ///
    /// # Errors
    /// An end that is not a token.
    pub(crate) fn of_gguf(gguf: &Gguf) -> Result<Self> {
        let number =
            |key: &str| gguf.float(&format!("general.sampling.{key}")).ok().map(|value| value as f32);
        Ok(Self {
            end_tokens: crate::gguf_tokenizer::end_tokens(gguf)?,
            temperature: number("temp"),
            top_p: number("top_p"),
            top_k: gguf.integer("general.sampling.top_k").ok(),
            min_p: number("min_p"),
            repetition_penalty: number("penalty_repeat"),
        })
    }

    /// As a `generation_config.json`.
    pub fn to_json(&self) -> String {
        let mut file = json!({"eos_token_id": self.end_tokens});
        let numbers = [
            ("temperature", self.temperature),
            ("top_p", self.top_p),
            ("min_p", self.min_p),
            ("repetition_penalty", self.repetition_penalty),
        ];
        for (key, value) in numbers {
            if let Some(value) = value {
                file[key] = json!(value);
            }
        }
        if let Some(top_k) = self.top_k {
            file["top_k"] = top_k.into();
        }
        if let Some(temperature) = self.temperature {
            file["do_sample"] = (temperature > 0.0).into();
        }
        format!("{file:#}\n")
    }
}

/// One id, or a list of them.
fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    }
}
