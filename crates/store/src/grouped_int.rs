//! Small integers that share a scale: int8 and int4 in groups of up to 32 values.
//!
//! value = code · scale, in `f32`. The scale is a bf16: as small as an f16 and with the range of an `f32`, so
//! that no table is too small or too large for its scales; codes are chosen for the rounded scale, so that
//! its eight bits cost nothing.
//!
//! * *int8*: codes −127 to 127, scale = largest magnitude / 127. No value is further off than half a scale.
//! * *int4*: codes −8 to 7, scale = −(value of largest magnitude) / 8, and thus of either sign: the whole
//!   range is used, and the value that matters most is kept best. Values are off by at most half a scale, or
//!   one scale where they lie as far out on the other side (which has no code 8).
//!
//! A group of zeros is zero bytes. These codes have no NaN: a group with a value that is not finite gets the
//! scale NaN and is NaN as a whole, so that such a value is never mistaken for a number. A zero does not keep
//! its sign, but takes the scale's.

use crate::float16::{bf16_to_f32, f32_to_bf16};

const BF16_NAN: u16 = 0x7fc0;

/// The bf16 scale of a group whose value of largest magnitude is `extreme`, which gets the code `code`.
fn scale_for(extreme: f32, code: f32) -> u16 {
    if !extreme.is_finite() {
        return BF16_NAN;
    }
    let scale = bf16_to_f32(f32_to_bf16(extreme / code));
    // Subnormal scales would have too few bits: where the whole group is that small, steps of 2⁻¹²⁶ will do.
    if extreme == 0.0 { 0 } else { f32_to_bf16(scale.abs().max(f32::MIN_POSITIVE).copysign(scale)) }
}

/// The value of largest magnitude, the first of equals; NaN or infinite if any value is.
fn extreme(values: &[f32]) -> f32 {
    let further = |a: f32, b: f32| if a.is_nan() || a.abs() >= b.abs() { a } else { b };
    values.iter().fold(0.0, |a, &b| further(a, b))
}

/// The code of `value`; 0 where `scale` is 0 or NaN.
fn code(value: f32, scale: f32, lowest: f32, highest: f32) -> i8 {
    let steps = if scale == 0.0 { 0.0 } else { (value / scale).round_ties_even() };
    steps.clamp(lowest, highest) as i8
}

/// Encodes up to 32 values as int8 and returns the bits of their bf16 scale.
pub(crate) fn encode_int8(values: &[f32], codes: &mut [u8]) -> u16 {
    let bits = scale_for(extreme(values).abs(), 127.0);
    let scale = bf16_to_f32(bits);
    for (out, &value) in codes.iter_mut().zip(values) {
        *out = code(value, scale, -127.0, 127.0) as u8;
    }
    bits
}

#[inline(always)]
pub(crate) fn decode_int8(codes: &[u8], scale: u16, values: &mut [f32]) {
    let scale = bf16_to_f32(scale);
    for (value, &code) in values.iter_mut().zip(codes) {
        *value = f32::from(code as i8) * scale;
    }
}

/// Encodes n ≤ 32 values as int4 into ⌈n/2⌉ bytes and returns the bits of their bf16 scale. The first ⌈n/2⌉
/// values are in the bytes' lower halves, the rest in their upper halves, two's complement.
pub(crate) fn encode_int4(values: &[f32], codes: &mut [u8]) -> u16 {
    let bits = scale_for(extreme(values), -8.0);
    let scale = bf16_to_f32(bits);
    let (first, second) = values.split_at(codes.len());
    for (i, out) in codes.iter_mut().enumerate() {
        let low = code(first[i], scale, -8.0, 7.0) as u8 & 15;
        let high = second.get(i).map_or(0, |&value| code(value, scale, -8.0, 7.0) as u8);
        *out = high << 4 | low;
    }
    bits
}

#[inline(always)]
pub(crate) fn decode_int4(codes: &[u8], scale: u16, values: &mut [f32]) {
    let scale = bf16_to_f32(scale);
    let (first, second) = values.split_at_mut(codes.len());
    // Flipping bit 3 and taking 8 away extends the sign of four bits.
    for (value, &code) in first.iter_mut().zip(codes) {
        *value = ((i32::from(code & 15) ^ 8) - 8) as f32 * scale;
    }
    for (value, &code) in second.iter_mut().zip(codes) {
        *value = ((i32::from(code >> 4) ^ 8) - 8) as f32 * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int8_bytes_are_what_the_definition_says() {
        let mut codes = [0; 5];
        let scale = encode_int8(&[127.0, -63.5, 1.0, 0.49, -0.0], &mut codes);
        // −63.5 lies between two codes and goes to the even one.
        assert_eq!((scale, codes), (0x3f80, [127, (-64i8) as u8, 1, 0, 0]));
        let mut values = [9.0; 5];
        decode_int8(&codes, scale, &mut values);
        assert_eq!(values, [127.0, -64.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn int4_bytes_are_what_the_definition_says() {
        // The extreme value is positive, so the scale is negative: −0.25.
        let mut codes = [0; 3];
        let scale = encode_int4(&[2.0, -1.75, 0.25, -0.5, 0.0], &mut codes);
        assert_eq!((scale, codes), (0xbe80, [0x28, 0x07, 0x0f]));
        let mut values = [9.0; 5];
        decode_int4(&codes, scale, &mut values);
        assert_eq!(values, [2.0, -1.75, 0.25, -0.5, 0.0]);
        // A zero has the sign of the scale.
        assert!(values[4].is_sign_negative());
        // As far out on the other side there is no code: one scale short.
        let scale = encode_int4(&[2.0, -2.0], &mut codes[..1]);
        decode_int4(&codes[..1], scale, &mut values[..2]);
        assert_eq!(values[..2], [2.0, -1.75]);
    }

    #[test]
    fn zeros_are_zero_bytes_and_what_is_not_finite_spoils_its_group() {
        let mut codes = [1; 32];
        assert_eq!((encode_int8(&[0.0; 32], &mut codes), codes), (0, [0; 32]));
        assert_eq!((encode_int4(&[-0.0; 32], &mut codes[..16]), &codes[..16]), (0, &[0; 16][..]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 17, 31] {
                let (mut values, mut back) = ([1.0; 32], [0.0; 32]);
                values[at] = bad;
                let scale = encode_int8(&values, &mut codes);
                decode_int8(&codes, scale, &mut back);
                assert!(back.iter().all(|value| value.is_nan()));
                let scale = encode_int4(&values, &mut codes[..16]);
                back = [0.0; 32];
                decode_int4(&codes[..16], scale, &mut back);
                assert!(back.iter().all(|value| value.is_nan()));
            }
        }
    }
}
