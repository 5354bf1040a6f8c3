//! The scales of ggml's blocks.

use half::f16;

/// Maximum number of groups in a super-block.
pub(crate) const GROUPS: usize = 16;

/// A block's scale and minimum, and the factors of its groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GroupScales {
    pub(crate) d: f16,
    pub(crate) minimum: Minimum,
    /// Scale of each group; 1 if a block is one group.
    pub(crate) scales: [i8; GROUPS],
}

/// The addend of a group's values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Minimum {
    None,
    /// The block's minimum.
    Added(f16),
    /// The block's minimum times the group's factor, subtracted.
    Subtracted(f16, [u8; GROUPS]),
}

impl GroupScales {
    /// For a block that is one group.
    pub(crate) fn one(d: f16) -> Self {
        Self { d, minimum: Minimum::None, scales: [1; GROUPS] }
    }

    /// For a block that is one group with a minimum.
    pub(crate) fn with_minimum(d: f16, minimum: f16) -> Self {
        Self { d, minimum: Minimum::Added(minimum), scales: [1; GROUPS] }
    }

    /// A nibble each: scale and minimum.
    pub(crate) fn q2_k(d: f16, minimum: f16, bytes: &[u8]) -> Self {
        let scales = std::array::from_fn(|group| (bytes[group] & 15) as i8);
        let minima = std::array::from_fn(|group| bytes[group] >> 4);
        Self { d, minimum: Minimum::Subtracted(minimum, minima), scales }
    }

    /// Six bits, 32 too large: nibbles in the first eight bytes, pairs of high bits in the last four.
    pub(crate) fn q3_k(d: f16, bytes: &[u8]) -> Self {
        let scales = std::array::from_fn(|group| {
            let low = bytes[group % 8] >> (4 * (group / 8)) & 15;
            let high = bytes[8 + group % 4] >> (2 * (group / 4)) & 3;
            (low | high << 4) as i8 - 32
        });
        Self { d, minimum: Minimum::None, scales }
    }

    /// Six bits each, of eight scales and eight minima. The first four of both fill the low bits of eight bytes; the
    /// others have nibbles in the last four bytes and their high bits above the first four's.
    pub(crate) fn q4_k(d: f16, minimum: f16, bytes: &[u8]) -> Self {
        let (mut scales, mut minima) = ([0; GROUPS], [0; GROUPS]);
        for group in 0..4 {
            let (scale, minimum, both) = (bytes[group], bytes[group + 4], bytes[group + 8]);
            scales[group] = (scale & 63) as i8;
            minima[group] = minimum & 63;
            scales[group + 4] = (both & 15 | scale >> 6 << 4) as i8;
            minima[group + 4] = both >> 4 | minimum >> 6 << 4;
        }
        Self { d, minimum: Minimum::Subtracted(minimum, minima), scales }
    }

    /// Signed bytes.
    pub(crate) fn q6_k(d: f16, bytes: &[u8]) -> Self {
        Self { d, minimum: Minimum::None, scales: std::array::from_fn(|group| bytes[group] as i8) }
    }

    /// Six bits, 32 too large: pairs of high bits in the first two bytes, then nibbles.
    pub(crate) fn iq4_xs(d: f16, bytes: &[u8]) -> Self {
        let mut scales = [0; GROUPS];
        for (group, scale) in scales[..8].iter_mut().enumerate() {
            let low = bytes[2 + group / 2] >> (4 * (group % 2)) & 15;
            let high = bytes[group / 4] >> (2 * (group % 4)) & 3;
            *scale = (low | high << 4) as i8 - 32;
        }
        Self { d, minimum: Minimum::None, scales }
    }

    /// The addend of a group's values.
    pub(crate) fn minimum(&self, group: usize) -> Option<f32> {
        match self.minimum {
            Minimum::None => None,
            Minimum::Added(minimum) => Some(minimum.to_f32()),
            Minimum::Subtracted(minimum, minima) => Some(-(minimum.to_f32() * f32::from(minima[group]))),
        }
    }
}
