//! Attention of single positions to a paged cache, for decoding one token or a chunk at a time.
//!
//! A cache entry holds the stored values of a position; keys and values are ranges of it. In latent attention
//! (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) with absorbed projections, all heads read one key (the latent and the
//! shared rotary part) and one value (the latent again). In plain attention each head has its own range, or shares it
//! with a group of heads (arXiv 2305.13245).
//!
//! Every score is one chain of multiply-adds over the values of a key, and every output value one chain over the
//! earlier positions. So a result has the same bits in any batch and for any division of its sequence into pages or
//! chunks.

use crate::heads::HeadMut;
use crate::parallel;
use crate::simd::{exp_in_place, max, multiply_add, vectorized};

/// The places of keys and values in an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedAttentionShape {
    /// Attention heads.
    pub heads: usize,
    /// Heads of keys and values; consecutive attention heads share one.
    pub key_heads: usize,
    /// Width of a query and of a key. An entry begins with its keys `[key_heads, key]`.
    pub key: usize,
    /// Width of a value.
    pub value: usize,
    /// Start of the values `[key_heads, value]`.
    pub value_start: usize,
    /// Values of an entry.
    pub entry: usize,
}

/// What one position attends to.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Pages `[page, entry]` of its sequence; all but the last are full.
    pub pages: &'a [&'a [f32]],
    /// The first entry that it sees: 0, unless a window slides along the sequence.
    pub first: usize,
    /// Number of entries up to its own, which is the last one that it sees.
    pub count: usize,
}

/// Maximum number of heads in a task; they share a key.
const HEADS: usize = 8;
/// Approximate number of queries in a task; they share each pass over the pages.
const QUERIES: usize = 64;
/// Number of keys laid side by side, so that a vector holds one value of several keys.
const TILE: usize = 32;
/// Number of columns of a value summed at once.
const COLUMNS: usize = 32;
/// Number of queries whose sums fit the vector registers together.
const FEW: usize = 4;

/// Softmax attention of `queries` `[rows, heads, key]`, where row r sees `seen[r]`. Returns `[rows, heads, value]`.
///
/// # Panics
/// When a slice does not have the stated shape, or a position sees nothing or more than its pages hold.
pub fn cached_attention(
    queries: &[f32],
    seen: &[Seen<'_>],
    shape: CachedAttentionShape,
    scale: f32,
) -> Vec<f32> {
    let CachedAttentionShape { heads, key, value, .. } = shape;
    shape.check();
    assert_eq!(
        queries.len(),
        seen.len() * heads * key,
        "cached_attention: queries are not [rows, heads, key]"
    );
    seen.iter().for_each(|seen| shape.check_seen(seen));
    let mut output = vec![0.0; seen.len() * heads * value];
    let (mut queries, mut rest) = (queries, &mut output[..]);
    let mut tasks = Vec::new();
    for rows in shape.blocks(seen) {
        let (of_rows, later) = queries.split_at(rows.len() * heads * key);
        let (output, others) = rest.split_at_mut(rows.len() * heads * value);
        (queries, rest) = (later, others);
        let mut outputs = HeadMut::split(output, rows.len(), heads, value).into_iter();
        tasks.extend(shape.head_groups().map(|heads| Task {
            seen: rows,
            queries: of_rows,
            first_head: heads.start,
            output: outputs.by_ref().take(heads.len()).collect(),
        }));
    }
    let work = |task: Task<'_>| {
        vectorized(
            #[inline(always)]
            || shape.attend(task, scale),
        );
    };
    let entries: usize = seen.iter().map(|seen| seen.count - seen.first).sum();
    if entries * heads * (key + value) < 1 << 16 {
        tasks.into_iter().for_each(work)
    } else {
        parallel::for_each(tasks.into_iter(), work)
    }
    output
}

/// Rows of one sequence, each seeing at least as much as the previous one, and heads that share a key.
struct Task<'a> {
    /// `[rows]`
    seen: &'a [Seen<'a>],
    /// `[rows, heads, key]`, of all heads.
    queries: &'a [f32],
    first_head: usize,
    /// Each head's `[rows, value]`.
    output: Vec<HeadMut<'a>>,
}

impl Task<'_> {
    /// Queries: the heads of the first row, then those of the next.
    fn count(&self) -> usize {
        self.seen.len() * self.output.len()
    }

    /// The output of a query, `[value]`.
    #[inline(always)]
    fn output_of(&mut self, query: usize) -> &mut [f32] {
        let heads = self.output.len();
        self.output[query % heads].row(query / heads)
    }

    /// Entries that a query sees.
    fn sees(&self, query: usize) -> std::ops::Range<usize> {
        let seen = &self.seen[query / self.output.len()];
        seen.first..seen.count
    }

    /// Entries that any query sees; both bounds ascend with the queries.
    fn entries(&self) -> std::ops::Range<usize> {
        self.sees(0).start..self.sees(self.count() - 1).end
    }

    /// The entry of the first stored score, aligned to tiles from the start of the sequence.
    fn base(&self) -> usize {
        self.entries().start / TILE * TILE
    }

    /// Number of stored scores per query.
    fn stride(&self) -> usize {
        (self.entries().end - self.base()).next_multiple_of(TILE)
    }
}

impl CachedAttentionShape {
    fn check(&self) {
        let Self { heads, key_heads, key, value, value_start, entry } = *self;
        assert!(heads * key_heads * key * value > 0, "cached_attention: a size is 0 in {self:?}");
        assert!(heads.is_multiple_of(key_heads), "cached_attention: {self:?} has no whole groups of heads");
        let end = (key_heads * key).max(value_start + key_heads * value);
        assert!(end <= entry, "cached_attention: an entry of {self:?} is too short");
    }

    fn check_seen(&self, seen: &Seen<'_>) {
        let held: usize = seen.pages.iter().map(|page| page.len() / self.entry).sum();
        let Seen { first, count, .. } = *seen;
        assert!(first < count && count <= held, "cached_attention: {first}..{count} of {held} entries");
    }

    /// Attention heads of each task on the same rows.
    fn head_groups(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let group = self.heads / self.key_heads;
        (0..self.heads).step_by(group).flat_map(move |first| {
            (first..first + group).step_by(HEADS).map(move |head| head..(first + group).min(head + HEADS))
        })
    }

    /// Rows of each task.
    fn blocks<'a>(&self, seen: &'a [Seen<'a>]) -> impl Iterator<Item = &'a [Seen<'a>]> {
        let rows = (QUERIES / (self.heads / self.key_heads).min(HEADS)).max(1);
        let together = |a: &Seen<'_>, b: &Seen<'_>| {
            std::ptr::eq(a.pages, b.pages) && a.first <= b.first && a.count <= b.count
        };
        seen.chunk_by(together).flat_map(move |sequence| sequence.chunks(rows))
    }

    #[inline(always)]
    fn attend(&self, mut task: Task<'_>, scale: f32) {
        let (base, stride) = (task.base(), task.stride());
        let mut weights = self.scores(&task);
        for (query, weights) in weights.chunks_exact_mut(stride).enumerate() {
            let sees = task.sees(query);
            // Positions before the window get weight 0, so that queries can be summed together.
            let (behind, weights) = weights[..sees.end - base].split_at_mut(sees.start - base);
            behind.fill(0.0);
            let shift = scale * max(weights);
            let total = exp_in_place(weights, scale, shift);
            weights.iter_mut().for_each(|weight| *weight /= total);
        }
        for column in (0..self.value).step_by(COLUMNS) {
            self.columns(&mut task, column, &weights);
        }
    }

    /// Products of queries and keys from [`Task::base`] on, `[queries, stride]`. Only the products that a query sees
    /// count.
    #[inline(always)]
    fn scores(&self, task: &Task<'_>) -> Vec<f32> {
        let (base, stride) = (task.base(), task.stride());
        let (key, count) = (self.key, task.count());
        let rows = task.queries.chunks_exact(self.heads * key);
        let of_task = rows.flat_map(|row| &row[task.first_head * key..][..task.output.len() * key]);
        let queries: Vec<f32> = of_task.copied().collect();
        let key_start = self.key_head(task) * key;
        let mut scores = vec![0.0; count * stride];
        let mut tile = vec![[0.0; TILE]; key];
        let (pages, most) = (task.seen[0].pages, task.entries().end);
        for start in (base..most).step_by(TILE) {
            self.each_entry(
                pages,
                start..most.min(start + TILE),
                #[inline(always)]
                |position, entry| {
                    for (values, &value) in tile.iter_mut().zip(&entry[key_start..][..key]) {
                        values[position - start] = value;
                    }
                },
            );
            // Queries before the first that sees any of the tile.
            let blind = task.seen.partition_point(|seen| seen.count <= start) * task.output.len();
            for first in (blind..count).step_by(FEW) {
                let queries = &queries[first * key..];
                let scores = &mut scores[first * stride + start - base..];
                match (count - first).min(FEW) {
                    1 => few_scores::<1>(queries, &tile, scores, stride),
                    2 => few_scores::<2>(queries, &tile, scores, stride),
                    3 => few_scores::<3>(queries, &tile, scores, stride),
                    _ => few_scores::<FEW>(queries, &tile, scores, stride),
                }
            }
        }
        scores
    }

    /// Output values from `column` on, given each query's weights, `[queries, stride]`.
    #[inline(always)]
    fn columns(&self, task: &mut Task<'_>, column: usize, weights: &[f32]) {
        let (base, stride, entries) = (task.base(), task.stride(), task.entries());
        let (count, width) = (task.count(), COLUMNS.min(self.value - column));
        let start = self.value_start + self.key_head(task) * self.value + column;
        let mut values = vec![[0.0; COLUMNS]; entries.len()];
        self.each_entry(
            task.seen[0].pages,
            entries.clone(),
            #[inline(always)]
            |position, entry| {
                values[position - entries.start][..width].copy_from_slice(&entry[start..start + width]);
            },
        );
        let mut sums = [[0.0; COLUMNS]; FEW];
        for first in (0..count).step_by(FEW) {
            let queries = first..count.min(first + FEW);
            let seen = |query: usize| entries.start - base..task.sees(query).end - base;
            let weights = |query: usize| &weights[query * stride..][seen(query)];
            match queries.len() {
                1 => few_sums([0].map(|query| weights(first + query)), &values, &mut sums),
                2 => few_sums([0, 1].map(|query| weights(first + query)), &values, &mut sums),
                3 => few_sums([0, 1, 2].map(|query| weights(first + query)), &values, &mut sums),
                _ => few_sums([0, 1, 2, 3].map(|query| weights(first + query)), &values, &mut sums),
            }
            for (query, sums) in queries.zip(&sums) {
                task.output_of(query)[column..column + width].copy_from_slice(&sums[..width]);
            }
        }
    }

    fn key_head(&self, task: &Task<'_>) -> usize {
        task.first_head / (self.heads / self.key_heads)
    }

    /// Calls `work` with each position of `positions` and its entry.
    #[inline(always)]
    fn each_entry(
        &self,
        pages: &[&[f32]],
        positions: std::ops::Range<usize>,
        mut work: impl FnMut(usize, &[f32]),
    ) {
        let size = pages[0].len() / self.entry;
        let mut position = positions.start;
        while position < positions.end {
            let first = position % size;
            let count = (size - first).min(positions.end - position);
            let entries = &pages[position / size][first * self.entry..][..count * self.entry];
            for entry in entries.chunks_exact(self.entry) {
                work(position, entry);
                position += 1;
            }
        }
    }
}

/// Products of R queries `[R, key]` with the keys of a tile `[key, TILE]`, each to the first of `stride` values.
#[inline(always)]
fn few_scores<const R: usize>(queries: &[f32], tile: &[[f32; TILE]], scores: &mut [f32], stride: usize) {
    let queries: [&[f32]; R] = std::array::from_fn(|query| &queries[query * tile.len()..][..tile.len()]);
    let mut sums = [[0.0_f32; TILE]; R];
    for (i, &keys) in tile.iter().enumerate() {
        sums = multiply_add(queries.map(|query| query[i]), keys, sums);
    }
    for (query, sums) in sums.iter().enumerate() {
        scores[query * stride..][..TILE].copy_from_slice(sums);
    }
}

/// Weighted sums of `values` for R queries, each of which sees at least as much as the previous one.
#[inline(always)]
fn few_sums<const R: usize>(
    weights: [&[f32]; R],
    values: &[[f32; COLUMNS]],
    output: &mut [[f32; COLUMNS]; FEW],
) {
    let (common, rest) = values.split_at(weights[0].len());
    let of_common = weights.map(|weights| &weights[..common.len()]);
    let mut sums = [[0.0_f32; COLUMNS]; R];
    for (position, &values) in common.iter().enumerate() {
        sums = multiply_add(of_common.map(|weights| weights[position]), values, sums);
    }
    output[..R].copy_from_slice(&sums);
    for (output, weights) in output.iter_mut().zip(weights) {
        for (&weight, &values) in weights[common.len()..].iter().zip(rest) {
            [*output] = multiply_add([weight], values, [*output]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};
    use crate::{AttentionShape, causal_attention};
    use proptest::prelude::*;

    /// Each key head repeated for its group.
    fn repeat(data: &[f32], group: usize, width: usize) -> Vec<f32> {
        data.chunks_exact(width).flat_map(|head| head.repeat(group)).collect()
    }

    /// Entries `[time, key_heads·(key + value)]` of plain attention, keys first.
    fn entries(k: &[f32], v: &[f32], shape: CachedAttentionShape) -> Vec<f32> {
        let rows = k.chunks(shape.key_heads * shape.key).zip(v.chunks(shape.key_heads * shape.value));
        rows.flat_map(|(k, v)| k.iter().chain(v).copied()).collect()
    }

    proptest! {
        #[test]
        fn is_the_causal_attention_of_each_position(
            time in 1_usize..150, key_heads in 1_usize..4, group in 1_usize..12, key in 1_usize..40,
            value in 1_usize..80, page in 1_usize..9, seed: u64,
        ) {
            let heads = key_heads * group;
            let shape = AttentionShape { batch: 1, time, heads, key, value };
            let q = random(time * heads * key, seed);
            let (k, v) = (random(time * key_heads * key, seed ^ 1), random(time * key_heads * value, seed ^ 2));
            let expected = causal_attention(&q, &repeat(&k, group, key), &repeat(&v, group, value), shape, 0.3).output;
            let entry = key_heads * (key + value);
            let cached = CachedAttentionShape { heads, key_heads, key, value, value_start: key_heads * key, entry };
            let data = entries(&k, &v, cached);
            let pages: Vec<&[f32]> = data.chunks(page * entry).collect();
            let seen: Vec<_> = (1..=time).map(|count| Seen { pages: &pages, first: 0, count }).collect();
            let found = cached_attention(&q, &seen, cached, 0.3);
            assert_close(&found, &expected, 2e-5);

            // The same bits alone and in other pages.
            let one: Vec<&[f32]> = vec![&data];
            let last = [Seen { pages: &one, first: 0, count: time }];
            let alone = cached_attention(&q[(time - 1) * heads * key..], &last, cached, 0.3);
            prop_assert_eq!(&alone[..], &found[(time - 1) * heads * value..]);

            // And in any chunk, beside another sequence.
            let (cut, row) = (time / 2, heads * key);
            let mut rows: Vec<_> = seen[cut..].to_vec();
            rows.insert(0, last[0]);
            let queries = [&q[(time - 1) * row..], &q[cut * row..]].concat();
            let chunk = cached_attention(&queries, &rows, cached, 0.3);
            prop_assert_eq!(&chunk[..heads * value], &alone[..]);
            prop_assert_eq!(&chunk[heads * value..], &found[cut * heads * value..]);
        }
    }

    proptest! {
        /// Positions before the window change no bit.
        #[test]
        fn a_window_is_a_sequence_of_its_own(
            time in 1_usize..150, window in 1_usize..90, heads in 1_usize..4, key in 1_usize..20,
            value in 1_usize..40, page in 1_usize..40, seed: u64,
        ) {
            let entry = heads * (key + value);
            let shape = CachedAttentionShape { heads, key_heads: heads, key, value, value_start: heads * key, entry };
            let (queries, data) = (random(time * heads * key, seed), random(time * entry, seed ^ 1));
            let pages: Vec<&[f32]> = data.chunks(page * entry).collect();
            let seen: Vec<_> = (1..=time)
                .map(|count| Seen { pages: &pages, first: count.saturating_sub(window), count })
                .collect();
            let found = cached_attention(&queries, &seen, shape, 0.3);
            for (row, seen) in seen.iter().enumerate() {
                let own: &[f32] = &data[seen.first * entry..seen.count * entry];
                let alone = [Seen { pages: &[own], first: 0, count: seen.count - seen.first }];
                let alone = cached_attention(&queries[row * heads * key..][..heads * key], &alone, shape, 0.3);
                prop_assert_eq!(&alone[..], &found[row * heads * value..][..heads * value]);
            }
        }
    }

    #[test]
    fn all_heads_may_share_one_entry() {
        let (heads, latent, rotary) = (6, 70, 4);
        let key = latent + rotary;
        let shape =
            CachedAttentionShape { heads, key_heads: 1, key, value: latent, value_start: 0, entry: key };
        let (queries, data) = (random(heads * key, 1), random(10 * key, 2));
        let pages: Vec<&[f32]> = data.chunks(3 * key).collect();
        let found = cached_attention(&queries, &[Seen { pages: &pages, first: 0, count: 9 }], shape, 0.1);
        for (head, found) in found.chunks(latent).enumerate() {
            let query = &queries[head * key..][..key];
            let score =
                |entry: &[f32]| (0.1 * entry.iter().zip(query).map(|(a, b)| a * b).sum::<f32>()).exp();
            let weights: Vec<f32> = data.chunks(key).take(9).map(score).collect();
            let total: f32 = weights.iter().sum();
            let expected: Vec<f32> = (0..latent)
                .map(|i| {
                    data.chunks(key).zip(&weights).map(|(entry, weight)| entry[i] * weight / total).sum()
                })
                .collect();
            assert_close(found, &expected, 1e-5);
        }
    }

    #[test]
    #[should_panic(expected = "0..4 of 3 entries")]
    fn refuses_to_see_past_the_pages() {
        let shape =
            CachedAttentionShape { heads: 1, key_heads: 1, key: 2, value: 2, value_start: 0, entry: 2 };
        let page: &[f32] = &[0.0; 6];
        cached_attention(&[0.0; 2], &[Seen { pages: &[page], first: 0, count: 4 }], shape, 1.0);
    }
}
