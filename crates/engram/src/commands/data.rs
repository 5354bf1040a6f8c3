use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use engram_data::{Corpus, PrepareOptions, PrepareProgress, PrepareSummary, Tokenizer};

use super::print;
use super::sft::Sft;
use crate::corpus_options::{CorpusOptions, tell_damage};
use crate::interrupt;
use crate::note::note;
use crate::number::short;
use crate::progress::Progress;
use crate::table::Table;

/// Commands for data.
#[derive(Debug, Subcommand)]
pub(crate) enum Data {
    Prepare(Prepare),
    Sft(Sft),
}

/// Turn a corpus into token shards: `OUT/train`, and `OUT/valid` with the held-out documents. The same command again
/// resumes a preparation that was interrupted or killed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram data prepare corpus.jsonl.zst --tokenizer tokenizer.json --out data
  engram data prepare books/ --tokenizer tokenizer.json --hold-out 0.05 --out data
  engram data prepare crawl/ --tokenizer tokenizer.json --skip-damaged --out data
  engram data prepare books/ --tokenizer runs/smol/tokenizer.json --end '<|im_end|>' --out chats
  engram data prepare valid.parquet --tokenizer tokenizer.json --hold-out 0 --out valid")]
pub(crate) struct Prepare {
    #[command(flatten)]
    corpus: CorpusOptions,
    /// Tokenizer (a Hugging Face `tokenizer.json`).
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder to create.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the documents to hold out. A document's text alone decides whether it is held out. If the share selects
    /// none of a few documents, the nearest one is held out.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    hold_out: f64,
    /// Token that ends a document, the same as in `[text]` of the model's run.toml. The default is the first usual name
    /// that the tokenizer has.
    #[arg(long, value_name = "NAME")]
    end: Option<String>,
    /// Bytes of text between two checkpoints, for tests.
    #[arg(long, value_name = "BYTES", hide = true, default_value_t = PrepareOptions::default().checkpoint_bytes)]
    checkpoint_bytes: u64,
}

impl Data {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Prepare(command) => command.run(),
            Self::Sft(command) => command.run(),
        }
    }
}

impl Prepare {
    fn run(self) -> anyhow::Result<()> {
        let tokenizer = Tokenizer::load_ending(&self.tokenizer, self.end.as_deref())?;
        let corpus = self.corpus.open()?;
        interrupt::listen()?;
        let (hold_out, checkpoint_bytes) = (self.hold_out, self.checkpoint_bytes);
        let options = PrepareOptions { hold_out, checkpoint_bytes, ..PrepareOptions::default() };
        let summary = prepare_with(&corpus, &tokenizer, &self.out, &options)?;
        self.tell(&summary);
        print(table(&summary).to_string())
    }
}

impl Prepare {
    /// Reports what differs from the request.
    fn tell(&self, summary: &PrepareSummary) {
        tell_damage(&summary.damage);
        if summary.empty_documents > 0 {
            note(format_args!("empty documents left out: {}", summary.empty_documents));
        }
        if summary.share_missed {
            let documents = summary.train.documents + summary.valid.documents;
            let held_out = match summary.valid.documents {
                0 => "none is held out; leave out `data.valid` when you train",
                _ => "the nearest is held out",
            };
            let share = self.hold_out;
            note(format_args!(
                "none of the {documents} documents falls into the held-out share of {share}: {held_out}"
            ));
        }
    }
}

/// Prepares shards in the new folder `out` and shows progress.
pub(super) fn prepare(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    out: &Path,
    hold_out: f64,
) -> anyhow::Result<PrepareSummary> {
    prepare_with(corpus, tokenizer, out, &PrepareOptions { hold_out, ..PrepareOptions::default() })
}

fn prepare_with(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    out: &Path,
    options: &PrepareOptions,
) -> anyhow::Result<PrepareSummary> {
    let mut progress = Progress::new(corpus.bytes());
    let mut noted = false;
    let mut report = |reached: PrepareProgress| {
        if reached.resumed > 0 && !noted {
            noted = true;
            let bytes = short(reached.resumed);
            note(format_args!("resuming an unfinished preparation; bytes of text already done: {bytes}"));
        }
        progress.show(reached.done, || format!("tokens: {}", short(reached.tokens)));
        interrupt::flow()
    };
    Ok(engram_data::prepare(corpus, tokenizer, out, options, &mut report)?)
}

fn table(summary: &PrepareSummary) -> Table {
    let mut table = Table::new(["split", "documents", "bytes", "tokens", "bytes/token", "shards"]);
    for (name, split) in [("train", &summary.train), ("valid", &summary.valid)] {
        if split.tokens > 0 {
            table.row([
                name.to_owned(),
                split.documents.to_string(),
                split.text_bytes.to_string(),
                split.tokens.to_string(),
                format!("{:.2}", split.text_bytes as f64 / split.tokens as f64),
                split.shards.to_string(),
            ]);
        }
    }
    table
}
