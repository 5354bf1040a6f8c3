//! Text to tokens and back, as the server needs it.

use engram_data::{TextTokenizer, TokenBytes};

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
    plain: TextTokenizer,
    /// Names of special tokens are those tokens.
    marked: TextTokenizer,
    token_bytes: TokenBytes,
    longest_token: usize,
    opening: Opening,
    end_of_text: u32,
    /// Tokens that end an answer, `end_of_text` first.
    end_tokens: Vec<u32>,
}

/// How a text becomes a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptOptions {
    /// Whether names of special tokens in the text are those tokens, or ordinary text.
    pub parse_special: bool,
    /// Whether what stands before a document is added.
    pub add_special_tokens: bool,
}

impl Default for PromptOptions {
    fn default() -> Self {
        Self { parse_special: true, add_special_tokens: true }
    }
}

impl TextCodec {
    /// Of `tokenizer`, whose token i stands for `token_bytes[i]`; `end_of_text` ends a document, and stands before
    /// the first token of one, unless they [open](Self::opening) in another way.
    pub fn new(tokenizer: &TextTokenizer, token_bytes: TokenBytes, end_of_text: u32) -> Self {
        let with = |special: bool| {
            let mut tokenizer = tokenizer.clone();
            tokenizer.set_encode_special_tokens(special);
            tokenizer
        };
        let opening = Opening::Always(end_of_text);
        let longest_token = token_bytes.iter().map(<[u8]>::len).max().unwrap_or(0);
        let (plain, marked, end_tokens) = (with(true), with(false), vec![end_of_text]);
        Self { plain, marked, token_bytes, longest_token, opening, end_of_text, end_tokens }
    }

    /// The same with more tokens that end an answer.
    pub fn ending(mut self, more: impl IntoIterator<Item = u32>) -> Self {
        self.end_tokens.extend(more);
        self.end_tokens.sort_unstable();
        self.end_tokens.dedup();
        self
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

    /// Tokens of a prompt.
    ///
    /// # Errors
    /// As [`document`](Self::document).
    pub fn prompt(&self, text: &str, options: PromptOptions) -> Result<Vec<u32>, CodecError> {
        let tokens = encode(if options.parse_special { &self.marked } else { &self.plain }, text)?;
        let is_open = options.parse_special && tokens.first().is_some_and(|&token| self.opens(token));
        Ok(if options.add_special_tokens && !is_open { self.opened(tokens) } else { tokens })
    }

    /// Whether a document begins with `token`.
    pub fn opens(&self, token: u32) -> bool {
        match self.opening {
            Opening::Always(first) | Opening::IfEmpty(first) => token == first,
        }
    }

    /// The token that a document begins with.
    pub fn opening_token(&self) -> u32 {
        match self.opening {
            Opening::Always(first) | Opening::IfEmpty(first) => first,
        }
    }

    /// The fewest tokens that a text of `bytes` may have, about: a tokenizer may leave out some of it.
    pub fn fewest_tokens(&self, bytes: usize) -> usize {
        bytes / (4 * self.longest_token.max(1))
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
        self.token_bytes.get(token)
    }

    /// The bytes of all tokens.
    pub fn token_bytes(&self) -> &TokenBytes {
        &self.token_bytes
    }

    /// How a token is shown: its text, or a special token's name. A part of a character is shown by its bytes, such as
    /// `bytes:\xf0`.
    pub fn shown(&self, token: u32) -> String {
        match self.bytes(token) {
            [] => self.plain.id_to_token(token).unwrap_or_default(),
            bytes => match std::str::from_utf8(bytes) {
                Ok(text) => text.to_owned(),
                Err(_) => {
                    bytes.iter().fold("bytes:".to_owned(), |shown, byte| shown + &format!("\\x{byte:02x}"))
                }
            },
        }
    }

    /// The token of a special token's name.
    pub fn token(&self, name: &str) -> Option<u32> {
        self.plain.token_to_id(name)
    }

    /// The same, if the token stands for no text.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.token(name).filter(|&token| self.bytes(token).is_empty())
    }

    /// The tokens that end an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }
}

fn encode(tokenizer: &TextTokenizer, text: &str) -> Result<Vec<u32>, CodecError> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|error| CodecError(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests {
    use tokenizers::models::ModelWrapper;
    use tokenizers::models::wordlevel::WordLevel;

    use super::*;

    #[test]
    fn a_document_opens_as_it_is_told() {
        let words = [("<s>".to_owned(), 0), ("a".to_owned(), 1)].into_iter().collect();
        let model = WordLevel::builder().vocab(words).unk_token("a".into()).build().unwrap();
        let mut tokenizer = TextTokenizer::new(ModelWrapper::from(model).into());
        tokenizer.add_special_tokens([tokenizers::AddedToken::from("<s>", true)]).unwrap();
        let codec = || TextCodec::new(&tokenizer, ["", "a", ""].into_iter().collect(), 2);
        let documents = |codec: TextCodec| ["a", ""].map(|text| codec.document(text).unwrap());
        assert_eq!(documents(codec()), [vec![2, 1], vec![2]]);
        assert_eq!(documents(codec().opening(Opening::Always(0))), [vec![0, 1], vec![0]]);
        let if_empty = || codec().opening(Opening::IfEmpty(0));
        assert_eq!(documents(if_empty()), [vec![1], vec![0]]);
        assert_eq!(if_empty().marked("a").unwrap(), [1]);
        // What says itself how it begins is left alone.
        assert_eq!(codec().marked("<s>a").unwrap(), [0, 1]);
    }

    /// Three bytes, of which one is a part of a character, and two special tokens.
    fn codec() -> TextCodec {
        let words =
            ["a", "b", "é", "<s>", "<|eot|>"].iter().zip(0..).map(|(name, id)| ((*name).to_owned(), id));
        let model = WordLevel::builder().vocab(words.collect()).unk_token("b".into()).build().unwrap();
        let mut tokenizer = TextTokenizer::new(ModelWrapper::from(model).into());
        tokenizer.with_pre_tokenizer(Some(
            tokenizers::pre_tokenizers::split::Split::new(
                "",
                tokenizers::SplitDelimiterBehavior::Isolated,
                false,
            )
            .unwrap(),
        ));
        let special = ["<s>", "<|eot|>"].map(|name| tokenizers::AddedToken::from(name, true));
        tokenizer.add_special_tokens(special).unwrap();
        let bytes: [&[u8]; 5] = [b"a", b"b", b"\xc3", b"", b""];
        TextCodec::new(&tokenizer, bytes.into_iter().collect(), 3)
    }

    #[test]
    fn names_of_special_tokens_are_those_tokens_unless_told_otherwise() {
        let options = |parse_special, add_special_tokens| PromptOptions { parse_special, add_special_tokens };
        let prompt = |text: &str, options| codec().prompt(text, options).unwrap();
        assert_eq!(prompt("a<|eot|>a", options(true, false)), [0, 4, 0]);
        assert_eq!(prompt("a<|eot|>a", options(true, true)), [3, 0, 4, 0]);
        assert_eq!(prompt("<s>a", options(true, true)), [3, 0], "it begins already");
        assert_eq!(prompt("<|eot|>a", options(true, true)), [3, 4, 0]);
        assert!(!prompt("a<|eot|>a", options(false, false)).contains(&4));
        assert_eq!(prompt("a", options(false, false)), [0]);
    }

    #[test]
    fn tokens_are_shown_so_that_they_can_be_told_apart() {
        assert_eq!([0, 2, 4].map(|token| codec().shown(token)), ["a", "bytes:\\xc3", "<|eot|>"]);
        assert_eq!((codec().special("<|eot|>"), codec().special("a")), (Some(4), None));
        assert_eq!(codec().ending([4, 3]).end_tokens(), [3, 4]);
    }
}
