//! Sentences that hide other sentences.

use rand::RngExt;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;

use super::super::error::{Error, Result};
use super::questions::Questions;

/// Number of hidden keys, values or queries, if there are several.
pub(super) const SEVERAL: usize = 4;

/// The text that hides needles and assignments, the paragraphs that hide the one with the answer, and the number of
/// digits of the numbers to find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Haystack {
    sentences: Vec<String>,
    questions: Option<Questions>,
    digits: u32,
}

/// Digits of a number to find, as published.
const DIGITS: u32 = 7;

impl Haystack {
    /// A few sentences, repeated.
    pub fn repeated() -> Self {
        let sentences =
            ["Grass is green.", "The sky is blue.", "The sun is warm.", "Off we go.", "And back we come."];
        Self { sentences: sentences.map(str::to_owned).into(), questions: None, digits: DIGITS }
    }

    /// The sentences of a text.
    ///
    /// # Errors
    /// When it has none.
    pub fn of(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let sentences = words.split_inclusive(|word| word.ends_with(['.', '!', '?']));
        let sentences: Vec<String> = sentences.map(|words| words.join(" ")).collect();
        if sentences.is_empty() {
            return Err(Error::Mismatch("the haystack has no sentence".into()));
        }
        Ok(Self { sentences, questions: None, digits: DIGITS })
    }

    /// Adds questions to ask.
    #[must_use]
    pub fn with_questions(self, questions: Questions) -> Self {
        Self { questions: Some(questions), ..self }
    }

    /// Sets the number of digits of the numbers to find, instead of seven.
    ///
    /// # Errors
    /// Unless it is 2 to 9.
    pub fn with_digits(self, digits: u32) -> Result<Self> {
        if !(2..=9).contains(&digits) {
            return Err(Error::Mismatch(format!("numbers must have 2 to 9 digits, not {digits}")));
        }
        Ok(Self { digits, ..self })
    }

    pub(super) fn digits(&self) -> u32 {
        self.digits
    }

    /// The questions, if there are any.
    pub fn questions(&self) -> Option<&Questions> {
        self.questions.as_ref()
    }

    /// `count` sentences from a random one on, starting over at the end, with `needles` among them in order.
    pub(super) fn hide(&self, count: usize, needles: &[String], random: &mut ChaCha8Rng) -> String {
        let first = random.random_range(0..self.sentences.len());
        let mut places = sample(random, count + needles.len(), needles.len()).into_vec();
        places.sort_unstable();
        let (mut needles, mut hay) = (needles.iter(), self.sentences.iter().cycle().skip(first));
        let mut sentences = Vec::with_capacity(count + places.len());
        for place in 0..count + places.len() {
            let next = if places.binary_search(&place).is_ok() { needles.next() } else { hay.next() };
            sentences.extend(next.map(String::as_str));
        }
        sentences.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::super::Ruler;
    use super::super::tests::words;
    use super::*;

    #[test]
    fn a_text_is_hay_by_the_sentence() {
        let haystack = Haystack::of("One  two.\nThree! Four").unwrap();
        assert_eq!(haystack.sentences, ["One two.", "Three!", "Four"]);
        assert!(Haystack::of(" \n").is_err());
        let error = Ruler::MultiKey.records(&haystack, (20, 1), 0, &words).unwrap_err().to_string();
        assert!(error.contains("multi_key: the shortest record needs"), "{error}");
    }
}
