//! The classes of a tokenizer's ids: section "Tokenizer compression" of the paper (arXiv 2601.07372).

use std::collections::HashMap;
use std::path::Path;

use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFD, NFKC, Replace, Sequence, Strip, StripAccents};
use tokenizers::{
    Decoder, Model, NormalizedString, Normalizer, NormalizerWrapper, PostProcessor, PreTokenizer, Tokenizer,
    TokenizerImpl,
};

use crate::error::{AddressError, Result};
use crate::vocabulary::Vocabulary;

impl Vocabulary {
    /// The classes of a tokenizer's ids, numbered in the order of their first token.
    ///
    /// A token's key is its decoded text after normalisation, which unifies compatibility forms, accents, case and runs
    /// of white space. If normalisation leaves nothing, the key is the text itself. A token that is not valid UTF-8 by
    /// itself has its raw vocabulary entry as key.
    ///
    /// # Errors
    /// A tokenizer whose ids have gaps, or one that fails to decode an id.
    pub fn from_tokenizer<M, N, PT, PP, D>(tokenizer: &TokenizerImpl<M, N, PT, PP, D>) -> Result<Self>
    where
        M: Model,
        N: Normalizer,
        PT: PreTokenizer,
        PP: PostProcessor,
        D: Decoder,
    {
        let tokens = tokenizer.get_vocab_size(true) as u32;
        refuse_ids_beyond(tokens, tokenizer.get_vocab(true).into_values().max())?;
        let normalizer = normalizer();
        let mut class_of_key = HashMap::new();
        let class_of = (0..tokens)
            .map(|token| {
                let next = class_of_key.len() as u32;
                let text = tokenizer.decode(&[token], false).map_err(|error| unnamed(token, error))?;
                let key = key(token, text, || tokenizer.id_to_token(token), &normalizer)?;
                Ok(*class_of_key.entry(key).or_insert(next))
            })
            .collect::<Result<Vec<u32>>>()?;
        Self::from_classes(class_of)
    }

    /// The classes of a `tokenizer.json` file's ids: see [`from_tokenizer`](Self::from_tokenizer).
    ///
    /// # Errors
    /// A file that is missing or malformed, and those of [`from_tokenizer`](Self::from_tokenizer).
    pub fn from_tokenizer_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let tokenizer = Tokenizer::from_file(path).map_err(|error| AddressError::TokenizerFile {
            path: path.to_path_buf(),
            problem: error.to_string(),
        })?;
        Self::from_tokenizer(&tokenizer)
    }
}

fn refuse_ids_beyond(tokens: u32, largest: Option<u32>) -> Result<()> {
    match largest {
        Some(token) if token >= tokens => Err(AddressError::Tokenizer {
            token,
            problem: format!(
                "the tokenizer has {tokens} tokens, so ids must be below that; number them without gaps"
            ),
        }),
        _ => Ok(()),
    }
}

/// The key of a token's decoded text; `entry` is the token's name in the vocabulary.
fn key(
    token: u32,
    text: String,
    entry: impl FnOnce() -> Option<String>,
    normalizer: &impl Normalizer,
) -> Result<String> {
    if text.contains(char::REPLACEMENT_CHARACTER) {
        return entry().ok_or_else(|| unnamed(token, "it has no vocabulary entry".into()));
    }
    let mut normalized = NormalizedString::from(text.as_str());
    normalizer.normalize(&mut normalized).map_err(|error| unnamed(token, error))?;
    Ok(if normalized.get().is_empty() { text } else { normalized.get().to_owned() })
}

fn unnamed(token: u32, error: tokenizers::Error) -> AddressError {
    AddressError::Tokenizer {
        token,
        problem: format!(
            "{error}; a token's class depends on its text, so repair the tokenizer's decoder or vocabulary"
        ),
    }
}

/// NFKC, NFD, no accents, lower case, runs of white space to one space, no outer space. A text of exactly one space
/// keeps it: a private-use character replaces it while outer spaces are stripped.
fn normalizer() -> Sequence {
    const LONE_SPACE: &str = "\u{E000}";
    let replace = |pattern: ReplacePattern, content: &str| {
        let replace = Replace::new(pattern, content).expect("the patterns below are valid");
        NormalizerWrapper::Replace(replace)
    };
    let regex = |pattern: &str| ReplacePattern::Regex(pattern.into());
    Sequence::new(vec![
        NFKC.into(),
        NFD.into(),
        StripAccents.into(),
        Lowercase.into(),
        replace(regex(r"[ \t\r\n]+"), " "),
        replace(regex("^ $"), LONE_SPACE),
        Strip::new(true, true).into(),
        replace(ReplacePattern::String(LONE_SPACE.into()), " "),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalize(text: &str) -> String {
        let mut text = NormalizedString::from(text);
        normalizer().normalize(&mut text).unwrap();
        text.get().to_owned()
    }

    #[test]
    fn normalising_keeps_words_and_drops_dress() {
        for (text, expected) in [
            ("The", "the"),
            (" THE ", "the"),
            ("\u{e9}t\u{e9}", "ete"),
            ("\u{fb01}ne", "fine"),
            ("a \t\r\n b", "a b"),
            (" ", " "),
            ("\n\n\t", " "),
            ("\u{a0}", " "),
            ("", ""),
            ("\u{301}", ""),
            ("\u{2167}", "viii"),
            ("四大", "四大"),
        ] {
            assert_eq!(normalize(text), expected, "{text:?}");
        }
    }

    /// A byte-level tokenizer of whole tokens: `Ġ` is a space, `Ċ` a line feed, `Ã` the first byte of an é.
    fn byte_level_tokenizer(vocabulary: &[&str]) -> Tokenizer {
        let entries: Vec<String> =
            vocabulary.iter().enumerate().map(|(id, token)| format!("\"{token}\": {id}")).collect();
        let special = vocabulary.len();
        format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null,
                "normalizer": null, "pre_tokenizer": null, "post_processor": null,
                "added_tokens": [{{"id": {special}, "content": "<The>", "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true}}],
                "decoder": {{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                    "use_regex": true}},
                "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "The"}}}}"#,
            entries.join(", ")
        )
        .parse()
        .unwrap()
    }

    #[test]
    fn tokens_of_equal_text_share_a_class() {
        let tokens = ["The", "Ġthe", "cafÃ©", "CAFE", "Ġ", "Ċ", "ĠĠ", "Ã", "Â", "THE", "Ìģ", "ģ"];
        let vocabulary = Vocabulary::from_tokenizer(&byte_level_tokenizer(&tokens)).unwrap();
        // White space is one class. Lone bytes keep their own class, as does an accent that normalisation would remove.
        // `<The>` is not the same text as `The`.
        assert_eq!(vocabulary.as_slice(), [0, 0, 1, 1, 2, 2, 2, 3, 4, 0, 5, 6, 7]);
        assert_eq!((vocabulary.len(), vocabulary.classes()), (13, 8));
    }

    #[test]
    fn holes_in_a_tokenizer_are_refused() {
        let mut tokenizer = byte_level_tokenizer(&["The"]);
        let text = tokenizer.to_string(false).unwrap().replace("\"The\":0", "\"The\":7");
        tokenizer = text.parse().unwrap();
        let error = Vocabulary::from_tokenizer(&tokenizer).unwrap_err().to_string();
        assert!(error.contains("token 7") && error.contains("has 2 tokens"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Vocabulary::from_tokenizer_file("no/such/tokenizer.json").unwrap_err().to_string();
        assert!(error.contains("no/such/tokenizer.json"), "{error}");
    }
}
