use std::path::PathBuf;

use engram_identity::IdentityMismatch;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, AddressError>;

/// What was wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// A value of an [`AddressConfig`](crate::AddressConfig) or
    /// [`StoredAddressing`](crate::StoredAddressing) cannot be used.
    #[error("address configuration, key `{key}`: {problem}")]
    Config {
        /// The key as it is written in the file.
        key: &'static str,
        /// What is wrong with its value, and what would be right.
        problem: String,
    },
    /// A tokenizer file could not be read or parsed.
    #[error("tokenizer {}: {problem}; give the path of a Hugging Face `tokenizer.json`", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library said.
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
         tokenise the text with the tokenizer this vocabulary was made from", ids_of(*len)
    )]
    OutOfVocabulary {
        /// The token's id.
        token: u32,
        /// Its position, counted from the start of the sequence.
        position: usize,
        /// Tokens in the vocabulary.
        len: usize,
    },
    /// A mask over tokens does not have one entry per token.
    #[error("the `{mask}` mask has {found} entries for {tokens} tokens; give one entry per token")]
    MaskLength {
        /// `dead` or `starts`.
        mask: &'static str,
        /// Entries in the mask.
        found: usize,
        /// Tokens it should cover.
        tokens: usize,
    },
    /// The slice for row ids does not fit the tokens.
    #[error(
        "row ids of {tokens} tokens with {slots} slots each need {} entries, the output has {found}",
        tokens * slots
    )]
    OutputLength {
        /// Tokens to be addressed.
        tokens: usize,
        /// Row ids per token.
        slots: usize,
        /// Entries in the slice.
        found: usize,
    },
    /// There is no layer of that index.
    #[error(
        "there is no memory layer of index {index}; the memory layers are {layers:?} (index 0 is the first)"
    )]
    LayerIndex {
        /// The index asked for.
        index: usize,
        /// The ids of the layers there are.
        layers: Vec<usize>,
    },
    /// A history cannot go back that far.
    #[error(
        "cannot roll back {asked} of {len} tokens: the history can give up {available}; \
         keep more with `History::with_rollback`, or start it again"
    )]
    Rollback {
        /// Tokens to be taken back.
        asked: usize,
        /// Tokens in the sequence.
        len: usize,
        /// Tokens that can be taken back.
        available: usize,
    },
    /// Two parts were made with different addressing.
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
