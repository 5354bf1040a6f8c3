//! Every field of a request that OpenAI's API, and others in its form, document: what values it takes, and what they do.
//!
//! The table decides what is accepted, and writes the server's OpenAPI document. A field that is null, or empty, counts as
//! absent. One that would change the answer in a way that this server does not know is refused by its name.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::api_error::ApiError;

/// Whether a text is completed or a conversation continued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Completions,
    Chat,
}

impl Endpoint {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// What JSON a field takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Bool,
    /// A whole number within bounds.
    Integer(i128, i128),
    /// A number within bounds.
    Number(f64, f64),
    Text,
    /// A text or a list of texts.
    TextOrTexts,
    Integers,
    /// A text, a list of texts, a list of tokens, or a list of such lists.
    Prompts,
    List,
    Object,
    /// A text or an object.
    TextOrObject,
    Any,
}

/// What a field does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Effect {
    /// What its documentation says.
    Honoured,
    /// Nothing, whatever its value is: it does not concern the answer's text.
    None,
    /// Only these values, in JSON, are taken: they say what happens anyway.
    Only(&'static [&'static str]),
}

/// A documented field.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) endpoints: &'static [Endpoint],
    pub(crate) kind: Kind,
    pub(crate) effect: Effect,
    pub(crate) about: &'static str,
}

const BOTH: &[Endpoint] = &[Endpoint::Completions, Endpoint::Chat];
const CHAT: &[Endpoint] = &[Endpoint::Chat];
const TEXT: &[Endpoint] = &[Endpoint::Completions];

/// Choices of a request at most.
pub(crate) const MOST_CHOICES: usize = 128;
/// Likeliest tokens that a request may have at each place.
pub(crate) const MOST_LOGPROBS: usize = 20;
const MANY: i128 = i64::MAX as i128;

const fn field(
    name: &'static str,
    endpoints: &'static [Endpoint],
    kind: Kind,
    effect: Effect,
    about: &'static str,
) -> Field {
    Field { name, endpoints, kind, effect, about }
}

use Effect::{Honoured, Only};
use Kind::{Any, Bool, Integer, Integers, List, Number, Object, Prompts, Text, TextOrObject, TextOrTexts};

const NOTHING: Effect = Effect::None;

/// The fields, in the order of OpenAI's documentation, then those of others, then our own.
pub(crate) const FIELDS: &[Field] = &[
    field("model", BOTH, Text, Honoured, "Name of the model, as /v1/models has it."),
    field("prompt", TEXT, Prompts, Honoured, "What to continue. Names of special tokens are those tokens."),
    field("messages", CHAT, List, Honoured, "The conversation so far."),
    field("max_tokens", BOTH, Integer(0, MANY), Honoured, "Tokens of the answer at most."),
    field("max_completion_tokens", BOTH, Integer(0, MANY), Honoured, "The same by its newer name."),
    field(
        "temperature",
        BOTH,
        Number(0.0, f64::MAX),
        Honoured,
        "Logits are divided by it; 0 takes the likeliest token.",
    ),
    field(
        "top_p",
        BOTH,
        Number(0.0, 1.0),
        Honoured,
        "Only the likeliest tokens that together reach this probability.",
    ),
    field("n", BOTH, Integer(1, MOST_CHOICES as i128), Honoured, "Choices for each prompt."),
    field("best_of", TEXT, Integer(1, MANY), Honoured, "Taken if it is 1 or `n`."),
    field("stream", BOTH, Bool, Honoured, "Whether the answer comes as server-sent events."),
    field(
        "stream_options",
        BOTH,
        Object,
        Honoured,
        "`include_usage`: whether the last event tells the usage.",
    ),
    field(
        "stop",
        BOTH,
        TextOrTexts,
        Honoured,
        "Texts, or names of special tokens, before which an answer ends.",
    ),
    field(
        "presence_penalty",
        BOTH,
        Number(-2.0, 2.0),
        Honoured,
        "Taken from the logits of tokens that were generated.",
    ),
    field("frequency_penalty", BOTH, Number(-2.0, 2.0), Honoured, "The same for each time that they were."),
    field("logit_bias", BOTH, Object, Honoured, "Added to the logits of tokens, by their ids."),
    field(
        "logprobs",
        TEXT,
        Integer(0, MOST_LOGPROBS as i128),
        Honoured,
        "Likeliest tokens to tell at each place.",
    ),
    field("logprobs", CHAT, Bool, Honoured, "Whether probabilities are told."),
    field(
        "top_logprobs",
        CHAT,
        Integer(0, MOST_LOGPROBS as i128),
        Honoured,
        "Likeliest tokens to tell at each place.",
    ),
    field("echo", TEXT, Bool, Honoured, "Whether the answer begins with the prompt."),
    field("echo", CHAT, Bool, Only(&["false"]), "Whether the answer begins with the last message."),
    field("suffix", TEXT, Text, Only(&[]), "A text that comes after the answer."),
    field("seed", BOTH, Integer(i64::MIN as i128, u64::MAX as i128), Honoured, "Seed of the draw."),
    field("user", BOTH, Text, NOTHING, "The user behind the request."),
    field("safety_identifier", BOTH, Text, NOTHING, "The user behind the request."),
    field("metadata", BOTH, Object, NOTHING, "Labels of the request."),
    field("store", BOTH, Bool, NOTHING, "Whether the provider keeps the answer; this server keeps none."),
    field("service_tier", BOTH, Text, NOTHING, "How soon a provider answers."),
    field("prompt_cache_key", BOTH, Text, NOTHING, "Which prompts begin alike; this server finds that out."),
    field("prompt_cache_retention", BOTH, Text, NOTHING, "How long a provider keeps prompts."),
    field("prediction", CHAT, Object, NOTHING, "A guess at the answer, for speed."),
    field("modalities", CHAT, List, Only(&["[\"text\"]"]), "Kinds of output."),
    field("audio", CHAT, Object, Only(&[]), "How speech sounds."),
    field("web_search_options", CHAT, Object, Only(&[]), "Where to search."),
    field("verbosity", CHAT, Text, Only(&["\"medium\""]), "How long answers are."),
    field("reasoning_effort", CHAT, Text, Honoured, "A variable of the chat template."),
    field(
        "response_format",
        BOTH,
        Object,
        Honoured,
        "`text`, `json_object`, or `json_schema` with a schema that the answer follows.",
    ),
    field("tools", CHAT, List, Honoured, "Functions that the assistant may call."),
    field(
        "tool_choice",
        CHAT,
        TextOrObject,
        Honoured,
        "`none`, `auto`, `required`, or the function to be called.",
    ),
    field("parallel_tool_calls", CHAT, Bool, Honoured, "Whether an answer may call several functions."),
    field("functions", CHAT, List, Only(&[]), "The older form of `tools`."),
    field(
        "function_call",
        CHAT,
        TextOrObject,
        Only(&["\"none\"", "\"auto\""]),
        "The older form of `tool_choice`.",
    ),
    // vLLM, llama.cpp and others.
    field("top_k", BOTH, Integer(-1, MANY), Honoured, "Only so many of the likeliest tokens; 0 or -1: all."),
    field(
        "min_p",
        BOTH,
        Number(0.0, 1.0),
        Honoured,
        "Only tokens at least this times as probable as the likeliest.",
    ),
    field(
        "repetition_penalty",
        BOTH,
        Number(0.0, f64::MAX),
        Honoured,
        "Divides the logits of tokens that occurred.",
    ),
    field(
        "min_tokens",
        BOTH,
        Integer(0, MANY),
        Honoured,
        "Tokens before which an answer does not end by itself.",
    ),
    field("ignore_eos", BOTH, Bool, Honoured, "Whether the answer goes on at tokens that end it."),
    field("stop_token_ids", BOTH, Integers, Honoured, "More tokens that end an answer."),
    field("include_stop_str_in_output", BOTH, Bool, Only(&["false"]), "Whether the stop text is told."),
    field(
        "skip_special_tokens",
        BOTH,
        Bool,
        Only(&["true"]),
        "Whether special tokens have no text in answers.",
    ),
    field(
        "spaces_between_special_tokens",
        BOTH,
        Bool,
        NOTHING,
        "How special tokens would be written in answers.",
    ),
    field(
        "add_special_tokens",
        TEXT,
        Bool,
        Honoured,
        "Whether what stands before a document is added to a text.",
    ),
    field(
        "add_special_tokens",
        CHAT,
        Bool,
        Only(&["false"]),
        "Whether tokens are added to the template's text.",
    ),
    field(
        "parse_special",
        TEXT,
        Bool,
        Honoured,
        "Whether names of special tokens in a text are those tokens.",
    ),
    field("add_generation_prompt", CHAT, Bool, Honoured, "Whether the template begins the assistant's turn."),
    field("continue_final_message", CHAT, Bool, Only(&["false"]), "Whether the last message is continued."),
    field("chat_template", CHAT, Text, Only(&[]), "Another template than the server's."),
    field("chat_template_kwargs", CHAT, Object, Honoured, "Variables of the chat template."),
    field("documents", CHAT, List, Honoured, "Texts for the chat template."),
    field("truncate_prompt_tokens", BOTH, Any, Only(&[]), "Tokens of the prompt that are kept."),
    field("prompt_logprobs", BOTH, Any, Only(&["false"]), "Use `echo` with `logprobs`."),
    field("guided_json", BOTH, Any, Only(&[]), "Use `response_format`."),
    field("guided_regex", BOTH, Any, Only(&[]), "Use `response_format`."),
    field("guided_choice", BOTH, Any, Only(&[]), "Use `response_format`."),
    field("guided_grammar", BOTH, Any, Only(&[]), "Use `response_format`."),
    field("structured_outputs", BOTH, Any, Only(&[]), "Use `response_format`."),
    field("use_beam_search", BOTH, Bool, Only(&["false"]), "Whether answers are searched for."),
    field(
        "length_penalty",
        BOTH,
        Number(f64::MIN, f64::MAX),
        NOTHING,
        "Of a search, which this server has not.",
    ),
    field("typical_p", BOTH, Number(0.0, 1.0), Only(&["1", "1.0"]), "Another way to cut the tail."),
    field("mirostat", BOTH, Integer(0, 2), Only(&["0"]), "Another way to draw."),
    field("cache_prompt", BOTH, Bool, NOTHING, "Whether the prompt is kept; answers are the same."),
    field("cache_salt", BOTH, Text, NOTHING, "Whose prompts share the cache."),
    field("priority", BOTH, Integer(-MANY, MANY), Only(&["0"]), "Who is answered first."),
    field("request_id", BOTH, Text, NOTHING, "The client's name for the request."),
    field(
        "return_tokens_as_token_ids",
        BOTH,
        Bool,
        Only(&["false"]),
        "Whether tokens are told by their ids.",
    ),
    field("reasoning", CHAT, Object, Only(&[]), "How a model reasons."),
    field("thinking", CHAT, Object, Only(&[]), "How a model reasons."),
    field(
        "include_reasoning",
        CHAT,
        Bool,
        NOTHING,
        "Whether reasoning is told apart; this server does not tell it apart.",
    ),
    // Our own.
    field("memory", BOTH, Bool, Honoured, "Whether the memory is read."),
    field("gates", BOTH, Bool, Honoured, "Whether the memory's gates are told, position by position."),
];

/// The fields of a body, still as JSON, without those that say nothing.
#[derive(Debug)]
pub(crate) struct Fields(Vec<(String, Box<RawValue>)>);

impl Fields {
    /// Reads a JSON object, behind a byte-order mark if there is one.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        let mut reader = serde_json::Deserializer::from_slice(bytes);
        let fields = reader.deserialize_map(Entries).and_then(|fields| reader.end().map(|()| fields));
        fields.map(Self).map_err(|error| ApiError::bad(format!("invalid request body: {error}")))
    }

    /// Checks every field by the table, and leaves out those that say nothing.
    pub(crate) fn checked(self, endpoint: Endpoint) -> Result<Self, ApiError> {
        let mut kept = Vec::new();
        for (name, raw) in self.0 {
            if check(&name, &raw, endpoint)? {
                kept.push((name, raw));
            }
        }
        Ok(Self(kept))
    }

    /// The fields of an object that has only these.
    pub(crate) fn only(self, names: &[&str]) -> Result<Self, ApiError> {
        match self.0.iter().find(|(name, _)| !names.contains(&&name[..])) {
            Some((name, _)) => Err(unknown(name)),
            None => Ok(Self(self.0.into_iter().filter(|(_, raw)| raw.get() != "null").collect())),
        }
    }

    /// The JSON of a field.
    pub(crate) fn raw(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, raw)| raw.get())
    }

    /// A field's value.
    pub(crate) fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(raw).map(Some).map_err(|error| ApiError::of(name, format!("`{name}`: {error}")))
    }

    /// A whole number, which may be written as 5.0.
    pub(crate) fn integer(&self, name: &str) -> Result<Option<i128>, ApiError> {
        Ok(self.get::<Value>(name)?.as_ref().and_then(whole))
    }

    /// A count.
    pub(crate) fn count(&self, name: &str) -> Result<Option<usize>, ApiError> {
        Ok(self.integer(name)?.map(|count| usize::try_from(count).unwrap_or(usize::MAX)))
    }
}

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, Box<RawValue>)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries: Self::Value = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
            if entries.iter().any(|(found, _)| *found == name) {
                return Err(serde::de::Error::custom(format!("`{name}` stands there twice")));
            }
            entries.push((name, value));
        }
        Ok(entries)
    }
}

fn unknown(name: &str) -> ApiError {
    ApiError::of(name, format!("unknown field `{name}`")).coded("unknown_parameter")
}

/// Whether a field says something; an error where it says what this server cannot do.
fn check(name: &str, raw: &RawValue, endpoint: Endpoint) -> Result<bool, ApiError> {
    let known = FIELDS.iter().filter(|field| field.name == name);
    let Some(field) = known.clone().find(|field| field.endpoints.contains(&endpoint)) else {
        return match known.clone().next() {
            Some(_) if raw.get() == "null" => Ok(false),
            Some(other) => {
                let path = other.endpoints[0].path();
                Err(ApiError::of(name, format!("`{name}` belongs to the other endpoint, {path}")))
            }
            None => Err(unknown(name)),
        };
    };
    if raw.get() == "null" {
        return Ok(false);
    }
    if matches!(field.kind, Prompts) || name == "messages" {
        // What is in them is read where they are used.
        return Ok(true);
    }
    let value: Value = serde_json::from_str(raw.get())
        .map_err(|error| ApiError::of(name, format!("`{name}` is {}: {error}", short(raw.get()))))?;
    if is_blank(&value) && name != "stop" {
        return Ok(false);
    }
    if field.kind == (Integer(0, MOST_LOGPROBS as i128)) && value == Value::Bool(false) {
        return Ok(false);
    }
    let only = |values: &[&str]| {
        values.iter().any(|one| serde_json::from_str::<Value>(one).ok() == Some(value.clone()))
    };
    match field.effect {
        Honoured if field.kind.takes(&value) => Ok(true),
        Effect::None if field.kind.takes(&value) => Ok(false),
        Only(values) if only(values) => Ok(false),
        Only(_) => {
            let problem = format!("`{name}` is {}, which this server does not support", short(raw.get()));
            Err(ApiError::of(name, problem).coded("unsupported_parameter"))
        }
        _ => {
            let problem = format!("`{name}` must be {}, not {}", field.kind, short(raw.get()));
            Err(ApiError::of(name, problem).coded("invalid_value"))
        }
    }
}

/// The beginning of some JSON.
pub(crate) fn short(json: &str) -> String {
    match json.char_indices().nth(60) {
        Some((end, _)) => json[..end].to_owned() + "…",
        None => json.to_owned(),
    }
}

/// Null, empty, or made up of such: it says nothing.
pub(crate) fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_blank),
        Value::Object(entries) => entries.values().all(is_blank),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A whole number.
fn whole(value: &Value) -> Option<i128> {
    let number = value.as_number()?;
    if let Some(whole) = number.as_i128() {
        return Some(whole);
    }
    number.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 1e30).map(|number| number as i128)
}

impl Kind {
    fn takes(self, value: &Value) -> bool {
        match self {
            Bool => value.is_boolean(),
            Integer(low, high) => whole(value).is_some_and(|number| (low..=high).contains(&number)),
            Number(low, high) => value.as_f64().is_some_and(|number| (low..=high).contains(&number)),
            Text => value.is_string(),
            TextOrTexts => {
                value.is_string() || value.as_array().is_some_and(|texts| texts.iter().all(Value::is_string))
            }
            Integers => value.as_array().is_some_and(|ids| ids.iter().all(|id| whole(id).is_some())),
            List => value.is_array(),
            Object => value.is_object(),
            TextOrObject => value.is_string() || value.is_object(),
            Prompts | Any => true,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bool => f.write_str("true or false"),
            Integer(low, high) => write!(f, "a whole number from {low} to {high}"),
            Number(low, high) if *high == f64::MAX => {
                if *low == f64::MIN {
                    f.write_str("a number")
                } else {
                    write!(f, "a number from {low} on")
                }
            }
            Number(low, high) => write!(f, "a number from {low} to {high}"),
            Text => f.write_str("a text"),
            TextOrTexts => f.write_str("a text or a list of texts"),
            Integers => f.write_str("a list of whole numbers"),
            Prompts => f.write_str("a text, a list of texts, a list of tokens, or a list of such lists"),
            List => f.write_str("a list"),
            Object => f.write_str("an object"),
            TextOrObject => f.write_str("a text or an object"),
            Any => f.write_str("null"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(endpoint: Endpoint, body: &Value) -> Result<Fields, ApiError> {
        Fields::parse(body.to_string().as_bytes())?.checked(endpoint)
    }

    #[test]
    fn a_byte_order_mark_changes_nothing() {
        let marked = Fields::parse("\u{feff}{\"prompt\": \"a\"}".as_bytes()).unwrap();
        assert_eq!(marked.0[0].0, "prompt");
        assert!(Fields::parse("\u{feff}\u{feff}{}".as_bytes()).is_err());
    }

    /// The property that holds for every field, so that nobody has to think of each.
    #[test]
    fn every_field_may_be_null_and_every_other_than_a_prompt_empty() {
        for field in FIELDS {
            for &endpoint in field.endpoints {
                let mut blanks = vec![Value::Null];
                if field.name != "prompt" && field.name != "messages" && field.name != "stop" {
                    blanks.extend([json!(""), json!([]), json!({}), json!({"a": null})]);
                }
                for blank in blanks {
                    let fields = checked(endpoint, &json!({field.name: blank.clone()}));
                    let fields =
                        fields.unwrap_or_else(|error| panic!("{} {blank}: {}", field.name, error.json()));
                    assert!(fields.raw(field.name).is_none());
                }
                if let Only(values) = field.effect {
                    for value in values {
                        let value: Value = serde_json::from_str(value).unwrap();
                        assert!(checked(endpoint, &json!({field.name: value})).is_ok(), "{}", field.name);
                    }
                }
            }
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for field in FIELDS {
            let Only(values) = field.effect else { continue };
            for &endpoint in field.endpoints {
                for value in [json!(true), json!("x"), json!([1]), json!({"a": 1}), json!(7)] {
                    if values.contains(&&value.to_string()[..]) {
                        continue;
                    }
                    let error = checked(endpoint, &json!({field.name: value})).unwrap_err().json();
                    assert_eq!(error["error"]["param"], field.name);
                    assert!(error["error"]["message"].as_str().unwrap().contains(field.name));
                }
            }
        }
    }

    #[test]
    fn values_of_another_kind_say_what_is_taken() {
        for (endpoint, body, words) in [
            (Endpoint::Chat, json!({"n": 0}), "from 1 to 128, not 0"),
            (Endpoint::Chat, json!({"n": 1.5}), "whole number"),
            (Endpoint::Chat, json!({"temperature": "hot"}), "a number from 0 on, not \"hot\""),
            (Endpoint::Chat, json!({"logprobs": 3}), "true or false"),
            (Endpoint::Completions, json!({"logprobs": true}), "number"),
            (Endpoint::Completions, json!({"logprobs": 21}), "20"),
            (Endpoint::Completions, json!({"messages": []}), "other endpoint, /v1/chat/completions"),
            (Endpoint::Chat, json!({"colour": "red"}), "unknown field `colour`"),
            (Endpoint::Chat, json!({"colour": null}), "unknown field `colour`"),
            (Endpoint::Chat, json!({"seed": -9_223_372_036_854_775_808_i64, "stop": 3}), "a text or a list"),
            (Endpoint::Chat, json!(3), "a JSON object"),
        ] {
            let error = checked(endpoint, &body).unwrap_err().json();
            assert!(error["error"]["message"].as_str().unwrap().contains(words), "{body}: {error}");
        }
        let body = json!({"n": 2.0, "seed": 18_446_744_073_709_551_615_u64, "top_k": -1, "temperature": 0});
        let fields = checked(Endpoint::Chat, &body).unwrap();
        assert_eq!((fields.count("n").unwrap(), fields.integer("top_k").unwrap()), (Some(2), Some(-1)));
        assert!(Fields::parse(b"{\"n\": 1, \"n\": 2}").unwrap_err().json().to_string().contains("twice"));
        assert!(Fields::parse(b"{\"n\": 1} x").is_err());
    }
}
