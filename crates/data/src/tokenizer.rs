//! Tokenizers: byte-level BPE trained on a corpus, stored as a Hugging Face `tokenizer.json`.
//!
//! Any `tokenizer.json` can be loaded. Tokenizers trained here split text by a rule like GPT-4's: words with the sign
//! or space before them, numbers two digits at a time (so that they do not fill a small vocabulary), line ends. They
//! merge bytes within these pieces. Every text has tokens, and decoding them gives the text unchanged.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::corpus::{Corpus, Documents};
use crate::cut::{Cut, PIECE};
use crate::damage::DamageReport;
use crate::error::{Error, Result};
use crate::files::write_file;
use crate::token_bytes::TokenBytes;
use crate::token_model::TextTokenizer;
use crate::word_encoder::WordEncoder;

/// The token after every document of a tokenizer trained here; its id is 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// The padding token of a tokenizer trained here; its id is 1.
pub const PAD: &str = "<|pad|>";

/// Names that common tokenizers give to the end-of-text token, the least ambiguous first.
const END_OF_TEXT_NAMES: [&str; 6] =
    [END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|im_end|>"];
const PAD_NAMES: [&str; 4] = [PAD, "<｜▁pad▁｜>", "<pad>", "[PAD]"];

/// Contractions; words with one sign before them; numbers; other signs; line ends; blanks.
const SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// A loaded or trained tokenizer, with the bytes that each of its tokens stands for.
#[derive(Clone)]
pub struct Tokenizer {
    inner: TextTokenizer,
    json: Arc<[u8]>,
    hash: TokenizerHash,
    end_of_text: u32,
    pad: Option<u32>,
    bytes: TokenBytes,
    cut: Cut,
    words: Option<Arc<WordEncoder>>,
}

/// blake3 of a `tokenizer.json`, stored in token shards and checkpoints.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenizerHash(pub [u8; 32]);

/// Options for training a tokenizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerTraining {
    /// Number of tokens, including the 256 bytes and the two special ones.
    pub vocabulary: usize,
    /// Maximum bytes of text to learn from. A longer corpus is sampled evenly from its start to its end.
    pub byte_budget: u64,
}

impl Default for TokenizerTraining {
    fn default() -> Self {
        Self { vocabulary: 32_768, byte_budget: 1 << 30 }
    }
}

/// The progress of training a tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerProgress {
    /// Words are being counted.
    Reading {
        /// Bytes of text read.
        done: u64,
        /// Bytes of text in the corpus.
        total: u64,
    },
    /// Tokens are being merged from the counted words. Nothing is reported until this is done.
    Merging,
}

impl Tokenizer {
    /// Trains a tokenizer on a corpus. Reads it twice: once for its length, once for its words. The same corpus and
    /// options give the same tokenizer, byte for byte.
    ///
    /// # Errors
    /// A vocabulary of fewer than 258 tokens or of more than the text has pairs for, a byte budget of 0 or
    /// above 16 GiB, any error of the corpus, or [`Error::Interrupted`] if `progress` breaks.
    pub fn train(
        corpus: &Corpus,
        options: &TokenizerTraining,
        progress: &mut (dyn FnMut(TokenizerProgress) -> ControlFlow<()> + Send),
    ) -> Result<Self> {
        Self::train_reporting(corpus, options, progress).map(|(tokenizer, _)| tokenizer)
    }

    /// Like [`train`](Self::train), and returns the damaged records of the corpus.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_reporting(
        corpus: &Corpus,
        options: &TokenizerTraining,
        progress: &mut (dyn FnMut(TokenizerProgress) -> ControlFlow<()> + Send),
    ) -> Result<(Self, DamageReport)> {
        options.validate()?;
        let (total, damage) = corpus.measured()?;
        let mut outcome = Ok(());
        let mut untrained = untrained();
        let mut trainer = TrainerWrapper::BpeTrainer(trainer(options.vocabulary));
        let words = Sample {
            documents: corpus.documents(),
            cut: Cut::of(&untrained),
            budget: options.byte_budget,
            total,
            seen: 0,
            taken: 0,
            progress,
            outcome: &mut outcome,
        };
        let trained = untrained.train(&mut trainer, words.flatten()).map(|_| ());
        outcome?;
        trained.map_err(|error| Error::Tokenize { reason: error.to_string() })?;
        untrained.add_special_tokens(special_tokens()).map_err(tokenize)?;

        let found = untrained.get_vocab_size(true);
        if found < options.vocabulary {
            let reason =
                format!("the text has only {found} different tokens; reduce the vocabulary or use more text");
            return Err(Error::option("vocabulary", options.vocabulary, reason));
        }
        let json = untrained.to_string(true).map_err(tokenize)?;
        Ok((Self::from_json(json.as_bytes(), "the trained tokenizer", None)?, damage))
    }

    /// Loads a `tokenizer.json` whose end-of-text token has one of the usual names.
    ///
    /// # Errors
    /// A file that cannot be read, is not a tokenizer, or has no token with such a name.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_ending(path, None)
    }

    /// Like [`load`](Self::load), with the name of the end-of-text token if it is known.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_ending(path: &Path, end_of_text: Option<&str>) -> Result<Self> {
        let json = std::fs::read(path).map_err(Error::read(path))?;
        Self::from_json(&json, &path.display().to_string(), end_of_text)
    }

    /// Reads the bytes of a `tokenizer.json`. `origin` names them in messages. `end_of_text` is the token that ends a
    /// document; `None` looks for one of the usual names.
    ///
    /// # Errors
    /// Bytes that are not a tokenizer, or a tokenizer without the end-of-text token.
    pub fn from_json(json: &[u8], origin: &str, end_of_text: Option<&str>) -> Result<Self> {
        // Some editors begin a file with a byte-order mark. It is no part of the tokenizer.
        let json = json.strip_prefix("\u{feff}".as_bytes()).unwrap_or(json);
        let malformed = |reason: String| Error::MalformedTokenizer { origin: origin.to_owned(), reason };
        let mut inner = TextTokenizer::from_bytes(json).map_err(|error| malformed(error.to_string()))?;
        // A file may ask for truncation or padding, as classifiers need. A corpus must stay as it is.
        inner.with_truncation(None).map_err(tokenize)?;
        inner.with_padding(None);
        // A document that happens to contain "<|endoftext|>" must not end there.
        inner.set_encode_special_tokens(true);

        let id_of = |names: &[&str]| names.iter().find_map(|name| inner.token_to_id(name));
        let end_of_text = match end_of_text {
            Some(name) => id_of(&[name]).ok_or_else(|| malformed(format!("it has no token {name:?}")))?,
            None => id_of(&END_OF_TEXT_NAMES).ok_or_else(|| {
                malformed(format!(
                    "none of its tokens is a usual end of text ({})",
                    END_OF_TEXT_NAMES.join(", ")
                ))
            })?,
        };
        let pad = id_of(&PAD_NAMES);
        let (bytes, cut) = (TokenBytes::of(&inner), Cut::of(&inner));
        let words = WordEncoder::of(&inner).map(Arc::new);
        Ok(Self {
            json: json.into(),
            hash: TokenizerHash::of(json),
            end_of_text,
            pad,
            bytes,
            cut,
            words,
            inner,
        })
    }

    /// Writes the `tokenizer.json` to a temporary file and renames it.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<()> {
        write_file(path, &self.json)
    }

    /// The bytes of the `tokenizer.json`. [`hash`](Self::hash) is their blake3.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// Identifies this tokenizer.
    pub fn hash(&self) -> TokenizerHash {
        self.hash
    }

    /// Number of token ids: one more than the largest.
    pub fn vocabulary(&self) -> usize {
        self.bytes.len()
    }

    /// Id of the token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Id of the padding token, if there is one.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The tokens of a text, without end-of-text. Names of special tokens in the text are read as ordinary text.
    ///
    /// # Errors
    /// Text that has no token, in a tokenizer without a token for unknown text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if let Some(words) = &self.words {
            return words.encode(&self.inner, text).map_err(tokenize);
        }
        let encoding = self.inner.encode_fast(text, false).map_err(tokenize)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A text in pieces whose tokens together are those of the text. If this is not known to hold for the tokenizer,
    /// there is one piece.
    pub(crate) fn pieces<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> + use<'a> {
        self.cut.pieces(text, PIECE)
    }

    /// The text of tokens, without special tokens. Bytes that are not UTF-8, such as parts of a character, become
    /// U+FFFD.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.vocabulary()) {
            let reason = format!("token id {id} is outside the vocabulary of {}", self.vocabulary());
            return Err(Error::Tokenize { reason });
        }
        self.inner.decode(tokens, true).map_err(tokenize)
    }

    /// The bytes of text of a token: none for special tokens and for ids without a token.
    ///
    /// For byte-level tokenizers, the bytes of a text's tokens together are the text.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// The bytes of text of all tokens.
    pub fn all_token_bytes(&self) -> &TokenBytes {
        &self.bytes
    }

    /// Bytes of text per token id, for converting a loss per token to bits per byte.
    pub fn byte_lengths(&self) -> Vec<u32> {
        self.bytes.iter().map(|bytes| bytes.len() as u32).collect()
    }

    /// The tokenizer of the crate `tokenizers`.
    pub fn inner(&self) -> &TextTokenizer {
        &self.inner
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Tokenizer({} tokens, {})", self.vocabulary(), self.hash)
    }
}

impl TokenizerTraining {
    const SMALLEST: usize = 256 + 2;
    /// The largest vocabulary that is trained: memory for it is set aside at once.
    const LARGEST: usize = 1 << 22;
    /// The trainer counts pairs in 32 bits. The most frequent pair of a text is well under a tenth of it.
    const LARGEST_BUDGET: u64 = 16 << 30;

    fn validate(&self) -> Result<()> {
        if self.vocabulary < Self::SMALLEST {
            let reason = "must be at least 258: the 256 bytes, end of text and pad";
            return Err(Error::option("vocabulary", self.vocabulary, reason));
        }
        if self.vocabulary > Self::LARGEST {
            let reason = "must be at most 4,194,304, many times that of any published tokenizer";
            return Err(Error::option("vocabulary", self.vocabulary, reason));
        }
        if !(1..=Self::LARGEST_BUDGET).contains(&self.byte_budget) {
            return Err(Error::option(
                "byte_budget",
                self.byte_budget,
                "must be at least 1 and at most 16 GiB",
            ));
        }
        Ok(())
    }
}

impl TokenizerHash {
    /// The hash of the bytes of a `tokenizer.json`.
    pub fn of(json: &[u8]) -> Self {
        Self(*blake3::hash(json).as_bytes())
    }
}

impl fmt::Display for TokenizerHash {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenizerHash {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// Texts to learn from. Takes the same share of every part of the corpus, so that the budget is met at its end.
struct Sample<'a> {
    documents: Documents<'a>,
    cut: Cut,
    budget: u64,
    total: u64,
    seen: u64,
    taken: u64,
    progress: &'a mut (dyn FnMut(TokenizerProgress) -> ControlFlow<()> + Send),
    outcome: &'a mut Result<()>,
}

impl Iterator for Sample<'_> {
    /// The selected pieces of one document.
    type Item = Vec<String>;

    fn next(&mut self) -> Option<Vec<String>> {
        let document = match self.documents.next() {
            Some(Ok(document)) => document,
            Some(Err(error)) => {
                *self.outcome = Err(error);
                return None;
            }
            None => {
                if (self.progress)(TokenizerProgress::Merging).is_break() {
                    *self.outcome = Err(Error::Interrupted);
                }
                return None;
            }
        };
        let mut taken = Vec::new();
        for piece in self.cut.pieces(&document, PIECE) {
            let bytes = piece.len() as u64;
            self.seen += bytes;
            let due = u128::from(self.budget) * u128::from(self.seen) / u128::from(self.total);
            if u128::from(self.taken + bytes) <= due {
                self.taken += bytes;
                taken.push(piece.to_owned());
            }
        }
        let reading = TokenizerProgress::Reading { done: self.seen, total: self.total };
        if (self.progress)(reading).is_break() {
            *self.outcome = Err(Error::Interrupted);
            return None;
        }
        Some(taken)
    }
}

fn untrained() -> tokenizers::Tokenizer {
    let split = Split::new(SplitPattern::Regex(SPLIT.to_owned()), SplitDelimiterBehavior::Isolated, false);
    let split = split.expect("the split rule is a valid pattern");
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    tokenizer
}

fn trainer(vocabulary: usize) -> BpeTrainer {
    let alphabet = ByteLevel::alphabet().into_iter().collect();
    BpeTrainer::builder()
        .vocab_size(vocabulary)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special_tokens())
        .initial_alphabet(alphabet)
        .build()
}

fn special_tokens() -> Vec<AddedToken> {
    [END_OF_TEXT, PAD].map(|name| AddedToken::from(name, true)).to_vec()
}

fn tokenize(error: tokenizers::Error) -> Error {
    Error::Tokenize { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str =
        "{\"text\": \"In 1984 the quick brown fox jumped over the lazy dog's 12345 bones.\\n\"}\n";

    fn corpus() -> Corpus {
        let mut lines = String::new();
        for word in ["fox", "dog", "whale", "president", "fellow-citizens", "naïveté", "日本語"] {
            let line = TEXT.replace("fox", word).replace("lazy", &format!("very {word}"));
            (0..3).for_each(|_| lines.push_str(&line));
        }
        Corpus::embedded("test.jsonl", lines.leak().as_bytes()).unwrap()
    }

    fn train(vocabulary: usize, byte_budget: u64) -> Result<Tokenizer> {
        let options = TokenizerTraining { vocabulary, byte_budget };
        Tokenizer::train(&corpus(), &options, &mut |_| ControlFlow::Continue(()))
    }

    fn tokenizer() -> &'static Tokenizer {
        static ONCE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
        ONCE.get_or_init(|| train(320, 1 << 20).unwrap())
    }

    #[test]
    fn the_same_corpus_gives_the_same_file() {
        let (one, other) = (train(320, 1 << 20).unwrap(), train(320, 1 << 20).unwrap());
        assert_eq!(one.json(), other.json());
        assert_eq!(one.hash(), other.hash());
        assert_ne!(one.hash(), train(319, 1 << 20).unwrap().hash());
    }

    #[test]
    fn special_tokens_come_first_and_stand_for_no_text() {
        let tokenizer = tokenizer();
        assert_eq!((tokenizer.vocabulary(), tokenizer.end_of_text(), tokenizer.pad()), (320, 0, Some(1)));
        assert_eq!(tokenizer.token_bytes(0), b"");
        assert_eq!(tokenizer.decode(&[0, 1]).unwrap(), "");
        // The names are ordinary text: a document cannot end itself.
        let tokens = tokenizer.encode("a<|endoftext|>b").unwrap();
        assert!(!tokens.contains(&0));
        assert_eq!(tokenizer.decode(&tokens).unwrap(), "a<|endoftext|>b");
    }

    #[test]
    fn words_and_numbers_split_as_stated() {
        let pieces = |text: &str| -> Vec<String> {
            let tokens = tokenizer().encode(text).unwrap();
            tokens
                .iter()
                .map(|id| String::from_utf8(tokenizer().token_bytes(*id).to_vec()).unwrap())
                .collect()
        };
        assert_eq!(
            pieces(" the dog's 12345 dog\n"),
            [" the", " dog", "'s", " ", "12", "34", "5", " dog", "\n"]
        );
    }

    #[test]
    fn save_and_load() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        tokenizer().save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!((loaded.hash(), loaded.json()), (tokenizer().hash(), tokenizer().json()));
        assert_eq!(loaded.encode(TEXT).unwrap(), tokenizer().encode(TEXT).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let missing = tokenizer().save(&folder.path().join("no/folder.json")).unwrap_err().to_string();
        assert!(missing.contains("cannot write") && missing.contains("no/folder.json"), "{missing}");
    }

    #[test]
    fn truncation_and_padding_of_a_file_are_ignored() {
        let mut json: serde_json::Value = serde_json::from_slice(tokenizer().json()).unwrap();
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
        });
        json["padding"] = serde_json::json!({
            "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"
        });
        let loaded = Tokenizer::from_json(json.to_string().as_bytes(), "test", None).unwrap();
        assert_eq!(loaded.encode(TEXT).unwrap(), tokenizer().encode(TEXT).unwrap());
    }

    #[test]
    fn unusable_files_are_named() {
        let refused = |json: &[u8], name: Option<&str>| {
            let message = Tokenizer::from_json(json, "a/tokenizer.json", name).unwrap_err().to_string();
            assert!(message.starts_with("a/tokenizer.json: not a usable tokenizer.json: "), "{message}");
            message
        };
        refused(b"", None);
        refused(b"{\"model\": 1}", None);
        let cut = &tokenizer().json()[..1000];
        refused(cut, None);
        assert!(refused(tokenizer().json(), Some("<stop>")).ends_with("it has no token \"<stop>\""));
        let json = String::from_utf8(tokenizer().json().to_vec()).unwrap().replace(END_OF_TEXT, "<|other|>");
        assert!(refused(json.as_bytes(), None).contains("none of its tokens is a usual end of text"));
        let named = Tokenizer::from_json(json.as_bytes(), "x", Some("<|other|>")).unwrap();
        assert_eq!(named.end_of_text(), 0);
        let missing = Tokenizer::load(Path::new("no/tokenizer.json")).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read no/tokenizer.json: "), "{missing}");
    }

    #[test]
    fn options_outside_their_range_are_refused() {
        let refused = |vocabulary, budget, expected: &str| {
            let message = train(vocabulary, budget).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        };
        refused(257, 1000, "vocabulary = 257: must be at least 258");
        refused(320, 0, "byte_budget = 0: ");
        refused(320, u64::MAX, "byte_budget = 18446744073709551615: ");
        refused(5000, 1 << 20, "vocabulary = 5000: the text has only ");
    }

    #[test]
    fn a_budget_takes_from_all_of_the_corpus() {
        let mut lines: String = "{\"text\": \"alpha alpha alpha\"}\n".repeat(50);
        lines.push_str(&"{\"text\": \"omega omega omega\"}\n".repeat(50));
        let corpus = Corpus::embedded("test.jsonl", lines.leak().as_bytes()).unwrap();
        let mut seen = Vec::new();
        let options = TokenizerTraining { vocabulary: 258 + 4, byte_budget: 17 * 20 };
        let trained = Tokenizer::train(&corpus, &options, &mut |progress| {
            seen.push(progress);
            ControlFlow::Continue(())
        });
        // Pairs of both halves are equally frequent. If the whole budget went to the first half, no pair of "omega"
        // would be merged.
        let trained = trained.unwrap();
        let tokens = |text| trained.encode(text).unwrap().len();
        assert!(tokens("alpha") < 5 && tokens("omega") < 5, "{} {}", tokens("alpha"), tokens("omega"));
        assert_eq!(seen.last(), Some(&TokenizerProgress::Merging));
        assert_eq!(seen[seen.len() - 2], TokenizerProgress::Reading { done: 1700, total: 1700 });
    }

    #[test]
    fn training_stops_when_asked_and_says_what_is_wrong_with_the_corpus() {
        let options = TokenizerTraining { vocabulary: 300, byte_budget: 1 << 20 };
        let stopped = Tokenizer::train(&corpus(), &options, &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(Error::Interrupted)));
        let bad = Corpus::embedded("bad.jsonl", b"{\"text\": \"x\"}\n{\"text\": 1}\n").unwrap();
        let failed = Tokenizer::train(&bad, &options, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(failed, Err(Error::MissingText { .. })));
        let empty = Corpus::embedded("empty.jsonl", b"\n").unwrap();
        let failed = Tokenizer::train(&empty, &options, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(failed, Err(Error::EmptyCorpus { .. })));
    }

    #[test]
    fn tokens_outside_the_vocabulary_are_refused() {
        let message = tokenizer().decode(&[5, 320]).unwrap_err().to_string();
        assert!(message.contains("token id 320 is outside the vocabulary of 320"), "{message}");
        assert_eq!(tokenizer().token_bytes(320), b"");
    }

    #[test]
    fn every_byte_has_a_token() {
        let mut bytes: Vec<u8> = (2..258).flat_map(|id| tokenizer().token_bytes(id)).copied().collect();
        bytes.sort();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    proptest! {
        #[test]
        fn any_text_comes_back_from_its_tokens(
            text in "\\PC*|[\\x00-\\x7f]*|(<\\|endoftext\\|>|é|\u{1F600}|\\s)*",
        ) {
            let tokens = tokenizer().encode(&text).unwrap();
            prop_assert_eq!(&tokenizer().decode(&tokens).unwrap(), &text);
            let bytes: Vec<u8> = tokens.iter().flat_map(|id| tokenizer().token_bytes(*id)).copied().collect();
            prop_assert_eq!(&bytes, text.as_bytes());
            let lengths = tokenizer().byte_lengths();
            let sum: u32 = tokens.iter().map(|id| lengths[*id as usize]).sum();
            prop_assert_eq!(sum as usize, text.len());
        }
    }
}
