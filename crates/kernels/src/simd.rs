//! Loops compiled for the widest vectors the machine has, and the arithmetic they share.
//!
//! Sums run over [`LANES`] interleaved partial sums at any vector width, so results do not depend on the instruction
//! set.

use std::sync::OnceLock;

/// Interleaved partial sums of a reduction: the width of a 512-bit vector of f32.
pub(crate) const LANES: usize = 16;

/// Runs `work` compiled for the best instruction set of this machine (AVX-512, AVX2 with FMA, NEON).
///
/// Only code inlined into `work` benefits: mark the closure and its callees `#[inline(always)]`.
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    static ARCH: OnceLock<pulp::Arch> = OnceLock::new();
    ARCH.get_or_init(pulp::Arch::new).dispatch(work)
}

/// Adds the lanes pairwise.
#[inline(always)]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Sum of `term` of the values at each place of slices of one length, each lane adding every 16th of them.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one index into several slices")]
pub(crate) fn sum<const N: usize>(slices: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let len = slices[0].len();
    let slices: [&[f32]; N] = std::array::from_fn(|slice| &slices[slice][..len]);
    let whole: [&[[f32; LANES]]; N] = std::array::from_fn(|slice| slices[slice].as_chunks().0);
    let mut lanes = [0.0; LANES];
    // Arrays of a known size, since an index that is checked keeps a loop from being vectorised.
    for chunk in 0..len / LANES {
        let values: [&[f32; LANES]; N] = std::array::from_fn(|slice| &whole[slice][chunk]);
        for lane in 0..LANES {
            lanes[lane] += term(std::array::from_fn(|slice| values[slice][lane]));
        }
    }
    let mut tail = 0.0;
    for place in len - len % LANES..len {
        tail += term(std::array::from_fn(|slice| slices[slice][place]));
    }
    sum_lanes(lanes) + tail
}

/// Scalar product of two slices of one length.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    let (a_whole, a_tail) = a.as_chunks::<LANES>();
    let (b_whole, b_tail) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a_whole.iter().zip(b_whole) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    sum_lanes(lanes) + tail
}

/// `sums` \[R, N\] with each of R values times all of `lanes` added. Takes sums by value, because borrowed ones would
/// be written to memory and not kept in registers.
#[inline(always)]
pub(crate) fn multiply_add<const R: usize, const N: usize>(
    values: [f32; R],
    lanes: [f32; N],
    mut sums: [[f32; N]; R],
) -> [[f32; N]; R] {
    for row in 0..R {
        for lane in 0..N {
            sums[row][lane] = values[row].mul_add(lanes[lane], sums[row][lane]);
        }
    }
    sums
}

/// The largest value of a slice; −∞ if it is empty. Ignores NaN.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let (whole, tail) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Replaces each value by exp(scale · value − shift) and returns their sum.
#[inline(always)]
pub(crate) fn exp_in_place(values: &mut [f32], scale: f32, shift: f32) -> f32 {
    let (whole, tail) = values.as_chunks_mut::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in whole {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane].mul_add(scale, -shift));
            lanes[lane] += chunk[lane];
        }
    }
    let mut total = 0.0;
    for value in tail {
        *value = exp(value.mul_add(scale, -shift));
        total += *value;
    }
    sum_lanes(lanes) + total
}

/// e^x within 2 units in the last place, as straight-line code that vectorises.
///
/// Results below 2^−125 are 0, arguments above 88.37 give ∞, NaN stays NaN. With n = round(x / ln 2)
/// and r = x − n·ln 2 (|r| ≤ ln 2 / 2): e^x = 2^n · (1 + r + r²·q(r)), where q is the polynomial of
/// degree 4 with the smallest largest relative error (3e-9) of e^r.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the significand.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; n · LN_2_HIGH is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -0.000_212_194_44;
    const SMALLEST: f32 = -86.643_39; // −125 ln 2
    const LARGEST: f32 = 88.37;

    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut q = 0.001_381_453_9_f32;
    q = q.mul_add(r, 0.008_368_745);
    q = q.mul_add(r, 0.041_668_39);
    q = q.mul_add(r, 0.166_665_21);
    q = q.mul_add(r, 0.499_999_94);
    let fraction = (q * r).mul_add(r, r) + 1.0;
    // 2^(n−1) from its bits; half of it, so that n = 128 does not overflow before the product does.
    let half_power = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    let value = fraction * half_power * 2.0;
    let value = if x < SMALLEST { 0.0 } else { value };
    if x > LARGEST { f32::INFINITY } else { value }
}

/// The logistic function 1 / (1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance of `found` from the f64 value `expected`, in units in the last place of f32.
    fn ulps(found: f32, expected: f64) -> f64 {
        let exponent = expected.log2().floor() as i32;
        (f64::from(found) - expected).abs() / 2.0_f64.powi(exponent - 23)
    }

    #[test]
    fn exp_is_within_two_ulps_everywhere() {
        let mut values: Vec<f32> = (0..4_000_000).map(|i| -86.6 + i as f32 * (174.9 / 4e6)).collect();
        let arguments = values.clone();
        vectorized(
            #[inline(always)]
            || values.iter_mut().for_each(|v| *v = exp(*v)),
        );
        let worst =
            arguments.iter().zip(&values).map(|(&x, &y)| ulps(y, f64::from(x).exp())).fold(0.0, f64::max);
        println!("worst error of exp: {worst:.2} ulp");
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-87.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_saturates() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!(sigmoid(-200.0), 0.0);
        assert_eq!(sigmoid(200.0), 1.0);
    }

    #[test]
    fn reductions_at_every_length() {
        for len in 0..70 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 0.3).cos()).collect();
            let expected: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((f64::from(dot(&a, &b)) - expected).abs() < 1e-5);
            assert!((f64::from(sum([&a, &b], |[a, b]| a * b)) - expected).abs() < 1e-5);
            let squares: f64 = a.iter().map(|&a| f64::from(a) * f64::from(a)).sum();
            assert!((f64::from(sum([&a], |[a]| a * a)) - squares).abs() < 1e-5);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut e = a.clone();
            let total = exp_in_place(&mut e, 2.0, 0.5);
            for (e, a) in e.iter().zip(&a) {
                assert!((e - (2.0 * a - 0.5).exp()).abs() < 1e-5);
            }
            assert!((total - e.iter().sum::<f32>()).abs() < 1e-3);
        }
    }
}
