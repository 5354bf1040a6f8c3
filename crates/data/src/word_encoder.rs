//! Encodes word by word with a cache of words' tokens. Several times as fast as the general tokenizer, which tracks
//! offsets and normalisations for every character.
//!
//! Works for byte-level BPE without normalisation and with a known split rule: there, the tokens of a text are the
//! tokens of its words in order, and depend on nothing else.
//!
//! There are two caches. Each thread has a small one for short words with few tokens, in which a look-up touches one
//! cache line. All threads share a large one, so that a word is merged once for all of them.

use std::hash::BuildHasher;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hashbrown::{DefaultHashBuilder, HashMap};
use regex::Regex;
use tokenizers::Model;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use crate::ascii_words::word_end;
use crate::split_rule::SplitRule;
use crate::token_model::TextTokenizer;

/// Encodes texts word by word.
pub(crate) struct WordEncoder {
    rule: SplitRule,
    /// What each thread of rayon's pool has for itself, so that no thread waits for another.
    threads: Vec<Mutex<Thread>>,
    /// The words of all threads, in parts by their hash.
    shared: [Mutex<Cache>; PARTS],
    hasher: DefaultHashBuilder,
    /// How byte-level vocabularies write each byte.
    characters: [char; 256],
}

/// What one thread has for itself.
struct Thread {
    /// The rule without its look-ahead, for words that are not ASCII. A shared one would make threads wait.
    words: Regex,
    slots: Box<[Slot]>,
}

/// A short word and its tokens, in half a cache line. A word has one place, where it replaces another.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The word and its length, as in [`key`]; 0 if there is none.
    word: u128,
    count: u32,
    tokens: [u32; SLOT_TOKENS],
}

/// Tokens of words by their bytes.
type Cache = HashMap<Box<str>, Box<[u32]>>;

/// Number of parts of the shared cache: enough that threads seldom meet.
const PARTS: usize = 64;
/// Maximum number of words in a part of the shared cache, which is emptied when it is full. With words of usual length
/// all parts together are some 100 MB.
const CACHED_WORDS: usize = (1 << 20) / PARTS;
/// Maximum bytes of a cached word. Longer words seldom occur again.
const CACHED_BYTES: usize = 64;
/// Number of words that a thread keeps: 1 MiB, which stays in the core's own cache.
const SLOTS: usize = 1 << 15;
/// Maximum tokens of such a word.
const SLOT_TOKENS: usize = 3;
/// Maximum bytes of such a word.
const SLOT_BYTES: usize = 15;

impl WordEncoder {
    /// The encoder for `tokenizer`, if it is of the supported kind.
    pub(crate) fn of(tokenizer: &TextTokenizer) -> Option<Self> {
        let looks_for_tokens = tokenizer.get_added_tokens_decoder().values().any(|token| !token.special);
        let depends_on_more = looks_for_tokens || tokenizer.get_normalizer().is_some();
        if depends_on_more || !tokenizer.get_model().is_bpe() {
            return None;
        }
        let rule = only_rule(tokenizer.get_pre_tokenizer()?)?;
        let words = Regex::new(&rule.without_look_ahead()).expect("a valid expression");
        let thread = |_| Mutex::new(Thread { words: words.clone(), slots: Box::default() });
        let threads = (0..rayon::current_num_threads().max(1)).map(thread).collect();
        let shared = std::array::from_fn(|_| Mutex::default());
        Some(Self { rule, threads, shared, hasher: Default::default(), characters: byte_characters() })
    }

    /// The same tokens of `text` that `tokenizer` gives.
    pub(crate) fn encode(&self, tokenizer: &TextTokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
        let number = rayon::current_thread_index().unwrap_or(0) % self.threads.len();
        let mut thread = locked(&self.threads[number]);
        let Thread { words, slots } = &mut *thread;
        if slots.is_empty() {
            *slots = vec![Slot::default(); SLOTS].into();
        }
        let mut tokens = Vec::with_capacity(text.len() / 3);
        let mut at = 0;
        while at < text.len() {
            let end = self.end(words, text, at);
            let key = key(text.as_bytes(), at, end);
            let slot = key.map(|key| (key, &mut slots[place(key)]));
            match &slot {
                Some((key, slot)) if slot.word == *key => match slot.count {
                    1 => tokens.push(slot.tokens[0]),
                    count => tokens.extend_from_slice(&slot.tokens[..count as usize]),
                },
                _ => {
                    let start = tokens.len();
                    self.look_up(tokenizer, &text[at..end], &mut tokens)?;
                    if let Some((key, slot)) = slot {
                        slot.keep(key, &tokens[start..]);
                    }
                }
            }
            at = end;
        }
        Ok(tokens)
    }

    /// Adds the tokens of a word from the shared cache, or makes them.
    fn look_up(
        &self,
        tokenizer: &TextTokenizer,
        word: &str,
        tokens: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let part = &self.shared[self.hasher.hash_one(word) as usize % PARTS];
        if word.len() <= CACHED_BYTES
            && let Some(known) = locked(part).get(word)
        {
            tokens.extend_from_slice(known);
            return Ok(());
        }
        let written: String = word.bytes().map(|byte| self.characters[usize::from(byte)]).collect();
        let start = tokens.len();
        tokens.extend(tokenizer.get_model().tokenize(&written)?.into_iter().map(|token| token.id));
        if word.len() <= CACHED_BYTES {
            let mut cache = locked(part);
            if cache.len() >= CACHED_WORDS {
                cache.clear();
            }
            cache.insert(word.into(), tokens[start..].into());
        }
        Ok(())
    }

    /// The end of the word of `text` that starts at `at`. `words` is the rule without its look-ahead.
    fn end(&self, words: &Regex, text: &str, at: usize) -> usize {
        if let Some(end) = word_end(self.rule, text.as_bytes(), at) {
            return end;
        }
        match words.find_at(text, at) {
            Some(found) if found.start() > at => found.start(),
            Some(found) if found.end() < text.len() => at + self.rule.cut(found.as_str()).len(),
            // Text that the rule does not match is a word, too, though the known rules match everything.
            _ => text.len(),
        }
    }
}

impl Slot {
    /// Replaces the word, if the tokens of the new one fit.
    fn keep(&mut self, word: u128, tokens: &[u32]) {
        if tokens.len() <= SLOT_TOKENS {
            (self.word, self.count) = (word, tokens.len() as u32);
            self.tokens[..tokens.len()].copy_from_slice(tokens);
        }
    }
}

/// Even after a panic, a cache holds only complete entries.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bytes of a short word, with its length above them. Different words have different keys.
fn key(text: &[u8], at: usize, end: usize) -> Option<u128> {
    let length = end - at;
    if length > SLOT_BYTES {
        return None;
    }
    let bytes = match text.get(at..at + 16) {
        Some(bytes) => u128::from_le_bytes(bytes.try_into().expect("16 bytes")),
        None => {
            let mut bytes = [0; 16];
            bytes[..length].copy_from_slice(&text[at..end]);
            u128::from_le_bytes(bytes)
        }
    };
    Some(bytes & ((1 << (8 * length)) - 1) | (length as u128) << 120)
}

/// The slot of a word: the middle of a product of its halves.
fn place(key: u128) -> usize {
    let (low, high) = (key as u64, (key >> 64) as u64);
    let product = u128::from(low ^ 0x9e37_79b9_7f4a_7c15) * u128::from(high ^ 0xc2b2_ae3d_27d4_eb4f);
    ((product >> 64) as u64 ^ product as u64) as usize % SLOTS
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
        let serves = |tokenizer: &TextTokenizer| WordEncoder::of(tokenizer).is_some();
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
        encoder.threads.iter().for_each(|thread| locked(thread).slots = Box::default());
        assert_eq!(encoder.encode(&tokenizer, text).unwrap(), first, "from the shared cache");
        encoder.threads.iter().for_each(|thread| locked(thread).slots = Box::default());
        encoder.shared.iter().for_each(|cache| locked(cache).clear());
        assert_eq!(encoder.encode(&tokenizer, text).unwrap(), first, "from no cache");
    }

    proptest! {
        #[test]
        fn its_tokens_are_those_of_the_tokenizer(
            text in "([ab1é.,'sT!\u{a0}\u{2028}\u{85} \r\t\n\u{1F600}日-]|ab| a|'s|'LL|\n\n|  ){0,60}|\\PC{0,40}",
        ) {
            for tokenizer in kinds() {
                let Some(encoder) = WordEncoder::of(&tokenizer) else { continue };
                let expected = tokenizer.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
                prop_assert_eq!(&encoder.encode(&tokenizer, &text).unwrap(), &expected);
                prop_assert_eq!(&encoder.encode(&tokenizer, &text).unwrap(), &expected, "from the cache");
            }
        }
    }
}
