use std::path::PathBuf;

use clap::{Args, Subcommand};
use engram_data::{Corpus, Tokenizer as Trained, TokenizerProgress, TokenizerTraining};

use super::print;
use crate::corpus_options::{CorpusOptions, tell_damage};
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::number::short;
use crate::progress::Progress;

/// Commands for tokenizers.
#[derive(Debug, Subcommand)]
pub(crate) enum Tokenizer {
    Train(Train),
}

/// Train a byte-level BPE tokenizer on a corpus and write it as a Hugging Face `tokenizer.json`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram tokenizer train corpus.jsonl.zst --vocabulary 32768 --out tokenizer.json
  engram tokenizer train books/ notes.txt --vocabulary 4096 --out tokenizer.json")]
pub(crate) struct Train {
    #[command(flatten)]
    corpus: CorpusOptions,
    /// File to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Number of tokens, including the 256 bytes and two special tokens.
    #[arg(long, value_name = "N")]
    vocabulary: usize,
    /// Maximum number of bytes to learn from. A longer corpus is sampled evenly.
    #[arg(long, value_name = "BYTES", default_value_t = TokenizerTraining::default().byte_budget)]
    byte_budget: u64,
}

impl Tokenizer {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Train(command) => command.run(),
        }
    }
}

impl Train {
    fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let corpus = self.corpus.open()?;
        interrupt::listen()?;
        let options = TokenizerTraining { vocabulary: self.vocabulary, byte_budget: self.byte_budget };
        let tokenizer = train(&corpus, &options)?;
        tokenizer.save(&self.out)?;
        print(format!("{}: {} tokens, {}\n", self.out.display(), tokenizer.vocabulary(), tokenizer.hash()))
    }
}

/// Trains a tokenizer and shows progress.
pub(super) fn train(corpus: &Corpus, options: &TokenizerTraining) -> anyhow::Result<Trained> {
    let mut progress = Progress::new(100);
    let mut report = |reached: TokenizerProgress| {
        match reached {
            TokenizerProgress::Reading { done, total } => {
                let percent = done * 90 / total.max(1);
                progress
                    .show(percent, || format!("tokenizer: {} of {} bytes read", short(done), short(total)));
            }
            TokenizerProgress::Merging => progress.show(90, || "tokenizer: merging".into()),
        }
        interrupt::flow()
    };
    let (tokenizer, damage) = Trained::train_reporting(corpus, options, &mut report)?;
    drop(progress);
    tell_damage(&damage);
    Ok(tokenizer)
}
