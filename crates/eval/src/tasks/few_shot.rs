//! The choice of solved examples before a question.

use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// Number of solved examples before each question, and the seed that chooses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FewShot {
    /// Number of examples; none means the task's own.
    pub count: Option<usize>,
    /// Seed of the choice.
    pub seed: u64,
}

/// How examples are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Choose {
    /// A new choice for every question.
    #[default]
    Random,
    /// The first of the file, in its order.
    First,
}

impl Choose {
    /// `count` different numbers below `there`, without `except`, which is the question itself if the examples come
    /// from its file. They depend on the seed and on `question` alone, not on which questions are asked.
    ///
    /// `None` when there are too few.
    pub(crate) fn indices(
        self,
        count: usize,
        there: usize,
        except: Option<usize>,
        (seed, question): (u64, u64),
    ) -> Option<Vec<usize>> {
        let others = there - usize::from(except.is_some());
        if count > others {
            return None;
        }
        let skip = |index: usize| index + usize::from(except.is_some_and(|except| index >= except));
        Some(match self {
            Self::First => (0..count).map(skip).collect(),
            Self::Random => {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                random.set_stream(question);
                sample(&mut random, others, count).into_iter().map(skip).collect()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Choose;

    proptest! {
        #[test]
        fn examples_differ_and_are_never_the_question(
            there in 1_usize..50, count in 0_usize..60, except in proptest::option::of(0_usize..50), seed: u64, first: bool,
        ) {
            let except = except.filter(|&except| except < there);
            let choose = if first { Choose::First } else { Choose::Random };
            match choose.indices(count, there, except, (seed, 7)) {
                None => prop_assert!(count > there - usize::from(except.is_some())),
                Some(found) => {
                    prop_assert_eq!(found.len(), count);
                    prop_assert!(found.iter().all(|&index| index < there && Some(index) != except));
                    let mut distinct = found.clone();
                    distinct.sort_unstable();
                    distinct.dedup();
                    prop_assert_eq!(distinct.len(), count);
                    prop_assert_eq!(Some(found), choose.indices(count, there, except, (seed, 7)));
                }
            }
        }
    }

    #[test]
    fn seeds_and_questions_choose_differently() {
        let of = |seed, question| Choose::Random.indices(5, 1000, None, (seed, question)).unwrap();
        assert_ne!(of(1, 0), of(2, 0));
        assert_ne!(of(1, 0), of(1, 1));
        assert_eq!(Choose::First.indices(2, 5, Some(0), (1, 1)).unwrap(), [1, 2]);
    }
}
