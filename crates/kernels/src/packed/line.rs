//! Sixty-four bytes, aligned to a cache line: one vector of 512 bits.

/// Bytes of a line.
pub(super) const BYTES: usize = 64;

/// A cache line. Vectors of packed weights never straddle two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; BYTES]);

impl Line {
    pub(super) const ZERO: Self = Self([0; BYTES]);

    /// Writes the f32 value `index` of 16.
    #[inline(always)]
    pub(super) fn set_f32(&mut self, index: usize, value: f32) {
        self.0[4 * index..][..4].copy_from_slice(&value.to_le_bytes());
    }

    /// The f32 value `index` of 16.
    #[inline(always)]
    pub(super) fn f32(&self, index: usize) -> f32 {
        f32::from_bits(self.u32(index))
    }

    /// The four bytes `index` of 16 as one number, the first of them lowest.
    #[inline(always)]
    pub(super) fn u32(&self, index: usize) -> u32 {
        let at = 4 * index;
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    /// Writes the f16 value `index` of 32.
    pub(super) fn set_f16(&mut self, index: usize, value: half::f16) {
        self.0[2 * index..][..2].copy_from_slice(&value.to_le_bytes());
    }

    /// The f16 value `index` of 32, as f32.
    #[inline(always)]
    pub(super) fn f16(&self, index: usize) -> f32 {
        from_f16(u16::from_le_bytes([self.0[2 * index], self.0[2 * index + 1]]))
    }
}

/// The value of an f16, in operations that vectorise.
#[inline(always)]
pub(super) fn from_f16(bits: u16) -> f32 {
    /// 2^112, by which the exponents' offsets differ: it makes subnormal numbers normal.
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let finite = (f32::from_bits(rest << 13) * REBIAS).to_bits();
    // Infinity and NaN keep the largest exponent.
    let special = rest << 13 | 0x7f80_0000;
    f32::from_bits(sign | if rest < 0x7c00 { finite } else { special })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (from_f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(
                found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
                "{bits:#x}"
            );
        }
    }
}
