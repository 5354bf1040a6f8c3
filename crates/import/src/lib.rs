//! A model on disk to a configuration, named tensors and a tokenizer; and back.
//!
//! [`Checkpoint`] and [`CheckpointWriter`] are our own folders. [`OutsideModel::open`] reads a GGUF file, with the
//! tokenizer in it, or a folder as Hugging Face's library writes it (`config.json`, `tokenizer.json`, safetensors).
//! [`OutsideModel::save_checkpoint`] makes a checkpoint of it, which everything that takes one can use.
//!
//! What such a file may hold beyond this (biases, scaled rotary positions, experts, another tokenizer) is refused by
//! name: a model that runs with a part of it left out gives numbers that look right.

mod architectures;
mod assembly;
mod checkpoint;
mod error;
mod generation;
mod gguf;
mod gguf_tokenizer;
#[cfg(any(test, feature = "testing"))]
mod gguf_writer;
mod hub;
mod hub_folder;
mod hub_form;
mod hub_tokenizer;
mod llama;
mod mapped_file;
mod model;
#[cfg(test)]
mod model_tests;
mod open;
mod own_form;
mod own_weights;
mod prefix_rows;
mod safetensors_folder;
mod safetensors_writer;
mod settings;
mod tensor;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod to_checkpoint;
mod weight;

pub use checkpoint::{Checkpoint, CheckpointWriter};
pub use error::{Error, Result};
pub use generation::GenerationSettings;
pub use hub::{Download, Hub, HubKind, HubModel, HubRepository};
pub use llama::{Llama, LlamaConfig, LlamaState};
pub use model::Model;
pub use open::OutsideModel;
pub use prefix_rows::{PrefixRows, common};
pub use tensor::HostTensor;
pub use weight::{Weight, Weights};
