//! Weights by name, read one at a time and packed for decoding.
//!
//! A weight's name is the path of fields to it in the model, such as `blocks.0.attention.query.weight`. Whatever a
//! file keeps, no weight is held as f32 beside its packed form for longer than it takes to pack it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use engram_import::{HostTensor, Weights};
use engram_kernels::{Activations, BlockError, BlockFormat, BlockPacker, PackedMatrix, WeightFormat};

/// Where a model's weights come from.
pub trait WeightSource {
    /// The names of all weights.
    fn names(&self) -> Vec<String>;

    /// The weight of that name, if there is one.
    fn get(&self, name: &str) -> Option<WeightView<'_>>;

    /// Some bytes of a weight have been packed: memory that a mapped file takes for them can be free again.
    fn release(&self, name: &str) {
        let _ = name;
    }
}

/// A weight as its file has it.
#[derive(Debug, Clone)]
pub struct WeightView<'a> {
    /// Sizes of the dimensions, the last of which is contiguous.
    pub shape: Cow<'a, [usize]>,
    /// The numbers.
    pub values: Values<'a>,
}

/// The numbers of a weight.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// Of our own checkpoints: a matrix is `[inputs, outputs]`.
    F32(&'a [f32]),
    /// Of files from elsewhere: a matrix is `[outputs, inputs]`.
    Blocks {
        /// How numbers lie in the bytes.
        format: BlockFormat,
        /// The bytes.
        bytes: &'a [u8],
    },
}

impl Values<'_> {
    /// Whether a matrix is `[outputs, inputs]`.
    fn is_outside(self) -> bool {
        matches!(self, Self::Blocks { .. })
    }
}

impl WeightSource for BTreeMap<String, HostTensor> {
    fn names(&self) -> Vec<String> {
        self.keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Option<WeightView<'_>> {
        let tensor = self.get(name)?;
        Some(WeightView { shape: Cow::Borrowed(&tensor.shape), values: Values::F32(&tensor.values) })
    }
}

impl WeightSource for Weights {
    fn names(&self) -> Vec<String> {
        self.iter().map(|(name, _)| name.to_owned()).collect()
    }

    fn get(&self, name: &str) -> Option<WeightView<'_>> {
        let weight = self.get(name)?;
        let values = match weight.floats().filter(|_| self.is_inputs_first()) {
            Some(values) => Values::F32(values),
            None => Values::Blocks { format: weight.format(), bytes: weight.bytes() },
        };
        Some(WeightView { shape: Cow::Borrowed(weight.shape()), values })
    }

    fn release(&self, name: &str) {
        if let Some(weight) = self.get(name) {
            weight.release();
        }
    }
}

/// The numbers that weights are kept in while they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As they are, multiplied with activations as they are.
    F32,
    /// Rounded to bf16. Products and sums stay f32.
    Bf16,
    /// Eight bits and a scale for every 32 inputs; activations are rounded alike.
    Int8,
    /// As the file has them. Where those are whole numbers with scales, activations are rounded to eight bits.
    #[default]
    File,
}

/// Weights that are not those of the model that the configuration describes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("weight `{name}`: {problem}")]
pub struct WeightError {
    /// The weight.
    pub name: String,
    /// What is wrong with it.
    pub problem: String,
}

/// Bytes of a file that are packed at a time.
const PART: usize = 4 << 20;

/// Reads the weights whose names begin with a prefix.
pub(crate) struct Loader<'a> {
    all: &'a All<'a>,
    prefix: String,
}

/// A file's weights, and which of them have been used.
pub(crate) struct All<'a> {
    weights: &'a dyn WeightSource,
    dtype: Dtype,
    used: RefCell<BTreeSet<String>>,
}

impl<'a> All<'a> {
    pub(crate) fn new(weights: &'a dyn WeightSource, dtype: Dtype) -> Self {
        Self { weights, dtype, used: RefCell::default() }
    }

    pub(crate) fn loader(&'a self) -> Loader<'a> {
        Loader { all: self, prefix: String::new() }
    }

    /// Refuses weights that nothing has used: a model without a part of itself gives numbers that look right.
    pub(crate) fn finish(self) -> Result<(), WeightError> {
        let used = self.used.into_inner();
        match self.weights.names().into_iter().find(|name| !used.contains(name)) {
            Some(name) => Err(WeightError { name, problem: "has no place in this model".into() }),
            None => Ok(()),
        }
    }
}

impl<'a> Loader<'a> {
    /// Of the weights below `name`.
    pub(crate) fn child(&self, name: impl std::fmt::Display) -> Self {
        Self { all: self.all, prefix: self.name(name) + "." }
    }

    /// Whether packed weights are the file's numbers, not rounded.
    pub(crate) fn is_exact(&self) -> bool {
        matches!(self.all.dtype, Dtype::F32 | Dtype::File)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.all.weights.get(&self.name(name)).is_some()
    }

    fn name(&self, name: impl std::fmt::Display) -> String {
        format!("{}{name}", self.prefix)
    }

    fn error(&self, name: &str, problem: impl ToString) -> WeightError {
        WeightError { name: self.name(name), problem: problem.to_string() }
    }

    /// The weight, whose matrix is `[inputs, outputs]`; other dimensions come before that.
    fn take(&self, name: &str, shape: &[usize]) -> Result<WeightView<'a>, WeightError> {
        let mut expected = shape.to_vec();
        let outside = self.get(name)?.values.is_outside();
        if let (true, [.., _, _]) = (outside, shape) {
            let last = expected.len() - 1;
            expected.swap(last - 1, last);
        }
        self.take_shape(name, expected)
    }

    fn get(&self, name: &str) -> Result<WeightView<'a>, WeightError> {
        self.all.weights.get(&self.name(name)).ok_or_else(|| self.error(name, "is missing"))
    }

    fn take_shape(&self, name: &str, expected: Vec<usize>) -> Result<WeightView<'a>, WeightError> {
        let weight = self.get(name)?;
        if *weight.shape != expected {
            let problem = format!("has shape {:?}, but the model needs {expected:?}", weight.shape);
            return Err(self.error(name, problem));
        }
        self.all.used.borrow_mut().insert(self.name(name));
        Ok(weight)
    }

    /// All values, row-major in `shape`, whose matrix is `[inputs, outputs]`.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, WeightError> {
        match self.take(name, shape)?.values {
            Values::F32(values) => Ok(values.to_vec()),
            Values::Blocks { format, bytes } => {
                let values = format.dequantize(bytes).map_err(|error| self.error(name, error))?;
                Ok(match *shape {
                    [.., inputs, outputs] => {
                        let matrices = values.chunks_exact(inputs * outputs);
                        matrices.flat_map(|matrix| transpose(matrix, outputs, inputs)).collect()
                    }
                    _ => values,
                })
            }
        }
    }

    /// A vector of `len` values.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, WeightError> {
        self.values(name, &[len])
    }

    /// A table `[rows, width]`, which lies so in every file.
    pub(crate) fn table(&self, name: &str, rows: usize, width: usize) -> Result<Values<'a>, WeightError> {
        let flat = self.take_shape(name, vec![rows, width])?;
        if let Values::Blocks { format, bytes } = flat.values {
            let row = self.row_bytes(name, format, width)?;
            if row.checked_mul(rows) != Some(bytes.len()) {
                return Err(self.error(name, format!("has {} bytes, not {rows} rows of {row}", bytes.len())));
            }
        }
        Ok(flat.values)
    }

    /// Bytes of a row of `width` values.
    pub(crate) fn row_bytes(
        &self,
        name: &str,
        format: BlockFormat,
        width: usize,
    ) -> Result<usize, WeightError> {
        format.bytes(width).map_err(|error| self.error(name, error))
    }

    /// A matrix `[inputs, outputs]`, packed.
    pub(crate) fn matrix(
        &self,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<PackedMatrix, WeightError> {
        let weight = self.take(name, &[inputs, outputs])?;
        self.pack(name, weight.values, inputs, outputs)
    }

    /// Matrices `[count, inputs, outputs]`, packed one by one.
    pub(crate) fn matrices(
        &self,
        name: &str,
        [count, inputs, outputs]: [usize; 3],
    ) -> Result<Vec<PackedMatrix>, WeightError> {
        let weight = self.take(name, &[count, inputs, outputs])?;
        let size = inputs * outputs;
        let one = |index: usize| {
            let values = match weight.values {
                Values::F32(values) => Values::F32(&values[index * size..][..size]),
                Values::Blocks { format, bytes } => {
                    let size = format.bytes(size).map_err(|error| self.error(name, error))?;
                    let bytes = bytes.get(index * size..(index + 1) * size);
                    let bytes = bytes.ok_or_else(|| self.error(name, "is shorter than its shape says"))?;
                    Values::Blocks { format, bytes }
                }
            };
            self.pack(name, values, inputs, outputs)
        };
        (0..count).map(one).collect()
    }

    /// A matrix `[inputs, outputs]` that is never rounded.
    pub(crate) fn exact(
        &self,
        name: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<PackedMatrix, WeightError> {
        let values = self.values(name, &[inputs, outputs])?;
        Ok(PackedMatrix::new(&values, inputs, outputs, WeightFormat::F32))
    }

    /// Packs values that were computed from weights `[inputs, outputs]`.
    pub(crate) fn computed(&self, values: &[f32], inputs: usize, outputs: usize) -> PackedMatrix {
        PackedMatrix::new(values, inputs, outputs, self.format())
    }

    pub(crate) fn pack(
        &self,
        name: &str,
        values: Values<'_>,
        inputs: usize,
        outputs: usize,
    ) -> Result<PackedMatrix, WeightError> {
        match values {
            Values::F32(values) => Ok(self.computed(values, inputs, outputs)),
            Values::Blocks { format, bytes } => {
                let activations = match self.all.dtype {
                    Dtype::F32 => Activations::Exact,
                    Dtype::File => Activations::Rounded,
                    Dtype::Bf16 | Dtype::Int8 => {
                        let values = format.dequantize(bytes).map_err(|error| self.error(name, error))?;
                        return Ok(self.computed(&transpose(&values, outputs, inputs), inputs, outputs));
                    }
                };
                self.pack_blocks(name, (format, bytes), [inputs, outputs], activations)
            }
        }
    }

    /// Packs blocks part by part, so that the file's bytes are not all in memory beside the packed ones.
    fn pack_blocks(
        &self,
        name: &str,
        (format, bytes): (BlockFormat, &[u8]),
        [inputs, outputs]: [usize; 2],
        activations: Activations,
    ) -> Result<PackedMatrix, WeightError> {
        let path = self.name(name);
        let failed = |error: BlockError| self.error(name, error);
        let rows = (PART / self.row_bytes(name, format, inputs)?.max(1)).max(1);
        let part = rows * self.row_bytes(name, format, inputs)?;
        let mut packer = BlockPacker::new(format, inputs, outputs, activations).map_err(failed)?;
        for bytes in bytes.chunks(part.max(1)) {
            packer.push(bytes).map_err(failed)?;
            self.all.weights.release(&path);
        }
        packer.finish().map_err(failed)
    }

    /// What f32 becomes.
    fn format(&self) -> WeightFormat {
        match self.all.dtype {
            Dtype::F32 | Dtype::File => WeightFormat::F32,
            Dtype::Bf16 => WeightFormat::Bf16,
            Dtype::Int8 => WeightFormat::Int8,
        }
    }
}

/// `[rows, columns]` to `[columns, rows]`.
pub(crate) fn transpose(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; rows * columns];
    // Sixteen columns at a time, so that the rows that are written stay in cache.
    for start in (0..columns).step_by(16) {
        let end = columns.min(start + 16);
        for (row, values) in data.chunks_exact(columns).enumerate() {
            for column in start..end {
                transposed[column * rows + row] = values[column];
            }
        }
    }
    transposed
}
