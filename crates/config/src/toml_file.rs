//! Configuration files: TOML, with the line of whatever is refused.

use std::path::Path;

use serde::Deserialize;

use crate::error::{ConfigError, Error, Result};

/// Reads a TOML file; its text, too, so that what is refused later can be [located](locate).
///
/// # Errors
/// When the file cannot be read, or does not hold a `T`: with the line.
pub fn load_toml<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<(String, T)> {
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let parsed = toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(&text, span.start));
        Error::Config { path: path.to_owned(), line, problem: error.message().trim().to_owned() }
    })?;
    Ok((text, parsed))
}

/// Puts the line of `error`'s key to it; where the key itself is absent, that of its table.
pub fn locate(text: &str, path: &Path, error: &ConfigError) -> Error {
    let line = key_line(text, &error.key);
    Error::Config { path: path.to_owned(), line, problem: error.to_string() }
}

/// Line of the longest prefix of the dotted `key` that the text holds; 1 if none.
fn key_line(text: &str, key: &str) -> usize {
    let Ok(document) = toml::de::DeTable::parse(text) else { return 1 };
    let mut table = document.get_ref();
    let mut line = 1;
    for part in key.split('.') {
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref().as_ref() == part) else {
            break;
        };
        line = line_of(text, name.span().start);
        match value.get_ref() {
            toml::de::DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    line
}

fn line_of(text: &str, offset: usize) -> usize {
    text[..offset.min(text.len())].matches('\n').count() + 1
}
