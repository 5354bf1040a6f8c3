//! When a generated text counts as one of the answers.

use regex::Regex;
use serde::{Deserialize, Serialize};

/// How a generated text is compared with the answers: what is extracted from it, and which differences are ignored.
#[derive(Debug, Clone, Default)]
pub struct AnswerRule {
    extract: Option<(Regex, Which)>,
    remove: Vec<Regex>,
    ignore_case: bool,
    compare: Compare,
}

/// When a text and the answers agree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compare {
    /// The text is one of the answers.
    #[default]
    Equal,
    /// The text contains one of the answers.
    ContainsAny,
    /// The share of the answers that the text contains.
    ContainsAll,
}

/// Which of several matches is used.
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
    /// A rule that extracts the match of `extract` (its first group, if it has one) from the text, removes what
    /// `remove` matches from text and answers, and may ignore case. Blanks at either end never count.
    pub fn new(
        extract: Option<(Regex, Which)>,
        remove: Vec<Regex>,
        ignore_case: bool,
        compare: Compare,
    ) -> Self {
        Self { extract, remove, ignore_case, compare }
    }

    /// The score of `text`, from 0 to 1, if there is at least one answer.
    pub fn score(&self, text: &str, answers: &[String]) -> f64 {
        let Some(found) = self.extracted(text).map(|found| self.normal(found)) else { return 0.0 };
        let mut answers = answers.iter().map(|answer| self.normal(answer));
        let right = match self.compare {
            Compare::Equal => answers.any(|answer| answer == found),
            Compare::ContainsAny => answers.any(|answer| found.contains(&answer)),
            Compare::ContainsAll => {
                let all = answers.len() as f64;
                return answers.filter(|answer| found.contains(answer)).count() as f64 / all;
            }
        };
        f64::from(u8::from(right))
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
        let rule = AnswerRule::new(None, vec![pattern("[[:punct:]]")], true, Compare::Equal);
        let aliases = answers(&["New York", "N.Y.C."]);
        for (text, right) in [(" new york ", true), ("NYC", true), ("New York City", false), ("", false)] {
            assert_eq!(rule.score(text, &aliases) == 1.0, right, "{text:?}");
        }
        assert_eq!(AnswerRule::default().score("new york", &aliases), 0.0);
    }

    #[test]
    fn a_text_may_contain_answers() {
        let rule = |compare| AnswerRule { ignore_case: true, compare, ..AnswerRule::default() };
        let wanted = answers(&["One", "two", "three", "four"]);
        for (text, any, all) in [("one, two and six", 1.0, 0.5), ("six", 0.0, 0.0)] {
            assert_eq!(rule(Compare::ContainsAny).score(text, &wanted), any);
            assert_eq!(rule(Compare::ContainsAll).score(text, &wanted), all);
        }
    }

    #[test]
    fn a_number_is_taken_from_a_text() {
        let answer = answers(&["1234"]);
        let strict = AnswerRule::new(
            Some((pattern(r"#### (-?[0-9.,]+)"), Which::First)),
            vec![pattern(",")],
            false,
            Compare::Equal,
        );
        assert_eq!(strict.score("12 + 3 = 15\n#### 1,234\n#### 7", &answer), 1.0);
        assert_eq!(strict.score("1234", &answer), 0.0);
        let last =
            AnswerRule::new(Some((pattern(r"-?[0-9]+"), Which::Last)), Vec::new(), false, Compare::Equal);
        assert_eq!(last.score("from 7 to 1234.", &answer), 1.0);
        assert_eq!(last.score("none", &answer), 0.0);
    }
}
