//! Eight-bit floats: e4m3 values and their e8m0 scales.
//!
//! *e4m3* is the finite variant ("e4m3fn") of the OCP 8-bit floating point specification: a sign, four
//! exponent bits with bias 7, three mantissa bits; no infinities, one NaN per sign (`0x7f`, `0xff`), largest
//! value 448, smallest 2⁻⁹. *e8m0*, of the OCP microscaling specification, is a bare power of two: byte `b`
//! is 2^(b−127), and 255 is NaN.

/// The largest finite e4m3 value.
pub const E4M3_MAX: f32 = 448.0;

/// The e4m3 code of NaN (with a positive sign).
pub const E4M3_NAN: u8 = 0x7f;

/// The value of an e4m3 code. Exact, and without a branch or a table, so that loops over it run in vector
/// registers.
#[inline(always)]
pub fn e4m3_to_f32(code: u8) -> f32 {
    let code = u32::from(code);
    let magnitude = code & 0x7f;
    // Exponent 0 counts steps of 2⁻⁹ without a leading one: read it as 2⁻⁶ · 1.m and take the one away.
    let (bias, one) = if magnitude < 8 { (121 << 23, 1.0 / 64.0) } else { (120 << 23, 0.0) };
    let value = f32::from_bits((magnitude << 20) + bias) - one;
    let value = if magnitude == u32::from(E4M3_NAN) { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | (code & 0x80) << 24)
}

/// The nearest e4m3 code, ties to even. Values beyond ±448, infinities too, saturate to ±448; NaN stays NaN.
#[inline]
pub fn f32_to_e4m3(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | E4M3_NAN;
    }
    if magnitude >= E4M3_MAX {
        return sign | 0x7e;
    }
    if magnitude < 1.0 / 64.0 {
        // Subnormal steps of 2⁻⁹. Adding 2²³ leaves the rounded count of steps in the low bits; a count of 8
        // carries into the first normal code, as it should.
        let steps = (magnitude * 512.0 + 8_388_608.0).to_bits() & 15;
        return sign | steps as u8;
    }
    // Round the 23-bit mantissa to 3 bits, ties to even; a carry moves into the exponent, as it should.
    let bits = magnitude.to_bits();
    let rounded = bits + 0x0007_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The value of an e8m0 scale: 2^(byte−127), NaN for 255. Exact (2⁻¹²⁷ is a subnormal `f32`).
#[inline(always)]
pub fn e8m0_to_f32(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits((byte as u32) << 23),
    }
}

/// The e8m0 byte of the smallest power of two by which `largest` can be divided without exceeding 448.
///
/// `largest` is the largest finite magnitude of a group; a group of zeros gets scale 1.
#[inline]
pub fn e8m0_scale_for(largest: f32) -> u8 {
    debug_assert!(largest.is_finite() && largest >= 0.0);
    if largest == 0.0 {
        return 127;
    }
    // largest = 1.f · 2^(exponent−127) and 448 = 1.75 · 2^8. Subnormals (exponent 0) end at the smallest
    // scale.
    let bits = largest.to_bits();
    let (exponent, fraction) = (bits >> 23, bits & 0x7f_ffff);
    let above = u32::from(fraction > 0x60_0000);
    (exponent + above).saturating_sub(8) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in f64: sign · 2^(e−7) · (1 + m/8), or sign · 2^(−6) · m/8.
    fn defined(code: u8) -> f64 {
        let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
        let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        match (e, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => sign * 2f64.powi(-6) * m / 8.0,
            _ => sign * 2f64.powi(e - 7) * (1.0 + m / 8.0),
        }
    }

    #[test]
    fn all_256_codes_have_their_published_value_and_come_back() {
        for code in 0..=255u8 {
            let (value, wanted) = (e4m3_to_f32(code), defined(code));
            if wanted.is_nan() {
                assert!(value.is_nan());
                assert_eq!(f32_to_e4m3(value) & 0x7f, E4M3_NAN);
            } else {
                assert_eq!(f64::from(value), wanted, "code {code:#04x}");
                assert_eq!(value.is_sign_negative(), code & 0x80 != 0);
                assert_eq!(f32_to_e4m3(value), code);
            }
        }
        assert_eq!(e4m3_to_f32(0x7e), E4M3_MAX);
    }

    /// The nearest code by search, ties to the even code.
    fn nearest(value: f32) -> u8 {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        let distance = |code: &u8| (defined(*code) - f64::from(value.abs())).abs();
        let best = (0..0x7f).min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
        sign | best.unwrap()
    }

    #[test]
    fn rounds_to_nearest_even_around_every_code_and_midpoint() {
        for code in 0..0x7eu8 {
            let (low, high) = (e4m3_to_f32(code), e4m3_to_f32(code + 1));
            let middle = (low + high) / 2.0;
            for value in [low, middle.next_down(), middle, middle.next_up(), high] {
                for value in [value, -value] {
                    assert_eq!(f32_to_e4m3(value), nearest(value), "{value:e}");
                }
            }
        }
    }

    #[test]
    fn saturates_keeps_nan_and_signed_zero_and_rounds_tiny_values() {
        for huge in [448.1, 464.0, 480.0, 1e30, f32::MAX, f32::INFINITY] {
            assert_eq!((f32_to_e4m3(huge), f32_to_e4m3(-huge)), (0x7e, 0xfe));
        }
        assert_eq!((f32_to_e4m3(f32::NAN), f32_to_e4m3(-f32::NAN)), (0x7f, 0xff));
        assert_eq!((f32_to_e4m3(0.0), f32_to_e4m3(-0.0)), (0, 0x80));
        assert_eq!(f32_to_e4m3(f32::from_bits(1)), 0);
        assert_eq!(f32_to_e4m3(1.0 / 1024.0), 0, "half the smallest step ties to zero");
        assert_eq!(f32_to_e4m3((1.0f32 / 1024.0).next_up()), 1);
    }

    #[test]
    fn all_256_scales_have_their_published_value() {
        for byte in 0..255u8 {
            assert_eq!(f64::from(e8m0_to_f32(byte)), 2f64.powi(i32::from(byte) - 127), "byte {byte}");
        }
        assert!(e8m0_to_f32(255).is_nan());
    }

    #[test]
    fn a_scale_is_the_smallest_that_holds_the_largest_value() {
        for exponent in -126..=127 {
            for fraction in [1.0, 1.5, 1.75, 1.750_001, 1.999_999] {
                let largest = 2f32.powi(exponent) * fraction;
                let byte = e8m0_scale_for(largest);
                let scale = |byte: u8| 2f64.powi(i32::from(byte) - 127);
                assert!(f64::from(largest) / scale(byte) <= 448.0, "{largest:e}");
                assert!(byte == 0 || f64::from(largest) / scale(byte - 1) > 448.0, "{largest:e}");
            }
        }
        assert_eq!((e8m0_scale_for(0.0), e8m0_scale_for(f32::from_bits(1))), (127, 0));
        assert_eq!(e8m0_scale_for(448.0), 127);
    }
}
