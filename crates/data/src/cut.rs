//! Where a long text may be cut so that the tokens of its pieces are the tokens of the whole.
//!
//! Pieces keep all cores busy and bound memory. A cut is safe where the tokenizer ends a word anyway, whatever
//! follows, and where what follows is split as if nothing had stood before it. Which tokenizers promise that is known of
//! few: those with the split rules of GPT-2, GPT-4 and their successors, without normalisation. SentencePiece's kind
//! writes `▁` before each text, merges over blanks or normalises over neighbours: its texts are never cut.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

/// Bytes that a piece has at most, where there are places to cut.
pub(crate) const PIECE: usize = 1 << 18;

/// The places at which a tokenizer's texts may be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// After line ends that an ASCII letter follows: the split rule takes a run of white space up to its last line end as
    /// one word.
    AfterLines,
    /// After a single line feed between a character that is no white space and an ASCII letter: the split rule leaves
    /// the last character of a longer run to the next word.
    AfterSingleLines,
    /// Nowhere.
    Never,
}

impl Cut {
    /// The places at which texts of `tokenizer` may be cut.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Self {
        // A token that is looked for before the text is split could stand across a cut, or take blanks beside it.
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

    /// `text` in pieces of at most `most` bytes each, but for stretches without a place to cut.
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

    /// Where the first piece of `text` ends: at the last place within `most` bytes, or else at the first after it.
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

/// The places that the first split rule of a pre-tokenizer allows: those after it only see its words.
fn of_splitters(splitter: &PreTokenizerWrapper) -> Cut {
    let splitters = match splitter {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        one => std::slice::from_ref(one),
    };
    let mut places = Cut::Never;
    for splitter in splitters {
        let of_this = match splitter {
            // Digits are no line ends, and part from them in either case.
            PreTokenizerWrapper::Digits(_) => continue,
            PreTokenizerWrapper::ByteLevel(bytes) if bytes.add_prefix_space => return Cut::Never,
            PreTokenizerWrapper::ByteLevel(bytes) if !bytes.use_regex => continue,
            PreTokenizerWrapper::ByteLevel(_) => Cut::AfterSingleLines,
            PreTokenizerWrapper::Split(split)
                if is_known(&split.pattern)
                    && split.behavior == SplitDelimiterBehavior::Isolated
                    && !split.invert =>
            {
                Cut::AfterLines
            }
            _ => return Cut::Never,
        };
        if places == Cut::Never {
            places = of_this;
        }
    }
    places
}

/// Whether it is the rule of GPT-4, Llama 3, Qwen 2 or of a tokenizer trained here, which differ in how many digits
/// stand together.
fn is_known(pattern: &SplitPattern) -> bool {
    let SplitPattern::Regex(pattern) = pattern else { return false };
    let (before, after) = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    );
    let digits = pattern.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
    digits.is_some_and(|digits| [r"\p{N}", r"\p{N}+", r"\p{N}{1,2}", r"\p{N}{1,3}"].contains(&digits))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// A BPE tokenizer over bytes, some merges over words, blanks and line ends among them.
    fn tokenizer(pre_tokenizer: Value, normalizer: Value, added: Value) -> Tokenizer {
        let names: Vec<char> = {
            let mut names: Vec<char> =
                tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
            names.extend(['▁']);
            names.sort_unstable();
            names
        };
        let merges = [
            ["a", "b"],
            ["Ġ", "a"],
            ["Ċ", "Ċ"],
            ["Ġ", "Ċ"],
            ["Ġa", "b"],
            ["ĊĊ", "Ċ"],
            ["▁", "a"],
            ["b", "▁a"],
        ];
        let merged = merges.iter().map(|[one, two]| format!("{one}{two}"));
        let vocabulary: serde_json::Map<String, Value> = names
            .iter()
            .map(char::to_string)
            .chain(merged)
            .enumerate()
            .map(|(id, name)| (name, Value::from(id)))
            .collect();
        let file = json!({
            "version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        });
        let mut tokenizer = Tokenizer::from_bytes(file.to_string()).unwrap();
        tokenizer.set_encode_special_tokens(true);
        tokenizer
    }

    fn split(digits: &str) -> Value {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    fn bytes(use_regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    fn sequence(splitters: Value) -> Value {
        json!({"type": "Sequence", "pretokenizers": splitters})
    }

    fn kinds() -> Vec<(Tokenizer, Cut)> {
        let digits = json!({"type": "Digits", "individual_digits": true});
        let of = |splitter, cut| (tokenizer(splitter, Value::Null, json!([])), cut);
        vec![
            of(bytes(true), Cut::AfterSingleLines),
            of(sequence(json!([digits, bytes(true)])), Cut::AfterSingleLines),
            of(sequence(json!([split(r"\p{N}"), bytes(false)])), Cut::AfterLines),
            of(sequence(json!([split(r"\p{N}{1,3}"), bytes(false)])), Cut::AfterLines),
        ]
    }

    #[test]
    fn places_are_known_of_few_tokenizers() {
        for (tokenizer, cut) in kinds() {
            assert_eq!(Cut::of(&tokenizer), cut);
        }
        let never = |splitter: Value, normalizer: Value, added: Value| {
            assert_eq!(Cut::of(&tokenizer(splitter, normalizer, added)), Cut::Never);
        };
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
        never(metaspace, Value::Null, json!([]));
        never(Value::Null, json!({"type": "Prepend", "prepend": "▁"}), json!([]));
        never(bytes(true), json!({"type": "NFC"}), json!([]));
        never(sequence(json!([split(r"\d+"), bytes(false)])), Value::Null, json!([]));
        let mut prefixed = bytes(true);
        prefixed["add_prefix_space"] = true.into();
        never(prefixed, Value::Null, json!([]));
        let token = |content: &str, special: bool, lstrip: bool| {
            json!([{"id": 300, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": false,
                    "normalized": false, "special": special}])
        };
        never(bytes(true), Value::Null, token("a\nb", false, false));
        never(bytes(true), Value::Null, token("ab", false, true));
        let harmless = tokenizer(bytes(true), Value::Null, token("a\nb", true, false));
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
            for (tokenizer, cut) in kinds() {
                let ids = |text: &str| tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
                let pieces: Vec<&str> = cut.pieces(&text, most).collect();
                prop_assert_eq!(pieces.concat(), text.as_str());
                let tokens: Vec<u32> = pieces.into_iter().flat_map(ids).collect();
                prop_assert_eq!(tokens, ids(&text));
            }
        }
    }
}
