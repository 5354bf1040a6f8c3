//! A model on disk to a configuration, named tensors and a tokenizer; and back.
//!
//! [`Checkpoint`] and [`CheckpointWriter`] are our own folders. [`OutsideModel::open`] reads a GGUF file, with the
//! tokenizer in it, or a folder as Hugging Face's library writes it (`config.json`, `tokenizer.json`, safetensors).
//! [`OutsideModel::save_checkpoint`] makes a checkpoint of it, which everything that takes one can use.
//!
//! What such a file may hold beyond this (biases, scaled rotary positions, experts, another tokenizer) is refused by
//! name: a model that runs with a part of it left out gives numbers that look right.

mod block_format;
mod checkpoint;
mod error;
mod gguf;
#[cfg(any(test, feature = "testing"))]
mod gguf_writer;
mod hub_folder;
mod llama;
mod open;
mod prefix_rows;
mod tensor;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod to_checkpoint;
mod vocabulary;

pub use checkpoint::{Checkpoint, CheckpointWriter};
pub use error::{Error, Result};
pub use llama::{Llama, LlamaConfig, LlamaState};
pub use open::OutsideModel;
pub use prefix_rows::{PrefixRows, common};
pub use tensor::HostTensor;
