//! How one row of numbers is laid out in bytes.

use serde::{Deserialize, Serialize};

use crate::fp8::{E4M3_NAN, e4m3_to_f32, e8m0_scale_for, e8m0_to_f32, f32_to_e4m3};

/// Values that share one e8m0 scale.
pub const VALUES_PER_SCALE: usize = 32;

/// The layout of a row in memory and on disk, little-endian. A row is contiguous: its scales lie behind its
/// values, so that reading it touches one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum RowFormat {
    /// `width` 32-bit floats.
    F32,
    /// `width` 16-bit brain floats: the upper half of an `f32`, rounded to nearest even.
    Bf16,
    /// `width` e4m3 codes, then one e8m0 scale per 32 of them (the last group may be shorter).
    /// A value is e4m3 · 2^(scale−127): 264 bytes for 256 values. See [`crate::fp8`].
    Fp8E4m3,
}

impl RowFormat {
    /// Bytes of one row of `width` values.
    pub const fn bytes_per_row(self, width: usize) -> usize {
        match self {
            Self::F32 => 4 * width,
            Self::Bf16 => 2 * width,
            Self::Fp8E4m3 => width + width.div_ceil(VALUES_PER_SCALE),
        }
    }

    /// Writes `values` (one row) to `bytes`.
    ///
    /// Rounding is to nearest even. In [`RowFormat::Fp8E4m3`] each group's scale is the smallest power of two
    /// that brings its largest value to 448 or below; a value that is not finite becomes NaN and does not
    /// move the scale. As in any rounding to nearest, values within half a step of the largest `f32` can
    /// round up to infinity in bf16 and fp8.
    ///
    /// # Panics
    /// If `bytes` is not [`bytes_per_row`](Self::bytes_per_row) of `values.len()`.
    pub fn encode_row(self, values: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.bytes_per_row(values.len()), "bytes of one {self} row");
        match self {
            Self::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
            Self::Bf16 => {
                for (two, &value) in bytes.chunks_exact_mut(2).zip(values) {
                    two.copy_from_slice(&f32_to_bf16(value).to_le_bytes());
                }
            }
            Self::Fp8E4m3 => {
                let (codes, scales) = bytes.split_at_mut(values.len());
                let groups = values.chunks(VALUES_PER_SCALE).zip(codes.chunks_mut(VALUES_PER_SCALE));
                for ((values, codes), scale) in groups.zip(scales) {
                    *scale = encode_group(values, codes);
                }
            }
        }
    }

    /// Reads one row from `bytes` into `values`. Every stored value is represented exactly.
    ///
    /// # Panics
    /// If `bytes` is not [`bytes_per_row`](Self::bytes_per_row) of `values.len()`.
    #[inline]
    pub fn decode_row(self, bytes: &[u8], values: &mut [f32]) {
        assert_eq!(bytes.len(), self.bytes_per_row(values.len()), "bytes of one {self} row");
        match self {
            Self::F32 => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
            Self::Bf16 => {
                for (two, value) in bytes.chunks_exact(2).zip(values) {
                    *value = bf16_to_f32(u16::from_le_bytes([two[0], two[1]]));
                }
            }
            Self::Fp8E4m3 => {
                let (codes, scales) = bytes.split_at(values.len());
                let groups = values.chunks_mut(VALUES_PER_SCALE).zip(codes.chunks(VALUES_PER_SCALE));
                for ((values, codes), &scale) in groups.zip(scales) {
                    decode_group(codes, scale, values);
                }
            }
        }
    }
}

impl std::fmt::Display for RowFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8E4m3 => "fp8e4m3",
        })
    }
}

/// Encodes up to 32 values and returns their scale.
fn encode_group(values: &[f32], codes: &mut [u8]) -> u8 {
    let finite = values.iter().map(|value| value.abs()).filter(|magnitude| magnitude.is_finite());
    let scale = e8m0_scale_for(finite.fold(0.0, f32::max));
    // Both factors are powers of two, and the product of value and factor is not rounded unless it underflows
    // far below the smallest e4m3 step; f64 also holds the inverse of the smallest scale.
    let inverse = 1.0 / f64::from(e8m0_to_f32(scale));
    for (code, &value) in codes.iter_mut().zip(values) {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        *code = if value.is_finite() {
            f32_to_e4m3((f64::from(value) * inverse) as f32)
        } else {
            sign | E4M3_NAN
        };
    }
    scale
}

#[inline]
fn decode_group(codes: &[u8], scale: u8, values: &mut [f32]) {
    let scale = e8m0_to_f32(scale);
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = e4m3_to_f32(code) * scale;
    }
}

/// The nearest bf16, ties to even; NaN stays NaN (quiet), overflow becomes infinity.
#[inline]
fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[inline]
fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FORMATS: [RowFormat; 3] = [RowFormat::F32, RowFormat::Bf16, RowFormat::Fp8E4m3];

    /// 1.875 · 2^127: from here on rounding to the three mantissa bits of e4m3 may carry to 2^128, infinity
    /// in `f32`.
    const ROUNDS_TO_FINITE: f32 = f32::from_bits(0x7f70_0000);

    fn round_trip(format: RowFormat, values: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0xa5; format.bytes_per_row(values.len())];
        format.encode_row(values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        format.decode_row(&bytes, &mut back);
        back
    }

    #[test]
    fn a_row_of_256_takes_the_published_bytes() {
        assert_eq!(FORMATS.map(|format| format.bytes_per_row(256)), [1024, 512, 264]);
        assert_eq!(RowFormat::Fp8E4m3.bytes_per_row(80), 83);
    }

    #[test]
    fn every_bf16_agrees_with_the_half_crate_both_ways() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (bf16_to_f32(bits), half::bf16::from_bits(bits));
            assert_eq!(ours.is_nan(), theirs.is_nan());
            if !ours.is_nan() {
                assert_eq!(ours.to_bits(), theirs.to_f32().to_bits());
                assert_eq!(f32_to_bf16(ours), bits);
            }
            // Everything between this value and the next: the ends, around the middle, and a spread.
            let base = u32::from(bits) << 16;
            for low in [0, 1, 0x1234, 0x7fff, 0x8000, 0x8001, 0xcafe, 0xffff] {
                let value = f32::from_bits(base | low);
                let (ours, theirs) = (f32_to_bf16(value), half::bf16::from_f32(value).to_bits());
                assert_eq!(ours, theirs, "{value:e}");
            }
        }
    }

    #[test]
    fn every_code_under_every_scale_decodes_to_their_product() {
        let mut values = [0.0; 32];
        for scale in 0..=255u8 {
            for codes in (0..=255u8).collect::<Vec<_>>().chunks(32) {
                let row = [codes, &[scale]].concat();
                RowFormat::Fp8E4m3.decode_row(&row, &mut values);
                for (&code, &value) in codes.iter().zip(&values) {
                    let exact = f64::from(e4m3_to_f32(code)) * f64::from(e8m0_to_f32(scale));
                    // Products beyond f32 (only under the largest scales) are infinite, as in IEEE
                    // arithmetic.
                    assert!(value == exact as f32 || (value.is_nan() && exact.is_nan()));
                }
            }
        }
    }

    #[test]
    fn fp8_rows_that_are_representable_survive_and_scales_lie_behind_the_values() {
        let mut row: Vec<f32> = (0..64).map(|i| e4m3_to_f32(i * 2)).collect();
        row[31] = 448.0;
        row[32..].iter_mut().for_each(|value| *value *= 2f32.powi(-20));
        row[63] = 448.0 * 2f32.powi(-20);
        assert_eq!(round_trip(RowFormat::Fp8E4m3, &row), row);
        let mut bytes = vec![0; 66];
        RowFormat::Fp8E4m3.encode_row(&row, &mut bytes);
        assert_eq!(bytes[64..], [127, 107]);
    }

    #[test]
    fn values_that_are_not_finite_become_nan_and_leave_their_neighbours_alone() {
        let mut row = vec![1.0; 40];
        (row[3], row[5], row[39]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let back = round_trip(RowFormat::Fp8E4m3, &row);
        for (i, value) in back.iter().enumerate() {
            assert!(if [3, 5, 39].contains(&i) { value.is_nan() } else { *value == 1.0 });
        }
        let back = round_trip(RowFormat::Bf16, &row);
        assert!(back[3].is_nan() && back[5] == f32::INFINITY && back[39] == f32::NEG_INFINITY);
    }

    proptest! {
        #[test]
        fn decoding_an_encoding_is_close_and_stable(bits in prop::collection::vec(any::<u32>(), 1..100)) {
            let row = bits.into_iter().map(f32::from_bits).filter(|value| value.abs() < ROUNDS_TO_FINITE);
            let row: Vec<f32> = row.collect();
            for format in FORMATS {
                let once = round_trip(format, &row);
                prop_assert_eq!(&round_trip(format, &once), &once, "a second trip changes nothing");
                for (group, back) in row.chunks(32).zip(once.chunks(32)) {
                    let largest = group.iter().fold(0f32, |a, b| a.max(b.abs()));
                    for (&value, &back) in group.iter().zip(back) {
                        let (relative, absolute) = match format {
                            RowFormat::F32 => (0.0, 0.0),
                            RowFormat::Bf16 => (2f64.powi(-8), 2f64.powi(-134)),
                            // Half a step: of the value, or of the smallest code under the group's scale.
                            RowFormat::Fp8E4m3 => {
                                (2f64.powi(-4), (f64::from(largest) * 2f64.powi(-17)).max(2f64.powi(-137)))
                            }
                        };
                        let bound = (f64::from(value).abs() * relative).max(absolute);
                        let error = (f64::from(value) - f64::from(back)).abs();
                        prop_assert!(error <= bound, "{} {} {}", format, value, back);
                    }
                }
            }
        }
    }
}
