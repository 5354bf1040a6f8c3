//! Writes the logits after the last token of each prompt as a numpy file, to compare with another implementation.
//!
//!     cargo run --release -p engram-eval --example logits -- MODEL LAMBADA.jsonl 50 logits.npy
//!
//! MODEL is a checkpoint without a memory, a GGUF file, or a folder with config.json.

use std::error::Error;
use std::io::Write;
use std::path::Path;

use engram_import::Model;
use engram_infer::{Cache, Chunk, Decoder, Dtype, Root};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, prompts, count, out] = &arguments[..] else {
        return Err("give MODEL PROMPTS.jsonl COUNT OUT.npy".into());
    };
    let model = Model::open(Path::new(model))?;
    let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32)?;
    let mut rows = Vec::new();
    for line in std::fs::read_to_string(prompts)?.lines().take(count.parse()?) {
        let record: serde_json::Value = serde_json::from_str(line)?;
        let text = record["context"].as_str().ok_or("a record without `context`")?;
        rows.extend(last_logits(&decoder, &model.tokenizer().encode(text)?)?);
    }
    write_npy(Path::new(out), &rows, decoder.config().vocabulary)
}

fn last_logits(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<f32>, Box<dyn Error>> {
    let layout = decoder.cache_layout(16);
    let pages = layout.pages_for(tokens.len()).max(1);
    let mut cache = Cache::new(layout, pages);
    let mut sequence = cache.begin(Root::NoMemory, &[]);
    cache.reserve(&mut sequence, tokens.len())?;
    let chunk = Chunk { sequence: &sequence, tokens, memory: None, logits: 1, targets: &[] };
    Ok(decoder.step(&mut cache, &[chunk], &mut [])?.logits)
}

/// A matrix of f32 in numpy's format, version 1.
fn write_npy(path: &Path, values: &[f32], columns: usize) -> Result<(), Box<dyn Error>> {
    let rows = values.len() / columns;
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    // Magic, version and length take 10 bytes; the data begins at a multiple of 64.
    let blank = 63 - (10 + header.len()) % 64;
    let header = format!("{header}{}\n", " ".repeat(blank));
    let mut file = std::fs::File::create(path)?;
    file.write_all(b"\x93NUMPY\x01\x00")?;
    file.write_all(&(header.len() as u16).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.write_all(bytemuck::cast_slice(values))?;
    Ok(())
}
