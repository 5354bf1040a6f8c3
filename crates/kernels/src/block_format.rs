//! The number formats of GGUF files: f32, 16 bits, or blocks of small whole numbers with a common scale (ggml).
//!
//! A value of a block is `d · s · (q − offset) + m`: q is a whole number of 2 to 8 bits, d the block's scale, s a scale
//! of its group of 16 or 32 values (1 if a block is one group) and m its group's minimum (absent in half of the
//! formats). ggml's names tell the bits (`Q4`), a minimum (`_1`) and groups with their own scales (`_K`).

pub(crate) mod numbers;
pub(crate) mod scales;

use half::{bf16, f16};

use scales::GroupScales;

/// Values of a legacy block, and of the largest group of a super-block.
pub(crate) const GROUP: usize = 32;
/// Values of a super-block.
pub(crate) const SUPER: usize = 256;

/// A format of numbers, by ggml's name.
///
/// From a file's bytes to values:
///
/// ```
/// use engram_kernels::BlockFormat;
///
/// let format = BlockFormat::from_ggml(8).expect("a format that is known");
/// assert_eq!((format.name(), format.block_values(), format.block_bytes()), ("Q8_0", 32, 34));
/// assert_eq!(format.bytes(64), Ok(68));
/// // A scale of 0.5 (f16) and the numbers 1, 1, 1, …
/// let block = [&[0x00, 0x38][..], &[1; 32]].concat();
/// assert_eq!(format.dequantize(&block)?, vec![0.5; 32]);
/// # Ok::<(), engram_kernels::BlockError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "these are ggml's names, which users know from file names")]
#[allow(missing_docs, reason = "the names say all that the table in `shape` does not")]
pub enum BlockFormat {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
}

/// Errors of bytes that do not fit a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// A row does not consist of whole blocks.
    #[error(
        "{values} values are not whole blocks of {}, which has {} values a block", .format.name(), .format.block_values()
    )]
    Values {
        /// The format.
        format: BlockFormat,
        /// Number of values.
        values: usize,
    },
    /// The number of bytes does not match the number of values.
    #[error("{values} values of {} take {expected} bytes, but there are {found}", .format.name())]
    Bytes {
        /// The format.
        format: BlockFormat,
        /// Number of values.
        values: usize,
        /// Bytes that these need.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// The bytes are not whole blocks.
    #[error(
        "{found} bytes are not whole blocks of {}, which has {} bytes a block", .format.name(), .format.block_bytes()
    )]
    Partial {
        /// The format.
        format: BlockFormat,
        /// Bytes found.
        found: usize,
    },
    /// A size of a matrix is 0, or their product overflows.
    #[error("a matrix of {outputs} rows of {inputs} values has an impossible size")]
    Shape {
        /// Values of a row.
        inputs: usize,
        /// Rows.
        outputs: usize,
    },
}

impl BlockFormat {
    /// All formats.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::IQ4_NL,
        Self::IQ4_XS,
    ];

    /// ggml's number and name; values and bytes of a block.
    const fn shape(self) -> (u32, &'static str, usize, usize) {
        match self {
            Self::F32 => (0, "F32", 1, 4),
            Self::F16 => (1, "F16", 1, 2),
            Self::BF16 => (30, "BF16", 1, 2),
            // d, numbers; with d, m, numbers in `_1`.
            Self::Q4_0 => (2, "Q4_0", GROUP, 2 + 16),
            Self::Q4_1 => (3, "Q4_1", GROUP, 4 + 16),
            // The fifth bits lie between scales and numbers.
            Self::Q5_0 => (6, "Q5_0", GROUP, 2 + 4 + 16),
            Self::Q5_1 => (7, "Q5_1", GROUP, 4 + 4 + 16),
            Self::Q8_0 => (8, "Q8_0", GROUP, 2 + 32),
            // Scales and minima, numbers, d, m.
            Self::Q2_K => (10, "Q2_K", SUPER, 16 + 64 + 4),
            // Third bits, numbers, scales, d.
            Self::Q3_K => (11, "Q3_K", SUPER, 32 + 64 + 12 + 2),
            // d, m, scales and minima, numbers.
            Self::Q4_K => (12, "Q4_K", SUPER, 4 + 12 + 128),
            // d, m, scales and minima, fifth bits, numbers.
            Self::Q5_K => (13, "Q5_K", SUPER, 4 + 12 + 32 + 128),
            // Low four bits, high two bits, scales, d.
            Self::Q6_K => (14, "Q6_K", SUPER, 128 + 64 + 16 + 2),
            Self::IQ4_NL => (20, "IQ4_NL", GROUP, 2 + 16),
            // d, high and low bits of scales, numbers.
            Self::IQ4_XS => (23, "IQ4_XS", SUPER, 2 + 2 + 4 + 128),
        }
    }

    /// The format with this number in a GGUF file; none if it is unknown.
    pub fn from_ggml(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.ggml() == number)
    }

    /// Its number in a GGUF file.
    pub const fn ggml(self) -> u32 {
        self.shape().0
    }

    /// ggml's name, such as `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.shape().1
    }

    /// Values of a block.
    pub const fn block_values(self) -> usize {
        self.shape().2
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.shape().3
    }

    /// Whether values are whole numbers with scales, rather than floats.
    pub const fn is_quantized(self) -> bool {
        self.block_values() > 1
    }

    /// Bytes of `values` values.
    ///
    /// # Errors
    /// When they are not whole blocks, or their size overflows.
    pub fn bytes(self, values: usize) -> Result<usize, BlockError> {
        let blocks = values / self.block_values();
        let bytes = blocks.checked_mul(self.block_bytes());
        bytes
            .filter(|_| values.is_multiple_of(self.block_values()))
            .ok_or(BlockError::Values { format: self, values })
    }

    /// The values of `bytes`, bit for bit as in ggml's `dequantize_row`.
    ///
    /// # Errors
    /// When the bytes are not whole blocks.
    pub fn dequantize(self, bytes: &[u8]) -> Result<Vec<f32>, BlockError> {
        if !bytes.len().is_multiple_of(self.block_bytes()) {
            return Err(BlockError::Partial { format: self, found: bytes.len() });
        }
        let mut values = vec![0.0; bytes.len() / self.block_bytes() * self.block_values()];
        self.dequantize_into(bytes, &mut values)?;
        Ok(values)
    }

    /// Like [`dequantize`](Self::dequantize), written to `values`.
    ///
    /// # Errors
    /// When `values` is not whole blocks or does not match the number of bytes.
    pub fn dequantize_into(self, bytes: &[u8], values: &mut [f32]) -> Result<(), BlockError> {
        self.check(bytes, values.len())?;
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(values.chunks_exact_mut(self.block_values()));
        match self {
            Self::F32 => {
                values.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b))
            }
            Self::F16 => values.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = half(*b).to_f32()),
            Self::BF16 => {
                values
                    .iter_mut()
                    .zip(bytes.as_chunks().0)
                    .for_each(|(v, b)| *v = bf16::from_le_bytes(*b).to_f32());
            }
            _ => blocks.for_each(|(block, values)| self.dequantize_block(block, values)),
        }
        Ok(())
    }

    /// Checks that `bytes` hold `values` values.
    pub(crate) fn check(self, bytes: &[u8], values: usize) -> Result<(), BlockError> {
        let (expected, found) = (self.bytes(values)?, bytes.len());
        if expected == found {
            return Ok(());
        }
        Err(BlockError::Bytes { format: self, values, expected, found })
    }

    /// One block of a quantised format.
    fn dequantize_block(self, block: &[u8], values: &mut [f32]) {
        let mut numbers = [0; SUPER];
        let numbers = &mut numbers[..self.block_values()];
        self.numbers(block, numbers);
        let (scales, size) = (self.scales(block), self.group());
        let groups = numbers.chunks_exact(size).zip(values.chunks_exact_mut(size)).enumerate();
        for (group, (numbers, values)) in groups {
            let scale = scales.d.to_f32() * f32::from(scales.scales[group]);
            let each = numbers.iter().zip(values);
            // Without a minimum nothing is added: −0 + 0 would be 0.
            match scales.minimum(group) {
                Some(min) => each.for_each(|(&q, value)| *value = scale * f32::from(self.number(q)) + min),
                None => each.for_each(|(&q, value)| *value = scale * f32::from(self.number(q))),
            }
        }
    }

    /// The number that a stored index or number represents.
    #[inline(always)]
    fn number(self, stored: u8) -> i16 {
        match self {
            Self::IQ4_NL | Self::IQ4_XS => i16::from(numbers::IQ4[usize::from(stored & 15)]),
            _ => i16::from(stored) - self.offset(),
        }
    }

    /// The offset subtracted from a stored number. Signed bytes are stored with their highest bit flipped, by
    /// [`numbers`](Self::numbers). Numbers of a lookup table have the same offset where they are looked up as bytes.
    pub(crate) const fn offset(self) -> i16 {
        match self {
            Self::Q8_0 | Self::IQ4_NL | Self::IQ4_XS => 128,
            Self::Q6_K => 32,
            Self::Q5_0 => 16,
            Self::Q4_0 => 8,
            Self::Q3_K => 4,
            _ => 0,
        }
    }

    /// Values that share a scale.
    pub(crate) const fn group(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q2_K | Self::Q3_K | Self::Q6_K => 16,
            _ => GROUP,
        }
    }

    /// The stored numbers of a block, in order.
    ///
    /// # Panics
    /// When the format is not quantised, or a slice is not of one block.
    pub(crate) fn numbers(self, block: &[u8], numbers: &mut [u8]) {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => unreachable!("{} has no blocks", self.name()),
            Self::Q4_0 | Self::IQ4_NL => numbers::nibbles(&block[2..], numbers),
            Self::Q4_1 => numbers::nibbles(&block[4..], numbers),
            Self::Q5_0 => numbers::q5(&block[2..6], &block[6..], numbers),
            Self::Q5_1 => numbers::q5(&block[4..8], &block[8..], numbers),
            Self::Q8_0 => numbers.iter_mut().zip(&block[2..]).for_each(|(q, &byte)| *q = byte ^ 0x80),
            Self::Q2_K => numbers::pairs(&block[16..80], numbers),
            Self::Q3_K => numbers::q3_k(&block[..32], &block[32..96], numbers),
            Self::Q4_K => numbers::q4_k(&block[16..], numbers),
            Self::Q5_K => numbers::q5_k(&block[16..48], &block[48..], numbers),
            Self::Q6_K => numbers::q6_k(&block[..128], &block[128..192], numbers),
            Self::IQ4_XS => numbers
                .chunks_exact_mut(GROUP)
                .zip(block[8..].chunks_exact(16))
                .for_each(|(numbers, bytes)| numbers::nibbles(bytes, numbers)),
        }
    }

    /// The scales of a block.
    ///
    /// # Panics
    /// As [`numbers`](Self::numbers).
    pub(crate) fn scales(self, block: &[u8]) -> GroupScales {
        let at = |at: usize| half([block[at], block[at + 1]]);
        match self {
            Self::F32 | Self::F16 | Self::BF16 => unreachable!("{} has no blocks", self.name()),
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::IQ4_NL => GroupScales::one(at(0)),
            Self::Q4_1 | Self::Q5_1 => GroupScales::with_minimum(at(0), at(2)),
            Self::Q2_K => GroupScales::q2_k(at(80), at(82), &block[..16]),
            Self::Q3_K => GroupScales::q3_k(at(108), &block[96..108]),
            Self::Q4_K | Self::Q5_K => GroupScales::q4_k(at(0), at(2), &block[4..16]),
            Self::Q6_K => GroupScales::q6_k(at(208), &block[192..208]),
            Self::IQ4_XS => GroupScales::iq4_xs(at(0), &block[2..8]),
        }
    }
}

fn half(bytes: [u8; 2]) -> f16 {
    f16::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_and_names_are_ggmls() {
        let known = BlockFormat::ALL.map(|format| (format.ggml(), format.name(), format.block_bytes()));
        let ggml = [
            (0, "F32", 4),
            (1, "F16", 2),
            (30, "BF16", 2),
            (2, "Q4_0", 18),
            (3, "Q4_1", 20),
            (6, "Q5_0", 22),
            (7, "Q5_1", 24),
            (8, "Q8_0", 34),
            (10, "Q2_K", 84),
            (11, "Q3_K", 110),
            (12, "Q4_K", 144),
            (13, "Q5_K", 176),
            (14, "Q6_K", 210),
            (20, "IQ4_NL", 18),
            (23, "IQ4_XS", 136),
        ];
        assert_eq!(known, ggml);
        assert_eq!(BlockFormat::from_ggml(9), None);
        assert_eq!(BlockFormat::from_ggml(14), Some(BlockFormat::Q6_K));
    }

    #[test]
    fn blocks_by_hand() {
        // Byte i holds i as value i and 15 − i as value 16 + i.
        let packed: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let whole: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| q as f32).collect();
        let half = |value: f32| f16::from_f32(value).to_le_bytes();
        let q4_0 = BlockFormat::Q4_0.dequantize(&[&half(0.5)[..], &packed].concat()).unwrap();
        assert_eq!(q4_0, whole.iter().map(|q| 0.5 * (q - 8.0)).collect::<Vec<_>>());
        let q4_1 = BlockFormat::Q4_1.dequantize(&[&half(0.5)[..], &half(-3.0), &packed].concat()).unwrap();
        assert_eq!(q4_1, whole.iter().map(|q| 0.5 * q - 3.0).collect::<Vec<_>>());
        let signed: Vec<u8> = (-16_i8..16).map(|q| q.to_le_bytes()[0]).collect();
        let q8_0 = BlockFormat::Q8_0.dequantize(&[&half(-2.0)[..], &signed].concat()).unwrap();
        assert_eq!(q8_0, (-16..16).map(|q| -2.0 * q as f32).collect::<Vec<_>>());
        assert_eq!(BlockFormat::F16.dequantize(&[half(1.5), half(-7.0)].concat()).unwrap(), [1.5, -7.0]);
        assert_eq!(BlockFormat::BF16.dequantize(&bf16::from_f32(1.5).to_le_bytes()).unwrap(), [1.5]);
        assert_eq!(BlockFormat::F32.dequantize(&1.25_f32.to_le_bytes()).unwrap(), [1.25]);
    }

    #[test]
    fn errors_say_what_does_not_fit() {
        let error = |result: Result<Vec<f32>, BlockError>| result.unwrap_err().to_string();
        assert_eq!(
            error(BlockFormat::Q4_K.dequantize(&[0; 145])),
            "145 bytes are not whole blocks of Q4_K, which has 144 bytes a block"
        );
        assert_eq!(
            BlockFormat::Q6_K.bytes(576).unwrap_err().to_string(),
            "576 values are not whole blocks of Q6_K, which has 256 values a block"
        );
        assert_eq!(
            BlockFormat::Q8_0.dequantize_into(&[0; 34], &mut [0.0; 64]).unwrap_err().to_string(),
            "64 values of Q8_0 take 68 bytes, but there are 34"
        );
        assert!(BlockFormat::F32.bytes(usize::MAX).is_err());
    }

    proptest! {
        /// No bytes make it panic, and the number of values is right.
        #[test]
        fn any_bytes_are_values_or_an_error(
            format in prop::sample::select(BlockFormat::ALL.to_vec()),
            bytes in prop::collection::vec(any::<u8>(), 0..700),
        ) {
            match format.dequantize(&bytes) {
                Ok(values) => prop_assert_eq!(format.bytes(values.len()), Ok(bytes.len())),
                Err(error) => prop_assert_eq!(error, BlockError::Partial { format, found: bytes.len() }),
            }
        }
    }
}
