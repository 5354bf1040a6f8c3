use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use engram_data::{Corpus, PrepareOptions, PrepareProgress, PrepareSummary, Tokenizer};

use super::print;
use crate::corpus_options::{CorpusOptions, tell_damage};
use crate::interrupt;
use crate::note::note;
use crate::number::short;
use crate::progress::Progress;
use crate::table::Table;

/// What can be done with data.
#[derive(Debug, Subcommand)]
pub(crate) enum Data {
    Prepare(Prepare),
}

/// Turn a corpus into shards of tokens: `OUT/train`, and `OUT/valid` with the documents held out.
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
    /// Tokenizer, a Hugging Face `tokenizer.json`.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the documents to hold out, chosen by their text alone; where none of a few falls into it, the nearest.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    hold_out: f64,
    /// Token that ends a document, as `[text]` of the model's run.toml has it; without it, the first usual name that the
    /// tokenizer has.
    #[arg(long, value_name = "NAME")]
    end: Option<String>,
}

impl Data {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Prepare(command) => command.run(),
        }
    }
}

impl Prepare {
    fn run(self) -> anyhow::Result<()> {
        let tokenizer = Tokenizer::load_ending(&self.tokenizer, self.end.as_deref())?;
        let corpus = self.corpus.open()?;
        interrupt::listen()?;
        let summary = prepare(&corpus, &tokenizer, &self.out, self.hold_out)?;
        self.tell(&summary);
        print(table(&summary).to_string())
    }
}

impl Prepare {
    /// Tells what is not as it was asked for.
    fn tell(&self, summary: &PrepareSummary) {
        tell_damage(&summary.damage);
        if summary.empty_documents > 0 {
            note(format_args!("documents without text, left out: {}", summary.empty_documents));
        }
        if summary.share_missed {
            let documents = summary.train.documents + summary.valid.documents;
            let held_out = match summary.valid.documents {
                0 => "none is held out; train without `data.valid`",
                _ => "the nearest is held out",
            };
            let share = self.hold_out;
            note(format_args!(
                "none of the {documents} documents falls into the share of {share}: {held_out}"
            ));
        }
    }
}

/// Prepares shards in the new folder `out`, with progress.
pub(super) fn prepare(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    out: &Path,
    hold_out: f64,
) -> anyhow::Result<PrepareSummary> {
    let mut progress = Progress::new(corpus.bytes());
    let mut report = |reached: PrepareProgress| {
        progress.show(reached.done, || format!("tokens: {}", short(reached.tokens)));
        interrupt::flow()
    };
    let options = PrepareOptions { hold_out, ..PrepareOptions::default() };
    Ok(engram_data::prepare(corpus, tokenizer, out, &options, &mut report)?)
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
