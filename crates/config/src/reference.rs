//! The configuration reference of the book is made from the code's own comments. Every key needs one.
//!
//!     UPDATE=1 cargo test --release -p engram -p engram-config --lib reference      # rewrites docs/configuration.md

use std::fmt::Write;
use std::path::Path;

use crate::run::RunConfig;
use serde_json::{Map, Value};

const HEAD: &str = "# Configuration

A run is one TOML file. `engram params FILE` checks it and prints what the model costs. A key that is not listed here is
refused with its line. Relative paths count from the folder of the file.

This page is made from the comments in `crates/config/src`.
";

/// The schema's tables, each once, in order of appearance.
struct Reference<'a> {
    definitions: &'a Map<String, Value>,
    text: String,
    done: Vec<String>,
    undocumented: Vec<String>,
}

impl<'a> Reference<'a> {
    /// Resolves a reference; a schema that is none is returned as it is.
    fn resolve(&self, schema: &'a Value) -> &'a Value {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(path) => &self.definitions[path.rsplit('/').next().unwrap()],
            None => schema,
        }
    }

    /// The schema of a value; of an optional value, the schema inside.
    fn inner(&self, schema: &'a Value) -> &'a Value {
        let any = schema.get("anyOf").and_then(Value::as_array);
        let given = any.and_then(|any| any.iter().find(|one| one.get("type") != Some(&"null".into())));
        self.resolve(given.unwrap_or(schema))
    }

    /// A section for the table at `path`, then sections for the tables inside.
    fn table(&mut self, path: &str, schema: &'a Value) {
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
        let title = if path.is_empty() { "The file".to_owned() } else { format!("`[{path}]`") };
        write!(self.text, "\n## {title}\n\n{}\n\n", sentence(schema)).unwrap();
        self.keys(path, schema, properties);
        for (key, property) in properties {
            let inner = self.inner(property);
            let place = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            if self.done.contains(&place) {
                continue;
            }
            self.done.push(place.clone());
            if let Some(choices) = choices(inner) {
                self.choices(&place, inner, choices);
            } else if let Some(items) = inner.get("items") {
                // A list of tables has a header in double brackets.
                self.table(&format!("[{place}]"), self.inner(items));
            } else {
                self.table(&place, inner);
            }
        }
    }

    fn keys(&mut self, path: &str, schema: &Value, properties: &'a Map<String, Value>) {
        let required = schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
        self.text += "| key | type | default | |\n|---|---|---|---|\n";
        for (key, property) in properties {
            let text = sentence(property);
            if text.is_empty() {
                self.undocumented.push(format!("{path}.{key}"));
            }
            let default = match property.get("default") {
                _ if required.contains(&Value::from(key.clone())) => "required".to_owned(),
                Some(Value::Null) | None => "–".to_owned(),
                Some(Value::Object(_)) => "see below".to_owned(),
                Some(value) => format!("`{}`", rounded(value)),
            };
            let kind = self.kind(property);
            writeln!(self.text, "| `{key}` | {kind} | {default} | {text} |").unwrap();
        }
    }

    /// A section for a key that takes one of several forms.
    fn choices(&mut self, place: &str, schema: &Value, choices: &'a [Value]) {
        write!(self.text, "\n## `{place}`\n\n{}\n\n", sentence(schema)).unwrap();
        for choice in choices {
            let text = match sentence(choice) {
                text if text.is_empty() => sentence(self.resolve(choice)),
                text => text,
            };
            let choice = self.resolve(choice);
            let values = choice.get("enum").and_then(Value::as_array).cloned();
            let values = values.or_else(|| choice.get("const").map(|value| vec![value.clone()]));
            if let Some(values) = values {
                let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
                if text.is_empty() {
                    self.undocumented.push(format!("{place} = {}", values.join(", ")));
                }
                writeln!(self.text, "* {}: {text}", values.join(", ")).unwrap();
            } else if let Some(properties) = choice.get("properties").and_then(Value::as_object) {
                self.form(place, choice, properties, &text);
            }
        }
    }

    /// One form of a key: a table that names its kind, or one with a single key.
    fn form(&mut self, place: &str, choice: &Value, properties: &'a Map<String, Value>, text: &str) {
        let tag = properties.iter().find_map(|(key, value)| Some(format!("{key} = {}", value.get("const")?)));
        let name = tag.clone().unwrap_or_else(|| properties.keys().cloned().collect::<Vec<_>>().join(", "));
        write!(self.text, "\n**`{name}`**: {text}\n\n").unwrap();
        let single = properties.values().next().map(|value| self.resolve(value)).filter(|_| tag.is_none());
        let inner = single.and_then(|inner| Some((inner, inner.get("properties")?.as_object()?)));
        match inner {
            Some((inner, properties)) => self.keys(place, inner, properties),
            None if tag.is_some() => {
                self.tagged(place, choice, properties);
            }
            None => {
                let kind = properties.values().next().map(|value| self.kind(value)).unwrap_or_default();
                writeln!(self.text, "A {kind}.").unwrap();
            }
        }
        self.text.push('\n');
    }

    fn tagged(&mut self, place: &str, choice: &Value, properties: &'a Map<String, Value>) {
        let required = choice.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
        self.text += "| key | type | | |\n|---|---|---|---|\n";
        for (key, value) in properties.iter().filter(|(_, value)| value.get("const").is_none()) {
            let text = sentence(value);
            if text.is_empty() {
                self.undocumented.push(format!("{place}.{key}"));
            }
            let kind = self.kind(value);
            let needed = if required.contains(&Value::from(key.clone())) { "required" } else { "" };
            writeln!(self.text, "| `{key}` | {kind} | {needed} | {text} |").unwrap();
        }
    }

    fn kind(&self, schema: &'a Value) -> String {
        let inner = self.inner(schema);
        if choices(inner).is_some() {
            return "choice".into();
        }
        let kind = match inner.get("type") {
            Some(Value::Array(kinds)) => kinds.iter().find(|kind| **kind != "null").cloned(),
            kind => kind.cloned(),
        };
        match kind.as_ref().and_then(Value::as_str) {
            Some("integer") => "whole number".into(),
            Some("number") => "number".into(),
            Some("boolean") => "true or false".into(),
            Some("string") if inner.get("enum").is_some() => "choice".into(),
            Some("string") => "text".into(),
            Some("array") => match inner.get("items") {
                Some(items) => format!("list of {}s", self.kind(items)),
                None => "list".into(),
            },
            Some("object") => "table".into(),
            _ => "value".into(),
        }
    }
}

fn choices(schema: &Value) -> Option<&[Value]> {
    let choices = schema.get("oneOf").or_else(|| schema.get("anyOf"))?;
    choices.as_array().map(Vec::as_slice)
}

/// A schema's comment on one line, without links.
fn sentence(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or("");
    let text = text.replace("\n\n", " ").replace('\n', " ").replace('|', "\\|");
    let mut plain = String::new();
    let mut rest = text.as_str();
    // [`Name`](path) and [`Name`] become `Name`.
    while let Some(start) = rest.find("[`") {
        let Some(end) = rest[start..].find("`]").map(|end| start + end) else { break };
        plain += &rest[..start];
        plain += &rest[start + 1..=end];
        rest = &rest[end + 2..];
        if rest.starts_with('(') {
            rest = rest.split_once(')').map_or("", |(_, rest)| rest);
        }
    }
    plain + rest
}

/// A default as written in a file; an f32 with its own digits.
fn rounded(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => format!("{}", number.as_f64().unwrap() as f32),
        Value::Array(values) => format!("[{}]", values.iter().map(rounded).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

#[test]
fn the_book_lists_every_key() {
    let schema = serde_json::to_value(schemars::schema_for!(RunConfig)).unwrap();
    let none = Map::new();
    let definitions = schema.get("$defs").and_then(Value::as_object).unwrap_or(&none);
    let mut reference =
        Reference { definitions, text: HEAD.to_owned(), done: Vec::new(), undocumented: Vec::new() };
    reference.table("", &schema);
    assert!(reference.undocumented.is_empty(), "keys without a comment: {:?}", reference.undocumented);

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &reference.text).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == reference.text,
        "docs/configuration.md differs from the comments: run `UPDATE=1 cargo test --release -p engram -p engram-config --lib reference`"
    );
}
