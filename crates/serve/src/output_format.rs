//! What an answer is made of: text, JSON of a schema, or calls of functions.

use engram_infer::TemplateValue;
use serde_json::Value;

use crate::api::Terms;
use crate::api_error::ApiError;
use crate::fields::{Endpoint, Fields};

/// What an answer is made of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum OutputFormat {
    /// Whatever the model says.
    Text,
}

impl OutputFormat {
    /// What `response_format`, `tools` and `tool_choice` ask for.
    pub(crate) fn read(fields: &Fields, _endpoint: Endpoint, _terms: &Terms<'_>) -> Result<Self, ApiError> {
        for (name, harmless) in [("response_format", r#"{"type":"text"}"#), ("tools", "[]")] {
            let value: Option<Value> = fields.get(name)?;
            if value.is_some_and(|value| value.to_string() != harmless) {
                let problem = format!("`{name}` is not supported by this server");
                return Err(ApiError::of(name, problem).coded("unsupported_parameter"));
            }
        }
        Ok(Self::Text)
    }

    /// Descriptions of the functions, for the chat template.
    pub(crate) fn described(&self) -> Option<TemplateValue> {
        None
    }
}
