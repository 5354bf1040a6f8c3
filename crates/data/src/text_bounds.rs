//! Tokens at which a text begins and ends.

use engram_config::{BeginConfig, TextConfig};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The token before the first token of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// This token, always: the model has seen no text without it.
    Always(u32),
    /// This token, if nothing else precedes a continuation.
    IfEmpty(u32),
}

impl Begin {
    /// What `config` puts before a text, in the tokens of `tokenizer`.
    ///
    /// # Errors
    /// When the tokenizer has no token of that name.
    pub fn of(config: &TextConfig, tokenizer: &Tokenizer) -> Result<Self> {
        let token = |name: &str| {
            let reason = "the tokenizer has no such token";
            tokenizer.inner().token_to_id(name).ok_or_else(|| Error::option("text.begin", name, reason))
        };
        match &config.begin {
            Some(BeginConfig::Always(name)) => token(name).map(Self::Always),
            Some(BeginConfig::IfEmpty(name)) => token(name).map(Self::IfEmpty),
            None => Ok(Self::Always(tokenizer.end_of_text())),
        }
    }

    /// The configuration of texts that begin with this and end as in `tokenizer`.
    ///
    /// # Errors
    /// When a token has no name.
    pub fn config(self, tokenizer: &Tokenizer) -> Result<TextConfig> {
        let name = |token: u32| {
            let name = tokenizer.inner().id_to_token(token);
            name.ok_or_else(|| Error::Tokenize { reason: format!("it has no name for token {token}") })
        };
        let begin = match self {
            Self::Always(token) => BeginConfig::Always(name(token)?),
            Self::IfEmpty(token) => BeginConfig::IfEmpty(name(token)?),
        };
        Ok(TextConfig { end: Some(name(tokenizer.end_of_text())?), begin: Some(begin) })
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
            let config = begin.config(&tokenizer).unwrap();
            assert_eq!(config.end.as_deref(), Some("<|endoftext|>"));
            assert_eq!(Begin::of(&config, &tokenizer).unwrap(), begin);
            let text = toml::to_string(&config).unwrap();
            assert_eq!(toml::from_str::<TextConfig>(&text).unwrap(), config);
        }
        assert_eq!(Begin::of(&TextConfig::default(), &tokenizer).unwrap(), Begin::Always(2));
    }

    #[test]
    fn tokens_that_are_not_there_are_refused() {
        let tokenizer = tokenizer();
        let error = Begin::Always(9).config(&tokenizer).unwrap_err().to_string();
        assert!(error.contains("no name for token 9"), "{error}");
        let begin = Some(BeginConfig::IfEmpty("<bos>".into()));
        let error =
            Begin::of(&TextConfig { begin, ..TextConfig::default() }, &tokenizer).unwrap_err().to_string();
        assert!(error.contains("text.begin = <bos>"), "{error}");
    }
}
