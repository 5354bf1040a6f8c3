//! Packs a matrix of a file part by part, so that the file's pages need not all be in memory at the same time.

use half::{bf16, f16};

use super::block_panels::BlockPanels;
use super::{Activations, PANEL, PackedMatrix, Panels};
use crate::block_format::{BlockError, BlockFormat};

/// A [`PackedMatrix`] under construction.
///
/// ```
/// use engram_kernels::{Activations, BlockFormat, BlockPacker};
///
/// // 64 rows of one block each, in two parts: a scale of 0.5 and the numbers 2, 2, 2, …
/// let row = [&[0x00, 0x38][..], &[2; 32]].concat();
/// let mut packer = BlockPacker::new(BlockFormat::Q8_0, 32, 64, Activations::Exact)?;
/// for _ in 0..2 {
///     packer.push(&row.repeat(32))?;
/// }
/// assert_eq!(packer.finish()?.product(&[1.0; 32]), vec![32.0; 64]);
/// # Ok::<(), engram_kernels::BlockError>(())
/// ```
#[derive(Debug)]
pub struct BlockPacker {
    format: BlockFormat,
    inputs: usize,
    outputs: usize,
    /// Outputs pushed so far.
    pushed: usize,
    panels: Panels,
    /// Bytes of outputs that do not fill a panel.
    rest: Vec<u8>,
}

impl BlockPacker {
    /// Starts a matrix of `outputs` rows of `inputs` values.
    ///
    /// # Errors
    /// When a row is not whole blocks, or a size is 0 or too large.
    pub fn new(
        format: BlockFormat,
        inputs: usize,
        outputs: usize,
        activations: Activations,
    ) -> Result<Self, BlockError> {
        let impossible = BlockError::Shape { inputs, outputs };
        // The largest form is f32, with whole panels.
        let size = outputs.checked_next_multiple_of(PANEL).and_then(|outputs| outputs.checked_mul(inputs));
        let size = size.filter(|&size| 0 < size && size <= isize::MAX as usize / 8).ok_or(impossible)?;
        format.bytes(inputs)?;
        let panels = match BlockPanels::with_format(format, inputs, outputs) {
            Some(panels) => Panels::Blocks(panels, activations),
            None if format == BlockFormat::F16 => Panels::F16(Vec::with_capacity(size)),
            None if format == BlockFormat::BF16 => Panels::Bf16(Vec::with_capacity(size)),
            None => Panels::F32(Vec::with_capacity(size)),
        };
        Ok(Self { format, inputs, outputs, pushed: 0, panels, rest: Vec::new() })
    }

    /// Appends the blocks of further rows.
    ///
    /// # Errors
    /// When they are not whole rows, or more than the matrix has. Nothing is appended then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), BlockError> {
        let row = self.format.bytes(self.inputs)?;
        let rows = bytes.len() / row;
        if !bytes.len().is_multiple_of(row) || rows > self.outputs - self.pushed {
            let values = self.inputs * (self.outputs - self.pushed);
            let expected = self.format.bytes(values)?;
            return Err(BlockError::Bytes { format: self.format, values, expected, found: bytes.len() });
        }
        self.pushed += rows;
        let (mut bytes, panel) = (bytes, PANEL * row);
        if !self.rest.is_empty() {
            let (first, later) = bytes.split_at(bytes.len().min(panel - self.rest.len()));
            self.rest.extend_from_slice(first);
            bytes = later;
            if self.rest.len() < panel {
                return Ok(());
            }
            let first = std::mem::take(&mut self.rest);
            self.pack(&first);
        }
        let (whole, rest) = bytes.split_at(bytes.len() / panel * panel);
        self.pack(whole);
        self.rest.extend_from_slice(rest);
        Ok(())
    }

    /// The matrix.
    ///
    /// # Errors
    /// When rows are missing.
    pub fn finish(mut self) -> Result<PackedMatrix, BlockError> {
        if self.pushed < self.outputs {
            let values = self.inputs * self.outputs;
            let (expected, found) =
                (self.format.bytes(values)?, self.format.bytes(self.inputs * self.pushed)?);
            return Err(BlockError::Bytes { format: self.format, values, expected, found });
        }
        let rest = std::mem::take(&mut self.rest);
        self.pack(&rest);
        Ok(PackedMatrix { inputs: self.inputs, outputs: self.outputs, panels: self.panels })
    }

    /// Packs whole panels, or the last one.
    fn pack(&mut self, bytes: &[u8]) {
        let inputs = self.inputs;
        match &mut self.panels {
            Panels::Blocks(panels, _) => panels.push(self.format, bytes),
            Panels::F32(panels) => transpose(bytes, inputs, f32::from_le_bytes, panels),
            Panels::F16(panels) => transpose(bytes, inputs, f16::from_le_bytes, panels),
            Panels::Bf16(panels) => transpose(bytes, inputs, bf16::from_le_bytes, panels),
        }
    }
}

/// Appends to `panels` `[panels, inputs, PANEL]` the values of `bytes` `[outputs, inputs]`.
fn transpose<const N: usize, T: Copy + Default>(
    bytes: &[u8],
    inputs: usize,
    value: impl Fn([u8; N]) -> T,
    panels: &mut Vec<T>,
) {
    for rows in bytes.chunks(PANEL * inputs * N) {
        let start = panels.len();
        panels.resize(start + PANEL * inputs, T::default());
        for (column, row) in rows.chunks_exact(inputs * N).enumerate() {
            for (target, &bytes) in panels[start..].chunks_exact_mut(PANEL).zip(row.as_chunks::<N>().0) {
                target[column] = value(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightFormat;
    use crate::testing::{blocks, random};
    use proptest::prelude::*;

    fn bytes_of(format: BlockFormat, values: usize, seed: u64) -> Vec<u8> {
        let floats = || random(values, seed).into_iter();
        match format {
            BlockFormat::F32 => floats().flat_map(f32::to_le_bytes).collect(),
            BlockFormat::F16 => floats().flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
            BlockFormat::BF16 => floats().flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            _ => blocks(format, values / format.block_values(), seed),
        }
    }

    /// The dequantised weight `[inputs, outputs]`.
    fn dequantized(format: BlockFormat, bytes: &[u8], inputs: usize, outputs: usize) -> Vec<f32> {
        let rows = format.dequantize(bytes).unwrap();
        (0..inputs * outputs).map(|i| rows[i % outputs * inputs + i / outputs]).collect()
    }

    fn formats() -> impl Strategy<Value = BlockFormat> {
        prop::sample::select(BlockFormat::ALL.to_vec())
    }

    fn inputs_of(format: BlockFormat, size: usize) -> usize {
        if format.is_quantized() { format.block_values() * size.div_ceil(20) } else { size }
    }

    proptest! {
        /// With exact activations the product is that of the f32 matrix, bit for bit.
        #[test]
        fn exact_products_are_those_of_the_dequantised_weight(
            format in formats(), size in 1_usize..60, outputs in 1_usize..80, rows in 1_usize..8, seed: u64,
        ) {
            let inputs = inputs_of(format, size);
            let bytes = bytes_of(format, inputs * outputs, seed);
            let packed = PackedMatrix::from_blocks(format, &bytes, inputs, outputs, Activations::Exact).unwrap();
            let weight = dequantized(format, &bytes, inputs, outputs);
            let x = random(rows * inputs, seed ^ 1);
            let expected = PackedMatrix::new(&weight, inputs, outputs, WeightFormat::F32).product(&x);
            prop_assert_eq!(packed.product(&x), expected);
            let mut row = vec![0.0; inputs];
            packed.output_weights_into(outputs - 1, &mut row);
            let last: Vec<f32> = weight.iter().skip(outputs - 1).step_by(outputs).copied().collect();
            prop_assert_eq!(row, last);
        }

        /// With rounded activations each value is off by at most half a step of its group: 1/254 of the group's
        /// largest.
        #[test]
        fn errors_are_those_of_rounded_activations(
            format in formats(), size in 1_usize..60, outputs in 1_usize..80, rows in 1_usize..20, seed: u64,
        ) {
            let inputs = inputs_of(format, size);
            let bytes = bytes_of(format, inputs * outputs, seed);
            let packed = PackedMatrix::from_blocks(format, &bytes, inputs, outputs, Activations::Rounded).unwrap();
            let weight = dequantized(format, &bytes, inputs, outputs);
            let x = random(rows * inputs, seed ^ 1);
            for (x, y) in x.chunks(inputs).zip(packed.product(&x).chunks(outputs)) {
                for (output, &y) in y.iter().enumerate() {
                    let (mut sum, mut size, mut bound) = (0.0, 0.0, 0.0);
                    for (group, x) in x.chunks(32).enumerate() {
                        let step = x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
                        for (i, &x) in x.iter().enumerate() {
                            let w = f64::from(weight[(group * 32 + i) * outputs + output]);
                            sum += w * f64::from(x);
                            size += (w * f64::from(x)).abs();
                            bound += w.abs() * 0.5001 * f64::from(step);
                        }
                    }
                    // Sums of groups and minima may be larger than the values: a minimum is at most the largest weight.
                    let bound = bound * f64::from(format.is_quantized()) + 1e-4 * size.max(1.0);
                    prop_assert!((f64::from(y) - sum).abs() <= bound, "{:?}: {y} and {sum}, {bound}", format);
                }
            }
        }

        /// The division into parts does not matter.
        #[test]
        fn parts_make_the_same_matrix(
            format in formats(), outputs in 1_usize..100, cuts in prop::collection::vec(0_usize..40, 0..5), seed: u64,
        ) {
            let inputs = inputs_of(format, 30);
            let bytes = bytes_of(format, inputs * outputs, seed);
            let whole = PackedMatrix::from_blocks(format, &bytes, inputs, outputs, Activations::Rounded).unwrap();
            let mut packer = BlockPacker::new(format, inputs, outputs, Activations::Rounded).unwrap();
            let (row, mut rest) = (bytes.len() / outputs, &bytes[..]);
            for cut in cuts {
                let (part, later) = rest.split_at(rest.len().min(cut * row));
                packer.push(part).unwrap();
                rest = later;
            }
            packer.push(rest).unwrap();
            let x = random(inputs, seed);
            prop_assert_eq!(packer.finish().unwrap().product(&x), whole.product(&x));
        }

        /// A row has the same bits alone, in any batch, with any number of threads, and beside other products.
        #[test]
        fn a_row_has_the_same_bits_in_any_batch(
            format in formats(), rows in 1_usize..130, first in any::<prop::sample::Index>(), seed: u64,
        ) {
            let (inputs, outputs) = (inputs_of(format, 50), 300);
            let bytes = bytes_of(format, inputs * outputs, seed);
            for activations in [Activations::Rounded, Activations::Exact] {
                let packed = PackedMatrix::from_blocks(format, &bytes, inputs, outputs, activations).unwrap();
                let x = random(rows * inputs, seed ^ 1);
                let all = packed.product(&x);
                let first = first.index(rows);
                prop_assert_eq!(packed.product(&x[first * inputs..]), &all[first * outputs..]);
                let alone = packed.product_here(&x[first * inputs..(first + 1) * inputs]);
                prop_assert_eq!(&alone[..], &all[first * outputs..(first + 1) * outputs]);
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let [y, other] = pool.install(|| PackedMatrix::products([&packed, &packed], &x));
                    prop_assert_eq!(&y, &all);
                    prop_assert_eq!(&other, &all);
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let error = |format, bytes: usize, inputs, outputs| {
            let found =
                PackedMatrix::from_blocks(format, &vec![0; bytes], inputs, outputs, Activations::Rounded);
            found.unwrap_err().to_string()
        };
        assert_eq!(
            error(BlockFormat::Q4_K, 0, 576, 3),
            "576 values are not whole blocks of Q4_K, which has 256 values a block"
        );
        assert_eq!(error(BlockFormat::Q8_0, 35, 32, 1), "32 values of Q8_0 take 34 bytes, but there are 35");
        assert_eq!(error(BlockFormat::Q8_0, 34, 32, 2), "64 values of Q8_0 take 68 bytes, but there are 34");
        assert_eq!(error(BlockFormat::F16, 20, 5, 1), "5 values of F16 take 10 bytes, but there are 20");
        for (inputs, outputs) in
            [(0, 3), (32, 0), (32, usize::MAX), (usize::MAX - 31, 32), (1 << 40, 1 << 40)]
        {
            let text = error(BlockFormat::Q8_0, 0, inputs, outputs);
            assert_eq!(text, format!("a matrix of {outputs} rows of {inputs} values has an impossible size"));
        }
    }
}
