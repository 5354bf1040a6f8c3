//! Values as Python writes them: `str`, `repr` and `json.dumps`.
//!
//! Chat templates are written for Jinja on Python. There `{{ true }}` is `True`, and a dictionary has single quotes.

use std::fmt::Write;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// `str(value)`; an undefined value is empty, as Jinja has it.
pub(crate) fn text_of(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        write_repr(&mut out, value)?;
    }
    Ok(out)
}

/// Adds `repr(value)`.
pub(crate) fn write_repr(out: &mut String, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write_repr(out, &key)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter()? {
                out.push_str(if count == 0 { "" } else { ", " });
                write_repr(out, &item)?;
                count += 1;
            }
            // A tuple of one is told from a value in brackets by its comma.
            out.push_str(if count == 1 && value.is_tuple() { "," } else { "" });
            out.push(close);
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// `repr` of a float: the shortest digits, in scientific form from 1e16 on and below 1e-4.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// A text in quotes: single ones, unless it has such and no double ones.
fn quote(out: &mut String, text: &str) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for letter in text.chars() {
        match letter {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            letter if letter == mark => {
                out.push('\\');
                out.push(letter);
            }
            letter if (letter as u32) < 0x20 || (0x7f..0xa0).contains(&(letter as u32)) => {
                let _ = write!(out, "\\x{:02x}", letter as u32);
            }
            letter => out.push(letter),
        }
    }
    out.push(mark);
}

/// How `json.dumps` writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct JsonStyle {
    /// Letters outside ASCII are written as `\uXXXX`.
    pub(crate) ascii: bool,
    /// What a level is indented by; none: everything in one line.
    pub(crate) indent: Option<String>,
    /// Between items, and between a key and its value.
    pub(crate) separators: (String, String),
    pub(crate) sort_keys: bool,
}

impl JsonStyle {
    /// As a chat template's `tojson` writes without arguments.
    pub(crate) fn plain() -> Self {
        Self { ascii: false, indent: None, separators: (", ".into(), ": ".into()), sort_keys: false }
    }
}

/// `json.dumps(value)`.
pub(crate) fn json(value: &Value, style: &JsonStyle) -> Result<String, Error> {
    let mut out = String::new();
    write_json(&mut out, value, style, 0)?;
    Ok(out)
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(match &number(value)[..] {
            "nan" => "NaN",
            "inf" => "Infinity",
            "-inf" => "-Infinity",
            number => number,
        }),
        ValueKind::String => json_text(out, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                entries.push((json_key(&key)?, value.get_item(&key)?));
            }
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            let write = |out: &mut String, (key, value): &(String, Value)| {
                json_text(out, key, style.ascii);
                out.push_str(&style.separators.1);
                write_json(out, value, style, depth + 1)
            };
            write_items(out, ('{', '}'), &entries, style, depth, write)?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            let write = |out: &mut String, value: &Value| write_json(out, value, style, depth + 1);
            write_items(out, ('[', ']'), &items, style, depth, write)?;
        }
        kind => {
            let problem = format!("a value of kind {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, problem));
        }
    }
    Ok(())
}

fn write_items<T>(
    out: &mut String,
    (open, close): (char, char),
    items: &[T],
    style: &JsonStyle,
    depth: usize,
    write: impl Fn(&mut String, &T) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(open);
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent.as_ref().filter(|_| !items.is_empty()) {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    for (index, item) in items.iter().enumerate() {
        out.push_str(if index == 0 { "" } else { &style.separators.0 });
        line(out, depth + 1);
        write(out, item)?;
    }
    line(out, depth);
    out.push(close);
    Ok(())
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => json(key, &JsonStyle::plain()),
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("a key of kind {kind} is not JSON"))),
    }
}

fn json_text(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            letter if (letter as u32) < 0x20 || ascii && !(' '..='~').contains(&letter) => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            letter => out.push(letter),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(json: &str) -> Value {
        serde_json::from_str(json).unwrap()
    }

    fn repr(json: &str) -> String {
        text_of(&value(json)).unwrap()
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        assert_eq!(repr("true"), "True");
        assert_eq!(repr("null"), "None");
        assert_eq!(repr(r#""it's""#), "it's");
        assert_eq!(
            repr(r#"{"b": "it's", "a": [1, 2.0, null, false, "\n\u0001é"], "c": {}}"#),
            r#"{'b': "it's", 'a': [1, 2.0, None, False, '\n\x01é'], 'c': {}}"#
        );
        for (json, python) in [
            ("1e16", "1e+16"),
            ("123456789012345680.0", "1.2345678901234568e+17"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("-0.0", "-0.0"),
            ("1.5e300", "1.5e+300"),
            ("100.0", "100.0"),
            ("0.1", "0.1"),
        ] {
            assert_eq!(repr(json), python);
        }
        let tuple = Value::from((1, "a"));
        assert_eq!(text_of(&tuple).unwrap(), "(1, 'a')");
    }

    #[test]
    fn json_is_that_of_json_dumps() {
        let value = value(r#"{"b": "<é & \"'>", "a": [1, 1.0, {}, []], "t": true}"#);
        let plain = JsonStyle::plain();
        assert_eq!(json(&value, &plain).unwrap(), r#"{"b": "<é & \"'>", "a": [1, 1.0, {}, []], "t": true}"#);
        let sorted = JsonStyle { ascii: true, sort_keys: true, ..plain.clone() };
        assert_eq!(
            json(&value, &sorted).unwrap(),
            r#"{"a": [1, 1.0, {}, []], "b": "<\u00e9 & \"'>", "t": true}"#
        );
        let lines = JsonStyle { indent: Some("  ".into()), separators: (",".into(), ": ".into()), ..plain };
        assert_eq!(
            json(&value, &lines).unwrap(),
            "{\n  \"b\": \"<é & \\\"'>\",\n  \"a\": [\n    1,\n    1.0,\n    {},\n    []\n  ],\n  \"t\": true\n}"
        );
        assert!(json(&Value::UNDEFINED, &JsonStyle::plain()).is_err());
    }
}
