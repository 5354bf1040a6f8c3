//! Rows of n-gram tables that are added without keys and gates, for decoding: the forms that a memory is compared with.

use engram_config::{MemoryConfig, MemoryForm, ModelConfig};
use engram_kernels::PackedMatrix;

use crate::weights::{Loader, WeightError};

/// Adds one layer's rows to the residual streams, or to the values of its attention.
#[derive(Debug)]
pub(crate) struct NgramEmbedding {
    target: Target,
    slots: usize,
    streams: usize,
    width: usize,
}

/// Where a token's rows side by side, e `[d_mem]`, go.
#[derive(Debug)]
enum Target {
    /// Their mean to every stream.
    Streams,
    /// `W·e` to every stream, the sum divided by one more than the rows (over-encoding, arXiv 2501.16975).
    Embedding(PackedMatrix),
    /// `W·e` to the values of the block's attention.
    Values(PackedMatrix),
}

impl NgramEmbedding {
    pub(crate) fn load(
        loader: &Loader<'_>,
        memory: &MemoryConfig,
        model: &ModelConfig,
    ) -> Result<Self, WeightError> {
        let projection = |outputs: usize| loader.matrix("projection", memory.width(), outputs);
        let target = match memory.form {
            MemoryForm::OverEncoding => Target::Embedding(projection(model.width)?),
            MemoryForm::AttentionValues => {
                let (_, value) = model.attention.head_widths();
                Target::Values(projection(model.attention.key_heads() * value)?)
            }
            MemoryForm::Added | MemoryForm::Paper | MemoryForm::V41 => Target::Streams,
        };
        Ok(Self { target, slots: memory.slots(), streams: model.streams(), width: model.width })
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.target {
            Target::Streams => 0,
            Target::Embedding(projection) | Target::Values(projection) => projection.bytes(),
        }
    }

    /// Adds the memory rows `e` `[on, d_mem]` of the rows `on` to the streams `x` `[rows, streams · width]`, where that is
    /// their place. Rows that are not on compute as if their memory rows were zero. Gives what is added to the values of
    /// the block's attention, `[rows, key_heads · value]`, where that is their place.
    pub(crate) fn add(&self, x: &mut [f32], e: &[f32], on: &[usize]) -> Option<Vec<f32>> {
        let all = self.streams * self.width;
        let mut to_streams = |added: &[f32]| {
            for (&row, added) in on.iter().zip(added.chunks_exact(self.width)) {
                for stream in x[row * all..][..all].chunks_exact_mut(self.width) {
                    // A zero adds nothing, not even to a zero's sign.
                    stream
                        .iter_mut()
                        .zip(added)
                        .filter(|(_, added)| **added != 0.0)
                        .for_each(|(x, added)| *x += added);
                }
            }
        };
        match &self.target {
            Target::Streams => {
                to_streams(&self.means(e));
                None
            }
            Target::Embedding(projection) => {
                to_streams(&projection.product(e));
                let count = 1.0 + self.slots as f32;
                x.iter_mut().for_each(|x| *x /= count);
                None
            }
            Target::Values(projection) => {
                let width = projection.outputs();
                let mut values = vec![0.0; x.len() / all * width];
                for (&row, added) in on.iter().zip(projection.product(e).chunks_exact(width)) {
                    values[row * width..][..width].copy_from_slice(added);
                }
                Some(values)
            }
        }
    }

    /// Gates as a gated memory has them, `[rows, streams]`: wide open where it is on.
    pub(crate) fn open_gates(&self, rows: usize, on: &[usize]) -> Vec<f32> {
        let mut gates = vec![0.0; rows * self.streams];
        for &row in on {
            gates[row * self.streams..][..self.streams].fill(1.0);
        }
        gates
    }

    /// The mean of every token's rows, `[on, width]`.
    fn means(&self, e: &[f32]) -> Vec<f32> {
        let width = self.width;
        let tokens = e.chunks_exact(self.slots * width);
        let mean = |rows: &[f32]| -> Vec<f32> {
            (0..width).map(|i| rows.iter().skip(i).step_by(width).sum::<f32>() / self.slots as f32).collect()
        };
        tokens.flat_map(mean).collect()
    }
}
