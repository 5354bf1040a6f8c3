//! What clients get: answers whole or as they come, in the form of OpenAI's API.

use std::time::{SystemTime, UNIX_EPOCH};

use engram_infer::{Finish, GeneratedToken, PositionGates, Summary, TextCodec, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::fields::Endpoint;
use crate::told_logprobs::{ToldLogprob, ToldText, logprobs_json};

/// What all parts of an answer have in common.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    /// Whether gates were asked for.
    gates: bool,
    /// Whether the parts of a stream have a place for the usage.
    include_usage: bool,
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl Heading {
    pub(crate) fn new(
        endpoint: Endpoint,
        number: u64,
        model: &str,
        gates: bool,
        include_usage: bool,
    ) -> Self {
        let kind = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let created = now();
        let id = format!("{kind}-{created:x}-{number:x}");
        Self { endpoint, id, created, model: model.into(), gates, include_usage }
    }

    fn object(&self, chunk: bool, choices: Value) -> Map<String, Value> {
        let object = match (self.endpoint, chunk) {
            (Endpoint::Completions, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        };
        let fields = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        });
        match fields {
            Value::Object(fields) => fields,
            _ => unreachable!("an object was written"),
        }
    }

    /// A part of choice `index`.
    fn chunk(&self, index: usize, part: Part<'_>) -> Value {
        let mut choice = match self.endpoint {
            Endpoint::Completions => json!({"index": index, "text": part.text}),
            Endpoint::Chat => {
                let mut delta = Map::new();
                if part.first {
                    delta.insert("role".into(), "assistant".into());
                }
                if part.first || !part.text.is_empty() {
                    delta.insert("content".into(), part.text.into());
                }
                json!({"index": index, "delta": delta})
            }
        };
        choice["logprobs"] = part.logprobs;
        choice["finish_reason"] = part.finish;
        if let Some(engram) = part.engram {
            choice["engram"] = engram;
        }
        let mut object = self.object(true, json!([choice]));
        if self.include_usage {
            object.insert("usage".into(), Value::Null);
        }
        Value::Object(object)
    }
}

/// What a part of a streamed choice tells.
#[derive(Debug, Default)]
struct Part<'a> {
    text: &'a str,
    /// Whether it is the first of its choice.
    first: bool,
    logprobs: Value,
    finish: Value,
    engram: Option<Value>,
}

/// One choice as it comes.
#[derive(Debug)]
pub(crate) struct Choice {
    index: usize,
    /// The prompt, where it is repeated and has not been told yet.
    echo: Option<ToldText>,
    text: String,
    told: ToldText,
    tokens: Vec<u32>,
    logprobs: Vec<ToldLogprob>,
    gates: Vec<PositionGates>,
    begun: bool,
    pub(crate) summary: Option<Summary>,
}

impl Choice {
    /// Choice `index`, which repeats the tokens of `echo` first; `probable` if it tells how likely they are.
    pub(crate) fn new(index: usize, echo: Option<&[u32]>, probable: bool, codec: &TextCodec) -> Self {
        let echo = echo.map(|tokens| ToldText::of_prompt(tokens, probable, codec));
        let told = ToldText::after(echo.as_ref());
        Self {
            index,
            echo,
            text: String::new(),
            told,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            gates: Vec::new(),
            begun: false,
            summary: None,
        }
    }

    /// The first part of a streamed choice, if there is something to say before the first token.
    pub(crate) fn open(&mut self, heading: &Heading, prompt: &[u32], codec: &TextCodec) -> Option<Value> {
        let engram = heading.gates.then(|| {
            let shown: Vec<String> = prompt.iter().map(|&token| codec.shown(token)).collect();
            json!({"prompt": shown})
        });
        // What is told with probabilities waits for them.
        let echo =
            if self.echo.as_ref().is_some_and(ToldText::is_probable) { None } else { self.echo.take() };
        let text = echo.map_or_else(String::new, |echo| echo.text().to_owned());
        self.text += &text;
        let needed = engram.is_some() || heading.endpoint == Endpoint::Chat || !text.is_empty();
        needed.then(|| {
            self.begun = true;
            heading.chunk(self.index, Part { text: &text, first: true, engram, ..Part::default() })
        })
    }

    /// Adds how likely the prompt's next tokens are.
    pub(crate) fn prompt_logprobs(&mut self, logprobs: Vec<TokenLogprob>) {
        if let Some(echo) = &mut self.echo {
            echo.add_logprobs(logprobs);
        }
    }

    /// The prompt with its probabilities, once it has been read.
    fn tell_echo(&mut self, heading: &Heading, codec: &TextCodec) -> Option<(String, Value)> {
        let mut echo = self.echo.take()?;
        let told = echo.take_logprobs();
        let shown = match &told[..] {
            [] => Value::Null,
            told => logprobs_json(heading.endpoint, told, codec),
        };
        self.text += echo.text();
        self.logprobs.extend(told);
        Some((echo.text().to_owned(), shown))
    }

    /// Adds a token; what a stream shows of it, in one part or two.
    pub(crate) fn token(
        &mut self,
        heading: &Heading,
        token: GeneratedToken,
        codec: &TextCodec,
    ) -> Vec<Value> {
        let mut parts = Vec::new();
        if let Some((text, logprobs)) = self.tell_echo(heading, codec) {
            let first = !std::mem::replace(&mut self.begun, true);
            parts.push(heading.chunk(self.index, Part { text: &text, first, logprobs, ..Part::default() }));
        }
        self.text += &token.text;
        self.tokens.push(token.id);
        let offset = self.told.add(token.id, codec);
        let logprobs = match token.logprob {
            Some(logprob) => {
                let told = ToldLogprob { token: token.id, logprob: Some(logprob), offset };
                let shown = logprobs_json(heading.endpoint, std::slice::from_ref(&told), codec);
                self.logprobs.push(told);
                shown
            }
            None => Value::Null,
        };
        let engram = heading.gates.then(|| json!({"token": codec.shown(token.id)}));
        if !token.text.is_empty() || !logprobs.is_null() || engram.is_some() {
            let first = !std::mem::replace(&mut self.begun, true);
            let part = Part { text: &token.text, first, logprobs, engram, ..Part::default() };
            parts.push(heading.chunk(self.index, part));
        }
        parts
    }

    /// Adds gates; what a stream shows of them.
    pub(crate) fn gates(&mut self, heading: &Heading, gates: PositionGates, streams: usize) -> Value {
        let engram = json!({"gates": gates_json(&gates, streams)});
        self.gates.push(gates);
        heading.chunk(self.index, Part { engram: Some(engram), ..Part::default() })
    }

    /// Ends the choice; what a stream shows last, in one part or two.
    pub(crate) fn done(&mut self, heading: &Heading, summary: Summary, codec: &TextCodec) -> Vec<Value> {
        let mut parts = Vec::new();
        if let Some((text, logprobs)) = self.tell_echo(heading, codec) {
            let first = !std::mem::replace(&mut self.begun, true);
            parts.push(heading.chunk(self.index, Part { text: &text, first, logprobs, ..Part::default() }));
        }
        let text = summary.text.clone();
        self.text += &text;
        let (engram, finish) = (Some(summary_json(&summary)), finish_json(&summary));
        self.summary = Some(summary);
        let first = !std::mem::replace(&mut self.begun, true);
        parts.push(heading.chunk(self.index, Part { text: &text, first, finish, engram, ..Part::default() }));
        parts
    }

    /// The whole choice.
    fn json(&self, heading: &Heading, codec: &TextCodec, streams: usize) -> Value {
        let logprobs = match &self.logprobs[..] {
            [] => Value::Null,
            logprobs => logprobs_json(heading.endpoint, logprobs, codec),
        };
        let mut choice = match heading.endpoint {
            Endpoint::Completions => json!({"index": self.index, "text": self.text}),
            Endpoint::Chat => {
                json!({"index": self.index, "message": {"role": "assistant", "content": self.text, "refusal": null}})
            }
        };
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = self.summary.as_ref().map_or(Value::Null, finish_json);
        let mut engram = self.summary.as_ref().map_or_else(|| json!({}), summary_json);
        if heading.gates {
            engram["tokens"] = self.tokens.iter().map(|&token| codec.shown(token)).collect();
            engram["gates"] = self.gates.iter().map(|gates| gates_json(gates, streams)).collect();
        }
        choice["engram"] = engram;
        choice
    }
}

/// A whole answer, of `n` choices for each prompt.
pub(crate) fn whole(
    heading: &Heading,
    choices: &[Choice],
    n: usize,
    codec: &TextCodec,
    streams: usize,
) -> Value {
    let each = choices.iter().map(|choice| choice.json(heading, codec, streams)).collect();
    let mut object = heading.object(false, each);
    object.insert("usage".into(), usage(choices, n));
    Value::Object(object)
}

/// The last part of a stream that asked for it: what it cost.
pub(crate) fn usage_chunk(heading: &Heading, choices: &[Choice], n: usize) -> Value {
    let mut object = heading.object(true, json!([]));
    object.insert("usage".into(), usage(choices, n));
    Value::Object(object)
}

/// Every prompt counts once, however many choices it has.
fn usage(choices: &[Choice], n: usize) -> Value {
    let sum = |step: usize, of: fn(&Summary) -> usize| {
        let summaries = choices.iter().step_by(step).filter_map(|choice| choice.summary.as_ref());
        summaries.map(of).sum::<usize>()
    };
    let prompt = sum(n, |summary| summary.prompt_tokens);
    let completion = sum(1, |summary| summary.completion_tokens);
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(n, |summary| summary.cached_tokens)},
    })
}

fn finish_json(summary: &Summary) -> Value {
    match summary.finish {
        Finish::Stop => "stop".into(),
        Finish::Length => "length".into(),
    }
}

fn summary_json(summary: &Summary) -> Value {
    json!({
        "row_wait_seconds": summary.row_wait.as_secs_f64(),
        "drafted_tokens": summary.drafted[0], "accepted_tokens": summary.drafted[1],
    })
}

/// `[layer][position][stream]`, from position `first` on, and `[layer][position]` how many rows an overlay changes.
fn gates_json(gates: &PositionGates, streams: usize) -> Value {
    let layer = |gates: &Vec<f32>| gates.chunks_exact(streams).map(<[f32]>::to_vec).collect::<Vec<_>>();
    let layers: Vec<_> = gates.layers.iter().map(layer).collect();
    json!({"first": gates.first, "layers": layers, "changed": gates.changed})
}
