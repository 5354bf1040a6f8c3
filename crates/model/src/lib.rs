//! Rows and tokens to logits: the Engram memory module and its transformer backbone, on [Burn](https://burn.dev).
//!
//! The backbone is DeepSeek's: [`Attention`] over a low-rank latent, [`Experts`] chosen by sigmoid scores and balanced
//! without a loss, and [`HyperConnection`]s, which carry several residual streams through the blocks. [`Memory`] adds to
//! those streams what the n-grams before a token have in the tables: rows, gated by context (arXiv 2601.07372). Every
//! part is optional, so that the same code is a plain transformer, a mixture of experts, or both with memory.
//!
//! A model is described by a [`ModelConfig`](engram_config::ModelConfig), whose price [`Account`](engram_config::Account) states without building it. What it computes
//! with comes from outside: tokens, and for each memory layer the distinct rows of the batch, [`MemoryRows`]. The rows
//! are a leaf of the graph, so that their gradient can go back to wherever they came from.
//!
//! On Burn's CPU backend `flex`, operations with a kernel of `engram-kernels` run fused, each with a backward pass of
//! its own; everywhere else the same operations are composed from Burn's primitives. Weights are `[in, out]`.
//!
//! ```
//! use std::sync::Arc;
//!
//! use burn::tensor::{Device, Tensor};
//! use engram_model::{LanguageModel, MemoryRows, Sequences, Tokens, Trace};
//! use engram_config::{ModelConfig, Precision};
//!
//! let config: ModelConfig = toml::from_str(r#"
//!     vocabulary = 64
//!     width = 16
//!     blocks = 2
//!     context = 8
//!     attention = { kind = "latent", heads = 2, latent_rank = 8, content_width = 8, rotary_width = 4, value_width = 8 }
//!     feed_forward = { width = 32 }
//!     hyper_connections = { streams = 2 }
//!     memory = { layers = [1], max_order = 3, heads = 2, row_width = 4, rows_per_head = [50, 50] }
//! "#)?;
//! let device = Device::flex().autodiff();
//! let model = LanguageModel::new(&config, &device, 42, Precision::F32)?;
//!
//! // Two sequences of three tokens; each token reads 2 orders · 2 heads = 4 rows, of which 5 are distinct here.
//! let rows = Tensor::<2>::ones([5, 4], &device).require_grad();
//! let index: Arc<[u32]> = (0..2 * 3 * 4).map(|slot| slot % 5).collect();
//! let memory = [MemoryRows { rows: rows.clone(), index, dead: None }];
//! let tokens = Tokens { ids: &[1, 2, 3, 4, 5, 6], sequences: &Sequences::equal(2, 3), memory: &memory };
//! let loss = model.loss(tokens, [2, 3, 4, 5, 6, 7].into(), &mut Trace::default());
//!
//! let gradients = loss.backward();
//! let of_rows = rows.grad(&gradients).expect("rows have a gradient");
//! assert_eq!(of_rows.dims(), [5, 4]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod attention;
mod block;
mod block_memory;
mod choice;
mod compute_gate;
mod experts;
mod feed_forward;
mod gate;
mod host;
mod hyper_connection;
mod init;
mod linear;
mod memory;
mod memory_rows;
mod ngram_embedding;
mod ops;
mod partial;
mod recomputation;
mod rms_norm;
mod rotary;
mod sequences;
mod short_convolution;
mod sigmoid_gate;
mod signed_root_gate;
mod targets;
mod training;
mod transformer;

pub use attention::{Attention, LatentAttention, PlainAttention};
pub use block::{Block, BlockFeedForward};
pub use block_memory::BlockMemory;
pub use choice::Choice;
pub use experts::Experts;
pub use feed_forward::FeedForward;
pub use gate::Gate;
pub use hyper_connection::{Coefficients, HyperConnection};
pub use init::Init;
pub use linear::Linear;
pub use memory::{Memory, Projection, SeparateProjection, ValueProjection};
pub use memory_rows::MemoryRows;
pub use ngram_embedding::NgramEmbedding;
pub use ops::{TargetScore, composed, cross_entropy, embed, fused_on, target_scores, token_losses};
pub use rms_norm::RmsNorm;
pub use rotary::Rotary;
pub use sequences::Sequences;
pub use short_convolution::ShortConvolution;
pub use sigmoid_gate::SigmoidGate;
pub use signed_root_gate::SignedRootGate;
pub use targets::{Shares, Targets};
pub use training::{DeclareTraining, Matrices, TrainingPlan, WeightTraining};
pub use transformer::{LanguageModel, Tokens, Trace};

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
