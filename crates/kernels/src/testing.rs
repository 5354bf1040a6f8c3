//! Helpers of all kernel tests: random values, and gradients by finite differences.

/// `len` values in (−1, 1), the same for the same seed (SplitMix64).
pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..len).map(|_| (next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// A scalar loss whose gradient at `output` is `grad`: their scalar product, in f64.
pub(crate) fn weighted(output: &[f32], grad: &[f32]) -> f64 {
    assert_eq!(output.len(), grad.len());
    output.iter().zip(grad).map(|(&o, &g)| f64::from(o) * f64::from(g)).sum()
}

/// Panics at the first place where the two differ by more than `tolerance`, relative to max(1, |expected|).
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * e.abs().max(1.0), "at {i}: found {f}, expected {e}");
    }
}

/// Compares `gradient` with differences of `loss` around `point`, at up to 24 spread positions.
///
/// Four evaluations each, so that the error of the difference falls with the fourth power of a step
/// that is large against the rounding of f32.
#[track_caller]
pub(crate) fn assert_gradient(name: &str, point: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    const STEP: f32 = 1.0 / 128.0;
    assert_eq!(point.len(), gradient.len(), "gradient of {name} has another size");
    let largest = gradient.iter().fold(0.0_f32, |m, g| m.max(g.abs()));
    let tolerance = 1e-3 * largest.max(1.0);
    let mut moved = point.to_vec();
    for i in (0..point.len()).step_by(point.len().div_ceil(24).max(1)) {
        let mut slope = |steps: f32| {
            let mut end = |steps: f32| {
                moved[i] = point[i] + steps * STEP;
                (loss(&moved), f64::from(moved[i]))
            };
            let ((above, up), (below, down)) = (end(steps), end(-steps));
            (above - below) / (up - down)
        };
        let expected = ((4.0 * slope(1.0) - slope(2.0)) / 3.0) as f32;
        moved[i] = point[i];
        let found = gradient[i];
        assert!(
            (found - expected).abs() <= tolerance,
            "d{name}[{i}]: found {found}, differences give {expected}"
        );
    }
}

/// `count` blocks of a quantised format with any numbers and scales of a usual size (a tenth, or less of super-blocks).
pub(crate) fn blocks(format: crate::BlockFormat, count: usize, seed: u64) -> Vec<u8> {
    use crate::BlockFormat::*;
    let bytes = count * format.block_bytes();
    let mut data: Vec<u8> =
        random(bytes, seed).into_iter().map(|value| (value * 128.0).floor() as i8 as u8).collect();
    let scales = random(2 * count, seed ^ 1);
    for (block, scale) in data.chunks_exact_mut(format.block_bytes()).zip(scales.chunks_exact(2)) {
        let (places, size) = match format {
            F32 | F16 | BF16 => panic!("{} has no scales", format.name()),
            Q4_0 | Q5_0 | Q8_0 | IQ4_NL => ([0, 0], 0.1),
            Q4_1 | Q5_1 => ([0, 2], 0.1),
            Q2_K => ([80, 82], 0.01),
            Q3_K => ([108, 108], 0.003),
            Q4_K | Q5_K => ([0, 2], 0.003),
            Q6_K => ([208, 208], 0.001),
            IQ4_XS => ([0, 0], 0.003),
        };
        for (at, scale) in places.into_iter().zip(scale) {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(scale * size).to_le_bytes());
        }
    }
    data
}
