//! The file of a token shard: its format and its header.
//!
//! [`prepare`](crate::prepare) turns a corpus into a folder:
//!
//! ```text
//! data/train/00000.tokens 00001.tokens …
//! data/valid/00000.tokens …                 where a share of the documents is held out
//! ```
//!
//! # The format, version 1
//!
//! All numbers are little-endian.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `ENGRTOKS` |
//! | 8 | 4 | version: 1; 2 if the shard has a [loss mask](crate::prepare_conversations) beside it |
//! | 12 | 4 | bytes per token: 2 if the vocabulary is at most 65,536, else 4 |
//! | 16 | 4 | number of this shard, from 0 |
//! | 20 | 4 | number of shards of the split |
//! | 24 | 8 | vocabulary: every token is below it |
//! | 32 | 8 | tokens |
//! | 40 | 8 | documents |
//! | 48 | 8 | bytes of text in the documents |
//! | 56 | 4 | id of the end-of-text token, the last token of every document |
//! | 60 | 4 | zero |
//! | 64 | 32 | blake3 of the `tokenizer.json` |
//! | 96 | 32 | blake3 of everything after the header |
//! | 128 | 32 | blake3 of the 128 bytes before |
//! | 160 | tokens · width | the tokens, documents one after another |
//! | then | up to 7 | zeros, to a multiple of 8 |
//! | then | documents · 16 | per document: its first token's place in this shard, and its bytes of text |

use crate::preparation_state::ShardProgress;
use crate::tokenizer::TokenizerHash;

pub(crate) const MAGIC: [u8; 8] = *b"ENGRTOKS";
pub(crate) const VERSION: u32 = 1;
/// The version of shards with a loss mask, so that no program trains on them without it.
pub(crate) const MASKED: u32 = 2;
pub(crate) const HEADER: usize = 160;
pub(crate) const DOCUMENT: usize = 16;

/// What a shard says about itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Header {
    pub(crate) width: u32,
    pub(crate) shard: u32,
    pub(crate) shards: u32,
    pub(crate) vocabulary: u64,
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
    pub(crate) text_bytes: u64,
    pub(crate) end_of_text: u32,
    pub(crate) tokenizer: TokenizerHash,
    pub(crate) body: [u8; 32],
    /// Whether there is a loss mask beside the shard.
    pub(crate) masked: bool,
}

impl Header {
    pub(crate) fn write(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        let version = if self.masked { MASKED } else { VERSION };
        [version, self.width, self.shard, self.shards].iter().for_each(|field| put(&field.to_le_bytes()));
        let counts = [self.vocabulary, self.tokens, self.documents, self.text_bytes];
        counts.iter().for_each(|field| put(&field.to_le_bytes()));
        put(&u64::from(self.end_of_text).to_le_bytes());
        put(&self.tokenizer.0);
        put(&self.body);
        let hash = blake3::hash(&bytes[..128]);
        bytes[128..].copy_from_slice(hash.as_bytes());
        bytes
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, String> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let hash = |at: usize| <[u8; 32]>::try_from(&bytes[at..at + 32]).expect("32 bytes");
        if bytes[..8] != MAGIC {
            return Err("is not a token shard: it does not start with ENGRTOKS".to_owned());
        }
        if ![VERSION, MASKED].contains(&word(8)) {
            return Err(format!(
                "has version {} of the format; this program reads versions {VERSION} and {MASKED}",
                word(8)
            ));
        }
        if *blake3::hash(&bytes[..128]).as_bytes() != hash(128) {
            return Err("its header does not match its checksum; prepare the data again".to_owned());
        }
        let header = Self {
            width: word(12),
            shard: word(16),
            shards: word(20),
            vocabulary: number(bytes, 24),
            tokens: number(bytes, 32),
            documents: number(bytes, 40),
            text_bytes: number(bytes, 48),
            end_of_text: word(56),
            tokenizer: TokenizerHash(hash(64)),
            body: hash(96),
            masked: word(8) == MASKED,
        };
        if !matches!(header.width, 2 | 4) || header.tokens == 0 || header.documents == 0 {
            return Err("its header states no tokens, no documents or no token width".to_owned());
        }
        Ok(header)
    }

    /// What a checkpoint stores of this shard.
    pub(crate) fn progress(&self, hash: [u8; 32]) -> ShardProgress {
        let Self { tokens, documents, text_bytes, .. } = *self;
        ShardProgress { tokens, documents, text_bytes, hash }
    }

    pub(crate) fn documents_at(&self) -> u64 {
        (HEADER as u64 + self.tokens * u64::from(self.width)).next_multiple_of(8)
    }

    pub(crate) fn file_length(&self) -> Option<u64> {
        let tokens = self.tokens.checked_mul(u64::from(self.width))?.checked_add(HEADER as u64)?;
        tokens.checked_next_multiple_of(8)?.checked_add(self.documents.checked_mul(DOCUMENT as u64)?)
    }
}

/// The number of eight bytes.
pub(crate) fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
