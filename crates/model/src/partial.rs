//! Parts of a forward pass, for training that leaves a backbone as it is.
//!
//! Below the first memory nothing depends on what is trained: [`LanguageModel::states_before`] computes it once, and
//! [`LanguageModel::hidden_from`] goes on from there. Logits cost more than a block, so that they are computed at chosen
//! positions alone, outside of autodiff: what knows the loss's gradient there takes it back with
//! [`LanguageModel::hidden_gradient`].

use burn::tensor::Tensor;

use crate::host::InnerOrSelf;
use crate::memory_rows::MemoryRows;
use crate::sequences::Sequences;
use crate::transformer::{LanguageModel, Tokens, Trace};

impl LanguageModel {
    /// Streams before block `block` and its memory, `[tokens, n·width]`. Memories below are not read.
    ///
    /// # Panics
    /// When a token lies outside the vocabulary, or the sequences have other tokens.
    pub fn states_before(&self, block: usize, ids: &[u32], sequences: &Sequences) -> Tensor<2> {
        let x = self.enter(Tokens { ids, sequences, memory: &[] });
        let pass = |x, index| self.pass(index, x, sequences, None, &mut Trace::default());
        (0..block).fold(x, pass).inner_or_self()
    }

    /// Hidden states before the head, `[tokens, width]`, from the streams before block `block`. `memory` has the rows of
    /// the memory layers from that block on.
    ///
    /// # Panics
    /// When the rows are not those of these layers.
    pub fn hidden_from(
        &self,
        block: usize,
        streams: Tensor<2>,
        sequences: &Sequences,
        memory: &[MemoryRows],
    ) -> Tensor<2> {
        let mut rows = memory.iter();
        let mut x = streams;
        for index in block..self.blocks.len() {
            let rows = self.blocks[index]
                .reads_rows()
                .then(|| rows.next().expect("rows for every memory layer from this block on"));
            x = self.pass(index, x, sequences, rows, &mut Trace::default());
        }
        assert!(rows.next().is_none(), "rows for more memory layers than these blocks have");
        self.leave(x)
    }

    /// Logits, `[rows, vocabulary]`, of hidden states before the head, `[rows, width]`, outside of autodiff.
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        hidden.inner_or_self().matmul(self.head_weight().inner_or_self())
    }

    /// The gradient of hidden states, `[rows, width]`, from that of their [`logits`](Self::logits).
    pub fn hidden_gradient(&self, of_logits: Tensor<2>) -> Tensor<2> {
        of_logits.matmul(self.head_weight().inner_or_self().transpose())
    }
}
