//! On 128 bits, which are four columns' quads: `smull` makes products of 16 bits, `addp` and `sadalp` sum a column's four.

use std::arch::aarch64::*;
use std::ops::Range;

use super::portable::add_with;
use crate::packed::PANEL;
use crate::packed::layout::{COLUMNS, Kind};
use crate::packed::line::Line;
use crate::packed::rounded_rows::RoundedGroup;

/// Vectors of a line.
const VECTORS: usize = 4;

#[target_feature(enable = "neon")]
pub(super) fn add<K: Kind, const R: usize>(
    records: &[Line],
    rows: [&[RoundedGroup]; R],
    sums: &mut [[f32; PANEL]; R],
) {
    add_with::<K>(records, &rows, sums, |tile, quads, half, x| exact(tile, quads, half, x));
}

/// Sums of products of 16 columns. Weights are multiplied with 128 taken off: two products of signed bytes then fit 16
/// bits, for the values of rows are never −128.
#[inline]
#[target_feature(enable = "neon")]
fn exact(tile: &[Line], quads: Range<usize>, half: usize, x: &RoundedGroup) -> [i32; COLUMNS] {
    let mut exact = [vdupq_n_s32(x.signed[half]); VECTORS];
    for quad in quads {
        let x = vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(x.values[quad].map(|x| x as u8))));
        let (vectors, _) = tile[quad * (PANEL / COLUMNS)].0.as_chunks::<16>();
        for (exact, numbers) in exact.iter_mut().zip(vectors) {
            // SAFETY: these are 16 bytes, which may be read from any address.
            let weights = unsafe { vld1q_u8(numbers.as_ptr()) };
            let weights = vreinterpretq_s8_u8(veorq_u8(weights, vdupq_n_u8(0x80)));
            let low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
            *exact = vpadalq_s16(*exact, vpaddq_s16(low, vmull_high_s8(weights, x)));
        }
    }
    let mut sums = [0; COLUMNS];
    for (target, sum) in sums.as_chunks_mut::<4>().0.iter_mut().zip(exact) {
        // SAFETY: the target is 4 values of 4 bytes, borrowed for writing.
        unsafe { vst1q_s32(target.as_mut_ptr(), sum) };
    }
    sums
}
