//! Multi-head attention whose heads may share keys and values (grouped queries, arXiv 2305.13245), for decoding.

use engram_config::{ModelConfig, PlainConfig};
use engram_kernels::{CachedAttentionShape, PackedMatrix};

use crate::cache::Cache;
use crate::cached_heads::CachedHeads;
use crate::norm::Norm;
use crate::rotary::RowAngles;
use crate::rows::side_by_side;
use crate::step_rows::StepRows;
use crate::weights::{Loader, WeightError};

/// Plain attention of one block.
#[derive(Debug)]
pub(crate) struct PlainAttention {
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection,
    /// Norms over every head of queries and of keys, before they are turned.
    head_norms: Option<[Norm; 2]>,
    heads: CachedHeads,
}

/// A linear map, with a bias where the model has one.
#[derive(Debug)]
struct Projection {
    weight: PackedMatrix,
    bias: Option<Vec<f32>>,
}

impl Projection {
    fn load(
        loader: &Loader<'_>,
        name: &str,
        [inputs, outputs]: [usize; 2],
        bias: bool,
    ) -> Result<Self, WeightError> {
        let loader = loader.child(name);
        let bias = bias.then(|| loader.vector("bias", outputs)).transpose()?;
        Ok(Self { weight: loader.matrix("weight", inputs, outputs)?, bias })
    }

    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let [y] = Self::forward_all([self], x);
        y
    }

    /// Several of the same rows, whose work threads share together.
    fn forward_all<const N: usize>(projections: [&Self; N], x: &[f32]) -> [Vec<f32>; N] {
        let mut all = PackedMatrix::products(projections.map(|projection| &projection.weight), x);
        for (projection, y) in projections.iter().zip(&mut all) {
            if let Some(bias) = &projection.bias {
                add_to_rows(y, bias);
            }
        }
        all
    }
}

impl PlainAttention {
    pub(crate) fn load(
        loader: &Loader<'_>,
        plain: &PlainConfig,
        config: &ModelConfig,
        block: usize,
    ) -> Result<Self, WeightError> {
        let (width, head) = (config.width, plain.head_width);
        let (heads, key_heads) = (config.attention.heads(), config.attention.key_heads());
        let projection =
            |name: &str, shape: [usize; 2], bias: bool| Projection::load(loader, name, shape, bias);
        let norm = |name: &str| Norm::load(loader, name, head, config.norm_epsilon);
        let norms = plain.query_key_norm.then(|| Ok([norm("query_norm")?, norm("key_norm")?]));
        Ok(Self {
            query: projection("query", [width, heads * head], plain.bias)?,
            key: projection("key", [width, key_heads * head], plain.bias)?,
            value: projection("value", [width, key_heads * head], plain.bias)?,
            output: projection("output", [heads * head, width], plain.output_bias)?,
            head_norms: norms.transpose()?,
            heads: CachedHeads {
                shape: CachedAttentionShape {
                    heads,
                    key_heads,
                    key: head,
                    value: head,
                    value_start: key_heads * head,
                    entry: 2 * key_heads * head,
                },
                scale: config.attention.scale(),
                window: config.attention.window_of(block),
                part: block,
            },
        })
    }

    /// Values kept of a position.
    pub(crate) fn entry(&self) -> usize {
        self.heads.shape.entry
    }

    pub(crate) fn bytes(&self) -> usize {
        [&self.query, &self.key, &self.value, &self.output]
            .map(|projection| projection.weight.bytes())
            .iter()
            .sum()
    }

    /// `[rows, width]` to the same. `added` `[rows, key_heads · head width]` goes to the values.
    pub(crate) fn forward(
        &self,
        h: &[f32],
        rows: &StepRows<'_>,
        angles: Option<&RowAngles>,
        added: Option<&[f32]>,
        cache: &mut Cache,
    ) -> Vec<f32> {
        let CachedAttentionShape { heads, key_heads, value_start: width, .. } = self.heads.shape;
        let [mut queries, mut keys, mut values] =
            Projection::forward_all([&self.query, &self.key, &self.value], h);
        if let Some([query_norm, key_norm]) = &self.head_norms {
            (queries, keys) = (query_norm.apply(&queries), key_norm.apply(&keys));
        }
        if let Some(angles) = angles {
            angles.turn_heads(&mut queries, heads);
            angles.turn_heads(&mut keys, key_heads);
        }
        if let Some(added) = added {
            values.iter_mut().zip(added).for_each(|(value, added)| *value += added);
        }
        let entries = side_by_side((&keys, width), (&values, width));
        self.output.forward(&self.heads.attend(&queries, &entries, rows, cache))
    }
}

/// Adds `bias` to every row.
fn add_to_rows(rows: &mut [f32], bias: &[f32]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
}
