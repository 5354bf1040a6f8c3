//! A corpus as tokens to train on and tokens that are held out, kept in the folder of a run.

use std::path::Path;

use anyhow::Context;
use engram_data::{Corpus, TokenShards, Tokenizer};

use super::data::prepare;
use crate::corpus_options::tell_damage;
use crate::failure::refuse;
use crate::files::write_file;

/// The training part and the held-out part of `corpus`, below `work`, which are made if they do not exist. `how`
/// tells what else they depend on.
pub(crate) fn divided(
    work: &Path,
    (corpus, how): (&Corpus, &str),
    tokenizer: &Tokenizer,
    hold_out: f64,
) -> anyhow::Result<[TokenShards; 2]> {
    let (data, note_of_corpus) = (work.join("data"), work.join("corpus.txt"));
    let told = described(corpus, how)?;
    match std::fs::read_to_string(&note_of_corpus) {
        Ok(saved) if saved == told => {}
        Ok(_) => {
            let work = work.display();
            return refuse(format!("{work}: was begun with another corpus; give that again, or remove it"));
        }
        Err(_) => {
            if data.exists() {
                std::fs::remove_dir_all(&data)
                    .with_context(|| format!("cannot remove {}", data.display()))?;
            }
            let summary = prepare(corpus, tokenizer, &data, hold_out)?;
            tell_damage(&summary.damage);
            if summary.valid.tokens < 2 {
                std::fs::remove_dir_all(&data)
                    .with_context(|| format!("cannot remove {}", data.display()))?;
                return refuse(
                    "the corpus has too few documents to hold one out: give more, or cut it into documents",
                );
            }
            write_file(&note_of_corpus, &told)?;
        }
    }
    Ok([TokenShards::open(&data.join("train"))?, TokenShards::open(&data.join("valid"))?])
}

/// The files of a corpus with their lengths, and how it is read.
fn described(corpus: &Corpus, how: &str) -> anyhow::Result<String> {
    let mut text = format!("{how}\n");
    for file in corpus.files() {
        let length =
            std::fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?.len();
        text += &format!("{} {length}\n", file.display());
    }
    Ok(text)
}
