//! What is asked in a step: a text, which of its positions are to say what, and which taught rows it reads.

use std::ops::Range;

use engram_data::{Begin, Tokenizer};

use crate::error::Result;
use crate::soft_targets::Wanted;

/// A text as tokens, with the spans that matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LessonText {
    pub(crate) tokens: Vec<u32>,
    /// The subject's tokens in each place where it stands.
    pub(crate) subjects: Vec<Range<usize>>,
    /// The answer's tokens, its end mark left out; empty where nothing is taught.
    pub(crate) answer: Range<usize>,
    /// First token of the text: what stands before is the model's begin.
    pub(crate) first: usize,
    /// Whether it asks for another relation of its subject: what matters is what would be answered.
    pub(crate) is_question: bool,
}

impl LessonText {
    /// `prompt`, then `answer` and `end`, all as the model reads them when it answers.
    pub(crate) fn new(
        (tokenizer, begin): (&Tokenizer, Begin),
        prompt: &str,
        subject: &str,
        answer: Option<(&str, &str)>,
    ) -> Result<Self> {
        let mut tokens = match begin {
            Begin::Always(token) => vec![token],
            Begin::IfEmpty(_) => Vec::new(),
        };
        let first = tokens.len();
        let of_prompt = tokenizer.encode(prompt)?;
        let subjects = spans(tokenizer, prompt, subject, &of_prompt);
        tokens.extend(of_prompt);
        let start = tokens.len();
        let mut end = start;
        if let Some((answer, mark)) = answer {
            tokens.extend(tokenizer.encode(answer)?);
            end = tokens.len();
            if !mark.is_empty() {
                tokens.extend(tokenizer.encode(mark)?);
            }
        }
        let subjects = subjects.into_iter().map(|span| span.start + first..span.end + first).collect();
        Ok(Self { tokens, subjects, answer: start..end, first, is_question: false })
    }

    /// The positions whose next token is part of the answer or its end mark, with that token.
    pub(crate) fn answered(&self) -> impl Iterator<Item = (usize, u32)> {
        let last = if self.answer.is_empty() { 0 } else { self.tokens.len() };
        (self.answer.start..last).filter(|&next| next > 0).map(|next| (next - 1, self.tokens[next]))
    }

    /// The same text as a question of another relation.
    pub(crate) fn asking(self) -> Self {
        Self { is_question: true, ..self }
    }

    /// The positions that are to say what the base says: of a prompt all but the last, which is left to the answer; of a
    /// question its last, where an answer would begin; of a text to keep all.
    pub(crate) fn kept(&self) -> Range<usize> {
        match (self.answer.is_empty(), self.is_question) {
            (false, _) => 0..self.answer.start - 1,
            (true, true) => self.tokens.len() - 1..self.tokens.len(),
            (true, false) => 0..self.tokens.len(),
        }
    }

    /// Those of them that have the weight of questions.
    pub(crate) fn asked(&self) -> Range<usize> {
        if self.answer.is_empty() { self.kept() } else { 0..0 }
    }

    /// Where the n-grams of up to `longest` tokens end that are taught, with their lengths: those inside the subject that
    /// end with it, and those inside the answer that are read before it is whole.
    pub(crate) fn ngrams(&self, longest: usize) -> Vec<(usize, usize)> {
        let inside = |span: &Range<usize>, end: usize| {
            let most = (end + 1 - span.start).min(longest);
            (2..=most).map(move |order| (end, order)).collect::<Vec<_>>()
        };
        let subjects = self.subjects.iter().flat_map(|span| inside(span, span.end - 1));
        let answer = self.answer.clone().flat_map(|end| inside(&self.answer, end));
        subjects.chain(answer).collect()
    }
}

/// The tokens of `prompt` that `subject` covers, wherever it stands.
fn spans(tokenizer: &Tokenizer, prompt: &str, subject: &str, tokens: &[u32]) -> Vec<Range<usize>> {
    let Ok(encoding) = tokenizer.inner().encode(prompt, false) else { return Vec::new() };
    if encoding.get_ids() != tokens {
        return Vec::new();
    }
    let offsets = encoding.get_offsets();
    let place = |(at, _): (usize, &str)| {
        let end = at + subject.len();
        let covered = |&(from, to): &(usize, usize)| from < end && to > at && from < to;
        let first = offsets.iter().position(covered)?;
        let last = offsets.iter().rposition(covered)?;
        Some(first..last + 1)
    };
    prompt.match_indices(subject).filter_map(place).collect()
}

/// A text that is ready to be computed from the first memory on.
#[derive(Debug, Clone)]
pub(crate) struct Lesson {
    /// Tokens.
    pub(crate) time: usize,
    /// Streams before the first memory block, `[time, n·width]`.
    pub(crate) states: Vec<f32>,
    /// Of each memory layer.
    pub(crate) rows: Vec<LessonRows>,
    /// Positions with a loss, ascending.
    pub(crate) wanted: Vec<(usize, Wanted)>,
    /// Positions that are to say what the base says, those included that no taught row can reach.
    pub(crate) kept: usize,
    /// Those of them that have the weight of questions.
    pub(crate) asked: Range<usize>,
    /// Hidden states of the base where it is asked, `[·, width]`.
    pub(crate) base: Vec<f32>,
}

/// The rows that a text reads of one memory layer.
#[derive(Debug, Clone)]
pub(crate) struct LessonRows {
    /// Row of each slot, `[time·slots]`.
    pub(crate) slots: Vec<Slot>,
    /// Rows that are not taught, `[·, row width]`.
    pub(crate) fixed: Vec<f32>,
}

/// Which row a slot reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// A taught one.
    Taught(u32),
    /// One that stays as it is.
    Fixed(u32),
    /// A row of zeros.
    Zero,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_kept_where_it_would_be_answered() {
        let text = LessonText {
            tokens: vec![1, 2, 3, 4, 5],
            subjects: vec![1..3],
            answer: 0..0,
            first: 0,
            is_question: false,
        };
        assert_eq!((text.kept(), text.asked()), (0..5, 0..5));
        let question = text.clone().asking();
        assert_eq!((question.kept(), question.asked()), (4..5, 4..5));
        let phrasing = LessonText { answer: 3..4, ..text };
        assert_eq!((phrasing.kept(), phrasing.asked()), (0..2, 0..0));
        assert_eq!(phrasing.answered().collect::<Vec<_>>(), [(2, 4), (3, 5)]);
    }
}
