//! The rules by which known byte-level tokenizers split texts into words.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;

/// A known split rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SplitRule {
    /// GPT-2's: before other text, the last white-space character is left to the next word.
    Gpt2,
    /// GPT-4's, Llama 3's, Qwen 2's and that of tokenizers trained here: white space up to its last line end is one
    /// word. They differ in how digits are grouped.
    Lines {
        /// The expression for digits.
        digits: &'static str,
        /// The most digits that it takes for one word.
        most_digits: usize,
    },
}

impl SplitRule {
    const LINES_BEFORE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
    const LINES_AFTER: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|";
    const DIGITS: [(&str, usize); 4] =
        [(r"\p{N}", 1), (r"\p{N}+", usize::MAX), (r"\p{N}{1,2}", 2), (r"\p{N}{1,3}", 3)];
    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|";
    /// The end of all of them.
    const BLANKS: &str = r"\s+(?!\S)|\s+";

    /// The rule of a pre-tokenizer, if it is a known one.
    pub(crate) fn of(splitter: &PreTokenizerWrapper) -> Option<Self> {
        match splitter {
            PreTokenizerWrapper::ByteLevel(bytes) => {
                (bytes.use_regex && !bytes.add_prefix_space).then_some(Self::Gpt2)
            }
            PreTokenizerWrapper::Split(split)
                if split.behavior == SplitDelimiterBehavior::Isolated && !split.invert =>
            {
                let SplitPattern::Regex(pattern) = &split.pattern else { return None };
                let rest = pattern.strip_suffix(Self::BLANKS)?;
                if rest == Self::GPT2 {
                    return Some(Self::Gpt2);
                }
                let found = rest.strip_prefix(Self::LINES_BEFORE)?.strip_suffix(Self::LINES_AFTER)?;
                let known = Self::DIGITS.into_iter().find(|(digits, _)| *digits == found);
                known.map(|(digits, most_digits)| Self::Lines { digits, most_digits })
            }
            _ => None,
        }
    }

    /// The rule as an expression with `\s+` in place of its end `\s+(?!\S)|\s+`, for libraries without look-ahead.
    /// [`cut`](Self::cut) removes the difference.
    pub(crate) fn without_look_ahead(self) -> String {
        match self {
            Self::Gpt2 => format!("{}{}", Self::GPT2, r"\s+"),
            Self::Lines { digits, .. } => {
                format!("{}{digits}{}{}", Self::LINES_BEFORE, Self::LINES_AFTER, r"\s+")
            }
        }
    }

    /// The part of `word` that the rule itself matches, where `word` is a match [without
    /// look-ahead](Self::without_look_ahead) that more text follows. The last character of white space is left to the
    /// next word, unless it is the only one.
    pub(crate) fn cut(self, word: &str) -> &str {
        let Some((last, _)) = word.char_indices().next_back() else { return word };
        let by_blanks = word.chars().all(char::is_whitespace)
            && match self {
                Self::Gpt2 => true,
                // `\s*[\r\n]+` comes first, so the rest holds no line end.
                Self::Lines { .. } => !word.contains(['\r', '\n']),
            };
        if by_blanks && last > 0 { &word[..last] } else { word }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Small tokenizers of every kind.

    use serde_json::{Value, json};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use crate::token_model::TextTokenizer;

    /// A BPE tokenizer over bytes, with merges within words and over blanks and line ends.
    pub(crate) fn tokenizer(pre_tokenizer: Value, normalizer: Value, added: Value) -> TextTokenizer {
        let mut names: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        names.push('▁');
        names.sort_unstable();
        let merges = [
            ["a", "b"],
            ["Ġ", "a"],
            ["Ċ", "Ċ"],
            ["Ġ", "Ċ"],
            ["Ġa", "b"],
            ["ĊĊ", "Ċ"],
            ["▁", "a"],
            ["b", "▁a"],
            ["b", "Ċ"],
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
        let mut tokenizer = TextTokenizer::from_bytes(file.to_string()).unwrap();
        tokenizer.set_encode_special_tokens(true);
        tokenizer
    }

    pub(crate) fn split(digits: &str) -> Value {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    pub(crate) fn byte_level(use_regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    pub(crate) fn sequence(splitters: Value) -> Value {
        json!({"type": "Sequence", "pretokenizers": splitters})
    }

    /// GPT-2's kind, the same with digits apart, Qwen 2's, Llama 3's, ours.
    pub(crate) fn kinds() -> Vec<TextTokenizer> {
        let digits = json!({"type": "Digits", "individual_digits": true});
        let of = |splitter| tokenizer(splitter, Value::Null, json!([]));
        let lines = |digits| of(sequence(json!([split(digits), byte_level(false)])));
        vec![
            of(byte_level(true)),
            of(sequence(json!([digits, byte_level(true)]))),
            lines(r"\p{N}"),
            lines(r"\p{N}{1,3}"),
            lines(r"\p{N}{1,2}"),
        ]
    }
}
