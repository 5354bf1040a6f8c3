//! Attention of single positions to a paged cache: what decoding does, one token or a chunk at a time.
//!
//! A cache entry holds what is kept of a position; keys and values are ranges of it. In latent attention
//! (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) with absorbed projections all heads read one key, the latent and
//! the shared rotary part, and one value, the latent again. In plain attention each head has a range of its own.
//!
//! The sums of a position run over its predecessors one by one, whatever else is computed beside it: its result has
//! the same bits in any batch and for any division of its sequence into pages or chunks.

use crate::parallel;
use crate::simd::{LANES, dot, exp_in_place, max, vectorized};

/// Where keys and values lie in an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CachedAttentionShape {
    /// Attention heads.
    pub heads: usize,
    /// Width of a query and of a key.
    pub key: usize,
    /// Width of a value.
    pub value: usize,
    /// Values from one head's key to the next's; 0: all heads share the first.
    pub key_stride: usize,
    /// Where the first head's value begins.
    pub value_start: usize,
    /// Values from one head's value to the next's; 0: all heads share the first.
    pub value_stride: usize,
    /// Values of an entry.
    pub entry: usize,
}

/// What one position sees.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Pages `[page, entry]` of its sequence; all but the last are full.
    pub pages: &'a [&'a [f32]],
    /// Entries it sees, the first of the sequence to its own.
    pub count: usize,
}

/// Heads of a task: they share each pass over the pages.
const HEADS: usize = 4;
/// Columns of a value that are summed at once, for each of those heads.
const COLUMNS: usize = 4 * LANES;

/// Softmax attention of `queries` `[rows, heads, key]`, row r of which sees `seen[r]`; gives `[rows, heads, value]`.
///
/// # Panics
/// When a slice does not have the shape stated, or a position sees nothing or more than its pages hold.
pub fn cached_attention(
    queries: &[f32],
    seen: &[Seen<'_>],
    shape: CachedAttentionShape,
    scale: f32,
) -> Vec<f32> {
    let CachedAttentionShape { heads, key, value, .. } = shape;
    assert!(heads * key * value > 0, "cached_attention: a size is 0 in {shape:?}");
    assert_eq!(
        queries.len(),
        seen.len() * heads * key,
        "cached_attention: queries are not [rows, heads, key]"
    );
    seen.iter().for_each(|seen| shape.check(seen));
    let mut output = vec![0.0; seen.len() * heads * value];
    let tasks = (queries.chunks_exact(heads * key).zip(output.chunks_exact_mut(heads * value)))
        .zip(seen)
        .flat_map(|((queries, output), seen)| {
            let groups = queries.chunks(HEADS * key).zip(output.chunks_mut(HEADS * value));
            groups.enumerate().map(move |(group, (queries, output))| (group * HEADS, queries, output, seen))
        });
    let work = |(first, queries, output, seen): (usize, &[f32], &mut [f32], &Seen<'_>)| {
        vectorized(
            #[inline(always)]
            || shape.attend(first, queries, output, seen, scale),
        );
    };
    let entries: usize = seen.iter().map(|seen| seen.count).sum();
    if entries * heads * (key + value) < 1 << 16 {
        tasks.for_each(work)
    } else {
        parallel::for_each(tasks, work)
    }
    output
}

impl CachedAttentionShape {
    fn check(&self, seen: &Seen<'_>) {
        let last = self.heads - 1;
        let key_end = last * self.key_stride + self.key;
        let value_end = self.value_start + last * self.value_stride + self.value;
        assert!(key_end.max(value_end) <= self.entry, "cached_attention: an entry of {self:?} is too short");
        let held: usize = seen.pages.iter().map(|page| page.len() / self.entry).sum();
        assert!(seen.count > 0 && seen.count <= held, "cached_attention: {} of {held} entries", seen.count);
    }

    /// Heads `first..` of one row, `queries` `[≤ HEADS, key]` to `output` `[≤ HEADS, value]`.
    #[inline(always)]
    fn attend(&self, first: usize, queries: &[f32], output: &mut [f32], seen: &Seen<'_>, scale: f32) {
        let heads = queries.len() / self.key;
        let mut weights = vec![0.0; heads * seen.count];
        for (position, entry) in self.entries(seen).enumerate() {
            for head in 0..heads {
                let key = &entry[(first + head) * self.key_stride..][..self.key];
                weights[head * seen.count + position] = dot(&queries[head * self.key..][..self.key], key);
            }
        }
        for weights in weights.chunks_exact_mut(seen.count) {
            let shift = scale * max(weights);
            let total = exp_in_place(weights, scale, shift);
            weights.iter_mut().for_each(|weight| *weight /= total);
        }
        let groups = output.chunks_exact_mut(self.value).zip(weights.chunks_exact(seen.count)).zip(first..);
        for ((output, weights), head) in groups {
            let start = self.value_start + head * self.value_stride;
            let (whole, tail) = output.as_chunks_mut::<COLUMNS>();
            let tail_start = start + whole.len() * COLUMNS;
            for (index, sums) in whole.iter_mut().enumerate() {
                let mut local = [0.0_f32; COLUMNS];
                for (entry, &weight) in self.entries(seen).zip(weights) {
                    let values = &entry[start + index * COLUMNS..][..COLUMNS];
                    for column in 0..COLUMNS {
                        local[column] = weight.mul_add(values[column], local[column]);
                    }
                }
                *sums = local;
            }
            if tail.is_empty() {
                continue;
            }
            tail.fill(0.0);
            for (entry, &weight) in self.entries(seen).zip(weights) {
                for (sum, value) in tail.iter_mut().zip(&entry[tail_start..]) {
                    *sum = weight.mul_add(*value, *sum);
                }
            }
        }
    }

    #[inline(always)]
    fn entries<'a>(&self, seen: &Seen<'a>) -> impl Iterator<Item = &'a [f32]> {
        seen.pages.iter().flat_map(|page| page.chunks_exact(self.entry)).take(seen.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};
    use crate::{AttentionShape, causal_attention};
    use proptest::prelude::*;

    /// Entries `[time, heads·(key + value)]` of plain attention, keys first.
    fn entries(k: &[f32], v: &[f32], shape: AttentionShape) -> Vec<f32> {
        let rows = k.chunks(shape.heads * shape.key).zip(v.chunks(shape.heads * shape.value));
        rows.flat_map(|(k, v)| k.iter().chain(v).copied()).collect()
    }

    proptest! {
        #[test]
        fn is_the_causal_attention_of_each_position(
            time in 1_usize..40, heads in 1_usize..6, key in 1_usize..40, value in 1_usize..150,
            page in 1_usize..9, seed: u64,
        ) {
            let shape = AttentionShape { batch: 1, time, heads, key, value };
            let (q, k) = (random(time * heads * key, seed), random(time * heads * key, seed ^ 1));
            let v = random(time * heads * value, seed ^ 2);
            let expected = causal_attention(&q, &k, &v, shape, 0.3).output;
            let entry = heads * (key + value);
            let cached = CachedAttentionShape {
                heads, key, value, key_stride: key, value_start: heads * key, value_stride: value, entry,
            };
            let data = entries(&k, &v, shape);
            let pages: Vec<&[f32]> = data.chunks(page * entry).collect();
            let seen: Vec<_> = (1..=time).map(|count| Seen { pages: &pages, count }).collect();
            let found = cached_attention(&q, &seen, cached, 0.3);
            assert_close(&found, &expected, 2e-5);

            // The same bits alone and in other pages.
            let one: Vec<&[f32]> = vec![&data];
            let last = [Seen { pages: &one, count: time }];
            let alone = cached_attention(&q[(time - 1) * heads * key..], &last, cached, 0.3);
            prop_assert_eq!(&alone[..], &found[(time - 1) * heads * value..]);
        }
    }

    #[test]
    fn all_heads_may_share_one_entry() {
        let (heads, latent, rotary) = (6, 70, 4);
        let key = latent + rotary;
        let shape = CachedAttentionShape {
            heads,
            key,
            value: latent,
            key_stride: 0,
            value_start: 0,
            value_stride: 0,
            entry: key,
        };
        let (queries, data) = (random(heads * key, 1), random(10 * key, 2));
        let pages: Vec<&[f32]> = data.chunks(3 * key).collect();
        let found = cached_attention(&queries, &[Seen { pages: &pages, count: 9 }], shape, 0.1);
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
    #[should_panic(expected = "4 of 3 entries")]
    fn refuses_to_see_past_the_pages() {
        let shape = CachedAttentionShape {
            heads: 1,
            key: 2,
            value: 2,
            key_stride: 0,
            value_start: 0,
            value_stride: 0,
            entry: 2,
        };
        let page: &[f32] = &[0.0; 6];
        cached_attention(&[0.0; 2], &[Seen { pages: &[page], count: 4 }], shape, 1.0);
    }
}
