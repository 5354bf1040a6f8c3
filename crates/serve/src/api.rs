//! What clients send, in the form of OpenAI's API, and what it asks of the engine.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use engram_infer::{ChatTemplate, Failure, Message, Refusal, Request, Sampling, TextCodec};

/// Whether a text is completed or a conversation continued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Completions,
    Chat,
}

/// The body of a request for either. What OpenAI's API has and this server does not is named and refused, never
/// passed over.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Body {
    pub(crate) model: Option<String>,
    prompt: Option<Prompts>,
    messages: Option<Vec<Message>>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<i64>,
    n: Option<usize>,
    stop: Option<OneOrMany>,
    logprobs: Option<Logprobs>,
    top_logprobs: Option<usize>,
    echo: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Who asks; it changes nothing.
    #[serde(rename = "user")]
    _user: Option<String>,
    /// Not of OpenAI's API: whether the memory is read.
    memory: Option<bool>,
    /// Not of OpenAI's API: gates of every position.
    gates: Option<bool>,
    best_of: Option<Value>,
    suffix: Option<Value>,
    logit_bias: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    functions: Option<Value>,
    response_format: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "`prompt` must be a text, a list of texts, a list of tokens, or a list of such lists"
)]
enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "`stop` must be a text or a list of texts")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "`logprobs` must be a number (completions) or true or false (chat)")]
enum Logprobs {
    Asked(bool),
    Count(usize),
}

/// What a client gets instead of an answer.
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
            response.headers_mut().insert("retry-after", axum::http::HeaderValue::from_static("1"));
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
            Refusal::EmptyPrompt | Refusal::Token { .. } | Refusal::Cache { .. } => Self::bad(message),
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
        };
        Self::new(status, failure.to_string()).coded(code)
    }
}

/// What a body asks for, ready for the engine.
#[derive(Debug)]
pub(crate) struct Asked {
    /// One for each choice: prompt after prompt, each `n` times.
    pub(crate) requests: Vec<Request>,
    /// Texts that stand before the choices, where they are to be repeated.
    pub(crate) echo: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// What bounds a request, and what turns text into tokens.
pub(crate) struct Terms<'a> {
    pub(crate) codec: &'a TextCodec,
    pub(crate) template: Option<&'a ChatTemplate>,
    pub(crate) context: usize,
    pub(crate) choices: usize,
    pub(crate) time_limit: Duration,
}

/// Likeliest tokens that a request may have at each place.
const MOST_LOGPROBS: usize = 20;
/// Tokens of a completion that does not say how many, as in OpenAI's API.
const COMPLETION_TOKENS: usize = 16;
/// Stop strings, and bytes of one, at most.
const MOST_STOPS: (usize, usize) = (16, 1000);

impl Body {
    /// Reads a request.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(bytes)
            .map_err(|error| ApiError::bad(format!("the request body is not as it must be: {error}")))
    }

    /// What it asks of the engine.
    pub(crate) fn ask(self, endpoint: Endpoint, terms: &Terms<'_>) -> Result<Asked, ApiError> {
        self.refuse_unsupported(endpoint)?;
        let (prompts, echo) = self.prompts(endpoint, terms)?;
        let n = self.n.unwrap_or(1);
        if n == 0 || prompts.is_empty() || n.saturating_mul(prompts.len()) > terms.choices {
            let problem = format!(
                "{} choices are asked for: 1 to {} can be had",
                n.saturating_mul(prompts.len()),
                terms.choices
            );
            return Err(ApiError::of("n", problem));
        }
        let stop = self.stops()?;
        let logprobs = self.logprobs(endpoint)?;
        let sampling = self.sampling();
        let deadline = Some(Instant::now() + terms.time_limit);
        let mut requests = Vec::new();
        for prompt in &prompts {
            let max_tokens = self.max_tokens(endpoint, prompt.len(), terms.context)?;
            for choice in 0..n {
                let sampling = Sampling { seed: sampling.seed.wrapping_add(choice as u64), ..sampling };
                requests.push(Request {
                    sampling,
                    stop: stop.clone(),
                    end_tokens: end_tokens(endpoint, terms),
                    logprobs,
                    gates: self.gates == Some(true),
                    memory: self.memory != Some(false),
                    deadline,
                    ..Request::new(prompt.clone(), max_tokens)
                });
            }
        }
        let echo = echo.into_iter().flat_map(|text| std::iter::repeat_n(text, n)).collect();
        let include_usage = self.stream_options.as_ref().is_some_and(|options| options.include_usage);
        Ok(Asked { requests, echo, stream: self.stream == Some(true), include_usage })
    }

    fn refuse_unsupported(&self, endpoint: Endpoint) -> Result<(), ApiError> {
        let values = [
            ("best_of", &self.best_of, json!(1)),
            ("suffix", &self.suffix, json!("")),
            ("logit_bias", &self.logit_bias, json!({})),
            ("tools", &self.tools, json!([])),
            ("tool_choice", &self.tool_choice, json!("none")),
            ("functions", &self.functions, json!([])),
            ("response_format", &self.response_format, json!({"type": "text"})),
        ];
        for (name, value, harmless) in values {
            if value.as_ref().is_some_and(|value| *value != harmless) {
                return Err(ApiError::of(name, format!("`{name}` is not supported by this server")));
            }
        }
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::of("stream_options", "`stream_options` goes with `stream`"));
        }
        let other = match endpoint {
            Endpoint::Completions => {
                [("messages", self.messages.is_some()), ("top_logprobs", self.top_logprobs.is_some())]
            }
            Endpoint::Chat => [("prompt", self.prompt.is_some()), ("echo", self.echo.is_some())],
        };
        match other.iter().find(|(_, present)| *present) {
            Some((name, _)) => Err(ApiError::of(*name, format!("`{name}` belongs to the other endpoint"))),
            None => Ok(()),
        }
    }

    /// Tokens of each prompt, and the texts to repeat.
    fn prompts(
        &self,
        endpoint: Endpoint,
        terms: &Terms<'_>,
    ) -> Result<(Vec<Vec<u32>>, Vec<String>), ApiError> {
        let unknown = |error: engram_infer::CodecError| ApiError::bad(error.to_string());
        if endpoint == Endpoint::Chat {
            let messages = self.messages.as_deref().filter(|messages| !messages.is_empty());
            let messages =
                messages.ok_or_else(|| ApiError::of("messages", "`messages` is missing or empty"))?;
            let template = terms.template.ok_or_else(|| {
                ApiError::bad(
                    "this model has no chat template: start the server with --chat-template, or put a \
                     tokenizer_config.json beside the tokenizer; /v1/completions works without",
                )
            })?;
            let text =
                template.render(messages).map_err(|error| ApiError::of("messages", error.to_string()))?;
            return Ok((vec![terms.codec.marked(&text).map_err(unknown)?], vec![String::new()]));
        }
        let document = |text: &String| terms.codec.document(text).map_err(unknown);
        let missing = || ApiError::of("prompt", "`prompt` is missing");
        let prompts = match self.prompt.clone().ok_or_else(missing)? {
            Prompts::Text(text) => vec![document(&text)?],
            Prompts::Texts(texts) => texts.iter().map(document).collect::<Result<_, _>>()?,
            Prompts::Tokens(tokens) => vec![tokens],
            Prompts::TokenLists(lists) => lists,
        };
        let text = |tokens: &Vec<u32>| {
            let bytes: Vec<u8> = tokens.iter().flat_map(|&token| terms.codec.bytes(token)).copied().collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let echo = match (self.echo, &self.logprobs) {
            (Some(true), Some(_)) => {
                return Err(ApiError::of(
                    "echo",
                    "`echo` does not go with `logprobs`: a prompt's are not computed",
                ));
            }
            (Some(true), None) => prompts.iter().map(text).collect(),
            _ => vec![String::new(); prompts.len()],
        };
        Ok((prompts, echo))
    }

    fn max_tokens(&self, endpoint: Endpoint, prompt: usize, context: usize) -> Result<usize, ApiError> {
        match (self.max_tokens, self.max_completion_tokens) {
            (Some(_), Some(_)) => {
                Err(ApiError::of("max_tokens", "take either `max_tokens` or `max_completion_tokens`"))
            }
            (Some(count), None) | (None, Some(count)) => Ok(count),
            (None, None) => {
                let left = context.saturating_sub(prompt);
                Ok(if endpoint == Endpoint::Chat { left.max(1) } else { COMPLETION_TOKENS.min(left).max(1) })
            }
        }
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) => stops.clone(),
        };
        let (count, bytes) = MOST_STOPS;
        if stops.len() > count || stops.iter().any(|stop| stop.is_empty() || stop.len() > bytes) {
            let problem = format!("`stop` takes up to {count} texts of 1 to {bytes} bytes");
            return Err(ApiError::of("stop", problem));
        }
        Ok(stops)
    }

    fn logprobs(&self, endpoint: Endpoint) -> Result<Option<usize>, ApiError> {
        let (name, asked) = match (endpoint, &self.logprobs, self.top_logprobs) {
            (_, None | Some(Logprobs::Asked(false)), None) => return Ok(None),
            (Endpoint::Completions, Some(Logprobs::Count(count)), _) => ("logprobs", *count),
            (Endpoint::Completions, ..) => {
                return Err(ApiError::of("logprobs", "`logprobs` must be a number here"));
            }
            (Endpoint::Chat, Some(Logprobs::Asked(true)), top) => ("top_logprobs", top.unwrap_or(0)),
            (Endpoint::Chat, Some(Logprobs::Count(_)), _) => {
                return Err(ApiError::of("logprobs", "`logprobs` must be true or false here"));
            }
            (Endpoint::Chat, ..) => {
                return Err(ApiError::of("top_logprobs", "`top_logprobs` goes with `logprobs`: true"));
            }
        };
        if asked > MOST_LOGPROBS {
            return Err(ApiError::of(
                name,
                format!("`{name}` is {asked}, but can be {MOST_LOGPROBS} at most"),
            ));
        }
        Ok(Some(asked))
    }

    fn sampling(&self) -> Sampling {
        let own = Sampling::default();
        Sampling {
            temperature: self.temperature.unwrap_or(own.temperature),
            top_k: self.top_k,
            top_p: self.top_p.unwrap_or(own.top_p),
            min_p: self.min_p.unwrap_or(own.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(own.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(own.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(own.frequency_penalty),
            seed: self.seed.map_or_else(any_seed, |seed| seed as u64),
        }
    }
}

/// Tokens that end an answer: the end of a document, and of a turn.
fn end_tokens(endpoint: Endpoint, terms: &Terms<'_>) -> Vec<u32> {
    let turn = terms.template.filter(|_| endpoint == Endpoint::Chat).and_then(ChatTemplate::end_token);
    let turn = turn.and_then(|name| terms.codec.token(name));
    [terms.codec.end_of_text()].into_iter().chain(turn).collect()
}

/// A seed for who gave none: another one each time.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: Value) -> (u16, Value) {
        let error = Body::parse(body.to_string().as_bytes()).and_then(|body| {
            let tokenizer = tokenizers::Tokenizer::new(tokenizers::models::bpe::BPE::default());
            let codec = TextCodec::new(&tokenizer, vec![Vec::new(); 4], 0);
            let terms = Terms {
                codec: &codec,
                template: None,
                context: 50,
                choices: 4,
                time_limit: Duration::from_secs(1),
            };
            body.ask(Endpoint::Completions, &terms).map(|asked| format!("{asked:?}"))
        });
        let error = error.expect_err("refused");
        (error.status.as_u16(), error.json()["error"].clone())
    }

    #[test]
    fn bad_requests_name_what_is_wrong() {
        for (body, parameter, words) in [
            (json!({}), json!("prompt"), "missing"),
            (json!({"prompt": [1], "n": 5}), json!("n"), "5 choices"),
            (json!({"prompt": [1], "n": 0}), json!("n"), "0 choices"),
            (json!({"prompt": [1], "stop": [""]}), json!("stop"), "1 to"),
            (json!({"prompt": [1], "logprobs": 21}), json!("logprobs"), "20"),
            (json!({"prompt": [1], "logprobs": true}), json!("logprobs"), "number"),
            (json!({"prompt": [1], "messages": []}), json!("messages"), "other endpoint"),
            (json!({"prompt": [1], "logit_bias": {"3": 1}}), json!("logit_bias"), "not supported"),
            (json!({"prompt": [1], "stream_options": {}}), json!("stream_options"), "`stream`"),
            (
                json!({"prompt": [1], "max_tokens": 1, "max_completion_tokens": 1}),
                json!("max_tokens"),
                "either",
            ),
            (json!({"prompt": [1], "echo": true, "logprobs": 1}), json!("echo"), "logprobs"),
            (json!({"prompt": {"a": 1}}), Value::Null, "`prompt` must be"),
            (json!({"prompt": [1], "temperature": "hot"}), Value::Null, "hot"),
            (json!({"prompt": [1], "max_tokens": -1}), Value::Null, "-1"),
            (json!({"prompt": [1], "colour": "red"}), Value::Null, "colour"),
        ] {
            let (status, error) = refused(body.clone());
            assert_eq!((status, &error["param"]), (400, &parameter), "{body}: {error}");
            assert!(error["message"].as_str().unwrap().contains(words), "{body}: {error}");
            assert_eq!(error["type"], "invalid_request_error");
        }
        assert!(Body::parse(b"{\"prompt\": ").is_err());
    }
}
