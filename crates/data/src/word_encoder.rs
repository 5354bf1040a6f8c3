//! Encodes word by word with a cache of words' tokens. Several times as fast as the general tokenizer, which tracks
//! offsets and normalisations for every character.
//!
//! Works for byte-level BPE without normalisation and with a known split rule: there, the tokens of a text are the
//! tokens of its words in order, and depend on nothing else.

use std::sync::Mutex;

use hashbrown::HashMap;
use regex::Regex;
use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{Model, Tokenizer};

use crate::split_rule::SplitRule;

/// Encodes texts word by word.
pub(crate) struct WordEncoder {
    rule: SplitRule,
    /// The rule without its look-ahead.
    words: Regex,
    /// One cache per thread of rayon's pool, so that no thread waits for another.
    caches: Vec<Mutex<Cache>>,
    /// How byte-level vocabularies write each byte.
    characters: [char; 256],
}

/// Tokens of words by their bytes.
type Cache = HashMap<Box<str>, Box<[u32]>>;

/// Maximum number of words in a cache, which is emptied when it is full. With words of usual length this is some 100
/// MB.
const CACHED_WORDS: usize = 1 << 20;
/// Maximum bytes of a cached word. Longer words seldom occur again.
const CACHED_BYTES: usize = 64;

impl WordEncoder {
    /// The encoder for `tokenizer`, if it is of the supported kind.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let looks_for_tokens = tokenizer.get_added_tokens_decoder().values().any(|token| !token.special);
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        if looks_for_tokens || tokenizer.get_normalizer().is_some() || model.dropout.is_some() {
            return None;
        }
        let rule = only_rule(tokenizer.get_pre_tokenizer()?)?;
        let words = Regex::new(&rule.without_look_ahead()).expect("a valid expression");
        let caches = (0..rayon::current_num_threads().max(1)).map(|_| Mutex::default()).collect();
        Some(Self { rule, words, caches, characters: byte_characters() })
    }

    /// The same tokens of `text` that `tokenizer` gives.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.caches.len();
        // Even after a panic, a cache holds only complete entries.
        let mut cache = self.caches[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut tokens = Vec::with_capacity(text.len() / 3);
        for word in self.split(text) {
            if let Some(known) = cache.get(word) {
                tokens.extend_from_slice(known);
                continue;
            }
            let written: String = word.bytes().map(|byte| self.characters[usize::from(byte)]).collect();
            let start = tokens.len();
            tokens.extend(tokenizer.get_model().tokenize(&written)?.into_iter().map(|token| token.id));
            if word.len() <= CACHED_BYTES {
                if cache.len() >= CACHED_WORDS {
                    cache.clear();
                }
                cache.insert(word.into(), tokens[start..].into());
            }
        }
        Ok(tokens)
    }

    /// The words of `text`, none left out.
    fn split<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut at = 0;
        std::iter::from_fn(move || {
            if at == text.len() {
                return None;
            }
            let word = match self.words.find_at(text, at) {
                Some(found) if found.start() > at => &text[at..found.start()],
                Some(found) if found.end() < text.len() => self.rule.cut(found.as_str()),
                // Text that the rule does not match is a word, too, though the known rules match everything.
                _ => &text[at..],
            };
            at += word.len();
            Some(word)
        })
    }
}

/// The split rule of a pre-tokenizer that otherwise only writes bytes as characters.
fn only_rule(splitter: &PreTokenizerWrapper) -> Option<SplitRule> {
    match splitter {
        PreTokenizerWrapper::Sequence(sequence) => match sequence.as_ref() {
            [rule @ PreTokenizerWrapper::Split(_), PreTokenizerWrapper::ByteLevel(bytes)]
                if !bytes.use_regex && !bytes.add_prefix_space =>
            {
                SplitRule::of(rule)
            }
            _ => None,
        },
        PreTokenizerWrapper::ByteLevel(_) => SplitRule::of(splitter),
        _ => None,
    }
}

/// Byte-level vocabularies write a byte as one printable character: itself if it is printable in Latin-1, otherwise the
/// next free one from U+0100 on.
pub(crate) fn byte_characters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte as u8 {
        printable @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(printable),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("a character below U+0144")
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::split_rule::testing::{byte_level, kinds, tokenizer};

    #[test]
    fn it_serves_the_tokenizers_that_it_knows() {
        let serves = |tokenizer: &Tokenizer| WordEncoder::of(tokenizer).is_some();
        let of_kinds: Vec<bool> = kinds().iter().map(serves).collect();
        assert_eq!(of_kinds, [true, false, true, true, true]);
        let added = serde_json::json!([{"id": 300, "content": "ab", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": false}]);
        assert!(!serves(&tokenizer(byte_level(true), serde_json::Value::Null, added)));
    }

    #[test]
    fn a_full_cache_is_no_other_result() {
        let tokenizer = kinds().remove(2);
        let encoder = WordEncoder::of(&tokenizer).unwrap();
        let text = "ab abab\n\n ab 12345 ab";
        let first = encoder.encode(&tokenizer, text).unwrap();
        assert_eq!(encoder.encode(&tokenizer, text).unwrap(), first);
        encoder.caches.iter().for_each(|cache| cache.lock().unwrap().clear());
        assert_eq!(encoder.encode(&tokenizer, text).unwrap(), first);
    }

    proptest! {
        #[test]
        fn its_tokens_are_those_of_the_tokenizer(
            text in "([ab1é.,'sT!\u{a0}\u{2028}\u{85} \r\t\n\u{1F600}日-]|ab| a|'s|'LL|\n\n|  ){0,60}|\\PC{0,40}",
        ) {
            for tokenizer in kinds() {
                let Some(encoder) = WordEncoder::of(&tokenizer) else { continue };
                let expected = tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
                prop_assert_eq!(encoder.split(&text).collect::<String>(), text.as_str());
                prop_assert_eq!(&encoder.encode(&tokenizer, &text).unwrap(), &expected);
                prop_assert_eq!(&encoder.encode(&tokenizer, &text).unwrap(), &expected, "from the cache");
            }
        }
    }
}
