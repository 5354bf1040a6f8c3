//! What an answer is made of: text. Structured output is refused by name.

use serde_json::{Value, json};

use crate::api_error::ApiError;
use crate::fields::Fields;

/// Refuses `response_format` and `tools` that ask for something other than text.
pub(crate) fn refuse_structured(fields: &Fields) -> Result<(), ApiError> {
    for (name, harmless) in [("response_format", json!({"type": "text"})), ("tools", json!([]))] {
        let value: Option<Value> = fields.get(name)?;
        if value.is_some_and(|value| value != harmless) {
            let problem = format!("`{name}` is not supported by this server");
            return Err(ApiError::of(name, problem).coded("unsupported_parameter"));
        }
    }
    Ok(())
}
