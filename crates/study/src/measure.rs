//! A run's measurements: its losses on held-out documents, in total and by how often the preceding text occurs in the
//! training text.
//!
//! A memory row learns from the occurrences of its n-grams. After three tokens that occur never or rarely, a row has
//! learnt little, and the optimiser decides what it holds.

use std::collections::HashMap;

use engram_data::{TokenShards, Tokenizer};
use engram_train::Trainer;
use serde::{Deserialize, Serialize};

/// Length of the counted n-grams.
const ORDER: usize = 3;
/// Lower bounds of the classes, in occurrences.
const CLASSES: [u64; 5] = [0, 1, 10, 100, 1000];
/// Tokens read at a time.
const CHUNK: u64 = 1 << 20;

/// Losses by document, as columns.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Documents {
    /// Tokens predicted.
    pub tokens: Vec<u64>,
    /// Bytes of text that they stand for.
    pub bytes: Vec<u64>,
    /// Sums of their cross-entropies, in nats.
    pub nats: Vec<f64>,
    /// The same by class of the tokens before.
    pub classes: Vec<Class>,
}

/// Losses by document, on tokens whose preceding three tokens occur this often in the training text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Minimum and maximum number of occurrences; the last class has no maximum.
    pub occurrences: (u64, Option<u64>),
    /// Tokens predicted.
    pub tokens: Vec<u64>,
    /// Sums of their cross-entropies, in nats.
    pub nats: Vec<f64>,
}

impl Documents {
    fn of(documents: usize) -> Self {
        let class = |(index, &fewest): (usize, &u64)| {
            let most = CLASSES.get(index + 1).map(|next| next - 1);
            Class { occurrences: (fewest, most), tokens: vec![0; documents], nats: vec![0.0; documents] }
        };
        Self {
            tokens: vec![0; documents],
            bytes: vec![0; documents],
            nats: vec![0.0; documents],
            classes: CLASSES.iter().enumerate().map(class).collect(),
        }
    }

    /// Mean loss, in nats per token; none without documents.
    pub fn nats_per_token(&self) -> Option<f64> {
        let tokens: u64 = self.tokens.iter().sum();
        (tokens > 0).then(|| self.nats.iter().sum::<f64>() / tokens as f64)
    }

    /// Mean loss, in bits per byte of text; none without text.
    pub fn bits_per_byte(&self) -> Option<f64> {
        let bytes: u64 = self.bytes.iter().sum();
        (bytes > 0).then(|| self.nats.iter().sum::<f64>() / std::f64::consts::LN_2 / bytes as f64)
    }

    /// Whether every loss is finite.
    pub fn is_finite(&self) -> bool {
        self.nats.iter().all(|nats| nats.is_finite())
    }
}

/// For every held-out position, its document and the class of the tokens before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Positions {
    document: Vec<u32>,
    class: Vec<u8>,
}

impl Positions {
    /// Classes of the first `limit` predicted tokens (all, if none) of `valid`. Occurrences are counted in `train`.
    ///
    /// # Errors
    /// When the shards cannot be read.
    pub fn of(train: &TokenShards, valid: &TokenShards, limit: Option<usize>) -> engram_train::Result<Self> {
        let length = limit.map_or(valid.len(), |limit| valid.len().min(limit as u64 + 1));
        let tokens = valid.tokens(0..length)?;
        let before = |position: usize| -> Option<[u32; ORDER]> {
            tokens[position.checked_sub(ORDER)?..position].try_into().ok()
        };
        let mut counts: HashMap<[u32; ORDER], u64> =
            (0..tokens.len()).filter_map(before).map(|ngram| (ngram, 0)).collect();
        let overlap = ORDER as u64 - 1;
        let mut start = 0;
        while start + overlap < train.len() {
            let end = train.len().min(start + CHUNK + overlap);
            for ngram in train.tokens(start..end)?.array_windows::<ORDER>() {
                if let Some(count) = counts.get_mut(ngram) {
                    *count += 1;
                }
            }
            start += CHUNK;
        }
        let class = |position: usize| {
            let count = before(position).map_or(0, |ngram| counts[&ngram]);
            CLASSES.iter().rposition(|&fewest| count >= fewest).unwrap_or(0) as u8
        };
        let mut document = Vec::with_capacity(tokens.len());
        for (index, of) in (0..).zip(valid.documents()) {
            document.resize(tokens.len().min(of.tokens.end as usize), index);
        }
        Ok(Self { document, class: (0..tokens.len()).map(class).collect() })
    }

    /// The losses of a finished run. `go_on` is called now and then and decides whether to continue.
    ///
    /// # Errors
    /// When data cannot be read, or `go_on` returned false.
    pub fn measure(
        &self,
        trainer: &Trainer,
        go_on: &mut dyn FnMut() -> bool,
    ) -> engram_train::Result<Documents> {
        let count = self.document.last().map_or(0, |&last| last as usize + 1);
        let mut documents = Documents::of(count);
        let tokenizer: &Tokenizer = trainer.tokenizer();
        let mut add = |first: usize, targets: &[u32], losses: &[f32]| {
            for ((position, &token), &loss) in (first..).zip(targets).zip(losses) {
                let document = self.document[position] as usize;
                documents.tokens[document] += 1;
                documents.bytes[document] += tokenizer.token_bytes(token).len() as u64;
                documents.nats[document] += f64::from(loss);
                let class = &mut documents.classes[usize::from(self.class[position])];
                class.tokens[document] += 1;
                class.nats[document] += f64::from(loss);
            }
        };
        trainer.held_out_losses(&mut add, go_on)?;
        Ok(documents)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow::Continue;

    use engram_data::{Corpus, PrepareOptions, TokenizerTraining, prepare};

    use super::*;

    #[test]
    fn losses_are_means_over_tokens_and_bytes() {
        let documents = Documents {
            tokens: vec![10, 30],
            bytes: vec![40, 40],
            nats: vec![20.0, 40.0],
            classes: Vec::new(),
        };
        assert_eq!(documents.nats_per_token(), Some(1.5));
        assert_eq!(documents.bits_per_byte(), Some(60.0 / std::f64::consts::LN_2 / 80.0));
        assert_eq!(Documents::default().nats_per_token(), None);
        assert!(documents.is_finite() && !Documents { nats: vec![f64::NAN], ..documents }.is_finite());
    }

    #[test]
    fn positions_know_their_document_and_how_often_they_were_seen() {
        let folder = tempfile::tempdir().unwrap();
        let shards = |name: &str, text: &str| {
            let path = folder.path().join(format!("{name}.jsonl"));
            std::fs::write(&path, text).unwrap();
            let corpus = Corpus::open(&[&path]).unwrap();
            let options = TokenizerTraining { vocabulary: 258, ..Default::default() };
            let bytes = Tokenizer::train(&corpus, &options, &mut |_| Continue(())).unwrap();
            let out = folder.path().join(name);
            let options = PrepareOptions { hold_out: 0.0, ..Default::default() };
            prepare(&corpus, &bytes, &out, &options, &mut |_| Continue(())).unwrap();
            TokenShards::open(&out.join("train")).unwrap()
        };
        // Tokens are bytes: "abc" occurs twelve times in the training text, "bcd" once.
        let train = shards("train", "{\"text\":\"abcxabcxabcxabcxabcxabcxabcxabcxabcxabcxabcxabcd\"}\n");
        let valid = shards("valid", "{\"text\":\"abcd\"}\n{\"text\":\"bcdq\"}\n");
        let positions = Positions::of(&train, &valid, None).unwrap();
        // Positions: a b c d end, b c d q end.
        assert_eq!(positions.document, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]);
        assert_eq!(positions.class, [0, 0, 0, 2, 1, 1, 0, 0, 1, 0]);
        let some = Positions::of(&train, &valid, Some(5)).unwrap();
        assert_eq!((some.document.len(), some.class.as_slice()), (6, &positions.class[..6]));
    }
}
