//! How numbers lie in a GGUF file: f32, 16 bits, or blocks of 32 small integers with a common scale (ggml).

use half::{bf16, f16};

/// Values of a quantised block.
const BLOCK: usize = 32;

/// A format of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockFormat {
    F32,
    F16,
    Bf16,
    /// 32 values in 4 bits, q, with a scale d: d·(q − 8).
    Q4_0,
    /// 32 values in 4 bits, q, with a scale d and an offset m: d·q + m.
    Q4_1,
    /// 32 values in 8 bits, q, signed, with a scale d: d·q.
    Q8_0,
}

impl BlockFormat {
    /// The format that ggml numbers so.
    pub(crate) fn of_ggml(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Values and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (BLOCK, 2 + BLOCK / 2),
            Self::Q4_1 => (BLOCK, 4 + BLOCK / 2),
            Self::Q8_0 => (BLOCK, 2 + BLOCK),
        }
    }

    /// Bytes of `count` values; none when they are not whole blocks or too many.
    pub(crate) fn bytes(self, count: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        if count.is_multiple_of(values) { (count / values).checked_mul(bytes) } else { None }
    }

    /// The numbers of `data`, which is whole blocks.
    pub(crate) fn decode(self, data: &[u8]) -> Vec<f32> {
        let (values, bytes) = self.block();
        let mut numbers = Vec::with_capacity(data.len() / bytes * values);
        for block in data.chunks_exact(bytes) {
            self.decode_block(block, &mut numbers);
        }
        numbers
    }

    #[inline]
    fn decode_block(self, block: &[u8], numbers: &mut Vec<f32>) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        match self {
            Self::F32 => numbers.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
            Self::F16 => numbers.push(half(0)),
            Self::Bf16 => numbers.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
            Self::Q4_0 => {
                let scale = half(0);
                numbers.extend(nibbles(&block[2..]).map(|q| scale * (f32::from(q) - 8.0)));
            }
            Self::Q4_1 => {
                let (scale, offset) = (half(0), half(2));
                numbers.extend(nibbles(&block[4..]).map(|q| scale * f32::from(q) + offset));
            }
            Self::Q8_0 => {
                let scale = half(0);
                numbers.extend(block[2..].iter().map(|&q| scale * f32::from(i8::from_le_bytes([q]))));
            }
        }
    }
}

/// The low halves of all bytes, then the high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|byte| byte & 15).chain(bytes.iter().map(|byte| byte >> 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    #[test]
    fn blocks_by_hand() {
        // Byte i holds i as value i and 15 − i as value 16 + i.
        let packed: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let whole: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| q as f32).collect();
        let q4_0 = BlockFormat::Q4_0.decode(&[&half(0.5)[..], &packed].concat());
        assert_eq!(q4_0, whole.iter().map(|q| 0.5 * (q - 8.0)).collect::<Vec<_>>());
        let q4_1 = BlockFormat::Q4_1.decode(&[&half(0.5)[..], &half(-3.0), &packed].concat());
        assert_eq!(q4_1, whole.iter().map(|q| 0.5 * q - 3.0).collect::<Vec<_>>());
        let signed: Vec<u8> = (-16_i8..16).map(|q| q.to_le_bytes()[0]).collect();
        let q8_0 = BlockFormat::Q8_0.decode(&[&half(-2.0)[..], &signed].concat());
        assert_eq!(q8_0, (-16..16).map(|q| -2.0 * q as f32).collect::<Vec<_>>());
        assert_eq!(BlockFormat::F16.decode(&[half(1.5), half(-7.0)].concat()), [1.5, -7.0]);
        assert_eq!(BlockFormat::Bf16.decode(&bf16::from_f32(1.5).to_le_bytes()), [1.5]);
        assert_eq!(BlockFormat::F32.decode(&1.25_f32.to_le_bytes()), [1.25]);
    }

    #[test]
    fn sizes() {
        assert_eq!(BlockFormat::Q4_1.bytes(64), Some(40));
        assert_eq!(BlockFormat::Q4_1.bytes(33), None);
        assert_eq!(BlockFormat::of_ggml(14), None);
    }
}
