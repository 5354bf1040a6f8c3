//! The options that name a corpus.

use std::path::PathBuf;

use clap::Args;
use engram_data::{Corpus, DamageReport, OnDamage};

use crate::note::note;

/// A corpus, and what to do with damaged records.
#[derive(Debug, Clone, Args)]
pub(crate) struct CorpusOptions {
    /// Files (.txt, .jsonl, each also .zst or .gz; .parquet) and folders of them.
    #[arg(value_name = "CORPUS", required = true)]
    paths: Vec<PathBuf>,
    /// Field of JSON lines, or column of Parquet files, with the text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Skip and count records that are not JSON, hold no text or are not UTF-8. Without this option, the first such
    /// record is an error that names its place.
    #[arg(long)]
    skip_damaged: bool,
    /// Replace bytes that are not UTF-8 and halves of UTF-16 pairs (`\ud83d`) by U+FFFD, and count the records.
    #[arg(long)]
    replace_damaged: bool,
}

impl CorpusOptions {
    /// Opens the corpus and reports files that its folders leave out.
    pub(crate) fn open(&self) -> anyhow::Result<Corpus> {
        let on_damage = OnDamage { replace: self.replace_damaged, skip: self.skip_damaged };
        Ok(open_corpus(&self.paths, &self.field)?.with_damage(on_damage))
    }
}

/// Opens a corpus and reports files that its folders leave out.
pub(crate) fn open_corpus(paths: &[PathBuf], field: &str) -> anyhow::Result<Corpus> {
    let corpus = Corpus::open(paths)?.with_field(field);
    for path in corpus.skipped() {
        note(format_args!("left out, because it is hidden or its format is unknown: {}", path.display()));
    }
    Ok(corpus)
}

/// Reports damaged records.
pub(crate) fn tell_damage(damage: &DamageReport) {
    if damage.is_empty() {
        return;
    }
    for (count, what) in [
        (damage.skipped, "skipped because they could not be read"),
        (damage.replaced, "repaired with U+FFFD"),
    ] {
        if count > 0 {
            note(format_args!("records {what}: {count}"));
        }
    }
    damage.first.iter().for_each(|problem| note(format_args!("  {problem}")));
    if damage.skipped + damage.replaced > damage.first.len() as u64 {
        note("  …");
    }
}
