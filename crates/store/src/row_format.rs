//! How one row of numbers is laid out in bytes.

use crate::error::{Result, StoreError};
use crate::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::fp8::{E4M3_MAX, E4M3_NAN, e4m3_to_f32, e8m0_scale_for, e8m0_to_f32, f32_to_e4m3};
use crate::grouped_int::{decode_int4, decode_int8, encode_int4, encode_int8};
use crate::simd::vectorized;

/// Values that share one scale, in the formats whose rows have scales. A row's last group may be shorter.
pub const VALUES_PER_SCALE: usize = 32;

/// The layout of a row in memory and on disk, little-endian. A row is contiguous: its scales lie behind its
/// values, so that reading it touches one place.
///
/// | format | bytes of a row | 256 values | 160 values |
/// |---|---|---|---|
/// | `f32` | 4·width | 1024 | 640 |
/// | `bf16`, `f16` | 2·width | 512 | 320 |
/// | `int8` | width + 2·⌈width/32⌉ | 272 | 170 |
/// | `fp8e4m3` | width + ⌈width/32⌉ | 264 | 165 |
/// | `fp8e4m3:SCALE` | width | 256 | 160 |
/// | `int4` | ⌈width/2⌉ + 2·⌈width/32⌉ | 144 | 90 |
///
/// The names are those of [`Display`](std::fmt::Display), [`FromStr`](std::str::FromStr) and serde.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
#[non_exhaustive]
pub enum RowFormat {
    /// `width` 32-bit floats.
    F32,
    /// `width` 16-bit brain floats: the upper half of an `f32`, rounded to nearest even.
    Bf16,
    /// `width` 16-bit floats of IEEE 754: three more bits of precision than bf16, up to 65504.
    F16,
    /// `width` e4m3 codes, then one e8m0 scale per 32 of them. A value is e4m3 · 2^(scale−127).
    /// DeepSeek-V4.1-Flash's format; see [`crate::fp8`].
    Fp8E4m3,
    /// `width` e4m3 codes, and one scale for the whole table. A value is e4m3 · scale, rounded to `f32`.
    /// Qwen3.8-Flash-Next's format.
    Fp8E4m3OneScale(TableScale),
    /// `width` signed bytes from −127 to 127, then one bf16 scale per 32 of them. A value is code · scale.
    Int8,
    /// Codes from −8 to 7, two a byte, then one bf16 scale per 32 of them. A value is code · scale.
    /// In each group of n, the lower halves of its ⌈n/2⌉ bytes hold the first ⌈n/2⌉ codes, the upper halves
    /// the rest.
    Int4,
}

/// The scale that all values of a table share: finite and above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TableScale(f32);

// A scale is never NaN, so that equality is total; and never zero, so that equal scales have equal bits.
impl Eq for TableScale {}

impl std::hash::Hash for TableScale {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

impl TableScale {
    /// The scale `scale`.
    ///
    /// # Errors
    /// Unless it is finite and above 0.
    pub fn new(scale: f32) -> Result<Self> {
        if scale > 0.0 && scale.is_finite() {
            Ok(Self(scale))
        } else {
            Err(StoreError::setting("a table's scale", scale, "finite and above 0"))
        }
    }

    /// The scale under which `largest`, the largest magnitude of a table, becomes the largest e4m3 value;
    /// 1 for a table of zeros. A largest magnitude that is not finite is taken as the largest `f32`.
    pub fn for_largest(largest: f32) -> Self {
        let largest = if largest.is_finite() { largest.abs() } else { f32::MAX };
        Self(if largest == 0.0 { 1.0 } else { (largest / E4M3_MAX).max(f32::MIN_POSITIVE) })
    }

    /// The scale as a number.
    pub fn get(self) -> f32 {
        self.0
    }
}

impl RowFormat {
    /// Bytes of one row of `width` values.
    pub const fn bytes_per_row(self, width: usize) -> usize {
        let scales = width.div_ceil(VALUES_PER_SCALE);
        match self {
            Self::F32 => 4 * width,
            Self::Bf16 | Self::F16 => 2 * width,
            Self::Fp8E4m3 => width + scales,
            Self::Fp8E4m3OneScale(_) => width,
            Self::Int8 => width + 2 * scales,
            Self::Int4 => width.div_ceil(2) + 2 * scales,
        }
    }

    /// Writes `values` (one row) to `bytes`.
    ///
    /// Rounding is to nearest even. In [`RowFormat::Fp8E4m3`] each group's scale is the smallest power of two
    /// that brings its largest value to 448 or below; a value that is not finite becomes NaN and does not
    /// move the scale. As in any rounding to nearest, values within half a step of the largest `f32` can
    /// round up to infinity in bf16, fp8 and the integers, and values from 65520 on in f16. In
    /// [`RowFormat::Fp8E4m3OneScale`] a value too large for the table's scale becomes NaN, not the largest
    /// code. In [`RowFormat::Int8`] and [`RowFormat::Int4`] a value that is not finite makes its group NaN.
    ///
    /// # Panics
    /// If `bytes` is not [`bytes_per_row`](Self::bytes_per_row) of `values.len()`.
    pub fn encode_row(self, values: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.bytes_per_row(values.len()), "bytes of one {self} row");
        match self {
            Self::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
            Self::Bf16 => encode_16_bits(values, bytes, f32_to_bf16),
            Self::F16 => encode_16_bits(values, bytes, f32_to_f16),
            Self::Fp8E4m3 => {
                let (codes, scales) = bytes.split_at_mut(values.len());
                let groups = values.chunks(VALUES_PER_SCALE).zip(codes.chunks_mut(VALUES_PER_SCALE));
                for ((values, codes), scale) in groups.zip(scales) {
                    *scale = encode_e4m3_group(values, codes);
                }
            }
            Self::Fp8E4m3OneScale(TableScale(scale)) => {
                for (code, &value) in bytes.iter_mut().zip(values) {
                    *code = e4m3_or_nan(value / scale);
                }
            }
            Self::Int8 => {
                let (codes, scales) = bytes.split_at_mut(values.len());
                let groups = values.chunks(VALUES_PER_SCALE).zip(codes.chunks_mut(VALUES_PER_SCALE));
                for ((values, codes), scale) in groups.zip(scales.chunks_exact_mut(2)) {
                    scale.copy_from_slice(&encode_int8(values, codes).to_le_bytes());
                }
            }
            Self::Int4 => {
                let (codes, scales) = bytes.split_at_mut(values.len().div_ceil(2));
                let groups = values.chunks(VALUES_PER_SCALE).zip(codes.chunks_mut(VALUES_PER_SCALE / 2));
                for ((values, codes), scale) in groups.zip(scales.chunks_exact_mut(2)) {
                    scale.copy_from_slice(&encode_int4(values, codes).to_le_bytes());
                }
            }
        }
    }

    /// Reads one row from `bytes` into `values`. Every stored value is represented exactly, but for the
    /// rounded product of [`RowFormat::Fp8E4m3OneScale`].
    ///
    /// # Panics
    /// If `bytes` is not [`bytes_per_row`](Self::bytes_per_row) of `values.len()`.
    pub fn decode_row(self, bytes: &[u8], values: &mut [f32]) {
        self.decode_rows(bytes, values.len(), values);
    }

    /// Reads rows of `width` that lie one after another from `bytes` into `values` \[rows, width\].
    ///
    /// # Panics
    /// If `bytes` and `values` are not whole rows, as many of each.
    pub fn decode_rows(self, bytes: &[u8], width: usize, values: &mut [f32]) {
        let row_bytes = self.bytes_per_row(width);
        let rows = values.len() / width.max(1);
        assert_eq!((rows * width, rows * row_bytes), (values.len(), bytes.len()), "rows of {self}");
        self.decode_loop(Consecutive { bytes, row_bytes, width, values });
    }

    /// Runs `work` with this format's decoder compiled into it, for the widest vectors that the machine has:
    /// both choices are made once for all rows of a batch.
    #[inline]
    pub(crate) fn decode_loop(self, work: impl DecodeLoop) {
        match self {
            Self::F32 => run_vectorized(work, decode_f32),
            Self::Bf16 => run_vectorized(work, decode_bf16),
            Self::F16 => run_vectorized(work, decode_f16),
            Self::Fp8E4m3 => run_vectorized(work, decode_fp8_e4m3),
            Self::Fp8E4m3OneScale(TableScale(scale)) => run_vectorized(
                work,
                #[inline(always)]
                |row, values| decode_e4m3(row, scale, values),
            ),
            Self::Int8 => run_vectorized(work, decode_int8_row),
            Self::Int4 => run_vectorized(work, decode_int4_row),
        }
    }

    /// The number that stands for the format in files, and the table's scale, 0 without one.
    pub(crate) fn to_code(self) -> (u32, f32) {
        match self {
            Self::F32 => (0, 0.0),
            Self::Bf16 => (1, 0.0),
            Self::Fp8E4m3 => (2, 0.0),
            Self::F16 => (3, 0.0),
            Self::Fp8E4m3OneScale(TableScale(scale)) => (4, scale),
            Self::Int8 => (5, 0.0),
            Self::Int4 => (6, 0.0),
        }
    }

    /// The format of a file's `code` and `scale`, or what is wrong with them.
    pub(crate) fn from_code(code: u32, scale: f32) -> Result<Self, String> {
        let format = match code {
            0 => Self::F32,
            1 => Self::Bf16,
            2 => Self::Fp8E4m3,
            3 => Self::F16,
            4 => Self::Fp8E4m3OneScale(TableScale::new(scale).map_err(|error| error.to_string())?),
            5 => Self::Int8,
            6 => Self::Int4,
            _ => return Err(format!("unknown row format {code}; use the program that wrote it")),
        };
        if format.to_code().1 == scale {
            Ok(format)
        } else {
            Err(format!("a table's scale of {scale}, but {format} has none; use the program that wrote it"))
        }
    }
}

impl std::fmt::Display for RowFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8E4m3 => "fp8e4m3",
            Self::Fp8E4m3OneScale(TableScale(scale)) => return write!(f, "fp8e4m3:{scale}"),
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

impl std::str::FromStr for RowFormat {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self> {
        const RULE: &str =
            "f32, bf16, f16, fp8e4m3, int8, int4, or fp8e4m3:SCALE with a finite scale above 0";
        Ok(match name {
            "f32" => Self::F32,
            "bf16" => Self::Bf16,
            "f16" => Self::F16,
            "fp8e4m3" => Self::Fp8E4m3,
            "int8" => Self::Int8,
            "int4" => Self::Int4,
            _ => {
                let scale = name.strip_prefix("fp8e4m3:").and_then(|scale| scale.parse().ok());
                let scale = scale.and_then(|scale| TableScale::new(scale).ok());
                Self::Fp8E4m3OneScale(scale.ok_or_else(|| StoreError::setting("row format", name, RULE))?)
            }
        })
    }
}

impl TryFrom<String> for RowFormat {
    type Error = StoreError;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<RowFormat> for String {
    fn from(format: RowFormat) -> Self {
        format.to_string()
    }
}

/// A loop over rows that is compiled once for every format's decoder. What it calls must be inlined to gain
/// from the machine's vectors.
pub(crate) trait DecodeLoop {
    fn run(self, decode: impl Fn(&[u8], &mut [f32]));
}

struct Consecutive<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    width: usize,
    values: &'a mut [f32],
}

impl DecodeLoop for Consecutive<'_> {
    #[inline(always)]
    fn run(self, decode: impl Fn(&[u8], &mut [f32])) {
        let rows = self.bytes.chunks_exact(self.row_bytes.max(1));
        for (row, values) in rows.zip(self.values.chunks_exact_mut(self.width.max(1))) {
            decode(row, values);
        }
    }
}

fn run_vectorized(work: impl DecodeLoop, decode: impl Fn(&[u8], &mut [f32])) {
    vectorized(
        #[inline(always)]
        || work.run(decode),
    );
}

#[inline(always)]
fn decode_f32(row: &[u8], values: &mut [f32]) {
    bytemuck::cast_slice_mut(values).copy_from_slice(row);
}

#[inline(always)]
fn decode_16_bits(row: &[u8], values: &mut [f32], decode: impl Fn(u16) -> f32) {
    for (value, two) in values.iter_mut().zip(row.as_chunks().0) {
        *value = decode(u16::from_le_bytes(*two));
    }
}

#[inline(always)]
fn decode_bf16(row: &[u8], values: &mut [f32]) {
    decode_16_bits(row, values, bf16_to_f32);
}

#[inline(always)]
fn decode_f16(row: &[u8], values: &mut [f32]) {
    decode_16_bits(row, values, f16_to_f32);
}

#[inline(always)]
fn decode_e4m3(codes: &[u8], scale: f32, values: &mut [f32]) {
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = e4m3_to_f32(code) * scale;
    }
}

/// Decodes a row's groups. A row holds codes, `CODES` bytes per full group, then scales of `SCALE` bytes.
///
/// Groups are slices, not arrays: loops whose length the compiler knows it unrolls before it looks for vectors
/// to use, and rows of fp8 then take seven times as long.
#[inline(always)]
fn decode_groups<const CODES: usize, const SCALE: usize>(
    row: &[u8],
    values: &mut [f32],
    decode: impl Fn(&[u8], [u8; SCALE], &mut [f32]),
) {
    let scales = SCALE * values.len().div_ceil(VALUES_PER_SCALE);
    let (codes, scales) = row.split_at(row.len() - scales);
    let groups = values.chunks_mut(VALUES_PER_SCALE).zip(codes.chunks(CODES));
    for ((values, codes), &scale) in groups.zip(scales.as_chunks().0) {
        decode(codes, scale, values);
    }
}

#[inline(always)]
fn decode_fp8_e4m3(row: &[u8], values: &mut [f32]) {
    decode_groups::<VALUES_PER_SCALE, 1>(
        row,
        values,
        #[inline(always)]
        |codes, [scale], values| decode_e4m3(codes, e8m0_to_f32(scale), values),
    );
}

#[inline(always)]
fn decode_int8_row(row: &[u8], values: &mut [f32]) {
    decode_groups::<VALUES_PER_SCALE, 2>(
        row,
        values,
        #[inline(always)]
        |codes, scale, values| decode_int8(codes, u16::from_le_bytes(scale), values),
    );
}

#[inline(always)]
fn decode_int4_row(row: &[u8], values: &mut [f32]) {
    decode_groups::<{ VALUES_PER_SCALE / 2 }, 2>(
        row,
        values,
        #[inline(always)]
        |codes, scale, values| decode_int4(codes, u16::from_le_bytes(scale), values),
    );
}

fn encode_16_bits(values: &[f32], bytes: &mut [u8], encode: impl Fn(f32) -> u16) {
    for (two, &value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *two = encode(value).to_le_bytes();
    }
}

/// Encodes up to 32 values and returns their scale.
fn encode_e4m3_group(values: &[f32], codes: &mut [u8]) -> u8 {
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

/// The nearest e4m3 code, NaN where the nearest would be beyond the largest.
fn e4m3_or_nan(value: f32) -> u8 {
    /// Halfway between 448 and the step after it.
    const ROUNDS_TO_LARGEST: f32 = 464.0;
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.abs() > ROUNDS_TO_LARGEST { sign | E4M3_NAN } else { f32_to_e4m3(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn formats() -> [RowFormat; 7] {
        let scale = TableScale::new(0.000_199).unwrap();
        let one_scale = RowFormat::Fp8E4m3OneScale(scale);
        [
            RowFormat::F32,
            RowFormat::Bf16,
            RowFormat::F16,
            RowFormat::Fp8E4m3,
            one_scale,
            RowFormat::Int8,
            RowFormat::Int4,
        ]
    }

    /// 1.875 · 2^127: from here on rounding to the three mantissa bits of e4m3 may carry to 2^128, infinity
    /// in `f32`.
    const ROUNDS_TO_FINITE: f32 = f32::from_bits(0x7f70_0000);

    fn encoded(format: RowFormat, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0xa5; format.bytes_per_row(values.len())];
        format.encode_row(values, &mut bytes);
        bytes
    }

    fn round_trip(format: RowFormat, values: &[f32]) -> Vec<f32> {
        let mut back = vec![0.0; values.len()];
        format.decode_row(&encoded(format, values), &mut back);
        back
    }

    #[test]
    fn rows_take_the_published_bytes() {
        let bytes = |width| formats().map(|format| format.bytes_per_row(width));
        assert_eq!(bytes(256), [1024, 512, 512, 264, 256, 272, 144]);
        assert_eq!(bytes(160), [640, 320, 320, 165, 160, 170, 90]);
        assert_eq!(bytes(33), [132, 66, 66, 35, 33, 37, 21]);
    }

    #[test]
    fn names_and_codes_come_back_and_others_are_refused() {
        for format in formats() {
            assert_eq!(format.to_string().parse::<RowFormat>().unwrap(), format);
            let json = serde_json::to_string(&format).unwrap();
            assert_eq!(serde_json::from_str::<RowFormat>(&json).unwrap(), format);
            let (code, scale) = format.to_code();
            assert_eq!(RowFormat::from_code(code, scale), Ok(format));
        }
        assert_eq!(serde_json::to_string(&RowFormat::Fp8E4m3).unwrap(), "\"fp8e4m3\"");
        for wrong in ["", "F32", "int5", "fp8e4m3:", "fp8e4m3:0", "fp8e4m3:-1", "fp8e4m3:nan", "fp8e4m3:inf"]
        {
            let said = wrong.parse::<RowFormat>().unwrap_err().to_string();
            assert!(said.starts_with(&format!("row format is {wrong}, but must be f32, bf16")), "{said}");
        }
        assert!(RowFormat::from_code(7, 0.0).unwrap_err().contains("unknown row format 7"));
        assert!(RowFormat::from_code(4, f32::NAN).unwrap_err().contains("scale is NaN"));
        assert!(RowFormat::from_code(5, 1.0).unwrap_err().contains("int8 has none"));
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
        assert_eq!(encoded(RowFormat::Fp8E4m3, &row)[64..], [127, 107]);
    }

    #[test]
    fn golden_bytes_of_a_row_of_34() {
        // Two groups, the second of two values: 1 and −0.5, and 3 at the end of the first.
        let mut row = [0.0; 34];
        (row[0], row[1], row[31], row[32], row[33]) = (1.0, -0.5, 3.0, -0.5, 1.0);
        let zeros = |count: usize| vec![0u8; count];
        let one_scale = RowFormat::Fp8E4m3OneScale(TableScale::new(0.5).unwrap());
        let f16 = [&[0x00, 0x3c, 0x00, 0xb8][..], &zeros(58), &[0x00, 0x42, 0x00, 0xb8, 0x00, 0x3c]].concat();
        assert_eq!(encoded(RowFormat::F16, &row), f16);
        let fp8 = [&[0x40, 0xb8][..], &zeros(29), &[0x4c, 0xb8, 0x40]].concat();
        assert_eq!(encoded(one_scale, &row), fp8);
        // Scales 3/127 → bf16 0x3cc2 = 0.023682 and 1/127 → 0x3c01 = 0.007874; codes 42, −21, 127; −64, 127.
        let int8 = [&[42, 235][..], &zeros(29), &[127, 192, 127, 0xc2, 0x3c, 0x01, 0x3c]].concat();
        assert_eq!(encoded(RowFormat::Int8, &row), int8);
        // Scales −3/8 = 0xbec0 and −1/8 = 0xbe00; codes −3, 1 in lower halves, −8 in the last upper half;
        // 4 and −8 share the last byte.
        let int4 = [&[0x0d, 0x01][..], &zeros(13), &[0x80, 0x84, 0xc0, 0xbe, 0x00, 0xbe]].concat();
        assert_eq!(encoded(RowFormat::Int4, &row), int4);
    }

    #[test]
    fn values_next_to_the_largest_round_to_infinity_and_not_to_another_number() {
        for format in [RowFormat::Bf16, RowFormat::Fp8E4m3, RowFormat::Int4] {
            let sign = |sign: f32| round_trip(format, &[f32::MAX * sign])[0] * sign;
            assert!([sign(1.0), sign(-1.0)].iter().all(|value| !value.is_finite()), "{format}");
        }
        assert_eq!(round_trip(RowFormat::Int4, &[-3.3961775e38]), [f32::NEG_INFINITY]);
    }

    #[test]
    fn values_that_are_not_finite_never_become_numbers() {
        let mut row = vec![1.0; 72];
        (row[3], row[5], row[39]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        for format in formats() {
            for (i, back) in round_trip(format, &row).into_iter().enumerate() {
                let group = matches!(format, RowFormat::Int8 | RowFormat::Int4);
                // 1 is too large for a table's scale of 0.000199.
                let lost = matches!(format, RowFormat::Fp8E4m3OneScale(_)) || (group && i < 64);
                let kept = if row[i].is_finite() { (back - 1.0).abs() < 1e-3 } else { !back.is_finite() };
                assert!(if lost { back.is_nan() } else { kept }, "{format}, {i}: {back}");
            }
        }
    }

    #[test]
    fn a_table_scale_for_the_largest_value_holds_it() {
        for largest in [1e-30, 0.1, 0.089_152, 448.0, 3e38, f32::MAX] {
            let format = RowFormat::Fp8E4m3OneScale(TableScale::for_largest(largest));
            let back = round_trip(format, &[largest, -largest]);
            assert!(
                back.iter().all(|value| (value.abs() / largest - 1.0).abs() < 1e-6),
                "{largest}: {back:?}"
            );
        }
        assert_eq!(TableScale::for_largest(0.0).get(), 1.0);
    }

    /// How far `back` may be from `value`, in a group of largest magnitude `largest`.
    fn bound(format: RowFormat, value: f32, largest: f32) -> f64 {
        let (value, largest) = (f64::from(value).abs(), f64::from(largest));
        // Half a step: of the value, or of the smallest code under the scale.
        let (relative, absolute) = match format {
            RowFormat::F32 => (0.0, 0.0),
            RowFormat::Bf16 => (2f64.powi(-8), 2f64.powi(-134)),
            RowFormat::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            RowFormat::Fp8E4m3 => (2f64.powi(-4), (largest * 2f64.powi(-17)).max(2f64.powi(-137))),
            RowFormat::Fp8E4m3OneScale(scale) => {
                (2f64.powi(-4) * (1.0 + 1e-6), f64::from(scale.get()) * 2f64.powi(-10) * (1.0 + 1e-6))
            }
            RowFormat::Int8 => (0.0, (largest / 254.0 * (1.0 + 2f64.powi(-8))).max(2f64.powi(-127))),
            RowFormat::Int4 => (0.0, (largest / 8.0 * (1.0 + 2f64.powi(-7))).max(2f64.powi(-126))),
        };
        (value * relative).max(absolute)
    }

    proptest! {
        #[test]
        fn decoding_an_encoding_is_close_and_stable(bits in prop::collection::vec(any::<u32>(), 1..100)) {
            for format in formats() {
                let limit = match format {
                    RowFormat::F16 => 65504.0,
                    RowFormat::Fp8E4m3OneScale(scale) => 448.0 * scale.get(),
                    _ => ROUNDS_TO_FINITE,
                };
                let row = bits.iter().map(|&bits| f32::from_bits(bits)).filter(|value| value.abs() < limit);
                let row: Vec<f32> = row.collect();
                let once = round_trip(format, &row);
                prop_assert_eq!(&round_trip(format, &once), &once, "a second trip changes nothing");
                for (group, back) in row.chunks(32).zip(once.chunks(32)) {
                    let largest = group.iter().fold(0f32, |a, b| a.max(b.abs()));
                    for (&value, &back) in group.iter().zip(back) {
                        let error = (f64::from(value) - f64::from(back)).abs();
                        prop_assert!(error <= bound(format, value, largest), "{format} {value} {back}");
                    }
                }
            }
        }

        #[test]
        fn rows_decode_alike_alone_and_together_whatever_their_bytes(
            width in 1..100usize,
            seed in prop::collection::vec(any::<u8>(), 1..2000),
        ) {
            for format in formats() {
                let row_bytes = format.bytes_per_row(width);
                let rows = 5;
                let bytes: Vec<u8> = seed.iter().copied().cycle().take(rows * row_bytes).collect();
                let mut together = vec![0.0; rows * width];
                format.decode_rows(&bytes, width, &mut together);
                for (row, together) in bytes.chunks(row_bytes).zip(together.chunks(width)) {
                    let mut alone = vec![0.0; width];
                    format.decode_row(row, &mut alone);
                    let bits = |values: &[f32]| -> Vec<u32> {
                        values.iter().map(|v| if v.is_nan() { 1 } else { v.to_bits() }).collect()
                    };
                    prop_assert_eq!(bits(&alone), bits(together));
                    // The rows are those of the definition, one value at a time.
                    for (column, &value) in alone.iter().enumerate() {
                        let wanted = defined(format, row, width, column);
                        prop_assert!(value == wanted || (value.is_nan() && wanted.is_nan()), "{format}");
                    }
                }
            }
        }
    }

    /// Value `column` of `row`, by the definition of the format.
    fn defined(format: RowFormat, row: &[u8], width: usize, column: usize) -> f32 {
        let (group, within) = (column / 32, column % 32);
        let in_group = (width - group * 32).min(32);
        let two = |at: usize| u16::from_le_bytes([row[at], row[at + 1]]);
        match format {
            RowFormat::F32 => {
                f32::from_bits(u32::from(two(4 * column + 2)) << 16 | u32::from(two(4 * column)))
            }
            RowFormat::Bf16 => half::bf16::from_bits(two(2 * column)).to_f32(),
            RowFormat::F16 => half::f16::from_bits(two(2 * column)).to_f32(),
            RowFormat::Fp8E4m3 => e4m3_to_f32(row[column]) * e8m0_to_f32(row[width + group]),
            RowFormat::Fp8E4m3OneScale(scale) => e4m3_to_f32(row[column]) * scale.get(),
            RowFormat::Int8 => {
                f32::from(row[column] as i8) * half::bf16::from_bits(two(width + 2 * group)).to_f32()
            }
            RowFormat::Int4 => {
                let half = in_group.div_ceil(2);
                let byte = row[16 * group + within % half];
                let nibble = if within < half { byte & 15 } else { byte >> 4 };
                let code = if nibble > 7 { f32::from(nibble) - 16.0 } else { f32::from(nibble) };
                code * half::bf16::from_bits(two(width.div_ceil(2) + 2 * group)).to_f32()
            }
        }
    }
}
