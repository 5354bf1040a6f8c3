//! Text to tokens and back, as the server needs it.

use tokenizers::Tokenizer;

/// A tokenizer that cannot turn a text into tokens.
#[derive(Debug, thiserror::Error)]
#[error("the text cannot be turned into tokens: {0}")]
pub struct CodecError(String);

/// A tokenizer, and what its tokens stand for.
#[derive(Debug)]
pub struct TextCodec {
    /// Names of special tokens are ordinary text.
    plain: Tokenizer,
    /// Names of special tokens are those tokens.
    marked: Tokenizer,
    token_bytes: Vec<Vec<u8>>,
    end_of_text: u32,
}

impl TextCodec {
    /// Of `tokenizer`, whose token i stands for `token_bytes[i]`; `end_of_text` ends a document, and stands before
    /// the first token of one.
    pub fn new(tokenizer: &Tokenizer, token_bytes: Vec<Vec<u8>>, end_of_text: u32) -> Self {
        let with = |special: bool| {
            let mut tokenizer = tokenizer.clone();
            tokenizer.set_encode_special_tokens(special);
            tokenizer
        };
        Self { plain: with(true), marked: with(false), token_bytes, end_of_text }
    }

    /// Tokens of the beginning of a document: the end of the one before, then the text.
    ///
    /// # Errors
    /// When the tokenizer has no token for some of it.
    pub fn document(&self, text: &str) -> Result<Vec<u32>, CodecError> {
        let mut tokens = vec![self.end_of_text];
        tokens.extend(encode(&self.plain, text)?);
        Ok(tokens)
    }

    /// Tokens of a text in which special tokens are written by their names, such as what a chat template makes. It
    /// begins a document, too, unless it says how it begins.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn marked(&self, text: &str) -> Result<Vec<u32>, CodecError> {
        let tokens = encode(&self.marked, text)?;
        let begins = tokens.first().is_some_and(|&token| self.bytes(token).is_empty());
        Ok(if begins { tokens } else { [&[self.end_of_text], &tokens[..]].concat() })
    }

    /// The bytes of text that a token stands for; none of special tokens.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.token_bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// The bytes of all tokens.
    pub fn token_bytes(&self) -> &[Vec<u8>] {
        &self.token_bytes
    }

    /// How a token is shown: its text, or a special token's name.
    pub fn shown(&self, token: u32) -> String {
        match self.bytes(token) {
            [] => self.plain.id_to_token(token).unwrap_or_default(),
            bytes => String::from_utf8_lossy(bytes).into_owned(),
        }
    }

    /// The token of a special token's name.
    pub fn token(&self, name: &str) -> Option<u32> {
        self.plain.token_to_id(name)
    }

    /// The token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, CodecError> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|error| CodecError(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}
