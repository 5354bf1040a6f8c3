//! The bytes of text that tokens stand for.

use std::fmt;
use std::sync::Arc;

use tokenizers::{DecoderWrapper, Model};

use crate::token_model::TextTokenizer;

/// The bytes of all tokens, one after another. Copies share them.
#[derive(Clone)]
pub struct TokenBytes {
    bytes: Arc<[u8]>,
    /// End of each token's bytes, preceded by a 0 for the start of the first.
    ends: Arc<[u32]>,
}

impl TokenBytes {
    pub(crate) fn of(tokenizer: &TextTokenizer) -> Self {
        let (model, added) = (tokenizer.get_model(), tokenizer.get_added_tokens_decoder());
        let count = added.keys().map(|id| *id as usize + 1).max().unwrap_or(0).max(model.id_count());
        let byte_level = is_byte_level(tokenizer.get_decoder());
        (0..count as u32)
            .map(|id| match (added.get(&id), model.id_to_token(id)) {
                (Some(token), _) if token.special => Vec::new(),
                (Some(token), _) => token.content.clone().into_bytes(),
                (None, None) => Vec::new(),
                (None, Some(name)) if byte_level => name.chars().flat_map(byte_level_bytes).collect(),
                (None, Some(name)) => sentencepiece_bytes(&name),
            })
            .collect()
    }

    /// Number of token ids: one more than the largest.
    #[allow(clippy::len_without_is_empty, reason = "a vocabulary without tokens is no question")]
    pub fn len(&self) -> usize {
        self.ends.len() - 1
    }

    /// The bytes of text of a token: none for special tokens and for ids without a token.
    pub fn get(&self, id: u32) -> &[u8] {
        match self.ends.get(id as usize..id as usize + 2) {
            Some(ends) => &self.bytes[ends[0] as usize..ends[1] as usize],
            None => &[],
        }
    }

    /// The bytes of every token, in the order of ids.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.ends.windows(2).map(|ends| &self.bytes[ends[0] as usize..ends[1] as usize])
    }
}

impl<B: AsRef<[u8]>> FromIterator<B> for TokenBytes {
    /// Takes the bytes of each token, in the order of ids.
    fn from_iter<I: IntoIterator<Item = B>>(tokens: I) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), vec![0]);
        for token in tokens {
            bytes.extend_from_slice(token.as_ref());
            ends.push(bytes.len() as u32);
        }
        Self { bytes: bytes.into(), ends: ends.into() }
    }
}

impl fmt::Debug for TokenBytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "TokenBytes({} tokens)", self.len())
    }
}

fn is_byte_level(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(sequence)) => {
            sequence.get_decoders().iter().any(|decoder| matches!(decoder, DecoderWrapper::ByteLevel(_)))
        }
        _ => false,
    }
}

/// Byte-level vocabularies write a byte as one printable character: itself if it is printable in Latin-1, otherwise the
/// next free one from U+0100 on.
fn byte_level_bytes(character: char) -> Vec<u8> {
    const fn printable(byte: u8) -> bool {
        matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
    }
    let code = character as u32;
    let byte = match code {
        0..0x100 => Some(code as u8).filter(|byte| printable(*byte)),
        _ => (0..=255).filter(|byte| !printable(*byte)).nth(code as usize - 0x100),
    };
    match byte {
        Some(byte) => vec![byte],
        None => character.encode_utf8(&mut [0; 4]).as_bytes().to_vec(),
    }
}

/// SentencePiece vocabularies write a space as U+2581 and a byte without a token as `<0xAB>`.
fn sentencepiece_bytes(name: &str) -> Vec<u8> {
    let byte = name.strip_prefix("<0x").and_then(|name| name.strip_suffix('>'));
    match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => vec![byte],
        None => name.replace('▁', " ").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_vocabularies_write_bytes_in_other_ways() {
        assert_eq!(sentencepiece_bytes("▁the"), b" the");
        assert_eq!(sentencepiece_bytes("<0x0A>"), b"\n");
        assert_eq!(sentencepiece_bytes("<0xZZ>"), b"<0xZZ>");
    }
}
