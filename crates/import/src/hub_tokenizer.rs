//! The tokenizer and the chat template of a folder from the hub.

use std::path::Path;

use engram_data::{Begin, Tokenizer};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::safetensors_folder::{json_if_there, read_if_there};

/// The tokenizer, and what stands before a text. `begin` and `end` are those of `config.json`.
///
/// # Errors
/// A file that is missing, or is not a tokenizer.
pub(crate) fn read(folder: &Path, begin: Option<u32>, end: Option<u32>) -> Result<(Tokenizer, Begin)> {
    let path = folder.join("tokenizer.json");
    let Some(mut json) = json_if_there(&path)? else {
        let other = ["tokenizer.model", "vocab.json", "tekken.json"]
            .into_iter()
            .find(|name| folder.join(name).exists());
        let problem = match other {
            Some(other) => format!(
                "the file is missing; {other} alone is not read: save the tokenizer by `transformers`' \
                 `AutoTokenizer`, which writes it"
            ),
            None => "the file is missing; download it".into(),
        };
        return Err(Error::model(&path, problem));
    };
    // The file's own bytes where nothing is missing: data prepared with it name it by their hash.
    let bytes = match complete_decoder(&mut json) {
        true => json.to_string().into_bytes(),
        false => std::fs::read(&path).map_err(Error::read(&path))?,
    };
    let config = json_if_there(&folder.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let end = end.and_then(|id| token_name(&json, id)).or_else(|| named(&config, "eos_token"));
    let origin = path.display().to_string();
    let tokenizer = Tokenizer::from_json(&bytes, &origin, end.as_deref())?;
    // The file's own rule for what surrounds a text, applied to none.
    let around = tokenizer.inner().encode_fast("", true);
    let around = around.map_err(|error| Error::model(&path, error))?;
    let asked = config.get("add_bos_token").and_then(Value::as_bool) == Some(true);
    let name = named(&config, "bos_token").and_then(|name| tokenizer.inner().token_to_id(&name));
    let begin = match (around.get_ids().first(), begin.or(name)) {
        (Some(&token), _) => Begin::Always(token),
        (None, Some(token)) if asked => Begin::Always(token),
        (None, Some(token)) => Begin::IfEmpty(token),
        (None, None) => Begin::IfEmpty(tokenizer.end_of_text()),
    };
    Ok((tokenizer, begin))
}

/// The chat template with the names that it may use, as a `tokenizer_config.json`; none if there is none. A file that cannot
/// be read is noted and left out: all but conversations works without.
pub(crate) fn chat_template(folder: &Path, notes: &mut Vec<String>) -> Option<String> {
    let mut readable = |read: Result<Option<Value>>| {
        read.unwrap_or_else(|error| {
            notes.push(format!("no chat template is taken from a file that is damaged: {error}"));
            None
        })
    };
    let mut config = readable(json_if_there(&folder.join("tokenizer_config.json")));
    let map = readable(json_if_there(&folder.join("special_tokens_map.json"))).unwrap_or(Value::Null);
    let beside = match readable(
        read_if_there(&folder.join("chat_template.jinja")).map(|text| text.map(Value::from)),
    ) {
        Some(text) => Some(text),
        None => readable(json_if_there(&folder.join("chat_template.json")))
            .and_then(|file| file.get("chat_template").cloned()),
    };
    let fields = match &mut config {
        Some(Value::Object(fields)) => fields,
        _ => config.insert(json!({})).as_object_mut()?,
    };
    for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        if fields.get(name).is_none_or(Value::is_null)
            && let Some(token) = named(&map, name)
        {
            fields.insert(name.into(), token.into());
        }
    }
    // Newer files have the template beside them, and it counts.
    if let Some(template) = beside {
        fields.insert("chat_template".into(), template);
    }
    let has_one = fields.get("chat_template").is_some_and(|template| !template.is_null());
    config.filter(|_| has_one).map(|config| format!("{config:#}"))
}

/// Gives a byte-level tokenizer the decoder that its file leaves out: without, its texts are letters that stand for
/// bytes. Returns whether it was missing.
fn complete_decoder(json: &mut Value) -> bool {
    let is_byte_level = |value: &Value| value.get("type").and_then(Value::as_str) == Some("ByteLevel");
    let pre = &json["pre_tokenizer"];
    let steps = pre.get("pretokenizers").and_then(Value::as_array);
    let missing = json["decoder"].is_null()
        && (is_byte_level(pre) || steps.is_some_and(|steps| steps.iter().any(is_byte_level)));
    if missing {
        json["decoder"] =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    }
    missing
}

/// The name of a token in a `tokenizer.json`.
fn token_name(json: &Value, id: u32) -> Option<String> {
    let is_it = |value: Option<&Value>| value.and_then(Value::as_u64) == Some(id.into());
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let added =
        added.into_iter().find(|token| is_it(token.get("id"))).and_then(|token| token["content"].as_str());
    let in_vocabulary = || {
        let vocabulary = json["model"]["vocab"].as_object()?;
        vocabulary.iter().find(|(_, found)| is_it(Some(found))).map(|(name, _)| name.as_str())
    };
    added.or_else(in_vocabulary).map(str::to_owned)
}

/// A token that a table names: by itself, or with its properties.
fn named(table: &Value, key: &str) -> Option<String> {
    let token = table.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}
