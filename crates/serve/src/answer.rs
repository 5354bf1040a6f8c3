//! What clients get: answers whole or as they come, in the form of OpenAI's API.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::api::Endpoint;
use engram_infer::{Finish, GeneratedToken, PositionGates, Summary, TextCodec, TokenLogprob};

/// What all parts of an answer have in common.
#[derive(Debug, Clone)]
pub(crate) struct Heading {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    /// Whether gates were asked for.
    gates: bool,
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl Heading {
    pub(crate) fn new(endpoint: Endpoint, number: u64, model: &str, gates: bool) -> Self {
        let kind = if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
        let created = now();
        Self { endpoint, id: format!("{kind}-{created:x}-{number:x}"), created, model: model.into(), gates }
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
    fn chunk(
        &self,
        index: usize,
        text: &str,
        first: bool,
        logprobs: Value,
        finish: Value,
        engram: Option<Value>,
    ) -> Value {
        let mut choice = match self.endpoint {
            Endpoint::Completions => json!({"index": index, "text": text}),
            Endpoint::Chat => {
                let mut delta = Map::new();
                if first {
                    delta.insert("role".into(), "assistant".into());
                }
                if first || !text.is_empty() {
                    delta.insert("content".into(), text.into());
                }
                json!({"index": index, "delta": delta})
            }
        };
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = finish;
        if let Some(engram) = engram {
            choice["engram"] = engram;
        }
        Value::Object(self.object(true, json!([choice])))
    }
}

/// One choice as it comes.
#[derive(Debug)]
pub(crate) struct Choice {
    index: usize,
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<(u32, TokenLogprob, usize)>,
    gates: Vec<PositionGates>,
    begun: bool,
    pub(crate) summary: Option<Summary>,
}

impl Choice {
    /// Choice `index`, which repeats `echo` first.
    pub(crate) fn new(index: usize, echo: String) -> Self {
        Self {
            index,
            text: echo,
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
        let needed = engram.is_some() || heading.endpoint == Endpoint::Chat || !self.text.is_empty();
        needed.then(|| {
            self.begun = true;
            heading.chunk(self.index, &self.text, true, Value::Null, Value::Null, engram)
        })
    }

    /// Adds a token; what a stream shows of it, if anything.
    pub(crate) fn token(
        &mut self,
        heading: &Heading,
        token: GeneratedToken,
        codec: &TextCodec,
    ) -> Option<Value> {
        let offset = self.text.len();
        self.text += &token.text;
        self.tokens.push(token.id);
        let logprobs = match token.logprob {
            Some(logprob) => {
                let of = (token.id, logprob, offset);
                let shown = logprobs_json(heading.endpoint, std::slice::from_ref(&of), codec);
                self.logprobs.push(of);
                shown
            }
            None => Value::Null,
        };
        let engram = heading.gates.then(|| json!({"token": codec.shown(token.id)}));
        if token.text.is_empty() && logprobs.is_null() && engram.is_none() {
            return None;
        }
        let first = !std::mem::replace(&mut self.begun, true);
        Some(heading.chunk(self.index, &token.text, first, logprobs, Value::Null, engram))
    }

    /// Adds gates; what a stream shows of them.
    pub(crate) fn gates(&mut self, heading: &Heading, gates: PositionGates, streams: usize) -> Value {
        let engram = json!({"gates": gates_json(&gates, streams)});
        self.gates.push(gates);
        heading.chunk(self.index, "", false, Value::Null, Value::Null, Some(engram))
    }

    /// Ends the choice; what a stream shows last.
    pub(crate) fn done(&mut self, heading: &Heading, summary: Summary) -> Value {
        let text = summary.text.clone();
        self.text += &text;
        let engram = summary_json(&summary);
        let finish = finish_json(&summary);
        self.summary = Some(summary);
        let first = !std::mem::replace(&mut self.begun, true);
        heading.chunk(self.index, &text, first, Value::Null, finish, Some(engram))
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

/// A whole answer.
pub(crate) fn whole(heading: &Heading, choices: &[Choice], codec: &TextCodec, streams: usize) -> Value {
    let each = choices.iter().map(|choice| choice.json(heading, codec, streams)).collect();
    let mut object = heading.object(false, each);
    object.insert("usage".into(), usage(choices));
    Value::Object(object)
}

/// The last part of a stream that asked for it: what it cost.
pub(crate) fn usage_chunk(heading: &Heading, choices: &[Choice]) -> Value {
    let mut object = heading.object(true, json!([]));
    object.insert("usage".into(), usage(choices));
    Value::Object(object)
}

fn usage(choices: &[Choice]) -> Value {
    let sum = |of: fn(&Summary) -> usize| {
        choices.iter().filter_map(|choice| choice.summary.as_ref()).map(of).sum::<usize>()
    };
    let (prompt, completion) =
        (sum(|summary| summary.prompt_tokens), sum(|summary| summary.completion_tokens));
    json!({
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(|summary| summary.cached_tokens)},
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

/// `[layer][position][stream]`, from position `first` on.
fn gates_json(gates: &PositionGates, streams: usize) -> Value {
    let layer = |gates: &Vec<f32>| gates.chunks_exact(streams).map(<[f32]>::to_vec).collect::<Vec<_>>();
    json!({"first": gates.first, "layers": gates.layers.iter().map(layer).collect::<Vec<_>>()})
}

fn logprobs_json(endpoint: Endpoint, logprobs: &[(u32, TokenLogprob, usize)], codec: &TextCodec) -> Value {
    let one = |token: u32, logprob: f32| json!({"token": codec.shown(token), "logprob": logprob, "bytes": codec.bytes(token)});
    match endpoint {
        Endpoint::Chat => {
            let content = logprobs.iter().map(|(token, logprob, _)| {
                let mut shown = one(*token, logprob.logprob);
                shown["top_logprobs"] =
                    logprob.top.iter().map(|&(token, logprob)| one(token, logprob)).collect();
                shown
            });
            json!({"content": content.collect::<Vec<_>>()})
        }
        Endpoint::Completions => {
            let top = |logprob: &TokenLogprob| -> Map<String, Value> {
                // Tokens whose bytes are no text of their own may be shown alike: the likelier stays.
                let likeliest_last = logprob.top.iter().rev();
                likeliest_last.map(|&(token, logprob)| (codec.shown(token), logprob.into())).collect()
            };
            json!({
                "tokens": logprobs.iter().map(|(token, ..)| codec.shown(*token)).collect::<Vec<_>>(),
                "token_logprobs": logprobs.iter().map(|(_, logprob, _)| logprob.logprob).collect::<Vec<_>>(),
                "top_logprobs": logprobs.iter().map(|(_, logprob, _)| top(logprob)).collect::<Vec<_>>(),
                "text_offset": logprobs.iter().map(|(.., offset)| offset).collect::<Vec<_>>(),
            })
        }
    }
}
