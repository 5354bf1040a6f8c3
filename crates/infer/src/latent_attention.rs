//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), for decoding.
//!
//! The cache keeps the latent and the rotary key alone: the projections to keys and values are absorbed into queries and
//! outputs (section 2.1.2). Where something is added to the values of single heads, there is nothing to absorb; the cache
//! then keeps the keys and values of all heads.

use engram_config::{LatentConfig, ModelConfig};
use engram_kernels::{CachedAttentionShape, PackedMatrix, head_products};

use crate::cache::Cache;
use crate::cached_heads::CachedHeads;
use crate::norm::Norm;
use crate::rotary::RowAngles;
use crate::rows::side_by_side;
use crate::step_rows::StepRows;
use crate::weights::{Loader, WeightError, transpose};

/// Latent attention of one block.
#[derive(Debug)]
pub(crate) struct LatentAttention {
    query_down: Option<(PackedMatrix, Norm)>,
    query_up: PackedMatrix,
    latent_down: PackedMatrix,
    latent_norm: Norm,
    up: Up,
    output: PackedMatrix,
    content: usize,
    rotary: usize,
    latent: usize,
    heads: CachedHeads,
}

/// From latents to keys and values.
#[derive(Debug)]
enum Up {
    Absorbed {
        /// Transposed key projection of each head, `[content, latent]`: queries meet latents instead of keys.
        key: Vec<PackedMatrix>,
        /// Value projection of each head, `[latent, value]`, after the attention instead of before.
        value: Vec<PackedMatrix>,
    },
    /// `[latent, heads · (content + value)]`
    Whole(PackedMatrix),
}

impl LatentAttention {
    /// The attention of block `block`, to whose values something is added if `adding`.
    pub(crate) fn load(
        loader: &Loader<'_>,
        latent: &LatentConfig,
        config: &ModelConfig,
        block: usize,
        adding: bool,
    ) -> Result<Self, WeightError> {
        let &LatentConfig {
            heads, query_rank, latent_rank, content_width, rotary_width, value_width, ..
        } = latent;
        let width = config.width;
        let norm = |name: &str, width: usize| Norm::load(loader, name, width, config.norm_epsilon);
        let linear =
            |name: &str, inputs: usize, outputs: usize| loader.child(name).matrix("weight", inputs, outputs);
        let query_down =
            query_rank.map(|rank| Ok((linear("query_down", width, rank)?, norm("query_norm", rank)?)));
        let own = content_width + rotary_width;
        let up = if adding {
            Up::Whole(linear("latent_up", latent_rank, heads * (content_width + value_width))?)
        } else {
            Up::absorbed(loader, latent)?
        };
        let shape = match up {
            Up::Absorbed { .. } => CachedAttentionShape {
                heads,
                key_heads: 1,
                key: latent_rank + rotary_width,
                value: latent_rank,
                value_start: 0,
                entry: latent_rank + rotary_width,
            },
            Up::Whole(_) => CachedAttentionShape {
                heads,
                key_heads: heads,
                key: own,
                value: value_width,
                value_start: heads * own,
                entry: heads * (own + value_width),
            },
        };
        Ok(Self {
            query_down: query_down.transpose()?,
            query_up: linear("query_up", query_rank.unwrap_or(width), heads * own)?,
            latent_down: linear("latent_down", width, latent_rank + rotary_width)?,
            latent_norm: norm("latent_norm", latent_rank)?,
            up,
            output: linear("output", heads * value_width, width)?,
            content: content_width,
            rotary: rotary_width,
            latent: latent_rank,
            heads: CachedHeads { shape, scale: config.attention.scale(), window: None, part: block },
        })
    }

    /// Values kept of a position.
    pub(crate) fn entry(&self) -> usize {
        self.heads.shape.entry
    }

    pub(crate) fn bytes(&self) -> usize {
        let up: usize = match &self.up {
            Up::Absorbed { key, value } => key.iter().chain(value).map(PackedMatrix::bytes).sum(),
            Up::Whole(up) => up.bytes(),
        };
        let down = self.query_down.as_ref().map_or(0, |(down, _)| down.bytes());
        up + down + self.query_up.bytes() + self.latent_down.bytes() + self.output.bytes()
    }

    /// `[rows, width]` to the same. `added` `[rows, heads · value]` goes to the values.
    pub(crate) fn forward(
        &self,
        h: &[f32],
        rows: &StepRows<'_>,
        angles: Option<&RowAngles>,
        added: Option<&[f32]>,
        cache: &mut Cache,
    ) -> Vec<f32> {
        let Some(angles) = angles else {
            unreachable!("latent attention has rotary positions in every block")
        };
        let queries = match &self.query_down {
            Some((down, norm)) => self.query_up.product(&norm.apply(&down.product(h))),
            None => self.query_up.product(h),
        };
        let (latents, rotary_keys) = self.down(h, angles);
        let heads = match &self.up {
            Up::Absorbed { key, value } => {
                let queries = self.absorb(&queries, key, angles);
                let entries = side_by_side((&latents, self.latent), (&rotary_keys, self.rotary));
                values(&self.heads.attend(&queries, &entries, rows, cache), value)
            }
            Up::Whole(up) => {
                let queries = self.turned(queries, angles);
                let entries = self.expand(&up.product(&latents), &rotary_keys, added);
                self.heads.attend(&queries, &entries, rows, cache)
            }
        };
        self.output.product(&heads)
    }

    /// Normalised latents `[rows, latent]` and turned keys `[rows, rotary]`.
    fn down(&self, h: &[f32], angles: &RowAngles) -> (Vec<f32>, Vec<f32>) {
        let down = self.latent_down.product(h);
        let split = down.chunks_exact(self.latent + self.rotary).map(|row| row.split_at(self.latent));
        let (mut latents, mut keys) = (Vec::new(), vec![0.0; split.len() * self.rotary]);
        for (row, ((latent, key), turned)) in split.zip(keys.chunks_exact_mut(self.rotary)).enumerate() {
            latents.extend_from_slice(latent);
            angles.turn(row, key, turned);
        }
        (self.latent_norm.apply(&latents), keys)
    }

    /// Queries that meet latents, `[rows, heads, latent + rotary]`.
    fn absorb(&self, projected: &[f32], key: &[PackedMatrix], angles: &RowAngles) -> Vec<f32> {
        let (heads, own, entry) = (key.len(), self.content + self.rotary, self.latent + self.rotary);
        let mut queries = vec![0.0; projected.len() / own * entry];
        head_products(projected, [heads * own, own], key, &mut queries, entry);
        let rows = queries.chunks_exact_mut(heads * entry).zip(projected.chunks_exact(heads * own));
        for (row, (queries, projected)) in rows.enumerate() {
            for (query, projected) in queries.chunks_exact_mut(entry).zip(projected.chunks_exact(own)) {
                angles.turn(row, &projected[self.content..], &mut query[self.latent..]);
            }
        }
        queries
    }

    /// Queries with their rotary parts turned, `[rows, heads, content + rotary]`.
    fn turned(&self, mut queries: Vec<f32>, angles: &RowAngles) -> Vec<f32> {
        let own = self.content + self.rotary;
        let mut turned = vec![0.0; self.rotary];
        for (row, queries) in queries.chunks_exact_mut(self.heads.shape.heads * own).enumerate() {
            for query in queries.chunks_exact_mut(own) {
                angles.turn(row, &query[self.content..], &mut turned);
                query[self.content..].copy_from_slice(&turned);
            }
        }
        queries
    }

    /// Entries of all heads' keys and values, from what is projected from latents, `[rows, heads, content + value]`.
    fn expand(&self, up: &[f32], rotary_keys: &[f32], added: Option<&[f32]>) -> Vec<f32> {
        let CachedAttentionShape { heads, value, entry, .. } = self.heads.shape;
        let per_head = self.content + value;
        let rows = up.chunks_exact(heads * per_head);
        let mut entries = Vec::with_capacity(rows.len() * entry);
        for (row, (up, rotary)) in rows.zip(rotary_keys.chunks_exact(self.rotary)).enumerate() {
            for head in up.chunks_exact(per_head) {
                entries.extend_from_slice(&head[..self.content]);
                entries.extend_from_slice(rotary);
            }
            let first = entries.len();
            up.chunks_exact(per_head).for_each(|head| entries.extend_from_slice(&head[self.content..]));
            if let Some(added) = added {
                let added = &added[row * heads * value..][..heads * value];
                entries[first..].iter_mut().zip(added).for_each(|(value, added)| *value += added);
            }
        }
        entries
    }
}

impl Up {
    fn absorbed(loader: &Loader<'_>, latent: &LatentConfig) -> Result<Self, WeightError> {
        let &LatentConfig { heads, latent_rank, content_width, value_width, .. } = latent;
        let per_head = content_width + value_width;
        let up = loader.child("latent_up").values("weight", &[latent_rank, heads * per_head])?;
        let part = |head: usize, first: usize, count: usize| -> Vec<f32> {
            let rows = up.chunks_exact(heads * per_head);
            rows.flat_map(|row| &row[head * per_head + first..][..count]).copied().collect()
        };
        let key = (0..heads).map(|head| {
            let key = transpose(&part(head, 0, content_width), latent_rank, content_width);
            loader.computed(&key, content_width, latent_rank)
        });
        let value = (0..heads)
            .map(|head| loader.computed(&part(head, content_width, value_width), latent_rank, value_width));
        Ok(Self::Absorbed { key: key.collect(), value: value.collect() })
    }
}

/// From attended latents `[rows, heads, latent]` to the heads' values `[rows, heads · value]`.
fn values(attended: &[f32], absorbed: &[PackedMatrix]) -> Vec<f32> {
    let (heads, first) = (absorbed.len(), &absorbed[0]);
    let (latent, value) = (first.inputs(), first.outputs());
    let mut out = vec![0.0; attended.len() / latent * value];
    head_products(attended, [heads * latent, latent], absorbed, &mut out, value);
    out
}
