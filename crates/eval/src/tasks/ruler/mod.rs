//! RULER (Hsieh et al. 2024, arXiv 2404.06654): how far back a model can find, follow and count. Records of any length,
//! generated from a seed.
//!
//! Sizes are the published ones: four keys, values or queries; a chain of four hops; ten common words, each thirty
//! times among words that occur three times (six and one below 4096 tokens); coded words whose frequency falls with the
//! square of their rank, the most frequent of them dots. Around the paragraph that answers a question stand first those
//! of its article, then others, as many as fit. The sentences are ours, so scores compare models here, but not with
//! published tables.

mod haystack;
mod needles;
mod questions;
mod variables;
mod words;

use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use self::haystack::Haystack;
use self::haystack::SEVERAL;
use self::needles::{Needles, needles};
pub use self::questions::Questions;
use self::variables::{HOPS, variables};
use self::words::{COMMON, common_words, frequent_words};
use super::answer::Compare;
use super::error::{Error, Result};

/// A kind of task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ruler {
    /// One number to find.
    Single,
    /// One number to find, among numbers of other keys.
    MultiKey,
    /// All numbers of one key.
    MultiValue,
    /// The numbers of several keys.
    MultiQuery,
    /// All variables that have a value, directly or through others.
    VariableTracking,
    /// The most frequent words, where all others are rare.
    CommonWords,
    /// The three most frequent of coded words.
    FrequentWords,
    /// A question that one of many paragraphs answers. Needs [`Questions`].
    QuestionAnswering,
}

/// A prompt with its answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RulerRecord {
    /// What the model reads.
    pub prompt: String,
    /// The expected parts of the model's answer: all of these, or any; see [`Ruler::compare`].
    pub answers: Vec<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Maximum tokens of an answer: one and a half times the longest right one of all records.
    pub answer_tokens: usize,
}

impl Ruler {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Single,
        Self::MultiKey,
        Self::MultiValue,
        Self::MultiQuery,
        Self::VariableTracking,
        Self::CommonWords,
        Self::FrequentWords,
        Self::QuestionAnswering,
    ];

    /// Its name in files and commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::MultiKey => "multi_key",
            Self::MultiValue => "multi_value",
            Self::MultiQuery => "multi_query",
            Self::VariableTracking => "variable_tracking",
            Self::CommonWords => "common_words",
            Self::FrequentWords => "frequent_words",
            Self::QuestionAnswering => "question_answering",
        }
    }

    /// How answers are compared.
    pub fn compare(self) -> Compare {
        match self {
            Self::QuestionAnswering => Compare::ContainsAny,
            _ => Compare::ContainsAll,
        }
    }

    /// `count` records whose prompt and answer have at most `length` tokens, with as much hay as fits. `tokens` counts
    /// them. The same seed gives the same records.
    ///
    /// # Errors
    /// [`Error::Length`] when the smallest record does not fit, or when all the text does not fill the length. Other
    /// errors when a text has no tokens in the vocabulary, or when there are too few questions or paragraphs.
    pub fn records(
        self,
        haystack: &Haystack,
        (length, count): (usize, usize),
        seed: u64,
        tokens: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<Vec<RulerRecord>> {
        if self == Self::QuestionAnswering {
            let questions = questions_of(haystack)?;
            let (found, path) = (questions.count(), questions.path().display());
            if found < count {
                let problem = format!(
                    "{path} has only {found} questions with an answer, but {count} records need one each"
                );
                return Err(Error::Mismatch(problem));
            }
        }
        let all = |reserve: usize| -> Result<Vec<RulerRecord>> {
            let record = |index| self.record(haystack, (length, reserve), (seed, index), tokens);
            (0..count as u64).map(record).collect()
        };
        // One limit for all answers, that of the longest; prompts leave room for it.
        let reserve = all(0)?.iter().map(|record| record.answer_tokens).max().unwrap_or(0);
        all(reserve)
    }

    fn record(
        self,
        haystack: &Haystack,
        (length, reserve): (usize, usize),
        (seed, index): (u64, u64),
        tokens: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<RulerRecord> {
        let with = |hay: usize| -> Result<RulerRecord> {
            // The same needles, whatever the amount of hay.
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(index);
            let (prompt, answers) = self.text(haystack, (hay, length), (seed, index), &mut random)?;
            let longest = match self.compare() {
                Compare::ContainsAll => tokens(&answers.join(", "))?,
                _ => answers.iter().try_fold(0, |most, answer| Ok::<_, Error>(most.max(tokens(answer)?)))?,
            };
            let answer_tokens = reserve.max(longest * 3 / 2 + 2);
            Ok(RulerRecord { prompt_tokens: tokens(&prompt)?, prompt, answers, answer_tokens })
        };
        let fits = |record: &RulerRecord| record.prompt_tokens + record.answer_tokens <= length;
        let (least, most) = (self.least(), self.most(haystack)?);
        let mut best = with(least)?;
        if !fits(&best) {
            let needed = best.prompt_tokens + best.answer_tokens;
            let problem =
                format!("{}: the shortest record needs {needed} tokens, more than {length}", self.name());
            return Err(Error::Length(problem));
        }
        // Double, then halve the interval between an amount that fits and one that does not.
        let (mut fitting, mut beyond) = (least, least);
        while beyond == fitting {
            beyond = most.min(2 * fitting);
            if beyond == fitting {
                return Err(self.too_little(haystack, &best, length));
            }
            let record = with(beyond)?;
            if fits(&record) {
                (best, fitting) = (record, beyond);
            }
        }
        while beyond - fitting > (fitting / 256).max(1) {
            let middle = fitting.midpoint(beyond);
            let record = with(middle)?;
            if fits(&record) { (best, fitting) = (record, middle) } else { beyond = middle }
        }
        Ok(best)
    }

    /// The minimum of hay, in sentences or words.
    fn least(self) -> usize {
        match self {
            Self::Single | Self::QuestionAnswering => 1,
            Self::MultiKey | Self::MultiValue | Self::MultiQuery => SEVERAL,
            Self::VariableTracking => HOPS + 1,
            Self::CommonWords => COMMON + 1,
            // Few enough that three words still differ in frequency.
            Self::FrequentWords => 60,
        }
    }

    /// The maximum of hay.
    fn most(self, haystack: &Haystack) -> Result<usize> {
        match self {
            Self::QuestionAnswering => Ok(questions_of(haystack)?.paragraphs()),
            _ => Ok(usize::MAX),
        }
    }

    /// Error: all the hay does not fill the length.
    fn too_little(self, haystack: &Haystack, record: &RulerRecord, length: usize) -> Error {
        let path = haystack.questions().map_or(Path::new(""), Questions::path).display();
        let paragraphs = haystack.questions().map_or(0, Questions::paragraphs);
        let all = record.prompt_tokens + record.answer_tokens;
        Error::Length(format!(
            "{}: all {paragraphs} paragraphs of {path} have only {all} of {length} tokens: use a larger file, or \
             leave this length out",
            self.name()
        ))
    }

    /// A prompt, and the answers.
    fn text(
        self,
        haystack: &Haystack,
        (hay, length): (usize, usize),
        record: (u64, u64),
        random: &mut ChaCha8Rng,
    ) -> Result<(String, Vec<String>)> {
        Ok(match self {
            Self::Single => needles(haystack, hay, Needles { keys: 1, values: 1, queries: 1 }, random),
            Self::MultiKey => {
                needles(haystack, hay, Needles { keys: SEVERAL, values: 1, queries: 1 }, random)
            }
            Self::MultiValue => {
                needles(haystack, hay, Needles { keys: 1, values: SEVERAL, queries: 1 }, random)
            }
            Self::MultiQuery => {
                needles(haystack, hay, Needles { keys: SEVERAL, values: 1, queries: SEVERAL }, random)
            }
            Self::VariableTracking => variables(haystack, hay, random),
            Self::CommonWords => common_words(hay, length, random),
            Self::FrequentWords => frequent_words(hay, length, random),
            Self::QuestionAnswering => questions_of(haystack)?.ask(hay, record, random),
        })
    }
}

fn questions_of(haystack: &Haystack) -> Result<&Questions> {
    let missing = || Error::Mismatch("question_answering needs questions with their paragraphs".into());
    haystack.questions().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::*;

    /// Words count as tokens.
    pub(super) fn words(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    /// With `count` questions about towns, each with its own paragraph, in articles of `size`.
    pub(super) fn haystack_with(count: usize, size: usize) -> Haystack {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("towns.jsonl");
        let mut lines = String::new();
        for town in 0..count {
            let title = town / size;
            writeln!(
                lines,
                "{{\"question\": \"Which river flows through t{town}?\", \"answers\": [\"r{town}\", \"the r{town}\"], \
                 \"context\": \"t{town} lies on the banks of the r{town} and is famous for its old bridge.\", \
                 \"title\": \"article {title}\"}}"
            )
            .unwrap();
        }
        std::fs::write(&path, lines).unwrap();
        Haystack::repeated().with_questions(Questions::read(&path).unwrap())
    }

    pub(super) fn one(kind: Ruler, length: usize, seed: u64) -> RulerRecord {
        one_of(&Haystack::repeated(), kind, length, seed)
    }

    fn one_of(haystack: &Haystack, kind: Ruler, length: usize, seed: u64) -> RulerRecord {
        kind.records(haystack, (length, 1), seed, &words).unwrap().remove(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn records_fill_their_length_and_hold_their_answers(length in 300_usize..3000, seed: u64) {
            let haystack = haystack_with(400, 10);
            for kind in Ruler::ALL {
                let record = one_of(&haystack, kind, length, seed);
                prop_assert_eq!(record.prompt_tokens, words(&record.prompt).unwrap());
                let all = record.prompt_tokens + record.answer_tokens;
                prop_assert!(all <= length, "{kind:?}");
                // The rest is less than a sentence, a word's repetitions, or a step of the search.
                prop_assert!(all + 60 + length / 100 > length, "{kind:?}: {all} of {length}");
                prop_assert!(record.answers.iter().all(|answer| record.prompt.contains(answer.as_str())), "{kind:?}");
                prop_assert_eq!(&record, &one_of(&haystack, kind, length, seed));
                prop_assert_ne!(record, one_of(&haystack, kind, length, seed ^ 1));
            }
        }
    }
}
