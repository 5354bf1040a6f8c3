//! Models to tokens and likelihoods: incremental decoding and continuous batching.
//!
//! Which memory rows a token reads depends on tokens alone, so that a table may live in RAM, on disk or in a cluster
//! and its rows be on their way before the model needs them. This crate is the model in use, built around that.
//!
//! * [`Decoder`]: a model one chunk of each sequence at a time, from the weights of our checkpoints or of files from
//!   elsewhere. Of latent attention it keeps the latents alone, with the projections to keys and values absorbed. Every sum of a position has an order of its own: **logits have the
//!   same bits alone, in any batch, and for any division into chunks and pages.**
//! * [`Cache`]: what is kept of positions, in pages that sequences with a common beginning share. The memory's short
//!   convolution keeps its past there, too, so that taking tokens back is forgetting positions.
//! * [`RowTiers`]: the rows of a step, asked for as soon as its tokens are known, from whatever tier; what is waited
//!   for them is measured.
//! * Memories: a model has its own, or others are added ([`Decoder::add_memory`]); a request names the one that it reads.
//!   Requests with different memories share steps and weights, never pages of the cache.
//! * [`Engine`]: continuous batching, prompts read in chunks, drafts by prompt look-up that change no answer.
//!   A request ends when its receiver is dropped.
//! * [`Offline`]: many texts scored or continued at once, with beginnings that they share computed once.
//!
//! ```
//! use std::collections::BTreeMap;
//!
//! use engram_config::ModelConfig;
//! use engram_import::HostTensor;
//! use engram_infer::{Decoder, Dtype, Engine, EngineOptions, Event, Model, Request};
//!
//! let config: ModelConfig = toml::from_str(r#"
//!     vocabulary = 64
//!     width = 16
//!     blocks = 1
//!     context = 32
//!     tied_head = true
//!     attention = { kind = "plain", heads = 2, head_width = 8 }
//!     feed_forward = { width = 32 }
//! "#)?;
//! // Weights come by name from a checkpoint or a file from elsewhere. Here they are made up.
//! let shapes: [(&str, &[usize]); 10] = [
//!     ("embedding", &[64, 16]),
//!     ("norm.weight", &[16]),
//!     ("blocks.0.attention_norm.weight", &[16]),
//!     ("blocks.0.attention.query.weight", &[16, 16]),
//!     ("blocks.0.attention.key.weight", &[16, 16]),
//!     ("blocks.0.attention.value.weight", &[16, 16]),
//!     ("blocks.0.attention.output.weight", &[16, 16]),
//!     ("blocks.0.feed_forward_norm.weight", &[16]),
//!     ("blocks.0.feed_forward.input.weight", &[16, 64]),
//!     ("blocks.0.feed_forward.output.weight", &[32, 16]),
//! ];
//! let weights: BTreeMap<String, HostTensor> = shapes
//!     .into_iter()
//!     .map(|(name, shape)| {
//!         let values = (0..shape.iter().product()).map(|i: usize| (i as f32).sin()).collect();
//!         (name.to_owned(), HostTensor { shape: shape.to_vec(), values })
//!     })
//!     .collect();
//! let decoder = Decoder::new(&config, &weights, Dtype::F32)?;
//! // Without a memory there are no rows to fetch. Every token stands for one letter here.
//! let token_bytes = (b'@'..).take(64).map(|letter| [letter]).collect();
//! let options = EngineOptions { cache_bytes: 1 << 20, ..EngineOptions::default() };
//! let engine = Engine::start(Model::new(decoder, None, token_bytes), options)?;
//!
//! let mut events = engine.submit(Request::new(vec![1, 2, 3], 5))?;
//! let mut text = String::new();
//! while let Some(event) = events.blocking_recv() {
//!     match event {
//!         Event::Token(token) => text += &token.text,
//!         Event::Done(summary) => assert_eq!(summary.completion_tokens, 5),
//!         Event::Gates(_) | Event::PromptLogprobs(_) => {}
//!         Event::Failed(failure) => return Err(failure.into()),
//!     }
//! }
//! assert_eq!(text.len(), 5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod block;
mod cache;
mod cached_heads;
mod chat_template;
mod decoder;
mod engine;
mod experts;
mod feed_forward;
mod gated_memory;
mod grammar;
mod jinja;
mod jinja_source;
mod latent_attention;
mod memory;
mod memory_tables;
mod metrics;
mod ngram_embedding;
mod norm;
mod offline;
mod opened_memory;
mod plain_attention;
mod prefix_tree;
mod prompt_lookup;
mod python_methods;
mod python_text;
mod request;
mod rotary;
mod row_fetch;
mod rows;
mod running;
mod sampling;
mod sigmoid_gate;
mod step_rows;
mod stop_strings;
mod streams;
mod text_codec;
mod text_stream;
mod token_embedding;
mod token_score;
mod weights;

pub use cache::{Cache, CacheFull, CacheLayout, Root, Sequence};
pub use chat_template::{ChatTemplate, Conversation, Message, TemplateError};
pub use decoder::{Decoder, StepOutput};
pub use engine::{Engine, EngineError, EngineOptions, Model, ModelMemory};
pub use engram_data::{TextTokenizer, TokenBytes};
pub use grammar::{Grammar, GrammarCompiler, GrammarError, json_rule};
pub use memory_tables::{MemoryTables, TableError};
pub use metrics::Metrics;
pub use offline::{Offline, OfflineError};
pub use opened_memory::BaseRows;
pub use prefix_tree::ScoredText;
pub use request::{Event, Failure, Finish, GeneratedToken, PositionGates, Refusal, Request, Summary};
pub use row_fetch::{Needed, RowFetch, RowIds, RowTiers, TierError};
pub use sampling::{BadParameter, Sampling, TokenLogprob};
pub use step_rows::{Chunk, Target};
pub use text_codec::{CodecError, Opening, PromptOptions, TextCodec};
pub use text_stream::TextStream;
pub use token_score::TokenScore;
pub use weights::{Dtype, Values, WeightError, WeightSource, WeightView};

/// A value of a chat template, read from JSON with its keys in their order.
pub use minijinja::Value as TemplateValue;

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
