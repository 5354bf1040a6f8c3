//! Byte-pair encoding in little memory.
//!
//! The crate `tokenizers` keeps each name of a token twice, and its merges in a map: 70 MB for Gemma's 262,144 tokens and
//! 514,000 merges, and several times that while it reads them. This model gives the same tokens from a quarter of it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tokenizers::Token;

use crate::token_names::{ReadNames, TokenNames};

/// Names, merges, and what becomes of characters without a token.
#[derive(Clone)]
pub(crate) struct Bpe {
    names: TokenNames,
    merges: Merges,
    unknown: Option<String>,
    /// Whether neighbouring unknown characters are one token.
    fuse_unknown: bool,
    /// Whether a character without a token becomes the tokens of its bytes.
    byte_fallback: bool,
    /// Whether a word that is a token is taken as it is.
    whole_words: bool,
    /// What stands before the name of a token that does not begin a word.
    prefix: Option<String>,
    /// What stands after the name of a token that ends a word.
    suffix: Option<String>,
}

/// Merges by their left token, then by their right one.
#[derive(Clone)]
struct Merges {
    /// Where the merges of each left token start, and where the last ones end.
    starts: Box<[u32]>,
    all: Box<[Merge]>,
}

#[derive(Clone, Copy)]
struct Merge {
    right: u32,
    rank: u32,
    merged: u32,
}

/// A part of a word, in a list of those that are left.
#[derive(Clone, Copy)]
struct Symbol {
    token: u32,
    /// Bytes of the word that it stands for; 0 once it is a part of the symbol before it.
    bytes: usize,
    previous: usize,
    next: usize,
}

/// No symbol.
const NONE: usize = usize::MAX;

/// The model of a `tokenizer.json`.
#[derive(Deserialize)]
struct File<'a> {
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    #[serde(borrow)]
    vocab: &'a RawValue,
    #[serde(borrow)]
    merges: &'a RawValue,
}

impl Bpe {
    /// Reads the model of a `tokenizer.json`. None where the general model has to serve it: some merges are left out at
    /// random, or two tokens have one id.
    ///
    /// # Errors
    /// Text that is not a model of this kind, and merges of tokens that do not exist.
    pub(crate) fn read(json: &str) -> serde_json::Result<Option<Self>> {
        let file: File<'_> = serde_json::from_str(json)?;
        let chance = file.dropout.is_some_and(|share| share != 0.0);
        let names: ReadNames = serde_json::from_str(file.vocab.get())?;
        let Some(names) = names.0.filter(|_| !chance) else { return Ok(None) };
        let prefix = file.continuing_subword_prefix;
        let pairs = Pairs { names: &names, prefix: prefix.as_deref().map_or(0, str::len) };
        let merges = pairs.deserialize(&mut serde_json::Deserializer::from_str(file.merges.get()))?;
        let merges = Merges::of(merges, names.id_count());
        Ok(Some(Self {
            names,
            merges,
            unknown: file.unk_token,
            fuse_unknown: file.fuse_unk.unwrap_or(false),
            byte_fallback: file.byte_fallback.unwrap_or(false),
            whole_words: file.ignore_merges.unwrap_or(false),
            prefix,
            suffix: file.end_of_word_suffix,
        }))
    }

    pub(crate) fn names(&self) -> &TokenNames {
        &self.names
    }

    /// The tokens of a word.
    pub(crate) fn tokenize(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        if word.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(id) = self.names.id(word).filter(|_| self.whole_words) {
            return Ok(vec![Token::new(id, word.to_owned(), (0, word.len()))]);
        }
        let mut symbols = self.characters(word)?;
        self.merge(&mut symbols);
        let (mut start, mut tokens) = (0, Vec::new());
        for symbol in symbols.into_iter().filter(|symbol| symbol.bytes > 0) {
            let (end, name) = (start + symbol.bytes, self.names.name(symbol.token).unwrap_or_default());
            tokens.push(Token::new(symbol.token, name.to_owned(), (start, end)));
            start = end;
        }
        Ok(tokens)
    }

    /// A symbol for each character of a word: its token, those of its bytes, or that for the unknown.
    fn characters(&self, word: &str) -> tokenizers::Result<Vec<Symbol>> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(word.len());
        let mut unknown: Option<(u32, usize)> = None;
        for (start, character) in word.char_indices() {
            let (bytes, end) = (character.len_utf8(), start + character.len_utf8());
            if let Some(token) = self.character(&word[start..end], start == 0, end == word.len()) {
                unknown.take().into_iter().for_each(|(token, bytes)| add(&mut symbols, token, bytes));
                add(&mut symbols, token, bytes);
            } else if let Some(tokens) = self.bytes(&word[start..end]) {
                tokens.into_iter().for_each(|token| add(&mut symbols, token, 1));
            } else if let Some(name) = &self.unknown {
                let token = self.names.id(name);
                let token = token
                    .ok_or_else(|| format!("the token {name:?} for unknown characters does not exist"))?;
                unknown = match unknown.take() {
                    Some((token, before)) if self.fuse_unknown => Some((token, before + bytes)),
                    Some((token, before)) => {
                        add(&mut symbols, token, before);
                        Some((token, bytes))
                    }
                    None => Some((token, bytes)),
                };
            }
        }
        unknown.into_iter().for_each(|(token, bytes)| add(&mut symbols, token, bytes));
        Ok(symbols)
    }

    fn character(&self, name: &str, first: bool, last: bool) -> Option<u32> {
        let prefix = self.prefix.as_deref().filter(|_| !first).unwrap_or_default();
        let suffix = self.suffix.as_deref().filter(|_| last).unwrap_or_default();
        match (prefix, suffix) {
            ("", "") => self.names.id(name),
            _ => self.names.id(&format!("{prefix}{name}{suffix}")),
        }
    }

    /// Tokens of bytes, where each has one.
    fn bytes(&self, character: &str) -> Option<Vec<u32>> {
        let byte = |byte: u8| self.names.id(&format!("<{byte:#04X}>"));
        self.byte_fallback.then(|| character.bytes().map(byte).collect())?
    }

    /// Merges neighbours, the best pair first, of equals the first.
    fn merge(&self, symbols: &mut [Symbol]) {
        let pair = |symbols: &[Symbol], left: usize| {
            let next = symbols[left].next;
            let found = (next != NONE).then(|| self.merges.find(symbols[left].token, symbols[next].token))?;
            found.map(|merge| Reverse((merge.rank, left, merge.merged)))
        };
        let mut queue: BinaryHeap<_> = (0..symbols.len()).filter_map(|left| pair(symbols, left)).collect();
        while let Some(Reverse((_, left, merged))) = queue.pop() {
            let next = symbols[left].next;
            // What was queued before one of the two was merged with another is void.
            let holds = symbols[left].bytes > 0
                && pair(symbols, left).is_some_and(|Reverse((_, _, now))| now == merged);
            if !holds {
                continue;
            }
            let right = symbols[next];
            symbols[next].bytes = 0;
            let symbol = &mut symbols[left];
            (symbol.token, symbol.bytes, symbol.next) = (merged, symbol.bytes + right.bytes, right.next);
            if right.next != NONE {
                symbols[right.next].previous = left;
            }
            let previous = Some(symbols[left].previous).filter(|&previous| previous != NONE);
            queue.extend(previous.and_then(|previous| pair(symbols, previous)));
            queue.extend(pair(symbols, left));
        }
    }
}

impl fmt::Debug for Bpe {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Bpe({} tokens, {} merges)", self.names.len(), self.merges.all.len())
    }
}

fn add(symbols: &mut Vec<Symbol>, token: u32, bytes: usize) {
    let place = symbols.len();
    if let Some(last) = symbols.last_mut() {
        last.next = place;
    }
    symbols.push(Symbol { token, bytes, previous: place.wrapping_sub(1), next: NONE });
}

impl Merges {
    /// Takes pairs with the token that they make, best first. If a pair occurs twice, the last one counts.
    fn of(pairs: Vec<[u32; 3]>, ids: usize) -> Self {
        let mut ranked: Vec<([u32; 2], Merge)> = (pairs.into_iter().zip(0..))
            .map(|([left, right, merged], rank)| ([left, right], Merge { right, rank, merged }))
            .collect();
        ranked.sort_unstable_by_key(|(pair, merge)| (*pair, Reverse(merge.rank)));
        ranked.dedup_by_key(|(pair, _)| *pair);
        let start = |left: usize| ranked.partition_point(|([other, _], _)| (*other as usize) < left) as u32;
        let starts = (0..=ids).map(start).collect();
        Self { starts, all: ranked.into_iter().map(|(_, merge)| merge).collect() }
    }

    fn find(&self, left: u32, right: u32) -> Option<Merge> {
        let of_left = &self.all[self.starts[left as usize] as usize..self.starts[left as usize + 1] as usize];
        of_left.binary_search_by_key(&right, |merge| merge.right).ok().map(|place| of_left[place])
    }
}

/// Reads merges, each a pair of names or both with a blank between them, as ids: left, right, and what they make.
struct Pairs<'a> {
    names: &'a TokenNames,
    /// Bytes of the right name that the merged one is without.
    prefix: usize,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pair {
    Names(String, String),
    Line(String),
}

impl<'de> DeserializeSeed<'de> for Pairs<'_> {
    type Value = Vec<[u32; 3]>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Pairs<'_> {
    type Value = Vec<[u32; 3]>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("pairs of tokens")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        let (mut pairs, mut line, mut merged) = (Vec::new(), 0, String::new());
        while let Some(pair) = sequence.next_element()? {
            line += 1;
            let (left, right) = match pair {
                Pair::Names(left, right) => (left, right),
                Pair::Line(text) if text.starts_with("#version") => continue,
                Pair::Line(text) => match text.split(' ').collect::<Vec<_>>()[..] {
                    [left, right] => (left.to_owned(), right.to_owned()),
                    _ => return Err(A::Error::custom(format!("merge {line} is not a pair: {text:?}"))),
                },
            };
            let end = right.get(self.prefix..).ok_or_else(|| {
                A::Error::custom(format!("merge {line} has {right:?} without the prefix of a part of a word"))
            })?;
            merged.clear();
            merged.extend([&left[..], end]);
            let id = |name: &str| {
                let problem = || {
                    A::Error::custom(format!("merge {line} needs the token {name:?}, which does not exist"))
                };
                self.names.id(name).ok_or_else(problem)
            };
            pairs.push([id(&left)?, id(&right)?, id(&merged)?]);
        }
        Ok(pairs)
    }
}
