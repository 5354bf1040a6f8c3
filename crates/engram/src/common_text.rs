//! English text that is in the program: the quickstart's corpus.

use engram_data::Corpus;

const TRAIN: &[u8] = include_bytes!("../../../data/quickstart.train.jsonl.zst");
const VALID: &[u8] = include_bytes!("../../../data/quickstart.valid.jsonl.zst");

/// Text to train on.
pub(crate) fn train() -> Result<Corpus, engram_data::Error> {
    Corpus::embedded("quickstart.train.jsonl.zst", TRAIN)
}

/// Text that is held out: no document of it is among those to train on.
pub(crate) fn held_out() -> Result<Corpus, engram_data::Error> {
    Corpus::embedded("quickstart.valid.jsonl.zst", VALID)
}
