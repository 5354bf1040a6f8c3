//! The tokens at which a text begins and ends, by name.

use serde::{Deserialize, Serialize};

/// The tokens around a text by their names: `[text]` of a configuration. By default a text ends with the first usual
/// end token that the tokenizer has, and begins after the end of another text.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum BeginConfig {
    /// This token, always.
    Always(String),
    /// This token, if nothing else precedes a continuation.
    IfEmpty(String),
}

impl TextConfig {
    /// Whether everything is the default.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
