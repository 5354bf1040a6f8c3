//! A census of common text: which n-grams it contains.
//!
//! Rows of an n-gram that ordinary text contains are not taught: they would change that text. Only the n-grams that are
//! asked for are looked for, so that the corpus may be of any size.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use engram_address::Vocabulary;
use engram_data::{Corpus, Tokenizer};
use rayon::prelude::*;

use crate::error::Result;

/// An n-gram, as the classes of its tokens.
pub(crate) type Ngram = Box<[u32]>;

/// Which of some n-grams a corpus contains.
#[derive(Debug, Default)]
pub(crate) struct Census {
    places: HashMap<Ngram, usize>,
    met: Vec<AtomicBool>,
    longest: usize,
    tokens: u64,
}

/// Documents that are looked through at once.
const BATCH: usize = 64;

impl Census {
    /// Of these n-grams.
    pub(crate) fn of(ngrams: impl IntoIterator<Item = Ngram>) -> Self {
        let mut census = Self::default();
        for ngram in ngrams {
            census.longest = census.longest.max(ngram.len());
            let next = census.places.len();
            census.places.entry(ngram).or_insert(next);
        }
        census.met.resize_with(census.places.len(), AtomicBool::default);
        census
    }

    /// Looks through `corpus`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read(
        &mut self,
        corpus: &Corpus,
        tokenizer: &Tokenizer,
        vocabulary: &Vocabulary,
    ) -> Result<()> {
        let mut documents = corpus.documents();
        loop {
            let texts: Vec<String> =
                documents.by_ref().take(BATCH).collect::<std::result::Result<_, engram_data::Error>>()?;
            if texts.is_empty() {
                return Ok(());
            }
            let counts = texts.par_iter().map(|text| self.look(text, tokenizer, vocabulary));
            self.tokens += counts.sum::<Result<u64>>()?;
        }
    }

    /// Marks the n-grams of `text`; says how many tokens it has.
    fn look(&self, text: &str, tokenizer: &Tokenizer, vocabulary: &Vocabulary) -> Result<u64> {
        let tokens = tokenizer.encode(text)?;
        let classes: Vec<u32> =
            tokens.iter().map(|&token| Ok(vocabulary.class(token)?)).collect::<Result<_>>()?;
        for order in 1..=self.longest {
            for ngram in classes.windows(order) {
                if let Some(&place) = self.places.get(ngram) {
                    self.met[place].store(true, Ordering::Relaxed);
                }
            }
        }
        Ok(tokens.len() as u64)
    }

    /// Whether the corpus contains `ngram`.
    pub(crate) fn contains(&self, ngram: &[u32]) -> bool {
        self.places.get(ngram).is_some_and(|&place| self.met[place].load(Ordering::Relaxed))
    }

    /// Tokens looked through.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }
}
