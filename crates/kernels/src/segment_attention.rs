//! Causal attention of text that continues other text, with grouped queries (Ainslie et al. 2023, arXiv 2305.13245):
//! forward only, for scoring and decoding with a model whose keys and values are kept.
//!
//! Tokens stand in one row after another, whatever sequence they belong to. A [`Segment`] is a run of rows that
//! continue some earlier rows: a beginning that many sequences share is computed once, and nothing is padded.

use std::ops::Range;

use crate::parallel;
use crate::product::{Matrix, MatrixMut, Threads, multiply};
use crate::simd::{self, vectorized};

/// Queries per block of scores.
const QUERIES: usize = 64;

/// Sizes of [`segment_attention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedShape {
    /// Query heads: a multiple of the key heads. Query heads that follow each other share a key head.
    pub heads: usize,
    /// Heads of keys and values.
    pub key_heads: usize,
    /// Width of a head.
    pub width: usize,
}

/// A run of tokens: its rows, and the rows of keys and values that it continues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows that all of its tokens see, from the first to the last token.
    pub seen: Vec<Range<usize>>,
    /// Its own rows; each sees those up to itself.
    pub rows: Range<usize>,
}

impl Segment {
    /// Rows that the segment's tokens see beside their own.
    pub fn seen_rows(&self) -> usize {
        self.seen.iter().map(ExactSizeIterator::len).sum()
    }
}

/// softmax(q·kᵀ/√width, over the rows that a token sees) · v, for each head, `[tokens, heads, width]`.
///
/// * `keys`, `values` `[rows, key_heads, width]`: of every row so far.
/// * `q` `[tokens, heads, width]`: queries of the last `tokens` of these rows, which the segments cover one after
///   another.
///
/// # Panics
/// When the segments do not cover the tokens in order, see rows that do not exist, or a slice does not have the shape
/// stated.
pub fn segment_attention(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    segments: &[Segment],
    shape: GroupedShape,
) -> Vec<f32> {
    let GroupedShape { heads, key_heads, width } = shape;
    let first = check(q, keys, values, segments, shape);
    let tasks = segments.iter().flat_map(|segment| (0..key_heads).map(move |head| (segment, head)));
    let outputs = parallel::map(tasks, |(segment, head)| {
        let rows = segment.rows.start - first..segment.rows.end - first;
        let q = &q[rows.start * heads * width..rows.end * heads * width];
        one_head(q, keys, values, segment, head, shape)
    });
    let (mut output, group) = (vec![0.0; q.len()], heads / key_heads * width);
    let mut left = output.as_mut_slice();
    let places = segments.iter().zip(outputs.chunks_exact(key_heads)).map(|(segment, found)| {
        let (own, after) = std::mem::take(&mut left).split_at_mut(segment.rows.len() * heads * width);
        left = after;
        (own, found)
    });
    // [tokens, group, width] of each key head into its place among the heads.
    parallel::for_each(places, |(own, found)| {
        for (head, found) in found.iter().enumerate() {
            for (row, found) in own.chunks_exact_mut(heads * width).zip(found.chunks_exact(group)) {
                row[head * group..][..group].copy_from_slice(found);
            }
        }
    });
    output
}

/// Checks the shapes and returns the row of the first query.
fn check(q: &[f32], keys: &[f32], values: &[f32], segments: &[Segment], shape: GroupedShape) -> usize {
    let GroupedShape { heads, key_heads, width } = shape;
    assert!(heads * key_heads * width > 0, "attention: a size of {shape:?} is 0");
    assert!(heads.is_multiple_of(key_heads), "attention: heads of {shape:?} are not whole groups");
    let (query, row) = (heads * width, key_heads * width);
    assert!(q.len().is_multiple_of(query), "attention: queries are not [tokens, heads, width] of {shape:?}");
    assert!(keys.len().is_multiple_of(row), "attention: keys are not [rows, key_heads, width] of {shape:?}");
    assert_eq!(keys.len(), values.len(), "attention: keys and values differ in size");
    let (tokens, rows) = (q.len() / query, keys.len() / row);
    assert!(tokens <= rows, "attention: {tokens} queries, but only {rows} rows of keys");
    let (first, mut next) = (rows - tokens, rows - tokens);
    for segment in segments {
        assert_eq!(segment.rows.start, next, "attention: segments do not follow each other");
        assert!(segment.rows.end > next, "attention: a segment without tokens");
        assert!(
            segment.seen.iter().all(|seen| seen.end <= segment.rows.start),
            "attention: a segment sees rows that do not come before it"
        );
        next = segment.rows.end;
    }
    assert_eq!(next, rows, "attention: the segments do not cover the queries");
    first
}

/// The outputs of the query heads that share one key head, `[tokens, group, width]`.
fn one_head(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    segment: &Segment,
    head: usize,
    shape: GroupedShape,
) -> Vec<f32> {
    let GroupedShape { heads, key_heads, width } = shape;
    let group = heads / key_heads;
    let (k, v) = (gather(keys, segment, head, shape), gather(values, segment, head, shape));
    let (before, total) = (segment.seen_rows(), k.len() / width);
    let scale = 1.0 / (width as f32).sqrt();
    let tokens = segment.rows.len();
    let mut output = vec![0.0; tokens * group * width];
    let block = (QUERIES / group).max(1);
    let (mut queries, mut scores) = (Vec::new(), Vec::new());
    for first in (0..tokens).step_by(block) {
        let last = tokens.min(first + block);
        queries.clear();
        for row in q[first * heads * width..last * heads * width].chunks_exact(heads * width) {
            queries.extend_from_slice(&row[head * group * width..][..group * width]);
        }
        // The last query of the block sees the most keys.
        let (rows, visible) = ((last - first) * group, (before + last).min(total));
        scores.resize(rows * visible, 0.0);
        let k = Matrix::new(&k, visible, width).transposed();
        multiply(
            1.0,
            Matrix::new(&queries, rows, width),
            k,
            0.0,
            MatrixMut::new(&mut scores, rows, visible),
            Threads::One,
        );
        vectorized(
            #[inline(always)]
            || {
                for (row, scores) in scores.chunks_exact_mut(visible).enumerate() {
                    probabilities(scores, before + first + row / group + 1, scale);
                }
            },
        );
        let output = &mut output[first * group * width..last * group * width];
        let (scores, v) = (Matrix::new(&scores, rows, visible), Matrix::new(&v, visible, width));
        multiply(1.0, scores, v, 0.0, MatrixMut::new(output, rows, width), Threads::One);
    }
    output
}

/// The rows that a segment sees, then its own, of one head: `[_, width]`.
fn gather(data: &[f32], segment: &Segment, head: usize, shape: GroupedShape) -> Vec<f32> {
    let GroupedShape { key_heads, width, .. } = shape;
    let mut gathered = Vec::with_capacity((segment.seen_rows() + segment.rows.len()) * width);
    for rows in segment.seen.iter().chain([&segment.rows]) {
        for row in
            data[rows.start * key_heads * width..rows.end * key_heads * width].chunks_exact(key_heads * width)
        {
            gathered.extend_from_slice(&row[head * width..][..width]);
        }
    }
    gathered
}

/// Softmax of the first `visible` scores; the rest become 0.
#[inline(always)]
fn probabilities(scores: &mut [f32], visible: usize, scale: f32) {
    let (seen, hidden) = scores.split_at_mut(visible);
    let max = scale * simd::max(seen);
    let inverse = 1.0 / simd::exp_in_place(seen, scale, max);
    seen.iter_mut().for_each(|value| *value *= inverse);
    hidden.fill(0.0);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{assert_close, random};
    use crate::{AttentionShape, causal_attention};

    /// Each key head repeated for its group.
    fn repeat(data: &[f32], group: usize, width: usize) -> Vec<f32> {
        data.chunks_exact(width).flat_map(|head| head.repeat(group)).collect()
    }

    proptest! {
        #[test]
        fn a_whole_sequence_is_causal_attention(
            time in 1_usize..150, key_heads in 1_usize..3, group in 1_usize..4, width in 1_usize..9, seed: u64,
        ) {
            let (heads, row) = (key_heads * group, key_heads * width);
            let shape = GroupedShape { heads, key_heads, width };
            let q = random(time * heads * width, seed);
            let (k, v) = (random(time * row, seed ^ 1), random(time * row, seed ^ 2));
            let found = segment_attention(&q, &k, &v, &[Segment { seen: vec![], rows: 0..time }], shape);
            let plain = AttentionShape { batch: 1, time, heads, key: width, value: width };
            let (k, v) = (repeat(&k, group, width), repeat(&v, group, width));
            let expected = causal_attention(&q, &k, &v, plain, 1.0 / (width as f32).sqrt()).output;
            assert_close(&found, &expected, 1e-5);
        }

        /// Two texts that share a beginning, laid out once, against each by itself.
        #[test]
        fn a_shared_beginning_is_as_one_of_its_own(
            shared in 1_usize..80, one in 1_usize..80, other in 1_usize..80, cut in 0_usize..80, seed: u64,
        ) {
            let shape = GroupedShape { heads: 4, key_heads: 2, width: 6 };
            let (query, row) = (24, 12);
            let rows = shared + one + other;
            let (q, k, v) = (random(rows * query, seed), random(rows * row, seed ^ 1), random(rows * row, seed ^ 2));
            let branch = shared + one;
            // The second text leaves the first somewhere behind its beginning.
            let leave = shared.min(cut + 1);
            let segments = [
                Segment { seen: vec![], rows: 0..branch },
                Segment { seen: std::iter::once(0..leave).collect(), rows: branch..rows },
            ];
            let found = segment_attention(&q, &k, &v, &segments, shape);
            let pick = |data: &[f32], width: usize| [&data[..leave * width], &data[branch * width..]].concat();
            let alone = |q: &[f32], k: &[f32], v: &[f32]| {
                let rows = k.len() / row;
                segment_attention(q, k, v, &[Segment { seen: vec![], rows: 0..rows }], shape)
            };
            let first = alone(&q[..branch * query], &k[..branch * row], &v[..branch * row]);
            assert_close(&found[..branch * query], &first, 1e-5);
            let second = alone(&pick(&q, query), &pick(&k, row), &pick(&v, row));
            assert_close(&found[branch * query..], &second[leave * query..], 1e-5);
            // Keys of earlier calls: the queries of the second text alone.
            let later = segment_attention(&q[branch * query..], &k, &v, &segments[1..], shape);
            assert_close(&later, &found[branch * query..], 1e-5);
        }
    }

    #[test]
    #[should_panic(expected = "do not cover")]
    fn refuses_queries_without_a_segment() {
        let shape = GroupedShape { heads: 1, key_heads: 1, width: 1 };
        segment_attention(&[0.0; 2], &[0.0; 2], &[0.0; 2], &[Segment { seen: vec![], rows: 0..1 }], shape);
    }
}
