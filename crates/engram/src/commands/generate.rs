use clap::Args;
use engram_infer::{Engine, PromptOptions, Request, Sampling, TextCodec};
use serde::Serialize;

use super::{print, print_json, text_or_stdin};
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::served::{ModelOptions, say};

/// Continue a text and print it as it is generated.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram generate runs/quickstart/memory --prompt 'The President of the United States'
  engram generate runs/small --prompt - --max-tokens 500 --temperature 0 < beginning.txt
  engram generate runs/small --prompt 'Once' --top-k 40 --seed 7 --json
  engram generate runs/large --prompt 'Once' --tier direct --row-cache 1GiB --no-memory
  engram generate SmolLM2-135M --prompt 'The Vorn bridge' --overlay facts/vorn")]
pub(crate) struct Generate {
    #[command(flatten)]
    model: ModelOptions,
    /// Text to continue, read as the beginning of a document; `-` reads standard input. Names of special tokens in it
    /// become those tokens.
    #[arg(long)]
    prompt: String,
    /// Read names of special tokens in the prompt as ordinary text.
    #[arg(long)]
    plain_prompt: bool,
    /// Maximum number of tokens. The default is 200, or what is left of the context. The model may end earlier.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    #[command(flatten)]
    answer: AnswerOptions,
    /// Print JSON at the end instead of the text as it is generated.
    #[arg(long)]
    json: bool,
}

/// How a model answers.
#[derive(Debug, Args)]
pub(crate) struct AnswerOptions {
    #[command(flatten)]
    sampling: SamplingOptions,
    /// Stop before this text.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Switch the memory off.
    #[arg(long = "without-memory", visible_alias = "no-memory")]
    without_memory: bool,
}

impl AnswerOptions {
    /// A request without a prompt yet.
    ///
    /// # Errors
    /// When a value is out of range.
    pub(crate) fn request(self) -> anyhow::Result<Request> {
        let sampling = self.sampling.sampling()?;
        if self.stop.iter().any(String::is_empty) {
            return refuse("--stop is empty: it would end every answer at once");
        }
        let memory = (!self.without_memory).then_some(0);
        Ok(Request { sampling, stop: self.stop, memory, ..Request::new(Vec::new(), 0) })
    }
}

/// Sampling options.
#[derive(Debug, Clone, Copy, Args)]
struct SamplingOptions {
    /// Temperature: logits are divided by it. 0 takes the likeliest token, 1 the model's own probabilities.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Sample only from the K likeliest tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample only from the likeliest tokens that together reach probability P.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Sample only from tokens at least P times as probable as the likeliest.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Divide the logits of tokens that already occurred by R; 1 changes nothing.
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Random seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingOptions {
    /// Refuses values out of range.
    fn sampling(self) -> anyhow::Result<Sampling> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, seed } = self;
        let sampling =
            Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed, ..Sampling::default() };
        match sampling.validate() {
            Ok(()) => Ok(sampling),
            Err(bad) => refuse(format!("--{} {}", bad.name.replace('_', "-"), bad.problem)),
        }
    }
}

/// A prompt and its continuation.
#[derive(Debug, Serialize)]
pub(super) struct Continuation {
    prompt: String,
    sampling: Sampling,
    /// The continuation.
    pub(super) text: String,
    tokens: Vec<u32>,
    /// Time spent waiting for memory rows.
    row_wait_seconds: f64,
}

/// Default length of a continuation in tokens.
const TOKENS: usize = 200;

impl Generate {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let request = self.answer.request()?;
        let prompt = text_or_stdin(Some(&self.prompt))?;
        let (engine, codec) = self.model.open()?.for_one()?;
        interrupt::listen()?;
        let options = PromptOptions { parse_special: !self.plain_prompt, ..PromptOptions::default() };
        let (prompt_of, count) = ((&prompt[..], options), self.max_tokens);
        if self.json {
            let continuation = proceed((&engine, &codec), prompt_of, count, request, &mut |_| Ok(()))?;
            return print_json(&continuation);
        }
        print(&prompt)?;
        let shown = &mut |text: &str| print(text);
        let continuation = proceed((&engine, &codec), prompt_of, count, request, shown);
        print("\n")?;
        continuation.map(|_| ())
    }
}

/// Tokens that end an answer: the model's own, and special tokens that a stop text names.
pub(super) fn end_tokens(codec: &TextCodec, stop: &[String]) -> Vec<u32> {
    let named = stop.iter().filter_map(|stop| codec.special(stop));
    codec.end_tokens().iter().copied().chain(named).collect()
}

/// Continues `prompt`, the beginning of a document, as `request` says, by `count` tokens or a default number. Passes
/// each piece of whole characters to `show`.
pub(super) fn proceed(
    (engine, codec): (&Engine, &TextCodec),
    (prompt, options): (&str, PromptOptions),
    count: Option<usize>,
    request: Request,
    show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Continuation> {
    let tokens = codec.prompt(prompt, options)?;
    let left = engine.context().saturating_sub(tokens.len());
    if left == 0 {
        return refuse(format!(
            "the prompt has {} tokens, which leaves none of the model's context of {}: shorten it",
            tokens.len(),
            engine.context()
        ));
    }
    let sampling = request.sampling;
    let request = Request {
        prompt: tokens,
        max_tokens: count.unwrap_or(TOKENS.min(left)),
        end_tokens: end_tokens(codec, &request.stop),
        ..request
    };
    let said = say(engine, request, show)?;
    if said.interrupted {
        return Err(Interrupted(String::new()).into());
    }
    Ok(Continuation {
        prompt: prompt.to_owned(),
        sampling,
        text: said.text,
        tokens: said.tokens,
        row_wait_seconds: said.row_wait.as_secs_f64(),
    })
}
