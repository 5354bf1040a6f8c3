use std::path::PathBuf;

use engram_identity::IdentityMismatch;

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, AddressError>;

/// What is wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// A value of an [`AddressConfig`](crate::AddressConfig) or [`StoredAddressing`](crate::StoredAddressing) is
    /// invalid.
    #[error("address configuration, key `{key}`: {problem}")]
    Config {
        /// The key as it is written in the file.
        key: &'static str,
        /// What is wrong with its value, and what is valid.
        problem: String,
    },
    /// A tokenizer file could not be read or parsed.
    #[error("tokenizer {}: {problem}; give the path of a Hugging Face `tokenizer.json`", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// The tokenizer library's message.
        problem: String,
    },
    /// A tokenizer cannot be turned into classes.
    #[error("tokenizer, token {token}: {problem}")]
    Tokenizer {
        /// The token's id.
        token: u32,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A class map is empty or leaves a class without a token.
    #[error("vocabulary classes: {problem}")]
    Classes {
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A token id lies outside the vocabulary.
    #[error(
        "token {token} at position {position} is outside the vocabulary, which has {}; \
         tokenise the text with the tokenizer that this vocabulary was made from", ids_of(*len)
    )]
    OutOfVocabulary {
        /// The token's id.
        token: u32,
        /// Its position, counted from the start of the sequence.
        position: usize,
        /// Tokens in the vocabulary.
        len: usize,
    },
    /// The number of entries in a mask differs from the number of tokens.
    #[error("the `{mask}` mask has {found} entries for {tokens} tokens; give one entry per token")]
    MaskLength {
        /// `dead` or `starts`.
        mask: &'static str,
        /// Entries in the mask.
        found: usize,
        /// Tokens that it should cover.
        tokens: usize,
    },
    /// The length of a slice for row ids does not match the tokens.
    #[error(
        "row ids of {tokens} tokens with {slots} slots each need {} entries, the output has {found}",
        tokens * slots
    )]
    OutputLength {
        /// Tokens to address.
        tokens: usize,
        /// Row ids per token.
        slots: usize,
        /// Entries in the slice.
        found: usize,
    },
    /// No layer has this index.
    #[error(
        "there is no memory layer of index {index}; the memory layers are {layers:?} (index 0 is the first)"
    )]
    LayerIndex {
        /// The requested index.
        index: usize,
        /// The ids of the existing layers.
        layers: Vec<usize>,
    },
    /// A history cannot be rolled back that far.
    #[error(
        "cannot roll back {asked} of {len} tokens: the history keeps {available} for rollback; \
         keep more with `History::with_rollback`, or start it again"
    )]
    Rollback {
        /// Tokens to remove.
        asked: usize,
        /// Tokens in the sequence.
        len: usize,
        /// Tokens that can be removed.
        available: usize,
    },
    /// Two parts belong to different addressings.
    #[error(transparent)]
    Identity(#[from] IdentityMismatch),
}

/// The ids of a vocabulary of `tokens` tokens, in words.
pub(crate) fn ids_of(tokens: usize) -> String {
    match tokens {
        0 => "no ids".into(),
        _ => format!("ids 0 to {}", tokens - 1),
    }
}
