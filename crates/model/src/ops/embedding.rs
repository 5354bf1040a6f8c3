//! Looking up rows: tokens in the vocabulary's table, and occurrences among the distinct memory rows of a batch.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::fused::{self, Operation, Pass, choose};
use super::selection::select;

/// Rows `ids` of `table`, `[rows, width]` to `[ids, width]`. The gradients of a row that is looked up more than once are summed
/// in an order that `ids` alone decide.
///
/// # Panics
/// When an id is not below the number of rows: callers check their ids.
pub fn embed(table: Tensor<2>, ids: Arc<[u32]>) -> Tensor<2> {
    let [rows, width] = table.dims();
    let count = ids.len();
    assert!(ids.iter().all(|&id| (id as usize) < rows), "an id is outside of the {rows} rows");
    let fused =
        |(table, ids)| fused::apply(Fused { ids, rows, width }, [fused::input::<2>(table)], [count, width]);
    choose(&table.device(), (table, ids), fused, |(table, ids)| select(table, ids))
}

#[derive(Debug)]
struct Fused {
    ids: Arc<[u32]>,
    rows: usize,
    width: usize,
}

impl Operation<1> for Fused {
    type Saved = ();

    fn forward(&self, [table]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        (engram_kernels::embedding(table, &self.ids, self.width), ())
    }

    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        [engram_kernels::embedding_backward(pass.gradient, &self.ids, self.rows, self.width)]
    }
}
