//! English text that is in the program: the quickstart's corpus.

use engram_data::Corpus;

const TRAIN: &[u8] = include_bytes!("../../../data/quickstart.train.jsonl.zst");
const VALID: &[u8] = include_bytes!("../../../data/quickstart.valid.jsonl.zst");

/// Text to train on.
pub(crate) fn train() -> engram_data::Result<Corpus> {
    Corpus::embedded("quickstart.train.jsonl.zst", TRAIN)
}

/// Text that is held out: no document of it is among those to train on.
pub(crate) fn held_out() -> engram_data::Result<Corpus> {
    Corpus::embedded("quickstart.valid.jsonl.zst", VALID)
}
