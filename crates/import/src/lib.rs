//! A model on disk to a configuration, named tensors and a tokenizer; and back.
//!
//! [`Model::open`] reads a checkpoint of ours, a GGUF file, or a folder as Hugging Face's library writes it
//! (`config.json`, `tokenizer.json`, safetensors); [`Hub`] brings such a folder from the hub. The weights stay in their
//! files, mapped: [`Weights`] gives views of them by one set of names. [`Model::save_checkpoint`] makes a checkpoint of a
//! model, and [`Model::export_hub`] a folder for Hugging Face's library.
//!
//! [`Adapter`] is a memory for a model that exists, and [`Overlay`] a few changed rows of a memory; each names the model
//! that it belongs to and is refused on any other.
//!
//! An architecture, a setting, a type or a tensor that is not known is refused by name: a model that runs with a part of
//! it left out gives numbers that look right.

mod adapter;
mod architectures;
mod assembly;
mod belonging;
mod checkpoint;
mod error;
mod generation;
mod gguf;
mod gguf_tokenizer;
#[cfg(any(test, feature = "testing"))]
mod gguf_writer;
mod hub;
mod hub_form;
mod hub_tokenizer;
mod mapped_file;
mod memory_addressing;
#[cfg(test)]
mod memory_tests;
mod model;
#[cfg(test)]
mod model_tests;
mod overlay;
mod own_form;
mod own_weights;
mod safetensors_folder;
mod safetensors_writer;
mod settings;
mod stacked_memory;
mod tensor;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod weight;

pub use adapter::{Adapter, AdapterRows, AdapterWriter};
pub use checkpoint::{Checkpoint, CheckpointWriter};
pub use error::{Error, Result};
pub use generation::GenerationSettings;
pub use hub::{Download, Hub, HubKind, HubModel, HubRepository};
pub use memory_addressing::memory_addressing;
pub use model::Model;
pub use overlay::{Overlay, OverlayNotes, OverlayWriter};
pub use stacked_memory::StackedMemory;
pub use tensor::HostTensor;
pub use weight::{Weight, Weights};

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
