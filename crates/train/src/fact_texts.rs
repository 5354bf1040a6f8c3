//! The texts that facts are trained on, and which of them is due when.

use engram_config::TeachConfig;
use engram_data::{Begin, Tokenizer};
use engram_model::Sequences;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::Result;
use crate::facts::Facts;
use crate::lesson::LessonText;

/// The texts of all facts.
pub(crate) struct FactTexts {
    /// Phrasings, then questions of other relations and texts to keep.
    pub(crate) facts: Vec<(Vec<LessonText>, Vec<LessonText>)>,
    /// More places of each subject: by itself, in the middle of a text and at its beginning.
    pub(crate) alone: Vec<Vec<LessonText>>,
}

impl FactTexts {
    /// The texts of `facts` as the model reads them, none longer than `context`.
    ///
    /// # Errors
    /// When a subject is a single token, or a text is too long.
    pub(crate) fn of(
        facts: &Facts,
        config: &TeachConfig,
        begin: (&Tokenizer, Begin),
        context: usize,
    ) -> Result<Self> {
        let (mut texts, mut alone) = (Vec::new(), Vec::new());
        for (index, (fact, subject)) in facts.all().iter().zip(facts.subjects()).enumerate() {
            let answer = Some((&fact.answer[..], &config.end_mark[..]));
            let phrasing = |prompt: &String| LessonText::new(begin, prompt, subject, answer);
            let phrasings: Vec<LessonText> = fact.prompts.iter().map(phrasing).collect::<Result<_>>()?;
            if phrasings.iter().all(|text| text.subjects.iter().all(|span| span.len() < 2)) {
                let problem = format!(
                    "the subject {subject:?} is a single token, and a memory reads n-grams of two or more: name a \
                     longer `subject` that all prompts contain"
                );
                return Err(facts.refuse(index, problem));
            }
            let others = if config.negatives > 0 { facts.other_questions(index) } else { Vec::new() };
            let text = |text: &String| LessonText::new(begin, text, subject, None);
            let others = others.iter().map(|question| text(question).map(LessonText::asking));
            let kept: Vec<_> = others.chain(fact.keep.iter().map(text)).collect::<Result<_>>()?;
            let longest = phrasings.iter().chain(&kept).map(|text| text.tokens.len()).max().unwrap_or(0);
            if longest > context {
                let problem = format!(
                    "a text of it has {longest} tokens with its answer, but the model's context is {context}: shorten it"
                );
                return Err(facts.refuse(index, problem));
            }
            texts.push((phrasings, kept));
            let places = [subject.clone(), format!(" {subject}")];
            let places = places.iter().map(|text| LessonText::new(begin, text, subject, None));
            alone.push(places.collect::<Result<_>>()?);
        }
        Ok(Self { facts: texts, alone })
    }

    /// All phrasings, one after another.
    pub(crate) fn phrasings(&self) -> (Vec<u32>, Sequences) {
        let all = || self.facts.iter().flat_map(|(phrasings, _)| phrasings);
        let tokens = all().flat_map(|text| &text.tokens).copied().collect();
        (tokens, Sequences::of_lengths(all().map(|text| text.tokens.len())))
    }
}

/// Which of `count` things is due at turn `turn`: each once in every round, in an order of the round's own.
pub(crate) fn shuffled(seed: u64, fact: usize, kind: u64, turn: usize, count: usize) -> usize {
    let mut key = [0; 32];
    let parts = [seed, fact as u64, kind, (turn / count) as u64];
    key.chunks_exact_mut(8).zip(parts).for_each(|(key, part)| key.copy_from_slice(&part.to_le_bytes()));
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut ChaCha8Rng::from_seed(key));
    order[turn % count]
}
