//! The outcome of a question, and its measures.

use serde::{Deserialize, Serialize};

/// The outcome of a question, with everything that its measures need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The question's number within the task, from 0.
    pub question: usize,
    /// Its line in its file.
    pub line: usize,
    /// The model's answer.
    #[serde(flatten)]
    pub said: Said,
}

/// The model's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// To multiple choice.
    Choice {
        /// Log-probability of each choice, in nats: the mean over the paraphrases.
        log_probabilities: Vec<f64>,
        /// The length of each choice.
        lengths: Vec<Length>,
        /// Index of the right choice.
        answer: usize,
    },
    /// To a cloze.
    Cloze {
        /// Log-probability of the continuation, in nats.
        log_probability: f64,
        /// Tokens of the continuation.
        tokens: usize,
        /// Whether it is the greedy continuation.
        greedy: bool,
    },
    /// A generated text.
    Generation {
        /// The text.
        text: String,
        /// Its score, from 0 to 1.
        score: f64,
    },
    /// A document.
    Document {
        /// Its log-probability, in nats.
        log_probability: f64,
        /// Tokens predicted.
        tokens: usize,
        /// Bytes of text.
        bytes: usize,
    },
    /// A long document.
    LongDocument {
        /// Its log-probability with the whole context, in nats.
        log_probability: f64,
        /// Tokens predicted.
        tokens: usize,
        /// Log-probability of the key tokens.
        key_log_probability: f64,
        /// Indices of the key tokens.
        keys: Vec<usize>,
    },
}

/// The length of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Length {
    /// In tokens, as scored; over all paraphrases, the mean rounded up.
    pub tokens: usize,
    /// In characters (Unicode scalar values).
    pub characters: usize,
    /// In bytes of UTF-8.
    pub bytes: usize,
}

/// A measure over questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Share of right answers. For choices: the likeliest is right (the harness's `acc`). For a cloze: greedy decoding
    /// produces it. For generated texts: the mean score.
    Accuracy,
    /// Share of questions whose choice with the largest log-probability per character is right (`acc_norm`).
    PerCharacter,
    /// The same per byte (`acc_bytes`).
    PerByte,
    /// The same per token.
    PerToken,
    /// exp of the mean negative log-probability of the continuations (`perplexity` of LAMBADA).
    Perplexity,
    /// Negative log-probability in bits, divided by bytes of text, over all documents (`bits_per_byte`).
    BitsPerByte,
    /// exp of the negative log-probability per token, over all documents.
    TokenPerplexity,
    /// exp of the negative log-probability per key token, over all documents (LongPPL).
    LongPerplexity,
}

impl Measure {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::PerCharacter => "accuracy per character",
            Self::PerByte => "accuracy per byte",
            Self::PerToken => "accuracy per token",
            Self::Perplexity => "perplexity",
            Self::BitsPerByte => "bits per byte",
            Self::TokenPerplexity => "perplexity per token",
            Self::LongPerplexity => "perplexity of key tokens",
        }
    }

    /// Whether each question is right or wrong.
    pub fn is_accuracy(self) -> bool {
        matches!(self, Self::Accuracy | Self::PerCharacter | Self::PerByte | Self::PerToken)
    }

    /// Whether it is exp of a mean.
    pub(crate) fn is_exponential(self) -> bool {
        matches!(self, Self::Perplexity | Self::TokenPerplexity | Self::LongPerplexity)
    }
}

impl Outcome {
    /// This question's amount and size. A measure over many questions is the sum of amounts over the sum of sizes (then
    /// exp, for perplexities).
    pub fn measures(&self) -> Vec<(Measure, f64, f64)> {
        let right = |right: bool| f64::from(u8::from(right));
        match &self.said {
            Said::Choice { log_probabilities, lengths, answer } => {
                let best = |length: &dyn Fn(&Length) -> usize| {
                    let scores = log_probabilities.iter().zip(lengths);
                    let scores = scores.map(|(score, of)| score / length(of) as f64);
                    right(first_largest(scores) == Some(*answer))
                };
                vec![
                    (Measure::Accuracy, best(&|_| 1), 1.0),
                    (Measure::PerCharacter, best(&|length| length.characters), 1.0),
                    (Measure::PerByte, best(&|length| length.bytes), 1.0),
                    (Measure::PerToken, best(&|length| length.tokens), 1.0),
                ]
            }
            Said::Cloze { log_probability, greedy, .. } => {
                vec![(Measure::Accuracy, right(*greedy), 1.0), (Measure::Perplexity, -log_probability, 1.0)]
            }
            Said::Generation { score, .. } => vec![(Measure::Accuracy, *score, 1.0)],
            Said::Document { log_probability, tokens, bytes } => vec![
                (Measure::BitsPerByte, -log_probability / std::f64::consts::LN_2, *bytes as f64),
                (Measure::TokenPerplexity, -log_probability, *tokens as f64),
            ],
            Said::LongDocument { log_probability, tokens, key_log_probability, keys } => vec![
                (Measure::LongPerplexity, -key_log_probability, keys.len() as f64),
                (Measure::TokenPerplexity, -log_probability, *tokens as f64),
            ],
        }
    }

    /// The score of the answer, from 0 to 1; none for documents, which have no answer.
    pub fn score(&self) -> Option<f64> {
        let (measure, amount, _) = *self.measures().first()?;
        (measure == Measure::Accuracy).then_some(amount)
    }

    /// The expected score of a guess among the choices; 0 without choices.
    pub fn guess(&self) -> f64 {
        match &self.said {
            Said::Choice { log_probabilities, .. } => 1.0 / log_probabilities.len() as f64,
            _ => 0.0,
        }
    }

    /// Index of the right choice; none without choices.
    pub fn answer(&self) -> Option<usize> {
        match self.said {
            Said::Choice { answer, .. } => Some(answer),
            _ => None,
        }
    }

    /// Log-probability of the right answer or of a document, in nats, and its tokens; none for a generated text.
    pub fn likelihood(&self) -> Option<(f64, usize)> {
        match &self.said {
            Said::Choice { log_probabilities, lengths, answer } => {
                Some((*log_probabilities.get(*answer)?, lengths.get(*answer)?.tokens))
            }
            Said::Cloze { log_probability, tokens, .. }
            | Said::Document { log_probability, tokens, .. }
            | Said::LongDocument { log_probability, tokens, .. } => Some((*log_probability, *tokens)),
            Said::Generation { .. } => None,
        }
    }

    /// Log-probability of the right choice among the choices, in nats; none without choices.
    pub fn among_choices(&self) -> Option<f64> {
        let Said::Choice { log_probabilities, answer, .. } = &self.said else { return None };
        let largest = log_probabilities.iter().copied().reduce(f64::max)?;
        let sum: f64 = log_probabilities.iter().map(|choice| (choice - largest).exp()).sum();
        Some(log_probabilities.get(*answer)? - largest - sum.ln())
    }
}

/// The index of the largest value; of equal ones, the first.
fn first_largest(values: impl Iterator<Item = f64>) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (index, value) in values.enumerate() {
        if best.is_none_or(|(_, largest)| value > largest) {
            best = Some((index, value));
        }
    }
    best.map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(said: Said, measure: Measure) -> (f64, f64) {
        let outcome = Outcome { question: 0, line: 1, said };
        let measures = outcome.measures();
        let found = measures.iter().find(|(found, ..)| *found == measure).unwrap();
        (found.1, found.2)
    }

    #[test]
    fn each_normalisation_has_its_own_favourite() {
        let length = |tokens, characters, bytes| Length { tokens, characters, bytes };
        let said = |answer| Said::Choice {
            log_probabilities: vec![-4.0, -5.0, -6.0, -9.0],
            lengths: vec![length(1, 2, 2), length(2, 3, 3), length(2, 4, 4), length(2, 5, 10)],
            answer,
        };
        let favourite = |measure| (0..4).find(|&answer| value(said(answer), measure) == (1.0, 1.0));
        assert_eq!(favourite(Measure::Accuracy), Some(0));
        assert_eq!(favourite(Measure::PerCharacter), Some(2));
        assert_eq!(favourite(Measure::PerByte), Some(3));
        assert_eq!(favourite(Measure::PerToken), Some(1));
    }

    #[test]
    fn of_equals_the_first_is_chosen() {
        assert_eq!(first_largest([1.0, 2.0, 2.0].into_iter()), Some(1));
        assert_eq!(first_largest([].into_iter()), None);
    }

    #[test]
    fn documents_count_bits_over_bytes() {
        let said = Said::Document { log_probability: -2.0 * std::f64::consts::LN_2, tokens: 3, bytes: 8 };
        assert_eq!(value(said.clone(), Measure::BitsPerByte), (2.0, 8.0));
        assert_eq!(value(said, Measure::TokenPerplexity).1, 3.0);
    }

    #[test]
    fn what_the_right_answer_has() {
        let length = |tokens| Length { tokens, characters: 9, bytes: 9 };
        let said = Said::Choice {
            log_probabilities: vec![-4.0, -5.0, -6.0, -9.0],
            lengths: [1, 2, 3, 4].map(length).to_vec(),
            answer: 2,
        };
        let outcome = |said| Outcome { question: 0, line: 1, said };
        let choice = outcome(said);
        assert_eq!((choice.score(), choice.guess(), choice.likelihood()), (Some(0.0), 0.25, Some((-6.0, 3))));
        assert_eq!(choice.answer(), Some(2));
        let sum: f64 = [-4.0_f64, -5.0, -6.0, -9.0].map(f64::exp).iter().sum();
        assert!((choice.among_choices().unwrap() - (-6.0 - sum.ln())).abs() < 1e-12);
        let text = outcome(Said::Generation { text: "a".into(), score: 0.5 });
        assert_eq!((text.among_choices(), text.answer()), (None, None));
        assert_eq!((text.score(), text.guess(), text.likelihood()), (Some(0.5), 0.0, None));
        let document = outcome(Said::Document { log_probability: -8.0, tokens: 4, bytes: 20 });
        assert_eq!((document.score(), document.likelihood()), (None, Some((-8.0, 4))));
    }

    #[test]
    fn an_outcome_is_a_line_of_json() {
        let outcome = Outcome {
            question: 3,
            line: 7,
            said: Said::Cloze { log_probability: -1.5, tokens: 2, greedy: true },
        };
        let line = serde_json::to_string(&outcome).unwrap();
        assert_eq!(
            line,
            r#"{"question":3,"line":7,"cloze":{"log_probability":-1.5,"tokens":2,"greedy":true}}"#
        );
        assert_eq!(serde_json::from_str::<Outcome>(&line).unwrap(), outcome);
    }
}
