//! The settings of a model from outside: `config.json`, or the metadata of a GGUF file, one reader for both.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::gguf::{self, Gguf};

/// Settings by name. What was never asked for and says something is refused in the end: it may change what the model
/// computes.
#[derive(Debug)]
pub(crate) struct Settings {
    path: PathBuf,
    /// What messages call a setting: `config.json`'s keys by themselves, GGUF's with their architecture.
    prefix: String,
    values: Map<String, Value>,
    asked: RefCell<BTreeSet<String>>,
}

/// Keys of `config.json` that speak of training, files, tokens or programs.
const HARMLESS: &[&str] = &[
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "initializer_range",
    "initializer_factor",
    "use_cache",
    "attention_dropout",
    "hidden_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "attn_pdrop",
    "classifier_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "pretraining_tp",
    "output_router_logits",
    "router_aux_loss_coef",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "cache_implementation",
    "auto_map",
    "tokenizer_class",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "return_dict_in_generate",
    "output_scores",
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "finetuning_task",
    "unsloth_version",
    "unsloth_fixed",
    "transformers.js_config",
    "is_llama_config",
    "attn_implementation",
    "attention_type",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "max_length",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "length_penalty",
    "repetition_penalty",
    "diversity_penalty",
    "chunk_size_feed_forward",
    "early_stopping",
    "min_length",
    "use_bfloat16",
    "tie_encoder_decoder",
];

/// Keys of a GGUF file's architecture that say nothing beyond others.
const HARMLESS_IN_GGUF: &[&str] = &[
    "vocab_size",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "attention.causal",
    "interleave_moe_layer_step",
];

impl Settings {
    /// Those of a `config.json`.
    ///
    /// # Errors
    /// When it is not a table.
    pub(crate) fn of_json(path: &Path, values: Value) -> Result<Self> {
        match values {
            Value::Object(values) => {
                let (path, asked) = (path.to_owned(), RefCell::default());
                Ok(Self { path, prefix: String::new(), values, asked })
            }
            _ => Err(Error::model(path, "it is not a table of settings")),
        }
    }

    /// Those of a GGUF file for its architecture.
    pub(crate) fn of_gguf(gguf: &Gguf, architecture: &str) -> Self {
        let prefix = format!("{architecture}.");
        let value = |key: &str, value: &gguf::Value| match value {
            gguf::Value::Unsigned(value) => Value::from(*value),
            gguf::Value::Signed(value) => Value::from(*value),
            gguf::Value::Float(value) => Value::from(*value),
            gguf::Value::Bool(value) => Value::from(*value),
            gguf::Value::Text(text) => Value::from(text.as_str()),
            gguf::Value::Array(_) => gguf.numbers(key).map_or(Value::Null, Value::from),
        };
        let of_architecture = gguf.keys().filter_map(|(key, it)| Some((key.strip_prefix(&prefix)?, key, it)));
        let values = of_architecture
            .filter(|(_, _, it)| !matches!(it, gguf::Value::Text(text) if text == "none"))
            .map(|(short, key, it)| (short.to_owned(), value(key, it)))
            .collect();
        Self { path: gguf.path().to_owned(), prefix, values, asked: RefCell::default() }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A value that is not null.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A whole number, where it is given.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number from 0 on", |value| {
            let whole = value
                .as_u64()
                .or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64));
            // No size is larger: what is computed from sizes does not overflow.
            usize::try_from(whole?).ok().filter(|size| *size < 1 << 28)
        })
    }

    /// A whole number that must be given.
    pub(crate) fn needed(&self, key: &str) -> Result<usize> {
        self.integer(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number, where it is given.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    /// A truth value, where it is given.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A text, where it is given.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.asked.borrow_mut().insert(key.to_owned());
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "is not a text")),
        }
    }

    /// A list of numbers, where it is given.
    pub(crate) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.read(key, "a list of numbers", |value| value.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// A list of texts, where it is given.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.read(key, "a list of texts", |value| {
            value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
        })
    }

    /// A table of settings, where it is given.
    pub(crate) fn table(&self, key: &str) -> Result<Option<Settings>> {
        let table = self.read(key, "a table", |value| value.as_object().cloned())?;
        Ok(table.map(|values| Self {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            values,
            asked: RefCell::default(),
        }))
    }

    /// Refuses a setting unless it is absent or one of `known`.
    pub(crate) fn only(&self, key: &str, known: &[&str]) -> Result<()> {
        match self.text(key)? {
            Some(found) if !known.contains(&found) => {
                Err(self.wrong(key, &format!("is `{found}`; known is `{}`", known.join("`, `"))))
            }
            _ => Ok(()),
        }
    }

    /// An error about a setting.
    pub(crate) fn wrong(&self, key: &str, reason: &str) -> Error {
        Error::model(&self.path, format!("`{}{key}` {reason}", self.prefix))
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        self.wrong(key, "is missing")
    }

    /// Refuses the first setting that nobody asked for and that says something.
    pub(crate) fn refuse_others(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let known = if self.prefix.is_empty() { HARMLESS } else { HARMLESS_IN_GGUF };
        let harmless = |key: &str| key.starts_with('_') || known.contains(&key);
        match self
            .values
            .iter()
            .find(|(key, value)| !asked.contains(*key) && !harmless(key) && !is_neutral(value))
        {
            Some((key, value)) => {
                let mut shown = value.to_string();
                shown.truncate(shown.floor_char_boundary(60));
                Err(self.wrong(
                    key,
                    &format!("is {shown}, which is not known: it may change what the model computes"),
                ))
            }
            None => Ok(()),
        }
    }

    fn read<T>(&self, key: &str, kind: &str, convert: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.value(key) {
            Some(value) => match convert(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.wrong(key, &format!("is not {kind}"))),
            },
            None => Ok(None),
        }
    }
}

fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
    }
}
