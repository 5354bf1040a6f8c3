//! GGUF files of models: any bytes are a model or an error.
//!
//! Input: a file, or what follows the magic number and the version.
#![no_main]

use engram_fuzz::file;
use engram_import::Model;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let whole = [b"GGUF", &3_u32.to_le_bytes()[..], input].concat();
    let path = if input.starts_with(b"GGUF") { file("m.gguf", input) } else { file("m.gguf", &whole) };
    if let Ok(model) = Model::open(&path) {
        model.weights().iter().for_each(|(_, weight)| drop(weight.values()));
    }
});
