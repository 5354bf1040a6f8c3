//! What clients get: answers whole or as they come, in the form of OpenAI's API.

use std::time::{SystemTime, UNIX_EPOCH};

use engram_infer::{Finish, GeneratedToken, PositionGates, Summary, TextCodec, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::call_parser::{CallParser, Piece};
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
    /// Whether functions may be called.
    tools: bool,
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
        Self { endpoint, id, created, model: model.into(), gates, include_usage, tools: false }
    }

    /// The same where functions may be called.
    pub(crate) fn with_tools(self, tools: bool) -> Self {
        Self { tools, ..self }
    }

    /// The name of a call: no two of a server are alike.
    fn call_id(&self, choice: usize, call: usize) -> String {
        let own = self.id.rsplit_once("cmpl-").map_or(&self.id[..], |(_, own)| own);
        format!("call_{}_{choice}_{call}", own.replace('-', "_"))
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
                if !part.text.is_empty() {
                    delta.insert("content".into(), part.text.into());
                } else if part.first {
                    // Where functions may be called there may be no text at all.
                    let nothing = if self.tools { Value::Null } else { "".into() };
                    delta.insert("content".into(), nothing);
                }
                if !part.calls.is_empty() {
                    delta.insert("tool_calls".into(), part.calls.into());
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
    /// What it adds to calls of functions.
    calls: Vec<Value>,
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
    parser: Option<CallParser>,
    calls: Vec<Call>,
    pub(crate) summary: Option<Summary>,
}

/// A call of a function, as far as it has come.
#[derive(Debug)]
struct Call {
    name: String,
    /// JSON.
    arguments: String,
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
            parser: None,
            calls: Vec::new(),
            summary: None,
        }
    }

    /// The same with functions that may be called.
    pub(crate) fn calling(self, parser: Option<CallParser>) -> Self {
        Self { parser, ..self }
    }

    /// Takes what became of text apart: gives text to be shown, and what a stream shows of calls.
    fn sort(&mut self, heading: &Heading, pieces: Vec<Piece>) -> (String, Vec<Value>) {
        let (mut text, mut shown) = (String::new(), Vec::new());
        for piece in pieces {
            let index = self.calls.len();
            match piece {
                Piece::Text(more) => text += &more,
                Piece::Call(name) => {
                    shown.push(json!({
                        "index": index, "id": heading.call_id(self.index, index), "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }));
                    self.calls.push(Call { name, arguments: String::new() });
                }
                Piece::Arguments(more) => {
                    if let Some(call) = self.calls.last_mut() {
                        shown.push(json!({"index": index - 1, "function": {"arguments": more}}));
                        call.arguments += &more;
                    }
                }
            }
        }
        (text, shown)
    }

    /// What an answer shows of the text of a token, which may be none.
    fn shown(&mut self, heading: &Heading, token: u32, text: String) -> (String, Vec<Value>) {
        let Some(parser) = &mut self.parser else { return (text, Vec::new()) };
        let mut pieces = parser.push(&text);
        pieces.extend(parser.token(token));
        self.sort(heading, pieces)
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
        let (text, calls) = self.shown(heading, token.id, token.text);
        self.text += &text;
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
        if !text.is_empty() || !calls.is_empty() || !logprobs.is_null() || engram.is_some() {
            let first = !std::mem::replace(&mut self.begun, true);
            let part = Part { text: &text, calls, first, logprobs, engram, ..Part::default() };
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
        let (text, calls) = match self.parser.take() {
            None => (summary.text.clone(), Vec::new()),
            Some(mut parser) => {
                let mut pieces = parser.push(&summary.text);
                pieces.extend(parser.finish());
                self.sort(heading, pieces)
            }
        };
        self.text += &text;
        let (engram, finish) = (Some(summary_json(&summary)), self.finish(&summary));
        let logprobs = self.tell_end(heading, &summary, codec);
        self.summary = Some(summary);
        let first = !std::mem::replace(&mut self.begun, true);
        let part = Part { text: &text, calls, first, logprobs, finish, engram };
        parts.push(heading.chunk(self.index, part));
        parts
    }

    /// How likely the end token was. Completions count it among their tokens, as `usage` does: clients that ask for one
    /// token after a prompt (lm-evaluation-harness) take the last for the generated one. Chat tells what can be read.
    fn tell_end(&mut self, heading: &Heading, summary: &Summary, codec: &TextCodec) -> Value {
        match &summary.end {
            Some((token, logprob)) if heading.endpoint == Endpoint::Completions => {
                let offset = self.told.add(*token, codec);
                let told = ToldLogprob { token: *token, logprob: Some(logprob.clone()), offset };
                let shown = logprobs_json(heading.endpoint, std::slice::from_ref(&told), codec);
                self.logprobs.push(told);
                shown
            }
            _ => Value::Null,
        }
    }

    fn finish(&self, summary: &Summary) -> Value {
        match summary.finish {
            Finish::Stop if !self.calls.is_empty() => "tool_calls".into(),
            Finish::Stop => "stop".into(),
            Finish::Length => "length".into(),
        }
    }

    /// What the assistant said, and which functions it calls.
    fn message(&self, heading: &Heading) -> Value {
        if self.calls.is_empty() {
            return json!({"role": "assistant", "content": self.text, "refusal": null});
        }
        let said = self.text.trim();
        let calls = self.calls.iter().enumerate().map(|(index, call)| {
            json!({
                "id": heading.call_id(self.index, index), "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            })
        });
        let content = if said.is_empty() { Value::Null } else { said.into() };
        let calls: Vec<Value> = calls.collect();
        json!({"role": "assistant", "content": content, "refusal": null, "tool_calls": calls})
    }

    /// The whole choice.
    fn json(&self, heading: &Heading, codec: &TextCodec, streams: usize) -> Value {
        let logprobs = match &self.logprobs[..] {
            [] => Value::Null,
            logprobs => logprobs_json(heading.endpoint, logprobs, codec),
        };
        let mut choice = match heading.endpoint {
            Endpoint::Completions => json!({"index": self.index, "text": self.text}),
            Endpoint::Chat => json!({"index": self.index, "message": self.message(heading)}),
        };
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = self.summary.as_ref().map_or(Value::Null, |summary| self.finish(summary));
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
