//! The memory rows that a batch reads.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::host::column;
use crate::ops::embed;

/// The memory rows of one layer that a batch needs: each distinct row once, and where it goes.
#[derive(Debug, Clone)]
pub struct MemoryRows {
    /// Distinct rows, `[distinct, row_width]`: a leaf of the graph, so that its gradient can go back to the table.
    pub rows: Tensor<2>,
    /// Which of them stands in each slot, `[batch·time·slots]`.
    pub index: Arc<[u32]>,
    /// Positions whose gate is 0, `[batch·time]`; none: all are alive.
    pub dead: Option<Arc<[bool]>>,
}

impl MemoryRows {
    /// e: the rows of all orders and heads side by side, `[batch·time, d_mem]`.
    pub(crate) fn concatenated(&self, memory_width: usize) -> Tensor<2> {
        let tokens = self.index.len() * self.rows.dims()[1] / memory_width;
        embed(self.rows.clone(), Arc::clone(&self.index)).reshape([tokens, memory_width])
    }
}

/// Zeroes the rows of dead positions.
pub(crate) fn silence(u: Tensor<2>, dead: &[bool]) -> Tensor<2> {
    let alive: Vec<bool> = dead.iter().map(|&dead| !dead).collect();
    let alive = column(&alive, &u.device());
    u * alive
}
