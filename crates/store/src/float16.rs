//! Sixteen-bit floats: bf16 (the upper half of an `f32`) and f16 (IEEE 754 half precision).

/// The nearest bf16, ties to even; NaN stays NaN (quiet), overflow becomes infinity.
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    half::bf16::from_f32(value).to_bits()
}

/// The value of a bf16. Exact, and, unlike that of `half`, without a case for NaN: loops over it run in vector registers.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest f16, ties to even; NaN stays NaN (quiet), overflow (from 65520 on) becomes infinity.
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    half::f16::from_f32(value).to_bits()
}

/// The value of an f16. Exact, and without a branch, so that loops over it run in vector registers.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let exponent = magnitude & (31 << 23);
    // f16's exponent has bias 15, f32's 127. Exponent 31 (infinity, NaN) becomes 255. Exponent 0 counts steps
    // of 2⁻²⁴ without a leading one: read it as 2⁻¹⁴ · 1.m and take the one away.
    let (bias, one) = match exponent {
        0 => (113 << 23, 1.0 / 16384.0),
        0x0f80_0000 => (224 << 23, 0.0),
        _ => (112 << 23, 0.0),
    };
    let value = f32::from_bits(magnitude + bias) - one;
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything between a 16-bit value and the next: the ends, around the middle, and a spread.
    fn between(base: u32, bits: u32) -> impl Iterator<Item = f32> {
        let steps = [0, 1, 0x1234, 0x7fff, 0x8000, 0x8001, 0xcafe, 0xffff];
        steps.into_iter().map(move |step: u32| f32::from_bits(base.wrapping_add(step >> (16 - bits))))
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
            for value in between(u32::from(bits) << 16, 16) {
                assert_eq!(f32_to_bf16(value), half::bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn every_f16_has_its_defined_value_and_comes_back() {
        for bits in 0..=u16::MAX {
            let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
            let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
            let defined = match exponent {
                0 => sign * 2f64.powi(-14) * mantissa,
                31 if mantissa > 0.0 => f64::NAN,
                31 => sign * f64::INFINITY,
                _ => sign * 2f64.powi(exponent - 15) * (1.0 + mantissa),
            };
            let value = f16_to_f32(bits);
            assert_eq!(value.is_sign_negative(), sign < 0.0);
            if defined.is_nan() {
                assert!(value.is_nan() && f32_to_f16(value) & 0x7fff > 0x7c00);
                continue;
            }
            assert_eq!(f64::from(value), defined, "bits {bits:#06x}");
            assert_eq!(f32_to_f16(value), bits);
        }
    }

    #[test]
    fn f16_rounds_to_nearest_even_up_to_its_largest() {
        for bits in 0..0x7bffu16 {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            let even = if bits & 1 == 0 { bits } else { bits + 1 };
            let around = [(middle.next_down(), bits), (middle, even), (middle.next_up(), bits + 1)];
            for (value, wanted) in around {
                assert_eq!((f32_to_f16(value), f32_to_f16(-value)), (wanted, wanted | 0x8000), "{value:e}");
            }
        }
        assert_eq!((f32_to_f16(65519.9), f32_to_f16(65520.0)), (0x7bff, 0x7c00));
    }
}
