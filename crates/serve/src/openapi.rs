//! The server's OpenAPI document, written from the table of fields.

use serde_json::{Map, Value, json};

use crate::fields::{Effect, Endpoint, FIELDS, Field, Kind};

/// The document, for a server of these models, the base first.
pub(crate) fn document(models: &[&str]) -> Value {
    let model = models.first().copied().unwrap_or_default();
    let error = |status: &str| (status.to_owned(), json!({"$ref": "#/components/responses/Error"}));
    let errors: Map<String, Value> =
        ["400", "401", "403", "404", "405", "408", "413", "429", "500", "503", "504"]
            .map(error)
            .into_iter()
            .collect();
    let answer = |about: &str, schema: Value| {
        let mut responses = errors.clone();
        responses.insert(
            "200".into(),
            json!({"description": about, "content": {"application/json": {"schema": schema}}}),
        );
        responses
    };
    let post = |endpoint: Endpoint, about: &str| {
        let mut responses = answer(about, json!({"type": "object", "required": ["id", "choices"]}));
        responses["200"]["content"]["text/event-stream"] = json!({"schema": {"type": "string"}});
        json!({"post": {
            "summary": about, "security": [{"key": []}, {}],
            "requestBody": {"required": true, "content": {"application/json": {"schema": body(endpoint)}}},
            "responses": responses,
        }})
    };
    let get = |about: &str, kind: &str| {
        let mut responses = errors.clone();
        responses.insert("200".into(), json!({"description": about, "content": {kind: {}}}));
        json!({"get": {"summary": about, "security": [{"key": []}, {}], "responses": responses}})
    };
    let names: Vec<Value> = models.iter().map(|&name| name.into()).chain([Value::Null]).collect();
    let tokenize = json!({
        "type": "object", "additionalProperties": false, "required": ["prompt"],
        "properties": {
            "model": {"type": ["string", "null"], "enum": names}, "prompt": {"type": "string"},
            "add_special_tokens": {"type": "boolean"}, "parse_special": {"type": "boolean"},
        },
    });
    let detokenize = json!({
        "type": "object", "additionalProperties": false, "required": ["tokens"],
        "properties": {
            "model": {"type": ["string", "null"], "enum": [model, null]},
            "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        },
    });
    let mut one_model = get("A model.", "application/json");
    one_model["get"]["parameters"] =
        json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
    json!({
        "openapi": "3.1.0",
        "info": {"title": format!("Engram: {model}"), "version": env!("CARGO_PKG_VERSION")},
        "paths": {
            "/v1/completions": post(Endpoint::Completions, "Continues texts."),
            "/v1/chat/completions": post(Endpoint::Chat, "Continues a conversation."),
            "/tokenize": {"post": {
                "summary": "The tokens of a text.", "security": [{"key": []}, {}],
                "requestBody": {"required": true, "content": {"application/json": {"schema": tokenize}}},
                "responses": answer("The tokens.", json!({"type": "object", "required": ["tokens", "count"]})),
            }},
            "/v1/models": get("The models: the base, and each adapter by its name.", "application/json"),
            "/detokenize": {"post": {
                "summary": "The text of tokens.", "security": [{"key": []}, {}],
                "requestBody": {"required": true, "content": {"application/json": {"schema": detokenize}}},
                "responses": answer("The text.", json!({"type": "object", "required": ["prompt"]})),
            }},
            "/tokenizer_info": get("Names of the tokens around texts, and the chat template.", "application/json"),
            "/v1/models/{id}": one_model,
            "/health": get("Whether requests can be answered.", "application/json"),
            "/metrics": get("Counters.", "text/plain"),
            "/openapi.json": get("This document.", "application/json"),
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "responses": {"Error": {
                "description": "Why there is no answer.",
                "content": {"application/json": {"schema": {
                    "type": "object", "required": ["error"],
                    "properties": {"error": {
                        "type": "object", "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"}, "type": {"type": "string"},
                            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
                        },
                    }},
                }}},
            }},
        },
    })
}

fn body(endpoint: Endpoint) -> Value {
    let fields = FIELDS.iter().filter(|field| field.endpoints.contains(&endpoint));
    let properties: Map<String, Value> =
        fields.map(|field| (field.name.to_owned(), property(field))).collect();
    let required = if endpoint == Endpoint::Chat { "messages" } else { "prompt" };
    json!({"type": "object", "additionalProperties": false, "required": [required], "properties": properties})
}

/// A field's values; null is one of them, unless it is what the request is about.
fn property(field: &Field) -> Value {
    let mut schema = match (field.name, field.effect) {
        ("messages", _) => messages(),
        (_, Effect::Only(values)) => {
            let values = values.iter().filter_map(|value| serde_json::from_str::<Value>(value).ok());
            json!({"enum": values.chain([Value::Null]).collect::<Vec<_>>()})
        }
        _ => schema(field.kind),
    };
    if !["messages", "prompt"].contains(&field.name) && schema.get("enum").is_none() {
        schema = json!({"anyOf": [schema, {"type": "null"}]});
    }
    schema["description"] = field.about.into();
    schema
}

fn schema(kind: Kind) -> Value {
    let within = |kind: &str, low: Value, high: Value| {
        let mut schema = json!({"type": kind});
        if !low.is_null() {
            schema["minimum"] = low;
        }
        if !high.is_null() {
            schema["maximum"] = high;
        }
        schema
    };
    let finite = |number: f64| if number.abs() < f64::MAX { json!(number) } else { Value::Null };
    let texts = json!({"type": "array", "items": {"type": "string"}});
    match kind {
        Kind::Bool => json!({"type": "boolean"}),
        Kind::Integer(low, high) => {
            let small = |number: i128| {
                i64::try_from(number)
                    .ok()
                    .filter(|number| number.checked_abs().is_none_or(|size| size < i64::MAX))
                    .map_or(Value::Null, Value::from)
            };
            within("integer", small(low), small(high))
        }
        Kind::Number(low, high) => within("number", finite(low), finite(high)),
        Kind::Text => json!({"type": "string"}),
        Kind::TextOrTexts => json!({"anyOf": [{"type": "string"}, texts]}),
        Kind::Integers => json!({"type": "array", "items": {"type": "integer"}}),
        Kind::Prompts => {
            let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
            json!({"anyOf": [{"type": "string"}, texts, tokens, {"type": "array", "items": tokens}]})
        }
        Kind::List => json!({"type": "array"}),
        Kind::Object => json!({"type": "object"}),
        Kind::TextOrObject => json!({"anyOf": [{"type": "string"}, {"type": "object"}]}),
        Kind::Any => json!({}),
    }
}

fn messages() -> Value {
    let part = json!({
        "type": "object", "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    });
    json!({"type": "array", "minItems": 1, "items": {
        "type": "object", "required": ["role", "content"],
        "properties": {
            "role": {"type": "string", "minLength": 1},
            "content": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": part}]},
            "name": {"type": ["string", "null"]},
            "refusal": {"type": ["string", "null"]},
        },
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_in_the_document() {
        let document = document(&["run"]);
        for field in FIELDS {
            for endpoint in field.endpoints {
                let body =
                    &document["paths"][endpoint.path()]["post"]["requestBody"]["content"]["application/json"];
                let property = &body["schema"]["properties"][field.name];
                assert_eq!(property["description"], field.about, "{}", field.name);
            }
        }
    }
}
