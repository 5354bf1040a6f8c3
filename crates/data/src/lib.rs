//! Text to tokens to batches.
//!
//! A [`Corpus`] streams documents from text, JSON lines and Parquet files. A [`Tokenizer`] is trained on it or loaded.
//! [`prepare`] turns the corpus into memory-mapped [`TokenShards`] with the boundaries and sizes of documents. A
//! [`Sampler`] gives training windows in a random order; its state is two numbers. A [`Mixture`] draws them from several
//! sources by weight. [`Packing`] tells which tokens of a
//! window belong to one document.
//!
//! ```
//! use std::ops::ControlFlow::Continue;
//! use engram_data::{Corpus, PrepareOptions, Sampler, TokenShards, Tokenizer, TokenizerTraining, prepare};
//!
//! let folder = tempfile::tempdir()?;
//! let text = folder.path().join("whale.txt");
//! std::fs::write(&text, "Call me Ishmael. Some years ago, never mind how long precisely. ".repeat(50))?;
//!
//! let corpus = Corpus::open(&[&text])?;
//! let training = TokenizerTraining { vocabulary: 280, ..Default::default() };
//! let tokenizer = Tokenizer::train(&corpus, &training, &mut |_| Continue(()))?;
//! let data = folder.path().join("data");
//! prepare(&corpus, &tokenizer, &data, &PrepareOptions::default(), &mut |_| Continue(()))?;
//!
//! let shards = TokenShards::open(&data.join("train"))?;
//! shards.check_tokenizer(&tokenizer)?;
//! let mut sampler = Sampler::new(42, 64, 2, shards.len())?;
//! let batch = sampler.next_batch(&shards)?;
//! assert_eq!(batch.tokens.len(), 2 * 65);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod ascii_words;
mod bpe;
mod conversations;
mod corpus;
mod cut;
mod damage;
mod error;
mod files;
mod json_text;
mod loss_mask;
mod mixture;
mod packing;
mod permuted;
mod preparation_state;
mod prepare;
mod sampler;
mod shard_file;
mod shard_writer;
mod split_rule;
mod text_bounds;
mod token_bytes;
mod token_model;
mod token_names;
mod token_shards;
mod tokenizer;
mod word_encoder;
mod work_folder;

pub use conversations::{Conversation, ConversationSplit, ConversationSummary, prepare_conversations};
pub use corpus::{Corpus, Documents};
pub use damage::{DamageReport, OnDamage};
pub use error::Error;
pub use files::{folder_of, new_file, new_folder, sync_folder, write_file};
pub use mixture::{Mixture, Window};
pub use packing::Packing;
pub use permuted::PermutedPlaces;
pub use prepare::{PrepareOptions, PrepareProgress, PrepareSummary, prepare};
pub use sampler::{Batch, Sampler, SamplerState, mix, validation_windows};
pub use shard_writer::SplitSummary;
pub use text_bounds::Begin;
pub use token_bytes::TokenBytes;
pub use token_model::{TextTokenizer, TokenModel};
pub use token_shards::{DataIdentity, ShardDocument, TokenShards};
pub use tokenizer::{END_OF_TEXT, PAD, Tokenizer, TokenizerHash, TokenizerProgress, TokenizerTraining};

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
