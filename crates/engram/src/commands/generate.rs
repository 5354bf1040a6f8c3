use std::path::PathBuf;

use clap::Args;
use engram_train::{Sampling, Trained, generate};
use serde::Serialize;

use super::{print, print_json, text_or_stdin};
use crate::device::DeviceKind;
use crate::failure::Interrupted;
use crate::interrupt;
use engram_serve::TextStream;

/// Continue a text, as it comes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram generate runs/quickstart/memory --prompt 'The President of the United States'
  engram generate runs/small --prompt - --tokens 500 --temperature 0 < beginning.txt
  engram generate runs/small --prompt 'Once' --top-k 40 --seed 7 --json")]
pub(crate) struct Generate {
    /// A checkpoint, or a run's folder, whose newest is taken.
    checkpoint: PathBuf,
    /// Text to continue, as the beginning of a document; `-`: standard input.
    #[arg(long)]
    prompt: String,
    /// Tokens at most; the model may end the text earlier.
    #[arg(long, value_name = "N", default_value_t = 200)]
    tokens: usize,
    /// Logits are divided by it: 0 takes the likeliest token, 1 the model's own probabilities.
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Consider only the K likeliest tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Consider only the likeliest tokens that together reach probability P.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Seed of the draw.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON when done, instead of the text as it comes.
    #[arg(long)]
    json: bool,
}

/// A prompt and what came of it.
#[derive(Debug, Serialize)]
pub(super) struct Continuation {
    prompt: String,
    sampling: Sampling,
    /// The continuation.
    pub(super) text: String,
    tokens: Vec<u32>,
}

impl Generate {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let Self { temperature, top_k, top_p, seed, .. } = self;
        let sampling = Sampling { temperature, top_k, top_p, seed };
        sampling.validate()?;
        let prompt = text_or_stdin(Some(&self.prompt))?;
        let model = Trained::open(&self.checkpoint, &self.device.open()?)?;
        interrupt::listen()?;
        if self.json {
            let continuation = proceed(&model, &prompt, self.tokens, sampling, &mut |_| Ok(()))?;
            return print_json(&continuation);
        }
        print(&prompt)?;
        let continuation = proceed(&model, &prompt, self.tokens, sampling, &mut |text| print(text));
        print("\n")?;
        continuation.map(|_| ())
    }
}

/// Continues `prompt`, the beginning of a document, and gives each piece of whole characters to `show`.
pub(super) fn proceed(
    model: &Trained,
    prompt: &str,
    count: usize,
    sampling: Sampling,
    show: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Continuation> {
    let tokenizer = model.tokenizer();
    // A document begins after the end of another.
    let mut before = vec![tokenizer.end_of_text()];
    before.extend(tokenizer.encode(prompt)?);
    let (mut stream, mut text, mut shown) = (TextStream::default(), String::new(), Ok(()));
    let mut each = |token: u32| {
        let piece = stream.push(tokenizer.token_bytes(token));
        text.push_str(&piece);
        shown = show(&piece);
        shown.is_ok() && !interrupt::asked()
    };
    let tokens = generate(model, &before, count, sampling, &mut each)?;
    shown?;
    let rest = stream.finish();
    show(&rest)?;
    text.push_str(&rest);
    if interrupt::asked() {
        return Err(Interrupted(String::new()).into());
    }
    Ok(Continuation { prompt: prompt.to_owned(), sampling, text, tokens })
}
