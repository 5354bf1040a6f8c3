//! Models from outside: decoders of the Llama type, as others have trained them.
//!
//! [`OutsideModel::open`] reads a GGUF file, with the tokenizer in it, or a folder as Hugging Face's library writes it
//! (`config.json`, `tokenizer.json`, safetensors). Whatever the numbers on disk are, it computes in f32.
//! [`OutsideModel::save_checkpoint`] makes a checkpoint of it, which everything that takes one can use.
//!
//! What such a file may hold beyond this (biases, scaled rotary positions, experts, another tokenizer) is refused by
//! name: a model that runs with a part of it left out gives numbers that look right.

mod block_format;
mod checkpoint;
mod error;
mod gguf;
mod hub_folder;
mod llama;
mod open;
mod prefix_rows;
#[cfg(test)]
pub(crate) mod testing;
mod vocabulary;

pub use error::{Error, Result};
pub use llama::{Llama, LlamaConfig, LlamaState};
pub use open::OutsideModel;
pub use prefix_rows::PrefixRows;
pub(crate) use prefix_rows::common;
