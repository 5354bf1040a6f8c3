//! Sequences laid out so that what they begin with alike is there once.

use std::ops::Range;

use engram_kernels::Segment;

/// Rows of tokens, and where each sequence's tokens are among them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefixRows {
    /// The token of each row.
    pub tokens: Vec<u32>,
    /// Its position within its sequences.
    pub positions: Vec<usize>,
    /// Runs of rows with what they continue; they cover the rows.
    pub segments: Vec<Segment>,
    /// The rows of each sequence, from its first token to its last.
    pub paths: Vec<Vec<Range<usize>>>,
}

impl PrefixRows {
    /// Lays out `sequences`, whose order does not matter.
    pub fn of(sequences: &[&[u32]]) -> Self {
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        // Neighbours in this order share the most.
        order.sort_by_key(|&index| sequences[index]);
        let mut rows = Self { paths: vec![Vec::new(); sequences.len()], ..Self::default() };
        let mut before: Option<usize> = None;
        for index in order {
            let sequence = sequences[index];
            let shared = before.map_or(0, |before| common(sequences[before], sequence));
            let seen = before.map_or(Vec::new(), |before| first_rows(&rows.paths[before], shared));
            rows.paths[index] = rows.add(seen, &sequence[shared..], shared);
            before = Some(index);
        }
        rows
    }

    /// The row of each of a sequence's positions in `range`.
    pub fn rows(&self, sequence: usize, range: Range<usize>) -> impl Iterator<Item = usize> {
        let path = self.paths[sequence].iter().cloned().flatten();
        path.skip(range.start).take(range.len())
    }

    /// Adds a segment, and returns the whole path to its end.
    fn add(&mut self, seen: Vec<Range<usize>>, tokens: &[u32], position: usize) -> Vec<Range<usize>> {
        if tokens.is_empty() {
            return seen;
        }
        let rows = self.tokens.len()..self.tokens.len() + tokens.len();
        self.tokens.extend(tokens);
        self.positions.extend(position..position + tokens.len());
        let path = seen.iter().cloned().chain([rows.clone()]).collect();
        self.segments.push(Segment { seen, rows });
        path
    }
}

/// How many tokens two sequences begin with alike.
pub fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The first `count` rows of a path.
fn first_rows(path: &[Range<usize>], count: usize) -> Vec<Range<usize>> {
    let mut left = count;
    let mut first = Vec::new();
    for rows in path {
        let taken = rows.len().min(left);
        if taken > 0 {
            first.push(rows.start..rows.start + taken);
        }
        left -= taken;
    }
    first
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_beginning_is_there_once(
            sequences in proptest::collection::vec(proptest::collection::vec(0_u32..3, 1..8), 1..12),
        ) {
            let borrowed: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
            let rows = PrefixRows::of(&borrowed);
            let beginnings: HashSet<&[u32]> =
                borrowed.iter().flat_map(|sequence| (1..=sequence.len()).map(|end| &sequence[..end])).collect();
            prop_assert_eq!(rows.tokens.len(), beginnings.len());
            for (index, sequence) in sequences.iter().enumerate() {
                let path: Vec<usize> = rows.rows(index, 0..sequence.len()).collect();
                let tokens: Vec<u32> = path.iter().map(|&row| rows.tokens[row]).collect();
                prop_assert_eq!(&tokens, sequence);
                let positions: Vec<usize> = path.iter().map(|&row| rows.positions[row]).collect();
                prop_assert_eq!(positions, (0..sequence.len()).collect::<Vec<_>>());
            }
            // A segment sees exactly the rows before its first in every path through it.
            let mut next = 0;
            for segment in &rows.segments {
                prop_assert_eq!(segment.rows.start, next);
                next = segment.rows.end;
                prop_assert_eq!(segment.seen_rows(), rows.positions[segment.rows.start]);
            }
            prop_assert_eq!(next, rows.tokens.len());
        }
    }
}
