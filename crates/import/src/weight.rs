//! The weights of a model, as they lie in its files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use engram_kernels::BlockFormat;
use half::{bf16, f16};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use crate::mapped_file::MappedFile;

/// A weight: a view of a mapped file where it can be one. Matrices from outside are `[outputs, inputs]`, in whatever
/// format; those of our checkpoints are `[inputs, outputs]` in f32, see [`Weights::is_inputs_first`].
#[derive(Debug, Clone)]
pub struct Weight {
    bytes: Bytes,
    format: BlockFormat,
    shape: Vec<usize>,
}

#[derive(Debug, Clone)]
enum Bytes {
    Mapped { map: Arc<Mmap>, range: Range<usize> },
    Owned(Arc<[u8]>),
    Floats(Arc<[f32]>),
}

impl Weight {
    /// A view of a file. The range must hold as many bytes as the shape takes in the format, and rows must be whole
    /// blocks.
    pub(crate) fn mapped(
        file: &MappedFile,
        range: Range<usize>,
        format: BlockFormat,
        shape: Vec<usize>,
    ) -> Self {
        debug_assert_eq!(format.bytes(shape.iter().product()), Ok(range.len()));
        Self { bytes: Bytes::Mapped { map: file.map().clone(), range }, format, shape }
    }

    /// Values that no file has as they are.
    pub(crate) fn owned(shape: Vec<usize>, values: Vec<f32>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Self { bytes: Bytes::Floats(values.into()), format: BlockFormat::F32, shape }
    }

    /// Sizes, outermost first; the last is contiguous.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How its numbers are stored.
    pub fn format(&self) -> BlockFormat {
        self.format
    }

    /// All its bytes, row after row.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped { map, range } => &map[range.clone()],
            Bytes::Owned(bytes) => bytes,
            Bytes::Floats(values) => bytemuck::cast_slice(values),
        }
    }

    /// The system may take back the memory of the mapped file that its bytes are in: all of the file, since a system maps
    /// more of it than was looked at. Whoever looks again has it read from the file.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Bytes::Mapped { map, .. } = &self.bytes {
            // SAFETY: the map is of a file, shared, and only ever read, so that a page that is dropped comes back from the
            // file with the bytes that it had.
            let dropped = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
            // It was a hint: a system that does not take it keeps the pages.
            let _ = dropped;
        }
    }

    /// Its values where they lie, if they are stored in f32 and aligned.
    pub fn floats(&self) -> Option<&[f32]> {
        if self.format == BlockFormat::F32 { bytemuck::try_cast_slice(self.bytes()).ok() } else { None }
    }

    /// Its values, row after row.
    pub fn values(&self) -> Vec<f32> {
        let bytes = self.bytes();
        let halves = || bytes.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
        match self.format {
            BlockFormat::F32 => bytemuck::pod_collect_to_vec(bytes),
            BlockFormat::F16 => halves().map(|bytes| f16::from_le_bytes(bytes).to_f32()).collect(),
            BlockFormat::BF16 => halves().map(|bytes| bf16::from_le_bytes(bytes).to_f32()).collect(),
            format => format.dequantize(bytes).expect("whole blocks, checked when the weight was made"),
        }
    }

    /// Some of its rows, as a matrix.
    ///
    /// # Panics
    /// When there are no such rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        let row = self.row_bytes();
        let part = rows.start * row..rows.end * row;
        let bytes = match &self.bytes {
            Bytes::Mapped { map, range } => {
                assert!(part.end <= range.len(), "rows that are there");
                Bytes::Mapped { map: map.clone(), range: range.start + part.start..range.start + part.end }
            }
            _ => Bytes::Owned(self.bytes()[part].into()),
        };
        Self { bytes, format: self.format, shape: vec![rows.len(), self.inputs()] }
    }

    /// The same rows in another order: row r is row `order[r]` of these. They are copied in their format.
    ///
    /// # Panics
    /// When the order names a row that is not there.
    pub(crate) fn reordered(&self, order: &[u32]) -> Self {
        let (row, bytes) = (self.row_bytes(), self.bytes());
        let mut ordered = Vec::with_capacity(bytes.len());
        for &from in order {
            ordered.extend_from_slice(&bytes[from as usize * row..][..row]);
        }
        Self { bytes: Bytes::Owned(ordered.into()), format: self.format, shape: self.shape.clone() }
    }

    /// The same with its values where [`floats`](Self::floats) finds them: copied, unless they are already.
    pub(crate) fn aligned(self) -> Self {
        match self.floats() {
            None if self.format == BlockFormat::F32 => Self::owned(self.shape.clone(), self.values()),
            _ => self,
        }
    }

    /// Values of one row: the innermost size.
    fn inputs(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn row_bytes(&self) -> usize {
        self.inputs() / self.format.block_values() * self.format.block_bytes()
    }
}

/// The weights of a model by name.
///
/// Whatever the source from outside, these are the names (`N` is a block, `E` an expert):
///
/// | name | shape | where |
/// |---|---|---|
/// | `embedding` | `[vocabulary, width]` | |
/// | `head` | `[vocabulary, width]` | not with a tied head |
/// | `norm.weight` | `[width]` | |
/// | `blocks.N.attention_norm.weight`, `….feed_forward_norm.weight` | `[width]` | |
/// | `blocks.N.attention_post_norm.weight`, `….feed_forward_post_norm.weight` | `[width]` | `post_norms` |
/// | `blocks.N.attention.query.weight` | `[heads·head_width, width]` | plain |
/// | `blocks.N.attention.key.weight`, `….value.weight` | `[key_heads·head_width, width]` | plain |
/// | `blocks.N.attention.{query,key,value}.bias` | `[outputs]` | `bias` |
/// | `blocks.N.attention.output.weight`, `….output.bias` | `[width, heads·value]`, `[width]` | bias: `output_bias` |
/// | `blocks.N.attention.query_norm.weight`, `….key_norm.weight` | `[head_width]` | `query_key_norm` |
/// | `blocks.N.attention.query_down.weight`, `….query_norm.weight` | `[query_rank, width]`, `[query_rank]` | latent with `query_rank` |
/// | `blocks.N.attention.query_up.weight` | `[heads·(content + rotary), query_rank or width]` | latent |
/// | `blocks.N.attention.latent_down.weight` | `[latent_rank + rotary, width]` | latent |
/// | `blocks.N.attention.latent_norm.weight` | `[latent_rank]` | latent |
/// | `blocks.N.attention.latent_up.weight` | `[heads·(content + value), latent_rank]` | latent |
/// | `blocks.N.feed_forward.{gate,up}.weight` | `[hidden, width]` | dense blocks |
/// | `blocks.N.feed_forward.output.weight` | `[width, hidden]` | dense blocks |
/// | `blocks.N.feed_forward.router.weight`, `….balance` | `[routed, width]`, `[routed]` | experts; balance: sigmoid scores |
/// | `blocks.N.feed_forward.experts.E.{gate,up,output}.weight` | as dense | experts |
/// | `blocks.N.feed_forward.shared.{gate,up,output}.weight` | as dense | `shared_width` above 0 |
///
/// Rotary pairs lie half a head's rotary width apart, whatever the file does. A checkpoint of ours has the names and
/// the shapes that it was written with: `input.weight` for gate and up side by side, experts stacked.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    by_name: BTreeMap<String, Weight>,
    inputs_first: bool,
}

impl Weights {
    /// The weight of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<&Weight> {
        self.by_name.get(name)
    }

    /// Whether matrices are `[inputs, outputs]`, as those of our checkpoints are, and not `[outputs, inputs]`. The
    /// embedding is `[vocabulary, width]` in both.
    pub fn is_inputs_first(&self) -> bool {
        self.inputs_first
    }

    /// All weights by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.by_name.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    pub(crate) fn insert(&mut self, name: String, weight: Weight) {
        self.by_name.insert(name, weight);
    }

    /// Weights whose matrices are `[inputs, outputs]`.
    pub(crate) fn inputs_first() -> Self {
        Self { by_name: BTreeMap::new(), inputs_first: true }
    }
}
