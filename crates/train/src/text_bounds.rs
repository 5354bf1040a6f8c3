//! Where a text begins and ends, in tokens.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// What stands before the first token of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// This token, always: the model has seen no text without.
    Always(u32),
    /// This token, where a continuation has nothing else before it.
    IfEmpty(u32),
}

/// The tokens around a text by their names: `[text]` of a configuration. By default a text ends with the token of the
/// first usual name that the tokenizer has, and begins after the end of another.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// The token that ends a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// What stands before a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begin: Option<BeginConfig>,
}

/// [`Begin`], by the name of the token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BeginConfig {
    /// This token, always.
    Always(String),
    /// This token, where a continuation has nothing else before it.
    IfEmpty(String),
}

impl TextConfig {
    /// That of texts which begin with `begin` and end as `tokenizer` has it.
    ///
    /// # Errors
    /// When a token has no name.
    pub fn of(tokenizer: &Tokenizer, begin: Begin) -> Result<Self> {
        let name = |token: u32| {
            let name = tokenizer.inner().id_to_token(token);
            name.ok_or_else(|| Error::Mismatch(format!("the tokenizer has no name for token {token}")))
        };
        let begin = match begin {
            Begin::Always(token) => BeginConfig::Always(name(token)?),
            Begin::IfEmpty(token) => BeginConfig::IfEmpty(name(token)?),
        };
        Ok(Self { end: Some(name(tokenizer.end_of_text())?), begin: Some(begin) })
    }

    /// What stands before a text in the tokens of `tokenizer`.
    ///
    /// # Errors
    /// When it has no token of that name.
    pub fn begin(&self, tokenizer: &Tokenizer) -> Result<Begin> {
        let token = |name: &str| {
            let token = tokenizer.inner().token_to_id(name);
            token.ok_or_else(|| {
                Error::Mismatch(format!("`text.begin` names {name:?}, but the tokenizer has no such token"))
            })
        };
        match &self.begin {
            Some(BeginConfig::Always(name)) => token(name).map(Begin::Always),
            Some(BeginConfig::IfEmpty(name)) => token(name).map(Begin::IfEmpty),
            None => Ok(Begin::Always(tokenizer.end_of_text())),
        }
    }

    /// Whether nothing is said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [
                {"id": 2, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true},
                {"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true},
            ],
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<|endoftext|>": 2, "<s>": 3}, "merges": []},
        });
        Tokenizer::from_json(json.to_string().as_bytes(), "test", None).unwrap()
    }

    #[test]
    fn names_and_tokens_are_the_same_tokens() {
        let tokenizer = tokenizer();
        for begin in [Begin::Always(3), Begin::IfEmpty(2)] {
            let config = TextConfig::of(&tokenizer, begin).unwrap();
            assert_eq!(config.end.as_deref(), Some("<|endoftext|>"));
            assert_eq!(config.begin(&tokenizer).unwrap(), begin);
            let text = toml::to_string(&config).unwrap();
            assert_eq!(toml::from_str::<TextConfig>(&text).unwrap(), config);
        }
        assert_eq!(TextConfig::default().begin(&tokenizer).unwrap(), Begin::Always(2));
    }

    #[test]
    fn tokens_that_are_not_there_are_refused() {
        let tokenizer = tokenizer();
        let error = TextConfig::of(&tokenizer, Begin::Always(9)).unwrap_err().to_string();
        assert!(error.contains("no name for token 9"), "{error}");
        let begin = Some(BeginConfig::IfEmpty("<bos>".into()));
        let error = TextConfig { begin, ..TextConfig::default() }.begin(&tokenizer).unwrap_err().to_string();
        assert!(error.contains("`text.begin` names \"<bos>\""), "{error}");
    }
}
