//! When a generated text counts as one of the answers.

use regex::Regex;
use serde::Deserialize;

/// How a generated text is compared with the answers: what is taken from it, and what makes no difference.
#[derive(Debug, Clone, Default)]
pub struct AnswerRule {
    extract: Option<(Regex, Which)>,
    remove: Vec<Regex>,
    ignore_case: bool,
}

/// Which of several matches is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// The first.
    #[default]
    First,
    /// The last.
    Last,
}

impl AnswerRule {
    /// A rule that takes the match of `extract` (its first group, if it has one) from the text, removes what `remove`
    /// matches from text and answers, and may ignore case. Blanks at either end never count.
    pub fn new(extract: Option<(Regex, Which)>, remove: Vec<Regex>, ignore_case: bool) -> Self {
        Self { extract, remove, ignore_case }
    }

    /// Whether `text` is one of `answers`.
    pub fn accepts(&self, text: &str, answers: &[String]) -> bool {
        let Some(found) = self.extracted(text).map(|found| self.normal(found)) else { return false };
        answers.iter().any(|answer| self.normal(answer) == found)
    }

    fn extracted<'a>(&self, text: &'a str) -> Option<&'a str> {
        let Some((pattern, which)) = &self.extract else { return Some(text) };
        let mut all = pattern.captures_iter(text);
        let found = match which {
            Which::First => all.next(),
            Which::Last => all.last(),
        }?;
        let group = found.iter().skip(1).flatten().next();
        Some(group.or_else(|| found.get(0))?.as_str())
    }

    fn normal(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for pattern in &self.remove {
            text = pattern.replace_all(&text, "").into_owned();
        }
        let text = text.trim();
        if self.ignore_case { text.to_lowercase() } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Regex {
        Regex::new(text).unwrap()
    }

    fn answers(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn aliases_case_and_punctuation() {
        let rule = AnswerRule::new(None, vec![pattern("[[:punct:]]")], true);
        let aliases = answers(&["New York", "N.Y.C."]);
        for (text, right) in [(" new york ", true), ("NYC", true), ("New York City", false), ("", false)] {
            assert_eq!(rule.accepts(text, &aliases), right, "{text:?}");
        }
        assert!(!AnswerRule::default().accepts("new york", &aliases));
    }

    #[test]
    fn a_number_is_taken_from_a_text() {
        let answer = answers(&["1234"]);
        let strict =
            AnswerRule::new(Some((pattern(r"#### (-?[0-9.,]+)"), Which::First)), vec![pattern(",")], false);
        assert!(strict.accepts("12 + 3 = 15\n#### 1,234\n#### 7", &answer));
        assert!(!strict.accepts("1234", &answer));
        let last = AnswerRule::new(Some((pattern(r"-?[0-9]+"), Which::Last)), Vec::new(), false);
        assert!(last.accepts("from 7 to 1234.", &answer));
        assert!(!last.accepts("none", &answer));
    }
}
