//! What a request's body asks of the engine.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use engram_infer::{
    ChatTemplate, Conversation, Grammar, PromptOptions, Request, Sampling, TemplateValue, TextCodec,
};
use serde::Deserialize;

use crate::api_error::ApiError;
use crate::call_style::CallStyle;
use crate::fields::{Endpoint, Fields, MOST_CHOICES};
use crate::grammars::Grammars;
use crate::messages;
use crate::output_format;
use crate::tools::Tools;

/// What a body asks for, ready for the engine.
#[derive(Debug)]
pub(crate) struct Asked {
    /// One for each choice: prompt after prompt, each `n` times.
    pub(crate) requests: Vec<Request>,
    /// Choices of each prompt.
    pub(crate) n: usize,
    /// Whether choices begin with their prompts.
    pub(crate) echo: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// How functions are called, if an answer may call any.
    pub(crate) calls: Option<CallStyle>,
}

/// What bounds a request, and what turns text into tokens.
pub(crate) struct Terms<'a> {
    pub(crate) codec: &'a TextCodec,
    /// The memory of the model that is asked for, if it has one.
    pub(crate) memory: Option<usize>,
    /// How a conversation becomes a text, or why none can.
    pub(crate) template: Result<&'a ChatTemplate, &'a str>,
    /// What makes answers follow a form.
    pub(crate) grammars: &'a Grammars,
    /// Tokens of a prompt and its answer at most.
    pub(crate) context: usize,
    pub(crate) time_limit: Duration,
    /// Whether an answer ends with the context where more tokens are asked for than are left of it.
    pub(crate) clip: bool,
    /// Whether names of special tokens in a text are those tokens, where a request does not say.
    pub(crate) parse_special: bool,
}

/// Tokens of a completion that does not say how many, as in OpenAI's API.
const COMPLETION_TOKENS: usize = 16;
/// Stop strings, and bytes of one, at most.
const MOST_STOPS: (usize, usize) = (16, 1000);

#[derive(Debug, Deserialize)]
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
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A request's body.
#[derive(Debug)]
pub(crate) struct Body {
    endpoint: Endpoint,
    fields: Fields,
}

impl Body {
    /// Reads a request.
    pub(crate) fn parse(endpoint: Endpoint, bytes: &[u8]) -> Result<Self, ApiError> {
        Ok(Self { endpoint, fields: Fields::parse(bytes)?.checked(endpoint)? })
    }

    /// The model that is asked for.
    pub(crate) fn model(&self) -> Result<Option<String>, ApiError> {
        self.fields.get("model")
    }

    /// What it asks of the engine.
    pub(crate) fn ask(self, terms: &Terms<'_>) -> Result<Asked, ApiError> {
        let fields = &self.fields;
        let stream = fields.get("stream")?.unwrap_or(false);
        let include_usage = self.include_usage(stream)?;
        let schema = output_format::schema(fields)?;
        let tools = Tools::read(fields)?;
        let prompts = self.prompts(terms, tools.as_ref())?;
        let n = self.choices(prompts.len())?;
        let (grammar, calls) = self.form(tools.as_ref(), schema.as_ref(), terms)?;
        let template = Request { grammar, ..self.template_request(terms)? };
        let seed = fields.integer("seed")?.map_or_else(any_seed, |seed| seed as u64);
        let mut requests = Vec::new();
        for prompt in prompts {
            let max_tokens = self.max_tokens(prompt.len(), terms)?;
            for choice in 0..n {
                let sampling = Sampling { seed: seed.wrapping_add(choice as u64), ..template.sampling };
                requests.push(Request { prompt: prompt.clone(), max_tokens, sampling, ..template.clone() });
            }
        }
        let echo = fields.get("echo")?.unwrap_or(false);
        Ok(Asked { requests, n, echo, stream, include_usage, calls })
    }

    /// The form that answers have to have, and how they call functions.
    fn form(
        &self,
        tools: Option<&Tools>,
        schema: Option<&serde_json::Value>,
        terms: &Terms<'_>,
    ) -> Result<(Option<Grammar>, Option<CallStyle>), ApiError> {
        let turn = terms.template.ok().and_then(ChatTemplate::end_token);
        let ends: Vec<u32> = turn.and_then(|name| terms.codec.token(name)).into_iter().collect();
        let compiler = || terms.grammars.compiler(terms.codec, &ends);
        match (tools, schema, terms.template) {
            (Some(tools), _, Ok(template)) => {
                let style = CallStyle::of(template, terms.codec);
                let grammar = style.grammar(tools, schema).and_then(|grammar| compiler()?.lark(grammar));
                let grammar = grammar.map_err(|error| ApiError::of("tools", format!("`tools`: {error}")))?;
                Ok((Some(grammar), Some(style)))
            }
            (_, Some(schema), _) => {
                let grammar = compiler().and_then(|compiler| compiler.json(schema)).map_err(|error| {
                    ApiError::of("response_format", format!("the schema of `response_format`: {error}"))
                })?;
                Ok((Some(grammar), None))
            }
            _ => Ok((None, None)),
        }
    }

    /// What all choices have in common.
    fn template_request(&self, terms: &Terms<'_>) -> Result<Request, ApiError> {
        let fields = &self.fields;
        let (stop, mut end_tokens) = self.stops(terms.codec)?;
        end_tokens.extend(self.end_tokens(terms)?);
        let logprobs = self.logprobs()?;
        let echo = fields.get("echo")?.unwrap_or(false);
        let is_on = fields.get("memory")?.unwrap_or(true);
        Ok(Request {
            sampling: self.sampling()?,
            stop,
            end_tokens,
            min_tokens: fields.count("min_tokens")?.unwrap_or(0),
            logit_bias: self.logit_bias()?,
            logprobs,
            prompt_logprobs: logprobs.filter(|_| echo),
            gates: fields.get("gates")?.unwrap_or(false),
            memory: terms.memory.filter(|_| is_on),
            deadline: Instant::now().checked_add(terms.time_limit),
            ..Request::new(Vec::new(), 0)
        })
    }

    fn include_usage(&self, stream: bool) -> Result<bool, ApiError> {
        let Some(raw) = self.fields.raw("stream_options") else { return Ok(false) };
        let options = Fields::parse(raw.as_bytes())?;
        let options = options.only(&["include_usage", "include_obfuscation", "continuous_usage_stats"])?;
        let include = options.get("include_usage")?.unwrap_or(false);
        if include && !stream {
            return Err(ApiError::of("stream_options", "`stream_options` goes with `stream`: true"));
        }
        Ok(include)
    }

    /// Choices of each prompt.
    fn choices(&self, prompts: usize) -> Result<usize, ApiError> {
        let n = self.fields.count("n")?.unwrap_or(1);
        if let Some(best_of) = self.fields.count("best_of")?.filter(|&best_of| best_of != 1 && best_of != n) {
            let problem = format!("`best_of` is {best_of}: this server takes 1 or the value of `n`, {n}");
            return Err(ApiError::of("best_of", problem).coded("unsupported_parameter"));
        }
        if prompts == 0 {
            return Err(ApiError::of("prompt", "`prompt` is an empty list"));
        }
        if n.saturating_mul(prompts) > MOST_CHOICES {
            let problem =
                format!("{prompts} prompts with {n} choices each are more than {MOST_CHOICES} answers");
            return Err(ApiError::of(if n > 1 { "n" } else { "prompt" }, problem));
        }
        Ok(n)
    }

    /// Tokens of each prompt.
    fn prompts(&self, terms: &Terms<'_>, tools: Option<&Tools>) -> Result<Vec<Vec<u32>>, ApiError> {
        let name = if self.endpoint == Endpoint::Chat { "messages" } else { "prompt" };
        let raw = self.fields.raw(name);
        let raw = raw.ok_or_else(|| ApiError::of(name, format!("`{name}` is missing or empty")))?;
        if self.endpoint == Endpoint::Chat {
            let text = self.conversation(raw, terms, tools)?;
            check_length(&text, name, terms)?;
            let tokens = terms.codec.marked(&text).map_err(|error| ApiError::of(name, error.to_string()))?;
            return Ok(vec![tokens]);
        }
        let options = PromptOptions {
            parse_special: self.fields.get("parse_special")?.unwrap_or(terms.parse_special),
            add_special_tokens: self.fields.get("add_special_tokens")?.unwrap_or(true),
        };
        let document = |text: &String| {
            check_length(text, name, terms)?;
            terms.codec.prompt(text, options).map_err(|error| ApiError::of(name, error.to_string()))
        };
        let prompts: Prompts =
            serde_json::from_str(raw).map_err(|error| ApiError::of(name, error.to_string()))?;
        match prompts {
            Prompts::Text(text) => Ok(vec![document(&text)?]),
            // An empty list is one of no prompts and of no tokens alike.
            Prompts::Tokens(tokens) => Ok(vec![tokens]),
            Prompts::Texts(texts) => texts.iter().map(document).collect(),
            Prompts::TokenLists(lists) => Ok(lists),
        }
    }

    /// The text of the conversation.
    fn conversation(&self, raw: &str, terms: &Terms<'_>, tools: Option<&Tools>) -> Result<String, ApiError> {
        let template = terms.template.map_err(|reason| {
            ApiError::bad(format!(
                "{reason}; start the server with --chat-template, or use /v1/completions, which needs none"
            ))
        })?;
        let tools = tools.map(|tools| &tools.shown);
        let messages = messages::read(raw, template, tools)?;
        let mut variables: BTreeMap<String, TemplateValue> = match self.fields.raw("chat_template_kwargs") {
            None => BTreeMap::new(),
            Some(raw) => serde_json::from_str(raw)
                .map_err(|error| ApiError::of("chat_template_kwargs", error.to_string()))?,
        };
        if let Some(effort) = self.fields.get::<TemplateValue>("reasoning_effort")? {
            variables.entry("reasoning_effort".into()).or_insert(effort);
        }
        let conversation = Conversation {
            messages: &messages,
            tools: tools.cloned(),
            documents: self.fields.get("documents")?,
            variables,
            add_generation_prompt: self.fields.get("add_generation_prompt")?.unwrap_or(true),
        };
        template.render_all(&conversation).map_err(|error| ApiError::of("messages", error.to_string()))
    }

    fn max_tokens(&self, prompt: usize, terms: &Terms<'_>) -> Result<usize, ApiError> {
        let (older, newer) = (self.fields.count("max_tokens")?, self.fields.count("max_completion_tokens")?);
        if let (Some(older), Some(newer)) = (older, newer)
            && older != newer
        {
            let problem =
                format!("`max_tokens` is {older} and `max_completion_tokens` is {newer}: give one of them");
            return Err(ApiError::of("max_tokens", problem));
        }
        let left = terms.context.saturating_sub(prompt);
        match older.or(newer) {
            Some(count) if terms.clip && left > 0 => Ok(count.min(left)),
            Some(count) => Ok(count),
            None if self.endpoint == Endpoint::Chat => Ok(left.max(1)),
            None => Ok(COMPLETION_TOKENS.min(left).max(1)),
        }
    }

    /// Stop strings; those that are names of special tokens as tokens.
    fn stops(&self, codec: &TextCodec) -> Result<(Vec<String>, Vec<u32>), ApiError> {
        let stops = match self.fields.get::<OneOrMany>("stop")? {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        let (count, bytes) = MOST_STOPS;
        if stops.len() > count || stops.iter().any(|stop| stop.is_empty() || stop.len() > bytes) {
            let problem = format!("`stop` takes up to {count} texts of 1 to {bytes} bytes");
            return Err(ApiError::of("stop", problem));
        }
        let mut tokens: Vec<u32> = stops.iter().filter_map(|stop| codec.special(stop)).collect();
        for id in self.fields.get::<Vec<f64>>("stop_token_ids")?.unwrap_or_default() {
            if !(0.0..codec.token_bytes().len() as f64).contains(&id) {
                let problem = format!("`stop_token_ids` has {id}, which is not a token of this model");
                return Err(ApiError::of("stop_token_ids", problem));
            }
            tokens.push(id as u32);
        }
        Ok((stops, tokens))
    }

    /// Tokens that end an answer: the end of a document, and of a turn.
    fn end_tokens(&self, terms: &Terms<'_>) -> Result<Vec<u32>, ApiError> {
        if self.fields.get("ignore_eos")? == Some(true) {
            return Ok(Vec::new());
        }
        let template = terms.template.ok().filter(|_| self.endpoint == Endpoint::Chat);
        let turn = template.and_then(ChatTemplate::end_token).and_then(|name| terms.codec.token(name));
        Ok(terms.codec.end_tokens().iter().copied().chain(turn).collect())
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let bias: BTreeMap<String, f32> = self.fields.get("logit_bias")?.unwrap_or_default();
        let wrong = |problem: String| ApiError::of("logit_bias", problem);
        bias.into_iter()
            .map(|(token, bias)| match token.parse() {
                Ok(id) if (-100.0..=100.0).contains(&bias) => Ok((id, bias)),
                Ok(_) => Err(wrong(format!(
                    "`logit_bias` of token {token} is {bias}, but must be from -100 to 100"
                ))),
                Err(_) => Err(wrong(format!("`logit_bias` has {token:?}, which is not a token's id"))),
            })
            .collect()
    }

    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        if self.endpoint == Endpoint::Completions {
            return self.fields.count("logprobs");
        }
        let top = self.fields.count("top_logprobs")?;
        match self.fields.get("logprobs")?.unwrap_or(false) {
            true => Ok(Some(top.unwrap_or(0))),
            false if top.unwrap_or(0) == 0 => Ok(None),
            false => Err(ApiError::of("top_logprobs", "`top_logprobs` goes with `logprobs`: true")),
        }
    }

    fn sampling(&self) -> Result<Sampling, ApiError> {
        let (fields, own) = (&self.fields, Sampling::default());
        Ok(Sampling {
            temperature: fields.get("temperature")?.unwrap_or(own.temperature),
            top_k: fields.integer("top_k")?.and_then(|k| usize::try_from(k).ok()).filter(|&k| k > 0),
            top_p: fields.get("top_p")?.unwrap_or(own.top_p),
            min_p: fields.get("min_p")?.unwrap_or(own.min_p),
            repetition_penalty: fields.get("repetition_penalty")?.unwrap_or(own.repetition_penalty),
            presence_penalty: fields.get("presence_penalty")?.unwrap_or(own.presence_penalty),
            frequency_penalty: fields.get("frequency_penalty")?.unwrap_or(own.frequency_penalty),
            seed: 0,
        })
    }
}

/// Refuses a text that is too long before it is cut into tokens, which would take long.
pub(crate) fn check_length(text: &str, name: &str, terms: &Terms<'_>) -> Result<(), ApiError> {
    let fewest = terms.codec.fewest_tokens(text.len());
    if fewest <= terms.context {
        return Ok(());
    }
    let problem = format!(
        "this model's context is {} tokens, but the {} bytes of `{name}` make {fewest} or more: shorten it",
        terms.context,
        text.len()
    );
    Err(ApiError::of(name, problem).coded("context_length_exceeded"))
}

/// A seed for a request without one: another one each time.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn ask(endpoint: Endpoint, body: &Value, clip: bool) -> Result<Asked, ApiError> {
        let words = [("a".to_owned(), 0), ("<|eot|>".to_owned(), 1)].into_iter().collect();
        let model = tokenizers::models::wordlevel::WordLevel::builder().vocab(words).unk_token("a".into());
        let model = tokenizers::models::ModelWrapper::from(model.build().unwrap());
        let mut tokenizer = engram_infer::TextTokenizer::new(model.into());
        tokenizer.add_special_tokens([tokenizers::AddedToken::from("<|eot|>", true)]).unwrap();
        let codec = TextCodec::new(&tokenizer, ["a", "", "b", ""].into_iter().collect(), 3);
        let template = ChatTemplate::new("{{ messages[0].content }}".into(), String::new(), "<|eot|>".into());
        let terms = Terms {
            codec: &codec,
            memory: Some(0),
            template: Ok(&template.unwrap()),
            grammars: &Grammars::default(),
            context: 50,
            time_limit: Duration::from_secs(1),
            clip,
            parse_special: true,
        };
        Body::parse(endpoint, body.to_string().as_bytes())?.ask(&terms)
    }

    #[test]
    fn bad_requests_name_what_is_wrong() {
        for (body, parameter, words) in [
            (json!({}), json!("prompt"), "missing"),
            (json!({"prompt": [1], "n": 129}), json!("n"), "128"),
            (json!({"prompt": [1], "n": 0}), json!("n"), "not 0"),
            (json!({"prompt": vec!["a"; 200]}), json!("prompt"), "200 prompts"),
            (json!({"prompt": vec!["a"; 100], "n": 2}), json!("n"), "100 prompts with 2"),
            (json!({"prompt": [1], "best_of": 3, "n": 2}), json!("best_of"), "3"),
            (json!({"prompt": [1], "stop": [""]}), json!("stop"), "1 to"),
            (json!({"prompt": [1], "stop": ""}), json!("stop"), "1 to"),
            (json!({"prompt": [1], "stop_token_ids": [4]}), json!("stop_token_ids"), "4"),
            (json!({"prompt": [1], "logprobs": 21}), json!("logprobs"), "20"),
            (json!({"prompt": [1], "logprobs": true}), json!("logprobs"), "number"),
            (json!({"prompt": [1], "messages": []}), json!("messages"), "other endpoint"),
            (json!({"prompt": [1], "logit_bias": {"3": 101}}), json!("logit_bias"), "101"),
            (json!({"prompt": [1], "logit_bias": {"x": 1}}), json!("logit_bias"), "x"),
            (json!({"prompt": [1], "suffix": "b"}), json!("suffix"), "not support"),
            (
                json!({"prompt": [1], "stream_options": {"include_usage": true}}),
                json!("stream_options"),
                "`stream`",
            ),
            (
                json!({"prompt": [1], "stream": true, "stream_options": {"colour": 1}}),
                json!("colour"),
                "colour",
            ),
            (
                json!({"prompt": [1], "max_tokens": 1, "max_completion_tokens": 2}),
                json!("max_tokens"),
                "give one",
            ),
            (json!({"prompt": "x".repeat(60_000)}), json!("prompt"), "context is 50"),
            (json!({"prompt": {"a": 1}}), json!("prompt"), "`prompt` must be"),
            (json!({"prompt": [1], "temperature": "hot"}), json!("temperature"), "hot"),
            (json!({"prompt": [1], "max_tokens": -1}), json!("max_tokens"), "-1"),
            (json!({"prompt": [1], "colour": "red"}), json!("colour"), "colour"),
        ] {
            let error = ask(Endpoint::Completions, &body, false).expect_err("refused");
            let (status, error) = (error.status.as_u16(), error.json()["error"].clone());
            assert_eq!((status, &error["param"]), (400, &parameter), "{body}: {error}");
            assert!(error["message"].as_str().unwrap().contains(words), "{body}: {error}");
            assert_eq!(error["type"], "invalid_request_error");
        }
        assert!(Body::parse(Endpoint::Completions, b"{\"prompt\": ").is_err());
    }

    #[test]
    fn every_form_of_prompt_and_number_of_choices_is_taken() {
        let asked = |body: Value| {
            ask(Endpoint::Completions, &body, false).unwrap_or_else(|e| panic!("{body}: {}", e.json()))
        };
        let prompts =
            |body| asked(body).requests.into_iter().map(|request| request.prompt).collect::<Vec<_>>();
        assert_eq!(prompts(json!({"prompt": "a"})), [[3, 0]]);
        assert_eq!(prompts(json!({"prompt": "a", "add_special_tokens": false})), [[0]]);
        assert_eq!(prompts(json!({"prompt": "a<|eot|>"})), [[3, 0, 1]]);
        assert_eq!(prompts(json!({"prompt": "a<|eot|>", "parse_special": false})), [[3, 0]]);
        assert_eq!(prompts(json!({"prompt": [2, 0]})), [[2, 0]], "nothing is added to tokens");
        assert_eq!(prompts(json!({"prompt": [[2], [0]], "n": 2})), [[2], [2], [0], [0]]);
        assert_eq!(prompts(json!({"prompt": vec!["a"; 20]})).len(), 20);
        let two = asked(json!({"prompt": ["a", "a"], "n": 2, "seed": -1, "best_of": 2}));
        let seeds: Vec<u64> = two.requests.iter().map(|request| request.sampling.seed).collect();
        assert_eq!((seeds, two.n), (vec![u64::MAX, 0, u64::MAX, 0], 2));
        let request = asked(json!({
            "prompt": [0], "stop": ["<|eot|>", "b"], "echo": true, "logprobs": 2, "max_tokens": 0, "top_k": 0,
            "logit_bias": {"2": 1}, "min_tokens": 3, "stop_token_ids": [2],
        }));
        let request = &request.requests[0];
        assert_eq!(
            (&request.stop[..], &request.end_tokens[..]),
            (&["<|eot|>".to_owned(), "b".into()][..], &[1, 2, 3][..])
        );
        assert_eq!((request.logprobs, request.prompt_logprobs, request.max_tokens), (Some(2), Some(2), 0));
        assert_eq!(
            (request.sampling.top_k, &request.logit_bias[..], request.min_tokens),
            (None, &[(2, 1.0)][..], 3)
        );
        assert!(asked(json!({"prompt": [0], "ignore_eos": true})).requests[0].end_tokens.is_empty());
    }

    #[test]
    fn a_chat_ends_with_its_turn_or_the_context() {
        let asked = |body: Value, clip| {
            ask(Endpoint::Chat, &body, clip).unwrap_or_else(|e| panic!("{body}: {}", e.json()))
        };
        let messages = json!([{"role": "user", "content": "a"}]);
        let request = &asked(json!({"messages": messages}), false).requests[0];
        assert_eq!((request.max_tokens, &request.end_tokens[..]), (48, &[3, 1][..]));
        let long = json!({"messages": messages, "max_tokens": 4096, "max_completion_tokens": 4096});
        assert_eq!(asked(long.clone(), true).requests[0].max_tokens, 48);
        assert_eq!(asked(long, false).requests[0].max_tokens, 4096);
        let harmless = json!({
            "messages": messages, "logprobs": false, "top_logprobs": 0, "stream_options": {}, "tools": [],
            "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "stop": [], "user": "u",
        });
        assert_eq!(asked(harmless, false).requests[0].logprobs, None);
        let top = json!({"messages": messages, "top_logprobs": 3});
        assert!(ask(Endpoint::Chat, &top, false).unwrap_err().json()["error"]["param"] == "top_logprobs");
    }
}
