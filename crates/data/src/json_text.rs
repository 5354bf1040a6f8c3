//! The text of a JSON record: one field's value, without building the others.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

/// The text of a record's field.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JsonText {
    /// A string.
    Text(String),
    /// A string with halves of UTF-16 pairs in it, such as `"\ud83d"`, as WTF-8.
    Halves(Vec<u8>),
}

/// Why a record has no text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JsonProblem {
    /// It is not JSON. Holds the reason, with the column.
    Malformed(String),
    /// It is not an object with a string in that field. Holds what it is.
    Missing(String),
}

/// The text in `field` of the JSON object `json`, which is one record. If the field occurs twice, the last one counts.
pub(crate) fn text_of(json: &str, field: &str) -> Result<JsonText, JsonProblem> {
    let strict = match parse(json, field, Strictness::Text) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => return Ok(JsonText::Text(text)),
            Err(error) => serde_json::Error::custom(error),
        },
        Err(error) => error,
    };
    match parse(json, field, Strictness::Bytes) {
        // Valid JSON was refused for another reason, such as a control character.
        Ok(bytes) if std::str::from_utf8(&bytes).is_err() => Ok(JsonText::Halves(bytes)),
        _ => Err(problem(json, field, &strict)),
    }
}

fn parse(json: &str, field: &str, strictness: Strictness) -> serde_json::Result<Vec<u8>> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let found = Record { field, strictness }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    found.ok_or_else(|| serde_json::Error::custom("no such field"))
}

/// Why the record was refused with `error`. Builds the whole value to find out.
fn problem(json: &str, field: &str, error: &serde_json::Error) -> JsonProblem {
    use serde_json::Value;
    let missing = match serde_json::from_str::<Value>(json) {
        Err(error) => return JsonProblem::Malformed(reason(&error)),
        Ok(Value::Object(record)) => match record.get(field) {
            Some(Value::String(_)) => return JsonProblem::Malformed(reason(error)),
            Some(other) => format!("field {field:?} holds {}, not a string", kind(other)),
            None => {
                let names: Vec<_> = record.keys().map(String::as_str).collect();
                format!("no field {field:?}; the fields are [{}]", names.join(", "))
            }
        },
        Ok(other) => format!("{} in place of an object with a field {field:?}", kind(&other)),
    };
    JsonProblem::Missing(missing)
}

/// serde_json counts lines within the record, which is one line, so only its column is useful.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let reason = message.rsplit_once(" at line ").map_or(message.as_str(), |(reason, _)| reason);
    format!("{reason} at column {}", error.column())
}

fn kind(value: &serde_json::Value) -> &'static str {
    match value {
        serde_json::Value::Null => "null",
        serde_json::Value::Bool(_) => "a boolean",
        serde_json::Value::Number(_) => "a number",
        serde_json::Value::String(_) => "a string",
        serde_json::Value::Array(_) => "an array",
        serde_json::Value::Object(_) => "an object",
    }
}

/// How a string is read.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Strictness {
    /// As JSON has it.
    Text,
    /// As bytes, which may contain halves of UTF-16 pairs.
    Bytes,
}

/// Reads an object and keeps the bytes of one field.
#[derive(Clone, Copy)]
struct Record<'a> {
    field: &'a str,
    strictness: Strictness,
}

impl<'de> DeserializeSeed<'de> for Record<'_> {
    type Value = Option<Vec<u8>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Record<'_> {
    type Value = Option<Vec<u8>>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "an object with a field {:?}", self.field)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key_seed(Bytes(Strictness::Bytes))? {
            if key == self.field.as_bytes() {
                found = Some(map.next_value_seed(Bytes(self.strictness))?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// The bytes of a string.
struct Bytes(Strictness);

impl<'de> DeserializeSeed<'de> for Bytes {
    type Value = Vec<u8>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u8>, D::Error> {
        match self.0 {
            Strictness::Text => deserializer.deserialize_string(self),
            Strictness::Bytes => deserializer.deserialize_byte_buf(self),
        }
    }
}

impl Visitor<'_> for Bytes {
    type Value = Vec<u8>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string")
    }

    fn visit_str<E>(self, text: &str) -> Result<Vec<u8>, E> {
        Ok(text.as_bytes().to_vec())
    }

    fn visit_string<E>(self, text: String) -> Result<Vec<u8>, E> {
        Ok(text.into_bytes())
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }

    fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn text(json: &str) -> Result<JsonText, JsonProblem> {
        text_of(json, "text")
    }

    #[test]
    fn halves_of_pairs_are_told_from_other_faults() {
        assert_eq!(text(r#"{"text": "\ud83d\ude00"}"#), Ok(JsonText::Text("😀".to_owned())));
        for half in [r#"x \ud83d y"#, r#"\ude00"#, r#"\ud83d\ud83d\ude00"#] {
            let json = format!(r#"{{"id": 1, "text": "{half}"}}"#);
            assert!(matches!(text(&json), Ok(JsonText::Halves(_))), "{json}");
        }
        assert_eq!(text(r#"{"text": "x", "\ud83d": "\ude00"}"#), Ok(JsonText::Text("x".to_owned())));
        let control = text("{\"text\": \"a\u{1}b\"}");
        assert!(matches!(control, Err(JsonProblem::Malformed(_))), "{control:?}");
        assert!(matches!(text(r#"{"text": "x"} {"text": "y"}"#), Err(JsonProblem::Malformed(_))));
    }

    #[test]
    fn deep_nesting_elsewhere_is_no_fault() {
        let deep = format!(r#"{{"meta": {}{}, "text": "x"}}"#, "[".repeat(9000), "]".repeat(9000));
        assert_eq!(text(&deep), Ok(JsonText::Text("x".to_owned())));
    }

    proptest! {
        #[test]
        fn any_string_comes_back(text: String, other in "\\PC{0,9}", first: bool) {
            let (text, other) = (Value::from(text), Value::from(other));
            let json = match first {
                true => format!(r#"{{"text": {text}, "b": [{other}, {{"text": 1}}]}}"#),
                false => format!(r#"{{"b": {{"text": {other}}}, "text": {text}}}"#),
            };
            prop_assert_eq!(text_of(&json, "text"), Ok(JsonText::Text(text.as_str().unwrap().to_owned())));
        }

        #[test]
        fn any_input_is_refused_as_by_a_parser(json in "[ -~]{0,40}|\\{\"text\": *[ -~]{0,30}") {
            let value = serde_json::from_str::<Value>(&json).ok();
            let expected = value.as_ref().and_then(|value| value.get("text")?.as_str());
            let found = text_of(&json, "text").ok();
            prop_assert_eq!(found, expected.map(|text| JsonText::Text(text.to_owned())));
        }
    }
}
