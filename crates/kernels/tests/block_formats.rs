//! Compares dequantised values with the reference's, bit for bit: tensors of GGUF files written by llama.cpp's
//! converter, with the values of the `gguf` Python package (which equal llama.cpp's own).
//!
//! The file in `tests/golden` holds a few blocks of every quantised format.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use engram_kernels::BlockFormat;
use safetensors::SafeTensors;
use std::path::Path;

/// Calls `check` with each format, bytes and values of the files.
fn each_tensor(mut check: impl FnMut(BlockFormat, &[u8], &[f32])) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/block_formats.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, tensor) in tensors.tensors() {
        let Some(stem) = name.strip_suffix(".bytes") else { continue };
        let format = BlockFormat::ALL.into_iter().find(|f| stem.starts_with(&format!("{}.", f.name())));
        let values = tensors.tensor(&format!("{stem}.values")).unwrap();
        let values: Vec<f32> =
            values.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        check(format.unwrap_or_else(|| panic!("{name}: no such format")), tensor.data(), &values);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn values_are_the_references() {
    let mut found = Vec::new();
    each_tensor(|format, bytes, values| {
        assert_eq!(bits(&format.dequantize(bytes).unwrap()), bits(values), "{}", format.name());
        found.push(format);
    });
    let missing: Vec<_> =
        BlockFormat::ALL.into_iter().filter(|f| f.is_quantized() && !found.contains(f)).collect();
    assert!(missing.is_empty(), "no golden values of {missing:?}");
}
