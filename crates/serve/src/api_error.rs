//! What a client gets instead of an answer, in the form of OpenAI's API.

use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use engram_infer::{Failure, Refusal};
use serde_json::{Value, json};

/// An error of a request or of the server.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    message: String,
    parameter: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), parameter: None, code: None }
    }

    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// About one parameter.
    pub(crate) fn of(parameter: impl Into<String>, message: impl Into<String>) -> Self {
        Self { parameter: Some(parameter.into()), ..Self::bad(message) }
    }

    pub(crate) fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// OpenAI's error object.
    pub(crate) fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert("retry-after", HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Parameter(bad) => Self::of(bad.name, message),
            Refusal::TooLong { .. } => Self::bad(message).coded("context_length_exceeded"),
            Refusal::Memory { .. } => Self::of("model", message),
            Refusal::EmptyPrompt | Refusal::Token { .. } => Self::of("prompt", message),
            Refusal::Cache { .. } => Self::bad(message).coded("context_length_exceeded"),
            Refusal::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, message).coded("queue_full"),
            Refusal::Stopping => Self::new(StatusCode::SERVICE_UNAVAILABLE, message),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let (status, code) = match failure {
            Failure::Rows(_) => (StatusCode::SERVICE_UNAVAILABLE, "memory_rows_unavailable"),
            Failure::Deadline => (StatusCode::GATEWAY_TIMEOUT, "time_limit"),
            Failure::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
            Failure::NotANumber => (StatusCode::INTERNAL_SERVER_ERROR, "not_a_number"),
            Failure::Grammar(_) => (StatusCode::BAD_REQUEST, "grammar_too_complex"),
            Failure::CacheFull => (StatusCode::SERVICE_UNAVAILABLE, "cache_full"),
        };
        Self::new(status, failure.to_string()).coded(code)
    }
}
