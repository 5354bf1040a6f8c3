//! With vectors of 512 bits.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Weight;
use crate::packed::PANEL;

/// Vectors of a panel's columns.
const VECTORS: usize = PANEL / 16;

/// [`Instructions::add`](super::Instructions::add).
///
/// # Safety
/// Each row must have as many values as there are inputs.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn add<const R: usize, T: Weight>(
    rows: [&[f32]; R],
    inputs: &[[T; PANEL]],
    output: &mut [[f32; PANEL]; R],
) {
    let mut sums: [[__m512; VECTORS]; R] =
        std::array::from_fn(|row| std::array::from_fn(|v| vector(&output[row].as_chunks().0[v])));
    for (input, weights) in inputs.iter().enumerate() {
        let weights = weights.as_chunks().0;
        // SAFETY: this function runs where the processor has AVX-512F.
        let weights: [__m512; VECTORS] = std::array::from_fn(|v| unsafe { T::vector(&weights[v]) });
        for row in 0..R {
            // SAFETY: the caller's promise. Checked indices would take as long as the products.
            let value = _mm512_set1_ps(unsafe { *rows[row].get_unchecked(input) });
            for v in 0..VECTORS {
                sums[row][v] = _mm512_fmadd_ps(value, weights[v], sums[row][v]);
            }
        }
    }
    for (output, sums) in output.iter_mut().zip(sums) {
        for (target, sum) in output.as_chunks_mut::<16>().0.iter_mut().zip(sums) {
            // SAFETY: the target is 16 values of 4 bytes, borrowed for writing, at any address.
            unsafe { _mm512_storeu_ps(target.as_mut_ptr(), sum) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn vector(values: &[f32; 16]) -> __m512 {
    // SAFETY: these are 16 values of 4 bytes, which may be read from any address.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn vector_of_f16(values: &[f16; 16]) -> __m512 {
    // SAFETY: these are 16 values of 2 bytes, which may be read from any address.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(values.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn vector_of_bf16(values: &[bf16; 16]) -> __m512 {
    // SAFETY: as above.
    let bits = unsafe { _mm256_loadu_si256(values.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}
