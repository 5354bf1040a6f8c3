//! How the tokens of a batch divide into sequences, none of which sees another.

use std::sync::Arc;

use burn::tensor::Tensor;

/// The sequences of a batch: its tokens, `[tokens]`, are those of one sequence after another.
///
/// ```
/// # use engram_model::Sequences;
/// let documents = Sequences::of_lengths([3, 3, 2]);
/// assert_eq!((documents.len(), documents.tokens()), (3, 8));
/// assert_eq!(Sequences::of_lengths([4, 4]), Sequences::equal(2, 4));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    runs: Arc<[Run]>,
}

/// Sequences of one length that follow each other: what an operation over `[sequences, time, ·]` takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first sequence's first token.
    first: usize,
    pub(crate) sequences: usize,
    pub(crate) time: usize,
}

impl Run {
    fn tokens(self) -> usize {
        self.sequences * self.time
    }
}

impl Sequences {
    /// `count` sequences of `time` tokens each.
    ///
    /// # Panics
    /// When either is 0.
    pub fn equal(count: usize, time: usize) -> Self {
        Self::of_lengths(std::iter::repeat_n(time, count))
    }

    /// Sequences of these lengths.
    ///
    /// # Panics
    /// When there is none, or one has no token.
    pub fn of_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let (mut runs, mut first) = (Vec::<Run>::new(), 0);
        for time in lengths {
            assert!(time > 0, "a sequence without tokens");
            match runs.last_mut() {
                Some(run) if run.time == time => run.sequences += 1,
                _ => runs.push(Run { first, sequences: 1, time }),
            }
            first += time;
        }
        assert!(!runs.is_empty(), "a batch without sequences");
        Self { runs: runs.into() }
    }

    /// Number of sequences: at least one.
    #[allow(clippy::len_without_is_empty, reason = "there is always a sequence")]
    pub fn len(&self) -> usize {
        self.runs.iter().map(|run| run.sequences).sum()
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.runs.iter().map(|run| run.tokens()).sum()
    }

    /// The lengths of the sequences, in order.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs.iter().flat_map(|run| std::iter::repeat_n(run.time, run.sequences))
    }

    /// `[sequences, time]` where all sequences are of one length; else the batch is laid out as one, `[1, tokens]`.
    pub(crate) fn layout(&self) -> [usize; 2] {
        match self.runs[..] {
            [run] => [run.sequences, run.time],
            _ => [1, self.tokens()],
        }
    }

    /// Every token's place in its sequence, `[time]` of the [`layout`](Self::layout).
    pub(crate) fn positions(&self) -> Vec<usize> {
        match self.runs[..] {
            [run] => (0..run.time).collect(),
            _ => self.lengths().flat_map(|time| 0..time).collect(),
        }
    }

    /// What `each` computes of every run from its parts of `data`, each `[tokens, ·]`, put together in order.
    pub(crate) fn map<const N: usize, const M: usize>(
        &self,
        data: [&[f32]; N],
        mut each: impl FnMut(Run, [&[f32]; N]) -> [Vec<f32>; M],
    ) -> [Vec<f32>; M] {
        let tokens = self.tokens();
        let mut all = [const { Vec::new() }; M];
        for &run in self.runs.iter() {
            let part = data.map(|data| {
                let width = data.len() / tokens;
                &data[run.first * width..][..run.tokens() * width]
            });
            let found = each(run, part);
            for (all, found) in all.iter_mut().zip(found) {
                if all.is_empty() {
                    *all = found;
                } else {
                    all.extend(found);
                }
            }
        }
        all
    }

    /// As [`map`](Self::map), in Burn's primitives.
    pub(crate) fn map_tensors<const N: usize>(
        &self,
        data: [Tensor<2>; N],
        each: impl Fn(Run, [Tensor<2>; N]) -> Tensor<2>,
    ) -> Tensor<2> {
        if let [run] = self.runs[..] {
            return each(run, data);
        }
        let part = |run: &Run| {
            let tokens = run.tokens();
            each(*run, data.clone().map(|data| data.narrow(0, run.first, tokens)))
        };
        Tensor::cat(self.runs.iter().map(part).collect(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_sequences_in_order(lengths in prop::collection::vec(1_usize..4, 1..20)) {
            let sequences = Sequences::of_lengths(lengths.iter().copied());
            prop_assert_eq!(sequences.lengths().collect::<Vec<_>>(), lengths.clone());
            prop_assert_eq!(sequences.len(), lengths.len());
            let tokens: usize = lengths.iter().sum();
            prop_assert_eq!(sequences.tokens(), tokens);
            prop_assert_eq!(sequences.layout().iter().product::<usize>(), tokens);
            // Every token is in one run, at its place.
            let data: Vec<f32> = (0..2 * tokens).map(|value| value as f32).collect();
            let ones = vec![1.0; tokens];
            let [found, times] = sequences.map([&data, &ones], |run, [data, ones]| {
                [data.to_vec(), ones.iter().map(|one| one * run.time as f32).collect()]
            });
            prop_assert_eq!(found, data);
            let expected: Vec<f32> = lengths.iter().flat_map(|&time| vec![time as f32; time]).collect();
            prop_assert_eq!(times, expected);
        }
    }

    #[test]
    #[should_panic(expected = "a sequence without tokens")]
    fn every_sequence_has_a_token() {
        Sequences::of_lengths([2, 0]);
    }

    #[test]
    #[should_panic(expected = "a batch without sequences")]
    fn there_is_a_sequence() {
        Sequences::of_lengths([]);
    }
}
