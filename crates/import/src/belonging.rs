//! What an adapter or an overlay belongs to, and whether that is the model at hand.

use std::path::Path;

use engram_address::Addressing;
use engram_data::Tokenizer;

use crate::error::{Error, Result};
use crate::model::Model;

/// A base model, its tokenizer and the addressing of a memory for it, as hexadecimal hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Belonging {
    /// [`Model::identity`] of the base.
    pub(crate) base: String,
    /// What people call the base.
    pub(crate) base_name: String,
    /// [`vocabulary_hash`] of its tokenizer.
    pub(crate) tokenizer: String,
    /// The identity of the addressing.
    pub(crate) addressing: String,
}

impl Belonging {
    /// A memory with this addressing for `base`.
    ///
    /// # Errors
    /// When the base's files cannot be read.
    pub(crate) fn to(base: &Model, addressing: &Addressing) -> Result<Self> {
        Ok(Self {
            base: base.identity()?,
            base_name: base.name(),
            tokenizer: vocabulary_hash(base.tokenizer()),
            addressing: addressing.identity().to_string(),
        })
    }

    /// Refuses a base model that is not the one that this belongs to; `path` is the file that says so.
    ///
    /// # Errors
    /// Both sides by name.
    pub(crate) fn check_base(&self, path: &Path, base: &Model) -> Result<()> {
        let tokenizer = vocabulary_hash(base.tokenizer());
        if self.tokenizer != tokenizer {
            let (made, found) = (short(&self.tokenizer), short(&tokenizer));
            return Err(Error::model(
                path,
                format!(
                    "it was made for the tokenizer {made} of {}, but {} has the tokenizer {found}: use the model \
                     that it was made for",
                    self.base_name,
                    base.name()
                ),
            ));
        }
        let identity = base.identity()?;
        if self.base != identity {
            let (made, found) = (short(&self.base), short(&identity));
            return Err(Error::model(
                path,
                format!(
                    "it was made for {} ({made}), but the model is {} ({found}): use the model that it was made for",
                    self.base_name,
                    base.name()
                ),
            ));
        }
        Ok(())
    }

    /// Refuses an addressing that is not the one that rows were made for.
    ///
    /// # Errors
    /// Both sides by name.
    pub(crate) fn check_addressing(&self, path: &Path, addressing: &Addressing) -> Result<()> {
        let found = addressing.identity().to_string();
        if self.addressing == found {
            return Ok(());
        }
        let (made, found) = (short(&self.addressing), short(&found));
        Err(Error::model(
            path,
            format!(
                "its rows were made for the addressing {made}, but the memory has the addressing {found}: use the \
                 memory that they were made for"
            ),
        ))
    }
}

/// The BLAKE3 hash of what a tokenizer's tokens stand for, in the order of their ids.
pub(crate) fn vocabulary_hash(tokenizer: &Tokenizer) -> String {
    let mut hasher = blake3::Hasher::new();
    for token in 0..tokenizer.vocabulary() as u32 {
        let bytes = tokenizer.token_bytes(token);
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// The first 12 digits of a hash, to show people.
pub(crate) fn short(hash: &str) -> &str {
    &hash[..hash.floor_char_boundary(12)]
}
