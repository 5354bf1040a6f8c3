//! Loss masks: which tokens of a shard a loss counts, in a file beside the shard.
//!
//! # The format, version 1
//!
//! The mask of `00000.tokens` is `00000.mask`. All numbers are little-endian.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `ENGRMASK` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | inputs per window, into which the conversations are packed |
//! | 16 | 8 | tokens |
//! | 24 | 8 | tokens that a loss counts |
//! | 32 | 32 | blake3 of the shard's header |
//! | 64 | 32 | blake3 of the bits |
//! | 96 | 32 | blake3 of the 96 bytes before |
//! | 128 | tokens / 8, rounded up | a bit per token, lowest first: 1 where a loss counts the token as a target |

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"ENGRMASK";
const VERSION: u32 = 1;
const HEADER: usize = 128;

/// The mask of a shard.
#[derive(Debug)]
pub(crate) struct LossMask {
    bytes: Vec<u8>,
    tokens: u64,
}

impl LossMask {
    /// The file of the mask of `shard`.
    pub(crate) fn path(shard: &Path) -> PathBuf {
        shard.with_extension("mask")
    }

    /// Reads the mask of `shard`, which has `tokens` tokens and this header. Checks all checksums.
    ///
    /// # Errors
    /// A file that is missing, damaged, or the mask of another shard.
    pub(crate) fn open(shard: &Path, header: &[u8], tokens: u64) -> Result<Self> {
        let path = Self::path(shard);
        let bytes = std::fs::read(&path).map_err(Error::read(&path))?;
        let malformed =
            |reason: &str| Error::MalformedShard { path: path.clone(), reason: reason.to_owned() };
        if bytes.len() < HEADER || bytes[..8] != *MAGIC {
            return Err(malformed("is not a loss mask: it does not start with ENGRMASK and a header"));
        }
        if word(&bytes, 8) != VERSION {
            return Err(malformed(&format!(
                "has version {} of the format; this program reads version {VERSION}",
                word(&bytes, 8)
            )));
        }
        let hashes = [(&bytes[..96], 96), (&bytes[HEADER..], 64), (header, 32)];
        let [own, bits, of_shard] =
            hashes.map(|(hashed, at)| *blake3::hash(hashed).as_bytes() == bytes[at..at + 32]);
        if !own || !bits {
            return Err(malformed("does not match its checksum; prepare the data again"));
        }
        if !of_shard || number(&bytes, 16) != tokens {
            return Err(malformed("is the mask of another shard; prepare the data again"));
        }
        if (bytes.len() - HEADER) as u64 != tokens.div_ceil(8) || word(&bytes, 12) == 0 {
            return Err(malformed("has not a bit for each token, or states no window"));
        }
        Ok(Self { bytes, tokens })
    }

    /// The bytes of the mask of a shard with this header.
    pub(crate) fn to_bytes(header: &[u8], window: u32, counted: &[bool]) -> Vec<u8> {
        let mut bits = vec![0u8; counted.len().div_ceil(8)];
        for (at, _) in counted.iter().enumerate().filter(|(_, counts)| **counts) {
            bits[at / 8] |= 1 << (at % 8);
        }
        let count = counted.iter().filter(|counts| **counts).count() as u64;
        let mut bytes = MAGIC.to_vec();
        [VERSION, window].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        [counted.len() as u64, count].iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes.extend(blake3::hash(header).as_bytes());
        bytes.extend(blake3::hash(&bits).as_bytes());
        let own = blake3::hash(&bytes);
        bytes.extend(own.as_bytes());
        bytes.extend(bits);
        bytes
    }

    /// The header, which identifies the mask.
    pub(crate) fn header(&self) -> &[u8] {
        &self.bytes[..HEADER]
    }

    /// Inputs per window.
    pub(crate) fn window(&self) -> usize {
        word(&self.bytes, 12) as usize
    }

    /// Number of tokens that a loss counts.
    pub(crate) fn count(&self) -> u64 {
        number(&self.bytes, 24)
    }

    /// Whether a loss counts the token at `place` of the shard.
    pub(crate) fn counts(&self, place: u64) -> bool {
        debug_assert!(place < self.tokens);
        self.bytes[HEADER + (place / 8) as usize] >> (place % 8) & 1 == 1
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
