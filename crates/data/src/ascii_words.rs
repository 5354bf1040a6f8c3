//! The known split rules for ASCII text, without a regular expression.

use crate::split_rule::SplitRule;

/// What the split rules distinguish among bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Letter,
    Digit,
    /// CR and LF.
    LineEnd,
    /// Other white space.
    Blank,
    /// Signs and control characters.
    Sign,
    /// Part of a character beyond ASCII, of any kind.
    Beyond,
}

/// The kind of every byte.
const KINDS: [Kind; 256] = {
    let mut kinds = [Kind::Beyond; 256];
    let mut byte = 0;
    while byte < 128 {
        kinds[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Kind::Letter,
            b'0'..=b'9' => Kind::Digit,
            b'\r' | b'\n' => Kind::LineEnd,
            b' ' | b'\t' | 0x0b | 0x0c => Kind::Blank,
            _ => Kind::Sign,
        };
        byte += 1;
    }
    kinds
};

/// The end of the word of `text` that starts at `at`, which is below its length. None if a character beyond ASCII has a
/// say: a regular expression must decide.
pub(crate) fn word_end(rule: SplitRule, text: &[u8], at: usize) -> Option<usize> {
    let word = Word { text, at };
    let (first, second) = (word.kind(0), word.kind(1));
    if first == Some(Kind::Beyond) || second == Some(Kind::Beyond) {
        return None;
    }
    let ignores_case = rule != SplitRule::Gpt2;
    if text[at] == b'\'' {
        match word.contraction(ignores_case) {
            Contraction::Length(length) => return Some(at + length),
            Contraction::Unknown => return None,
            Contraction::None => {}
        }
    }
    let after_space = usize::from(text[at] == b' ');
    match rule {
        SplitRule::Gpt2 => match word.kind(after_space) {
            Some(kind @ (Kind::Letter | Kind::Digit | Kind::Sign)) => {
                word.run(after_space, |other| other == kind)
            }
            _ => word.blanks(false),
        },
        SplitRule::Lines { most_digits, .. } => match (first?, second) {
            (Kind::Letter, _) => word.run(1, |kind| kind == Kind::Letter),
            (Kind::Blank | Kind::Sign, Some(Kind::Letter)) => word.run(2, |kind| kind == Kind::Letter),
            (Kind::Digit, _) => word.digits(most_digits),
            _ if word.kind(after_space) == Some(Kind::Sign) => {
                let end = word.run(after_space, |kind| kind == Kind::Sign)?;
                Some(end + text[end..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count())
            }
            _ => word.blanks(true),
        },
    }
}

/// Whether a word is a contraction's end, such as `'ll`.
enum Contraction {
    None,
    /// With its number of bytes.
    Length(usize),
    /// A character beyond ASCII may be a letter of it, as `ſ` is an `s`.
    Unknown,
}

/// A place in a text where a word starts.
#[derive(Clone, Copy)]
struct Word<'a> {
    text: &'a [u8],
    at: usize,
}

impl Word<'_> {
    /// The kind of the byte at `offset` from the start; None after the end of the text.
    fn kind(self, offset: usize) -> Option<Kind> {
        self.text.get(self.at + offset).map(|byte| KINDS[usize::from(*byte)])
    }

    /// The end of the longest run of bytes from `offset` on that `takes`; None if a character beyond ASCII follows it.
    fn run(self, offset: usize, takes: impl Fn(Kind) -> bool) -> Option<usize> {
        let from = self.at + offset;
        let kinds = self.text[from..].iter().map(|byte| KINDS[usize::from(*byte)]);
        for (length, kind) in kinds.enumerate() {
            if kind == Kind::Beyond {
                return None;
            }
            if !takes(kind) {
                return Some(from + length);
            }
        }
        Some(self.text.len())
    }

    fn digits(self, most: usize) -> Option<usize> {
        let most = most.min(self.text.len() - self.at);
        let cut = Word { text: &self.text[..self.at + most], at: self.at };
        cut.run(0, |kind| kind == Kind::Digit)
    }

    /// The end of white space: after its last line end if `lines`; otherwise all but its last character, which the next
    /// word takes, if text follows.
    fn blanks(self, lines: bool) -> Option<usize> {
        let end = self.run(0, |kind| matches!(kind, Kind::Blank | Kind::LineEnd))?;
        let blanks = &self.text[self.at..end];
        let last_line = blanks.iter().rposition(|byte| matches!(byte, b'\r' | b'\n'));
        Some(match last_line {
            Some(last) if lines => self.at + last + 1,
            _ if end == self.text.len() || blanks.len() == 1 => end,
            _ => end - 1,
        })
    }

    fn contraction(self, ignores_case: bool) -> Contraction {
        let letter = |offset: usize| {
            let byte = self.text.get(self.at + offset).copied();
            if ignores_case { byte.map(|byte| byte.to_ascii_lowercase()) } else { byte }
        };
        match (letter(1), letter(2)) {
            (Some(b's' | b't' | b'm' | b'd'), _) => Contraction::Length(2),
            (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => Contraction::Length(3),
            (Some(byte), _) | (_, Some(byte)) if !byte.is_ascii() => Contraction::Unknown,
            _ => Contraction::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_end_where_the_rule_says() {
        let lines = SplitRule::Lines { digits: r"\p{N}{1,2}", most_digits: 2 };
        let words = |rule, text: &str| {
            let mut ends = vec![0];
            while *ends.last().unwrap() < text.len() {
                ends.push(word_end(rule, text.as_bytes(), *ends.last().unwrap()).unwrap());
            }
            ends.windows(2).map(|ends| text[ends[0]..ends[1]].to_owned()).collect::<Vec<_>>()
        };
        let text = "It'S  \"so\" 1234!\n\n  on\t";
        assert_eq!(
            words(lines, text),
            ["It", "'S", " ", " \"", "so", "\"", " ", "12", "34", "!\n\n", " ", " on", "\t"]
        );
        assert_eq!(
            words(SplitRule::Gpt2, text),
            ["It", "'", "S", " ", " \"", "so", "\"", " 1234", "!", "\n\n ", " on", "\t"]
        );
        for (text, at) in [("é", 0), ("aé", 0), (" é", 0), ("'é", 0), ("  \u{a0}", 0), ("!é", 0), ("1²", 0)]
        {
            assert_eq!(word_end(lines, text.as_bytes(), at), None, "{text:?}");
        }
        assert_eq!(word_end(lines, "12²".as_bytes(), 0), Some(2));
    }
}
