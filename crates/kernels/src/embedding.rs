//! Rows of a table by token id, and the dense gradient of the table.

use crate::parallel::{self, block_rows};
use crate::simd::vectorized;

/// The rows of `table` `[rows, width]` named by `ids` `[n]`: `[n, width]`.
///
/// # Panics
/// When `width` is 0, `table` is not a whole number of rows, or an id is not below the number of rows.
pub fn embedding(table: &[f32], ids: &[u32], width: usize) -> Vec<f32> {
    assert!(width > 0 && table.len().is_multiple_of(width), "embedding: {} in rows of {width}", table.len());
    check(ids, table.len() / width);
    let mut output = vec![0.0; ids.len() * width];
    let block = block_rows(width);
    parallel::for_each(ids.chunks(block).zip(output.chunks_mut(block * width)), |(ids, output)| {
        for (&id, output) in ids.iter().zip(output.chunks_exact_mut(width)) {
            output.copy_from_slice(&table[id as usize * width..][..width]);
        }
    });
    output
}

/// Gradient `[rows, width]` of [`embedding`]'s table, given `grad` `[n, width]` of its output.
///
/// A row is the sum of its occurrences' gradients in the order of `ids`; a row without any is zero.
///
/// # Panics
/// When `grad` is not `[n, width]`, or an id is not below `rows`.
pub fn embedding_backward(grad: &[f32], ids: &[u32], rows: usize, width: usize) -> Vec<f32> {
    assert_eq!(grad.len(), ids.len() * width, "embedding: one gradient row of {width} for each id");
    check(ids, rows);
    let occurrences = Occurrences::of(ids, rows);
    let mut table = vec![0.0; rows * width];
    if width == 0 {
        return table;
    }
    let block = block_rows(2 * width);
    parallel::for_each(table.chunks_mut(block * width).enumerate(), |(index, table)| {
        vectorized(
            #[inline(always)]
            || {
                for (row, total) in table.chunks_exact_mut(width).enumerate() {
                    for &occurrence in occurrences.of_row(index * block + row) {
                        let grad = &grad[occurrence as usize * width..][..width];
                        for (t, g) in total.iter_mut().zip(grad) {
                            *t += g;
                        }
                    }
                }
            },
        );
    });
    table
}

fn check(ids: &[u32], rows: usize) {
    if let Some(at) = ids.iter().position(|&id| id as usize >= rows) {
        panic!("embedding: id {} at position {at} of a table of {rows} rows", ids[at]);
    }
}

/// The positions of each id: a counting sort of positions by id, which keeps their order.
#[derive(Debug, Clone)]
pub(crate) struct Occurrences {
    /// `[rows + 1]`: a row's positions are `positions[starts[row]..starts[row + 1]]`.
    pub(crate) starts: Vec<usize>,
    /// `[n]`: positions in the list of ids.
    pub(crate) positions: Vec<u32>,
}

impl Occurrences {
    /// Sorts `ids`, all of them below `rows`.
    pub(crate) fn of(ids: &[u32], rows: usize) -> Self {
        assert!(u32::try_from(ids.len()).is_ok(), "{} ids in one batch are more than 2^32", ids.len());
        let mut starts = vec![0; rows + 1];
        for &id in ids {
            starts[id as usize + 1] += 1;
        }
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut positions = vec![0; ids.len()];
        for (position, &id) in ids.iter().enumerate() {
            positions[next[id as usize]] = position as u32;
            next[id as usize] += 1;
        }
        Self { starts, positions }
    }

    /// The positions at which `row` occurs, in order.
    #[inline(always)]
    pub(crate) fn of_row(&self, row: usize) -> &[u32] {
        &self.positions[self.starts[row]..self.starts[row + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_come_out_and_gradients_go_back(
            ids in prop::collection::vec(0_u32..40, 0..200), width in 1_usize..40, seed: u64,
        ) {
            let rows = 40;
            let table = random(rows * width, seed);
            let output = embedding(&table, &ids, width);
            for (&id, row) in ids.iter().zip(output.chunks(width)) {
                prop_assert_eq!(row, &table[id as usize * width..][..width]);
            }
            let grad = random(ids.len() * width, seed ^ 1);
            let found = embedding_backward(&grad, &ids, rows, width);
            let mut expected = vec![0.0; rows * width];
            for (&id, grad) in ids.iter().zip(grad.chunks(width)) {
                for (e, g) in expected[id as usize * width..].iter_mut().zip(grad) {
                    *e += g;
                }
            }
            prop_assert_eq!(&found, &expected); // the same order of additions: the same bits
        }
    }

    #[test]
    fn a_large_batch_over_many_blocks() {
        let (rows, width) = (1000, 300);
        let ids: Vec<u32> = (0..3000_u32).map(|i| i.wrapping_mul(2_654_435_761) % 900).collect();
        let grad = random(ids.len() * width, 5);
        let found = embedding_backward(&grad, &ids, rows, width);
        assert_eq!(found, embedding_backward(&grad, &ids, rows, width));
        assert!(found[900 * width..].iter().all(|&g| g == 0.0));
        let sums = |values: &[f32]| -> Vec<f32> {
            (0..width).map(|i| values.chunks(width).map(|row| row[i]).sum()).collect()
        };
        assert_close(&sums(&found), &sums(&grad), 1e-3);
    }

    #[test]
    #[should_panic(expected = "id 4 at position 1 of a table of 4 rows")]
    fn refuses_an_id_outside_the_table() {
        embedding(&[0.0; 12], &[0, 4], 3);
    }
}
