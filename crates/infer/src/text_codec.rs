//! Text to tokens and back, as the server needs it.

use tokenizers::Tokenizer;

/// A tokenizer that cannot turn a text into tokens.
#[derive(Debug, thiserror::Error)]
#[error("the text cannot be turned into tokens: {0}")]
pub struct CodecError(String);

/// What stands before the first token of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// This token, always.
    Always(u32),
    /// This token, where there is no other.
    IfEmpty(u32),
}

/// A tokenizer, and what its tokens stand for.
#[derive(Debug)]
pub struct TextCodec {
    /// Names of special tokens are ordinary text.
    plain: Tokenizer,
    /// Names of special tokens are those tokens.
    marked: Tokenizer,
    token_bytes: Vec<Vec<u8>>,
    opening: Opening,
    end_of_text: u32,
}

impl TextCodec {
    /// Of `tokenizer`, whose token i stands for `token_bytes[i]`; `end_of_text` ends a document, and stands before
    /// the first token of one, unless they [open](Self::opening) in another way.
    pub fn new(tokenizer: &Tokenizer, token_bytes: Vec<Vec<u8>>, end_of_text: u32) -> Self {
        let with = |special: bool| {
            let mut tokenizer = tokenizer.clone();
            tokenizer.set_encode_special_tokens(special);
            tokenizer
        };
        let opening = Opening::Always(end_of_text);
        Self { plain: with(true), marked: with(false), token_bytes, opening, end_of_text }
    }

    /// The same with documents that open so.
    pub fn opening(self, opening: Opening) -> Self {
        Self { opening, ..self }
    }

    /// Tokens of the beginning of a document: what stands before it, then the text.
    ///
    /// # Errors
    /// When the tokenizer has no token for some of it.
    pub fn document(&self, text: &str) -> Result<Vec<u32>, CodecError> {
        Ok(self.opened(encode(&self.plain, text)?))
    }

    /// Tokens of a text in which special tokens are written by their names, such as what a chat template makes. It
    /// begins a document, too, unless it says how it begins.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn marked(&self, text: &str) -> Result<Vec<u32>, CodecError> {
        let tokens = encode(&self.marked, text)?;
        let begins = tokens.first().is_some_and(|&token| self.bytes(token).is_empty());
        Ok(if begins { tokens } else { self.opened(tokens) })
    }

    fn opened(&self, tokens: Vec<u32>) -> Vec<u32> {
        match self.opening {
            Opening::Always(token) => [&[token], &tokens[..]].concat(),
            Opening::IfEmpty(token) if tokens.is_empty() => vec![token],
            Opening::IfEmpty(_) => tokens,
        }
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

#[cfg(test)]
mod tests {
    use tokenizers::models::wordlevel::WordLevel;

    use super::*;

    #[test]
    fn a_document_opens_as_it_is_told() {
        let words = [("<s>".to_owned(), 0), ("a".to_owned(), 1)].into_iter().collect();
        let model = WordLevel::builder().vocab(words).unk_token("a".into()).build().unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.add_special_tokens([tokenizers::AddedToken::from("<s>", true)]).unwrap();
        let codec = || TextCodec::new(&tokenizer, vec![vec![], b"a".to_vec(), vec![]], 2);
        let documents = |codec: TextCodec| ["a", ""].map(|text| codec.document(text).unwrap());
        assert_eq!(documents(codec()), [vec![2, 1], vec![2]]);
        assert_eq!(documents(codec().opening(Opening::Always(0))), [vec![0, 1], vec![0]]);
        let if_empty = || codec().opening(Opening::IfEmpty(0));
        assert_eq!(documents(if_empty()), [vec![1], vec![0]]);
        assert_eq!(if_empty().marked("a").unwrap(), [1]);
        // What says itself how it begins is left alone.
        assert_eq!(codec().marked("<s>a").unwrap(), [0, 1]);
    }
}
