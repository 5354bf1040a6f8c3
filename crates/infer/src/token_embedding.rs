//! From tokens to vectors, and from vectors to logits.

use engram_config::ModelConfig;
use engram_kernels::{BlockFormat, PackedMatrix, embedding};
use rayon::prelude::*;

use crate::weights::{Loader, Values, WeightError, transpose};

/// The embedding of tokens, and the head.
#[derive(Debug)]
pub(crate) struct TokenEmbedding {
    table: Table,
    /// `[width, vocabulary]`
    head: PackedMatrix,
    /// What embeddings are multiplied by.
    scale: f32,
}

/// Vectors of tokens, `[vocabulary, width]`.
#[derive(Debug)]
enum Table {
    /// The columns of the head.
    Head,
    F32(Vec<f32>),
    Blocks {
        format: BlockFormat,
        bytes: Vec<u8>,
        row: usize,
    },
}

impl TokenEmbedding {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig) -> Result<Self, WeightError> {
        let (width, vocabulary) = (config.width, config.vocabulary);
        let values = loader.table("embedding", vocabulary, width)?;
        let head = match (config.tied_head, values) {
            (false, _) => loader.matrix("head", width, vocabulary)?,
            (true, Values::F32(values)) => {
                loader.computed(&transpose(values, vocabulary, width), width, vocabulary)
            }
            (true, blocks) => loader.pack("embedding", blocks, width, vocabulary)?,
        };
        let table = match values {
            _ if config.tied_head && loader.is_exact() => Table::Head,
            Values::F32(values) => Table::F32(values.to_vec()),
            Values::Blocks { format, bytes } => {
                let row = loader.row_bytes("embedding", format, width)?;
                Table::Blocks { format, bytes: bytes.to_vec(), row }
            }
        };
        Ok(Self { table, head, scale: config.embedding_scale.unwrap_or(1.0) })
    }

    /// Vectors `[tokens, width]`.
    ///
    /// # Panics
    /// When a token is outside the vocabulary.
    pub(crate) fn vectors(&self, tokens: &[u32]) -> Vec<f32> {
        let width = self.head.inputs();
        let mut vectors = match &self.table {
            Table::Head => {
                let mut vectors = vec![0.0; tokens.len() * width];
                let each = tokens.par_iter().zip(vectors.par_chunks_exact_mut(width));
                each.for_each(|(&token, vector)| self.head.output_weights_into(token as usize, vector));
                vectors
            }
            Table::F32(values) => embedding(values, tokens, width),
            Table::Blocks { format, bytes, row } => {
                let mut vectors = vec![0.0; tokens.len() * width];
                let each = tokens.par_iter().zip(vectors.par_chunks_exact_mut(width));
                each.for_each(|(&token, vector)| {
                    let bytes = &bytes[token as usize * row..][..*row];
                    format.dequantize_into(bytes, vector).expect("the size was checked when it was opened");
                });
                vectors
            }
        };
        if self.scale != 1.0 {
            vectors.iter_mut().for_each(|value| *value *= self.scale);
        }
        vectors
    }

    /// From normalised rows `[rows, width]` to logits `[rows, vocabulary]`.
    pub(crate) fn head(&self) -> &PackedMatrix {
        &self.head
    }

    pub(crate) fn bytes(&self) -> usize {
        let table = match &self.table {
            Table::Head => 0,
            Table::F32(values) => size_of_val(&values[..]),
            Table::Blocks { bytes, .. } => bytes.len(),
        };
        table + self.head.bytes()
    }
}
