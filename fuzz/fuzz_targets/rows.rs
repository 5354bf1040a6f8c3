//! Rows of every format: any bytes decode, alone as together, and what was encoded once is stable. Also the
//! formats' names.
#![no_main]

use engram_fuzz::{format, take};
use engram_store::RowFormat;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [number, width] = take(&mut rest);
    if number == 255 {
        return name(rest);
    }
    let scale = f32::from_le_bytes(take(&mut rest));
    let Some(format) = format(number, scale) else { return };
    assert_eq!(format.to_string().parse::<RowFormat>().expect("its own name"), format);
    let width = usize::from(width) + 1;
    let row_bytes = format.bytes_per_row(width);
    let rows = rest.len() / row_bytes;
    let stored = &rest[..rows * row_bytes];
    let mut together = vec![0.0; rows * width];
    format.decode_rows(stored, width, &mut together);
    for (stored, together) in stored.chunks_exact(row_bytes).zip(together.chunks_exact(width)) {
        let mut alone = vec![0.0; width];
        format.decode_row(stored, &mut alone);
        assert!(same(&alone, together));
        stable(format, &alone);
    }
});

/// From here on rounding may carry to infinity.
const ROUNDS_TO_INFINITY: f32 = 1.875 * (1u128 << 127) as f32;

/// Values that were in a row become a row, and that one becomes itself.
fn stable(format: RowFormat, values: &[f32]) {
    let trip = |values: &[f32]| {
        let mut bytes = vec![0; format.bytes_per_row(values.len())];
        format.encode_row(values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        format.decode_row(&bytes, &mut back);
        back
    };
    let once = trip(values);
    if values.iter().any(|value| value.is_finite() && value.abs() >= ROUNDS_TO_INFINITY) {
        return;
    }
    let twice = trip(&once);
    // As numbers: integers under a negative scale have no zero but −0.
    let stays = once.iter().zip(&twice).all(|(a, b)| a == b || a.is_nan() && b.is_nan());
    assert!(stays, "{format}: {values:?} → {once:?} → {twice:?}");
    for (&value, &back) in values.iter().zip(&once) {
        assert!(value.is_finite() || !back.is_finite(), "{format}: {value} became {back}");
    }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

fn name(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(format) = text.parse::<RowFormat>() {
        assert_eq!(format.to_string().parse::<RowFormat>().expect("its own name"), format);
    }
}
