//! `response_format`: what an answer is made of, text or JSON.

use serde_json::{Value, json};

use crate::api_error::ApiError;
use crate::fields::{Fields, short};

const NAME: &str = "response_format";

/// The schema that answers follow; none if they are text.
pub(crate) fn schema(fields: &Fields) -> Result<Option<Value>, ApiError> {
    let Some(format) = fields.get::<Value>(NAME)? else { return Ok(None) };
    let wrong = |problem: String| ApiError::of(NAME, problem);
    let only = |value: &Value, place: &str, known: &[&str]| match value.as_object() {
        None => Err(wrong(format!("`{place}` must be an object, not {}", short(&value.to_string())))),
        Some(found) => match found.keys().find(|key| !known.contains(&&key[..])) {
            Some(key) => {
                Err(wrong(format!("`{place}.{key}` is unknown: `{place}` takes {}", known.join(", "))))
            }
            None => Ok(()),
        },
    };
    match format["type"].as_str() {
        Some("text") => only(&format, NAME, &["type"]).map(|()| None),
        Some("json_object") => only(&format, NAME, &["type"]).map(|()| Some(json!({"type": "object"}))),
        Some("json_schema") => {
            only(&format, NAME, &["type", "json_schema"])?;
            let place = "response_format.json_schema";
            let Some(described) = format.get("json_schema") else {
                return Err(wrong(format!("`{place}` is missing")));
            };
            only(described, place, &["name", "description", "schema", "strict"])?;
            match described.get("schema").filter(|schema| !schema.is_null()) {
                Some(schema) => Ok(Some(schema.clone())),
                None => Err(wrong(format!("`{place}.schema` is missing"))),
            }
        }
        _ => Err(wrong(format!(
            "`response_format.type` is {}, but must be \"text\", \"json_object\" or \"json_schema\"",
            short(&format["type"].to_string())
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(format: Value) -> Result<Option<Value>, String> {
        let body = json!({"response_format": format}).to_string();
        schema(&Fields::parse(body.as_bytes()).unwrap())
            .map_err(|error| error.json()["error"]["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn formats_are_text_or_json() {
        assert_eq!(read(json!({"type": "text"})), Ok(None));
        assert_eq!(read(json!({"type": "json_object"})), Ok(Some(json!({"type": "object"}))));
        let described = json!({"name": "a", "schema": {"type": "array"}, "strict": true, "description": "b"});
        let found = read(json!({"type": "json_schema", "json_schema": described}));
        assert_eq!(found, Ok(Some(json!({"type": "array"}))));
        for (format, problem) in [
            (json!({}), "response_format.type"),
            (json!({"type": "xml"}), "\"xml\""),
            (json!({"type": "json_schema"}), "`response_format.json_schema` is missing"),
            (json!({"type": "json_schema", "json_schema": {"name": "a"}}), "json_schema.schema` is missing"),
            (json!({"type": "json_schema", "json_schema": 3}), "must be an object"),
            (
                json!({"type": "json_schema", "json_schema": {"schemas": {}}}),
                "json_schema.schemas` is unknown",
            ),
            (json!({"type": "json_object", "schema": {}}), "response_format.schema` is unknown"),
        ] {
            let error = read(format.clone()).expect_err(&format.to_string());
            assert!(error.contains(problem), "{format}: {error}");
        }
    }
}
