//! The rows of a step: the tokens of all chunks, one after another.

use crate::cache::{Place, Sequence};

/// The next tokens of one sequence, for whose positions there is room in the cache.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// What has been computed of it.
    pub sequence: &'a Sequence,
    /// The tokens that follow, at least one.
    pub tokens: &'a [u32],
    /// Which of the decoder's memories is read, if one is.
    pub memory: Option<usize>,
    /// Of how many tokens, the last ones, the logits are wanted.
    pub logits: usize,
    /// Tokens that may follow, and whose log-probabilities are wanted.
    pub targets: &'a [Target],
}

/// A token that may follow one of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The token of the chunk that stands before it, counted from the chunk's first.
    pub after: usize,
    /// The token.
    pub token: u32,
    /// How many of the likeliest tokens are wanted beside it.
    pub top: usize,
}

impl<'a> Chunk<'a> {
    fn places(&self) -> impl Iterator<Item = Place<'a>> + use<'a> {
        let (pages, first) = (self.sequence.pages(), self.sequence.len());
        (0..self.tokens.len()).map(move |index| Place { pages, position: first + index })
    }
}

/// Where the rows of a step stand.
#[derive(Debug)]
pub(crate) struct StepRows<'a> {
    /// Of every row.
    pub(crate) places: Vec<Place<'a>>,
    /// Which memory every row reads, if it reads one.
    pub(crate) memories: Vec<Option<usize>>,
    /// Pages and number of rows of every chunk.
    pub(crate) chunks: Vec<(&'a [u32], usize)>,
}

impl<'a> StepRows<'a> {
    pub(crate) fn new(chunks: &[Chunk<'a>]) -> Self {
        let memories = chunks.iter().flat_map(|chunk| chunk.tokens.iter().map(|_| chunk.memory));
        Self {
            places: chunks.iter().flat_map(Chunk::places).collect(),
            memories: memories.collect(),
            chunks: chunks.iter().map(|chunk| (chunk.sequence.pages(), chunk.tokens.len())).collect(),
        }
    }

    /// The rows that read `memory`.
    pub(crate) fn reading(&self, memory: usize) -> Vec<usize> {
        (0..self.memories.len()).filter(|&row| self.memories[row] == Some(memory)).collect()
    }
}
