//! With `vpdpbusd` on 512 bits, which multiplies and sums 16 columns' quads at once.

use std::arch::x86_64::*;

use crate::packed::PANEL;
use crate::packed::layout::{COLUMNS, IQ4_BYTES, Kind, Numbers, QUADS, Scales};
use crate::packed::line::Line;
use crate::packed::rounded_rows::RoundedGroup;

/// Vectors of a panel's columns.
const VECTORS: usize = PANEL / COLUMNS;

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn add<K: Kind, const R: usize>(
    records: &[Line],
    rows: [&[RoundedGroup]; R],
    output: &mut [[f32; PANEL]; R],
) {
    let layout = K::LAYOUT;
    let mut sums: [[__m512; VECTORS]; R] = std::array::from_fn(|row| load_sums(&output[row]));
    for (index, record) in records.chunks_exact(K::LINES).enumerate() {
        let d = block_scales(layout.scales, record, K::SCALES_AT[1]);
        let d_minima = block_scales(layout.minima, record, K::MINIMA_AT[1]);
        for group in 0..layout.groups {
            let x: [&RoundedGroup; R] = std::array::from_fn(|row| &rows[row][index * layout.groups + group]);
            let numbers = &record[group * K::NUMBER_LINES..][..K::NUMBER_LINES];
            for half in 0..layout.halves {
                let exact = exact::<K, R>(numbers, x, half);
                for v in 0..VECTORS {
                    let scale = group_scales(
                        layout.scales,
                        record,
                        K::SCALES_AT[0],
                        group * layout.halves + half,
                        v,
                        d[v],
                        15,
                    );
                    for row in 0..R {
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[row].scale));
                        sums[row][v] =
                            _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[row][v]), scale, sums[row][v]);
                    }
                }
                if layout.minima != Scales::None {
                    for v in 0..VECTORS {
                        let minimum = group_scales(
                            layout.minima,
                            record,
                            K::MINIMA_AT[0],
                            group * layout.halves + half,
                            v,
                            d_minima[v],
                            240,
                        );
                        for row in 0..R {
                            let sum = _mm512_set1_ps(x[row].sums[half]);
                            sums[row][v] = if layout.subtracts {
                                _mm512_fnmadd_ps(minimum, sum, sums[row][v])
                            } else {
                                _mm512_fmadd_ps(minimum, sum, sums[row][v])
                            };
                        }
                    }
                }
            }
        }
    }
    for (output, sums) in output.iter_mut().zip(sums) {
        store_sums(sums, output);
    }
}

/// Sums of products of a group, or of a half of it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn exact<K: Kind, const R: usize>(
    numbers: &[Line],
    x: [&RoundedGroup; R],
    half: usize,
) -> [[__m512i; VECTORS]; R] {
    let quads = QUADS / K::LAYOUT.halves;
    let mut exact: [[__m512i; VECTORS]; R] =
        std::array::from_fn(|row| [_mm512_set1_epi32(x[row].corrections[half]); VECTORS]);
    for quad in half * quads..(half + 1) * quads {
        let weights: [__m512i; VECTORS] =
            std::array::from_fn(|v| weights(K::LAYOUT.numbers, numbers, quad, v));
        for row in 0..R {
            let x = _mm512_set1_epi32(i32::from_ne_bytes(x[row].values[quad].map(|x| x as u8)));
            for v in 0..VECTORS {
                exact[row][v] = _mm512_dpbusd_epi32(exact[row][v], weights[v], x);
            }
        }
    }
    exact
}

/// The numbers of a quad of 16 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn weights(numbers: Numbers, lines: &[Line], quad: usize, v: usize) -> __m512i {
    let high = numbers.high();
    match numbers {
        Numbers::Bytes => load(&lines[quad * VECTORS + v]),
        Numbers::Nibbles => nibbles(lines, quad, v),
        Numbers::Table => {
            // SAFETY: the table is 16 bytes, which may be read from any address.
            let table = unsafe { _mm_loadu_si128(IQ4_BYTES.as_ptr().cast()) };
            _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles(lines, quad, v))
        }
        Numbers::Five => or_bits(nibbles(lines, quad, v), shift(load(&lines[high + v]), 4 - quad as i32), 16),
        Numbers::Six => or_bits(
            nibbles(lines, quad, v),
            shift(load(&lines[high + quad / 4 * VECTORS + v]), 4 - 2 * (quad % 4) as i32),
            48,
        ),
        Numbers::Two => pairs(lines, quad, v),
        Numbers::Three => or_bits(pairs(lines, quad, v), shift(load(&lines[high + v]), 2 - quad as i32), 4),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(lines: &[Line], quad: usize, v: usize) -> __m512i {
    let both = load(&lines[quad % (QUADS / 2) * VECTORS + v]);
    let place = if quad < QUADS / 2 { both } else { _mm512_srli_epi16::<4>(both) };
    _mm512_and_si512(place, _mm512_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pairs(lines: &[Line], quad: usize, v: usize) -> __m512i {
    let four = load(&lines[quad / 4 * VECTORS + v]);
    _mm512_and_si512(shift(four, -2 * (quad % 4) as i32), _mm512_set1_epi8(3))
}

/// `low` and those bits of `high` that `mask` has in every byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn or_bits(low: __m512i, high: __m512i, mask: i8) -> __m512i {
    _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(mask)))
}

/// Shifts left, or right when `by` is negative. Bits cross bytes: the caller masks them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn shift(v: __m512i, by: i32) -> __m512i {
    if by >= 0 {
        _mm512_sll_epi16(v, _mm_cvtsi32_si128(by))
    } else {
        _mm512_srl_epi16(v, _mm_cvtsi32_si128(-by))
    }
}

/// The block's scales, or minima, where there are any.
#[inline]
#[target_feature(enable = "avx512f")]
fn block_scales(scales: Scales, record: &[Line], at: usize) -> [__m512; VECTORS] {
    match scales {
        Scales::None | Scales::F32 => [_mm512_setzero_ps(); VECTORS],
        Scales::Half | Scales::Bytes | Scales::Nibbles => {
            let (halves, _) = record[at].0.as_chunks::<32>();
            // SAFETY: each is 32 bytes, which may be read from any address.
            std::array::from_fn(|v| unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(halves[v].as_ptr().cast())) })
        }
    }
}

/// Scales, or minima, of 16 columns of a group, or of a half of it; nibbles are those that `mask` has.
#[inline]
#[target_feature(enable = "avx512f")]
fn group_scales(
    scales: Scales,
    record: &[Line],
    at: usize,
    index: usize,
    v: usize,
    d: __m512,
    mask: i32,
) -> __m512 {
    match scales {
        Scales::None => _mm512_setzero_ps(),
        // SAFETY: a line is 16 values of 4 bytes.
        Scales::F32 => unsafe { _mm512_loadu_ps(record[at + index * VECTORS + v].0.as_ptr().cast()) },
        Scales::Half => d,
        Scales::Bytes | Scales::Nibbles => {
            let bytes = &record[at + index / 2].0[index % 2 * PANEL + v * COLUMNS..][..COLUMNS];
            // SAFETY: these are 16 bytes, which may be read from any address.
            let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            let whole = match scales {
                Scales::Bytes => _mm512_cvtepi8_epi32(bytes),
                _ if mask == 15 => _mm512_and_si512(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(15)),
                _ => _mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(bytes)),
            };
            _mm512_mul_ps(d, _mm512_cvtepi32_ps(whole))
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes.
    unsafe { _mm512_loadu_si512(line.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_sums(values: &[f32; PANEL]) -> [__m512; VECTORS] {
    let (vectors, _) = values.as_chunks::<COLUMNS>();
    // SAFETY: each is 16 values of 4 bytes, which may be read from any address.
    std::array::from_fn(|v| unsafe { _mm512_loadu_ps(vectors[v].as_ptr()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_sums(sums: [__m512; VECTORS], values: &mut [f32; PANEL]) {
    let (vectors, _) = values.as_chunks_mut::<COLUMNS>();
    for (target, sum) in vectors.iter_mut().zip(sums) {
        // SAFETY: the target is 16 values of 4 bytes, borrowed for writing, at any address.
        unsafe { _mm512_storeu_ps(target.as_mut_ptr(), sum) };
    }
}
