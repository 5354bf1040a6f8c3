//! On 256 bits, which are eight columns' quads: with `vpdpbusd`, or with `vpmaddubsw` where that is missing.

use std::arch::x86_64::*;

use crate::packed::PANEL;
use crate::packed::layout::{COLUMNS, IQ4_BYTES, Numbers, QUADS, Scales};
use crate::packed::line::Line;

/// Vectors of a line of quads.
const VECTORS: usize = 2;
/// Lines of a quad of all columns.
const LINES: usize = PANEL / COLUMNS;
/// Columns of a vector.
const LANES: usize = COLUMNS / VECTORS;

/// Defines `add` for a set of features and its product of a vector of weights and the values of a row.
macro_rules! kernel {
    ($name:ident, $features:literal, $product:path, signed: $signed:literal) => {
        pub(super) mod $name {
            use super::*;
            use crate::packed::layout::Kind;
            use crate::packed::rounded_rows::RoundedGroup;

            #[target_feature(enable = $features)]
            pub(in crate::packed::dot) fn add<K: Kind, const R: usize>(
                records: &[Line],
                rows: [&[RoundedGroup]; R],
                output: &mut [[f32; PANEL]; R],
            ) {
                let layout = K::LAYOUT;
                for (index, record) in records.chunks_exact(K::LINES).enumerate() {
                    for group in 0..layout.groups {
                        let x: [&RoundedGroup; R] =
                            std::array::from_fn(|row| &rows[row][index * layout.groups + group]);
                        let numbers = &record[group * K::NUMBER_LINES..][..K::NUMBER_LINES];
                        for half in 0..layout.halves {
                            for line in 0..LINES {
                                let exact = exact::<K, R>(numbers, x, half, line);
                                add_scaled::<K, R>(
                                    record,
                                    group * layout.halves + half,
                                    x,
                                    line,
                                    exact,
                                    output,
                                );
                            }
                        }
                    }
                }
            }

            /// Sums of products of a group, or of a half of it, with 16 columns.
            #[inline]
            #[target_feature(enable = $features)]
            fn exact<K: Kind, const R: usize>(
                numbers: &[Line],
                x: [&RoundedGroup; R],
                half: usize,
                line: usize,
            ) -> [[__m256i; VECTORS]; R] {
                let quads = QUADS / K::LAYOUT.halves;
                let wide = matches!(K::LAYOUT.numbers, Numbers::Bytes | Numbers::Table);
                // Wide weights are multiplied with 128 taken off where that avoids saturation.
                let start =
                    |x: &RoundedGroup| if wide && $signed { x.signed[half] } else { x.corrections[half] };
                let mut exact: [[__m256i; VECTORS]; R] =
                    std::array::from_fn(|row| [_mm256_set1_epi32(start(x[row])); VECTORS]);
                for quad in half * quads..(half + 1) * quads {
                    let weights: [__m256i; VECTORS] =
                        std::array::from_fn(|v| weights(K::LAYOUT.numbers, numbers, quad, line, v));
                    for row in 0..R {
                        let x = _mm256_set1_epi32(i32::from_ne_bytes(x[row].values[quad].map(|x| x as u8)));
                        for v in 0..VECTORS {
                            exact[row][v] = $product(exact[row][v], weights[v], x, wide);
                        }
                    }
                }
                exact
            }

            /// Adds the sums of 16 columns, scaled, and the minima.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_scaled<K: Kind, const R: usize>(
                record: &[Line],
                index: usize,
                x: [&RoundedGroup; R],
                line: usize,
                exact: [[__m256i; VECTORS]; R],
                output: &mut [[f32; PANEL]; R],
            ) {
                let (layout, half) = (K::LAYOUT, index % K::LAYOUT.halves);
                for v in 0..VECTORS {
                    let first = line * COLUMNS + v * LANES;
                    let scale = scales(layout.scales, record, K::SCALES_AT, index, first, false);
                    for row in 0..R {
                        let target = &mut output[row][first..first + LANES];
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x[row].scale));
                        store(
                            _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[row][v]), scale, load_f32(target)),
                            target,
                        );
                    }
                    if layout.minima == Scales::None {
                        continue;
                    }
                    let at = K::MINIMA_AT;
                    let minimum = scales(layout.minima, record, at, index, first, true);
                    for row in 0..R {
                        let target = &mut output[row][first..first + LANES];
                        let sum = _mm256_set1_ps(x[row].sums[half]);
                        let total = if layout.subtracts {
                            _mm256_fnmadd_ps(minimum, sum, load_f32(target))
                        } else {
                            _mm256_fmadd_ps(minimum, sum, load_f32(target))
                        };
                        store(total, target);
                    }
                }
            }
        }
    };
}

kernel!(vnni, "avx2,fma,f16c,avxvnni", product_vnni, signed: false);
kernel!(plain, "avx2,fma,f16c", product_plain, signed: true);

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn product_vnni(sum: __m256i, weights: __m256i, x: __m256i, _wide: bool) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, weights, x)
}

/// `vpmaddubsw` adds two products in 16 bits: those of six-bit weights fit (2 · 63 · 127), those of signed bytes do too
/// (2 · 128 · 127), those of unsigned bytes would not.
#[inline]
#[target_feature(enable = "avx2")]
fn product_plain(sum: __m256i, weights: __m256i, x: __m256i, wide: bool) -> __m256i {
    let pairs = if wide {
        let signed = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
        _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
    } else {
        _mm256_maddubs_epi16(weights, x)
    };
    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// The numbers of a quad of eight columns.
#[inline]
#[target_feature(enable = "avx2")]
fn weights(numbers: Numbers, lines: &[Line], quad: usize, line: usize, v: usize) -> __m256i {
    let high = numbers.high();
    let at = |index: usize| load(&lines[index * LINES + line], v);
    match numbers {
        Numbers::Bytes => at(quad),
        Numbers::Nibbles => nibbles(at(quad % (QUADS / 2)), quad),
        Numbers::Table => {
            // SAFETY: the table is 16 bytes, which may be read from any address.
            let table = unsafe { _mm_loadu_si128(IQ4_BYTES.as_ptr().cast()) };
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), nibbles(at(quad % (QUADS / 2)), quad))
        }
        Numbers::Five => {
            let bits = load(&lines[high + line], v);
            or_bits(nibbles(at(quad % (QUADS / 2)), quad), shift(bits, 4 - quad as i32), 16)
        }
        Numbers::Six => {
            let pairs = load(&lines[high + quad / 4 * LINES + line], v);
            or_bits(nibbles(at(quad % (QUADS / 2)), quad), shift(pairs, 4 - 2 * (quad % 4) as i32), 48)
        }
        Numbers::Two => pairs(at(quad / 4), quad),
        Numbers::Three => {
            let bits = load(&lines[high + line], v);
            or_bits(pairs(at(quad / 4), quad), shift(bits, 2 - quad as i32), 4)
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(both: __m256i, quad: usize) -> __m256i {
    let place = if quad < QUADS / 2 { both } else { _mm256_srli_epi16::<4>(both) };
    _mm256_and_si256(place, _mm256_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx2")]
fn pairs(four: __m256i, quad: usize) -> __m256i {
    _mm256_and_si256(shift(four, -2 * (quad % 4) as i32), _mm256_set1_epi8(3))
}

/// `low` and those bits of `high` that `mask` has in every byte.
#[inline]
#[target_feature(enable = "avx2")]
fn or_bits(low: __m256i, high: __m256i, mask: i8) -> __m256i {
    _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(mask)))
}

/// Shifts left, or right when `by` is negative. Bits cross bytes: the caller masks them.
#[inline]
#[target_feature(enable = "avx2")]
fn shift(v: __m256i, by: i32) -> __m256i {
    if by >= 0 {
        _mm256_sll_epi16(v, _mm_cvtsi32_si128(by))
    } else {
        _mm256_srl_epi16(v, _mm_cvtsi32_si128(-by))
    }
}

/// Scales, or minima, of the eight columns from `first` on, of a group or of a half of it. Those of groups begin at the
/// first of `at`, the block's at the second.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scales(
    scales: Scales,
    record: &[Line],
    at: [usize; 2],
    index: usize,
    first: usize,
    minima: bool,
) -> __m256 {
    if scales == Scales::None {
        return _mm256_setzero_ps();
    }
    if scales == Scales::F32 {
        let line = &record[at[0] + index * LINES + first / COLUMNS].0;
        // SAFETY: these are 8 values of 4 bytes, which may be read from any address.
        return unsafe { _mm256_loadu_ps(line[first % COLUMNS * 4..][..32].as_ptr().cast()) };
    }
    let block = &record[at[1]].0[first * 2..][..16];
    // SAFETY: these are 16 bytes, which may be read from any address.
    let d = _mm256_cvtph_ps(unsafe { _mm_loadu_si128(block.as_ptr().cast()) });
    if scales == Scales::Half {
        return d;
    }
    let bytes = &record[at[0] + index / 2].0[index % 2 * PANEL + first..][..LANES];
    // SAFETY: these are 8 bytes, which may be read from any address.
    let bytes = unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) };
    let whole = match (scales, minima) {
        (Scales::Bytes, _) => _mm256_cvtepi8_epi32(bytes),
        (_, false) => _mm256_and_si256(_mm256_cvtepi8_epi32(bytes), _mm256_set1_epi32(15)),
        (_, true) => _mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(bytes)),
    };
    _mm256_mul_ps(d, _mm256_cvtepi32_ps(whole))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &Line, v: usize) -> __m256i {
    // SAFETY: these are 32 bytes, which may be read from any address.
    unsafe { _mm256_loadu_si256(line.0[v * 32..][..32].as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(values: &[f32]) -> __m256 {
    // SAFETY: these are 8 values of 4 bytes, which may be read from any address.
    unsafe { _mm256_loadu_ps(values[..LANES].as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(sums: __m256, values: &mut [f32]) {
    // SAFETY: these are 8 values of 4 bytes, borrowed for writing, at any address.
    unsafe { _mm256_storeu_ps(values[..LANES].as_mut_ptr(), sums) }
}
