//! Logits after the last token of each prompt, as a numpy file: to be set beside another implementation.
//!
//!     cargo run --release -p engram-eval --example logits -- MODEL.gguf LAMBADA.jsonl 50 logits.npy
//!     cargo run --release -p engram-eval --example logits -- CHECKPOINT LAMBADA.jsonl 50 logits.npy

use std::error::Error;
use std::io::Write;
use std::path::Path;

use burn::tensor::Device;
use engram_import::{LlamaState, OutsideModel, PrefixRows};
use engram_train::Trained;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, prompts, count, out] = &arguments[..] else {
        return Err("give MODEL PROMPTS.jsonl COUNT OUT.npy".into());
    };
    let model = open(Path::new(model))?;
    let mut rows = Vec::new();
    for line in std::fs::read_to_string(prompts)?.lines().take(count.parse()?) {
        let record: serde_json::Value = serde_json::from_str(line)?;
        let text = record["context"].as_str().ok_or("a record without `context`")?;
        rows.extend(model.last_logits(text)?);
    }
    write_npy(Path::new(out), &rows, model.vocabulary())
}

/// A model from outside, or a checkpoint.
enum Model {
    Outside(Box<OutsideModel>),
    Trained(Box<Trained>),
}

fn open(path: &Path) -> Result<Model, Box<dyn Error>> {
    Ok(match OutsideModel::is_one(path) {
        true => Model::Outside(OutsideModel::open(path)?.into()),
        false => Model::Trained(Trained::open(path, &Device::flex())?.into()),
    })
}

impl Model {
    fn vocabulary(&self) -> usize {
        match self {
            Self::Outside(model) => model.llama().config().vocabulary,
            Self::Trained(model) => model.config().model.vocabulary,
        }
    }

    fn last_logits(&self, text: &str) -> Result<Vec<f32>, Box<dyn Error>> {
        Ok(match self {
            Self::Outside(model) => last_logits(model, &model.tokenizer().encode(text)?),
            Self::Trained(model) => model.next_logits(&model.tokenizer().encode(text)?)?,
        })
    }
}

fn last_logits(model: &OutsideModel, tokens: &[u32]) -> Vec<f32> {
    let rows = PrefixRows::of(&[tokens]);
    let llama = model.llama();
    let hidden = llama.hidden(&rows.tokens, &rows.positions, &rows.segments, &mut LlamaState::default());
    llama.logits(&hidden[hidden.len() - llama.config().width..])
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
