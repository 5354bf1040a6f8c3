//! Where to cut a long text so that the tokens of its pieces are the tokens of the whole.
//!
//! Pieces keep all cores busy and bound memory. A cut is safe if the tokenizer ends a word there whatever follows, and
//! splits the rest as if nothing preceded it. This is known only of tokenizers with the split rules of GPT-2, GPT-4 and
//! their successors, without normalisation. SentencePiece tokenizers write `▁` before each text, merge over blanks or
//! normalise over neighbours, so their texts are never cut.

use tokenizers::Model;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use crate::split_rule::SplitRule;
use crate::token_model::TokenizerWith;

/// Maximum bytes of a piece, where the text can be cut.
pub(crate) const PIECE: usize = 1 << 18;

/// The places where a tokenizer's texts can be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// After line ends before an ASCII letter: the split rule takes a run of white space up to its last line end as one
    /// word.
    AfterLines,
    /// After a single line feed between a character that is not white space and an ASCII letter: the split rule leaves
    /// the last character of a longer run to the next word.
    AfterSingleLines,
    /// Nowhere.
    Never,
}

impl Cut {
    /// The places where texts of `tokenizer` can be cut.
    pub(crate) fn of<M: Model>(tokenizer: &TokenizerWith<M>) -> Self {
        // A token that is matched before the split could lie across a cut, or absorb blanks beside it.
        let crosses = |token: &tokenizers::AddedToken| {
            let takes_neighbours = token.lstrip || token.rstrip || token.single_word;
            !token.special && (takes_neighbours || token.content.contains('\n'))
        };
        let added = tokenizer.get_added_tokens_decoder();
        if tokenizer.get_normalizer().is_some() || added.values().any(crosses) {
            return Self::Never;
        }
        tokenizer.get_pre_tokenizer().map_or(Self::Never, of_splitters)
    }

    /// `text` in pieces of at most `most` bytes each, except for stretches that cannot be cut.
    pub(crate) fn pieces(self, text: &str, most: usize) -> impl Iterator<Item = &str> + use<'_> {
        let mut rest = text;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (piece, after) = rest.split_at(self.end(rest, most));
            rest = after;
            Some(piece)
        })
    }

    /// The end of the first piece of `text`: the last place within `most` bytes, or else the first after it.
    fn end(self, text: &str, most: usize) -> usize {
        if text.len() <= most || self == Self::Never {
            return text.len();
        }
        let fits = |end: &usize| self.is_safe(text, *end);
        let last = (1..=most).rev().find(fits);
        last.or_else(|| (most + 1..text.len()).find(fits)).unwrap_or(text.len())
    }

    fn is_safe(self, text: &str, at: usize) -> bool {
        let bytes = text.as_bytes();
        if bytes[at - 1] != b'\n' || !bytes[at].is_ascii_alphabetic() {
            return false;
        }
        match self {
            Self::AfterLines => true,
            Self::AfterSingleLines => {
                text[..at - 1].chars().next_back().is_some_and(|before| !before.is_whitespace())
            }
            Self::Never => false,
        }
    }
}

/// The places that the first split rule of a pre-tokenizer allows. Later rules only see its words.
fn of_splitters(splitter: &PreTokenizerWrapper) -> Cut {
    let splitters = match splitter {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        one => std::slice::from_ref(one),
    };
    let mut places = Cut::Never;
    for splitter in splitters {
        let of_this = match (splitter, SplitRule::of(splitter)) {
            (_, Some(SplitRule::Gpt2)) => Cut::AfterSingleLines,
            (_, Some(SplitRule::Lines { .. })) => Cut::AfterLines,
            // Digits are not line ends, and both rules separate the two.
            (PreTokenizerWrapper::Digits(_), None) => continue,
            (PreTokenizerWrapper::ByteLevel(bytes), None) if !bytes.add_prefix_space => continue,
            _ => return Cut::Never,
        };
        if places == Cut::Never {
            places = of_this;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::split_rule::testing::{byte_level, kinds, sequence, split, tokenizer};

    #[test]
    fn places_are_known_of_few_tokenizers() {
        let places: Vec<_> = kinds().iter().map(Cut::of).collect();
        let (lines, single) = (Cut::AfterLines, Cut::AfterSingleLines);
        assert_eq!(places, [single, single, lines, lines, lines]);
        let never = |splitter: Value, normalizer: Value, added: Value| {
            assert_eq!(Cut::of(&tokenizer(splitter, normalizer, added)), Cut::Never);
        };
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
        never(metaspace, Value::Null, json!([]));
        never(Value::Null, json!({"type": "Prepend", "prepend": "▁"}), json!([]));
        never(byte_level(true), json!({"type": "NFC"}), json!([]));
        never(sequence(json!([split(r"\d+"), byte_level(false)])), Value::Null, json!([]));
        let mut prefixed = byte_level(true);
        prefixed["add_prefix_space"] = true.into();
        never(prefixed, Value::Null, json!([]));
        let token = |content: &str, special: bool, lstrip: bool| {
            json!([{"id": 300, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": false,
                    "normalized": false, "special": special}])
        };
        never(byte_level(true), Value::Null, token("a\nb", false, false));
        never(byte_level(true), Value::Null, token("ab", false, true));
        let harmless = tokenizer(byte_level(true), Value::Null, token("a\nb", true, false));
        assert_eq!(Cut::of(&harmless), Cut::AfterSingleLines);
    }

    #[test]
    fn a_text_is_cut_at_the_last_place_that_fits_or_the_first_after_it() {
        let text = "abc def.\n  two\n1\nabc\n\nxyz";
        let ends = |cut: Cut, most| cut.end(text, most);
        assert_eq!((ends(Cut::AfterLines, 100), ends(Cut::AfterLines, 24)), (text.len(), 22));
        assert_eq!((ends(Cut::AfterLines, 21), ends(Cut::AfterLines, 3)), (17, 17));
        assert_eq!(ends(Cut::AfterSingleLines, 24), 17, "two line ends are no place");
        assert_eq!(ends(Cut::Never, 3), text.len());
        let long = "No end. ".repeat(100);
        assert_eq!(Cut::AfterLines.pieces(&long, 64).collect::<Vec<_>>(), [&long]);
        assert_eq!(Cut::AfterLines.pieces("", 64).count(), 0);
    }

    proptest! {
        #[test]
        fn tokens_of_pieces_are_tokens_of_the_whole(text in "([ab1é.,'!\u{a0} \r\t\n-]|\n[ab]){0,60}", most in 1..20usize) {
            for tokenizer in kinds() {
                let cut = Cut::of(&tokenizer);
                let ids = |text: &str| tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
                let pieces: Vec<&str> = cut.pieces(&text, most).collect();
                prop_assert_eq!(pieces.concat(), text.as_str());
                let tokens: Vec<u32> = pieces.into_iter().flat_map(ids).collect();
                prop_assert_eq!(tokens, ids(&text));
            }
        }
    }
}
