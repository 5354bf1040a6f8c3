//! Folders of models: any settings, index and header are a model or an error.
//!
//! Input: `config.json`, the index and the header of a file, each ended by a zero byte; what is left is its tensors.
#![no_main]

use engram_fuzz::{file, folder};
use engram_import::Model;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let texts: Vec<&[u8]> = input.splitn(4, |&byte| byte == 0).collect();
    let text = |i: usize| texts.get(i).copied().unwrap_or_default();
    file("config.json", text(0));
    let index = file("model.safetensors.index.json", text(1));
    if text(1).is_empty() {
        let _ = std::fs::remove_file(index);
    }
    let header = text(2);
    file("model.safetensors", &[&(header.len() as u64).to_le_bytes()[..], header, text(3)].concat());
    if let Ok(model) = Model::open(folder()) {
        model.weights().iter().for_each(|(_, weight)| drop(weight.values()));
    }
});
