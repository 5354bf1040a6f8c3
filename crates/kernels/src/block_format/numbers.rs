//! Unpacks the stored numbers of ggml's blocks.
//!
//! Each function writes the numbers of a block in the order of its values. High bits stored apart from low ones come
//! first among the arguments.

/// The values of the indices of IQ4_NL and IQ4_XS.
pub(crate) const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The low halves of all bytes, then the high ones.
#[inline(always)]
pub(crate) fn nibbles(bytes: &[u8], numbers: &mut [u8]) {
    let (low, high) = numbers.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Nibbles with a fifth bit each: bit i of `high` `[4]` is that of value i.
#[inline(always)]
pub(crate) fn q5(high: &[u8], bytes: &[u8], numbers: &mut [u8]) {
    nibbles(bytes, numbers);
    for (i, number) in numbers.iter_mut().enumerate() {
        *number |= (high[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// 32 nibbles of each 32 bytes, then their high halves.
#[inline(always)]
pub(crate) fn q4_k(bytes: &[u8], numbers: &mut [u8]) {
    for (bytes, numbers) in bytes.chunks_exact(32).zip(numbers.chunks_exact_mut(64)) {
        nibbles(bytes, numbers);
    }
}

/// Like [`q4_k`], with a fifth bit: bit g of byte i of `high` `[32]` is that of value 32g + i.
#[inline(always)]
pub(crate) fn q5_k(high: &[u8], bytes: &[u8], numbers: &mut [u8]) {
    q4_k(bytes, numbers);
    for (group, numbers) in numbers.chunks_exact_mut(32).enumerate() {
        for (number, high) in numbers.iter_mut().zip(high) {
            *number |= (high >> group & 1) << 4;
        }
    }
}

/// Two bits: of each 32 bytes the lowest pairs of bits, then the next, four times.
#[inline(always)]
pub(crate) fn pairs(bytes: &[u8], numbers: &mut [u8]) {
    for (bytes, numbers) in bytes.chunks_exact(32).zip(numbers.chunks_exact_mut(128)) {
        for (pair, numbers) in numbers.chunks_exact_mut(32).enumerate() {
            for (number, byte) in numbers.iter_mut().zip(bytes) {
                *number = byte >> (2 * pair) & 3;
            }
        }
    }
}

/// Like [`pairs`], with a third bit: bit g of byte i of `high` `[32]` is that of value 32g + i.
#[inline(always)]
pub(crate) fn q3_k(high: &[u8], bytes: &[u8], numbers: &mut [u8]) {
    pairs(bytes, numbers);
    for (group, numbers) in numbers.chunks_exact_mut(32).enumerate() {
        for (number, high) in numbers.iter_mut().zip(high) {
            *number |= (high >> group & 1) << 2;
        }
    }
}

/// Six bits: 128 values have 64 bytes of nibbles and 32 bytes of pairs of high bits.
#[inline(always)]
pub(crate) fn q6_k(low: &[u8], high: &[u8], numbers: &mut [u8]) {
    let halves = low.chunks_exact(64).zip(high.chunks_exact(32));
    for ((low, high), numbers) in halves.zip(numbers.chunks_exact_mut(128)) {
        nibbles(low, numbers);
        for (pair, numbers) in numbers.chunks_exact_mut(32).enumerate() {
            for (number, high) in numbers.iter_mut().zip(high) {
                *number |= (high >> (2 * pair) & 3) << 4;
            }
        }
    }
}
