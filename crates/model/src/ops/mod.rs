//! The operations of a model, each in two forms: fused, by a CPU kernel, and composed of Burn's primitives.
//!
//! A module calls an operation by its name. Which form runs is decided here alone ([`choose`](fused::choose)): fused
//! ones on Burn's CPU backend `flex`, composed ones everywhere else.

mod attention;
mod cross_entropy;
mod embedding;
mod experts;
mod function;
mod fused;
mod geglu;
mod hyper_connection;
mod memory_gate;
mod product;
mod rms_norm;
mod selection;
mod short_convolution;
mod softmax;
mod swiglu;
mod token_sums;

pub(crate) use attention::{CausalAttentionShape, LatentAttentionShape, causal_attention, latent_attention};
pub use cross_entropy::{TargetScore, cross_entropy, target_scores, token_losses};
pub use embedding::embed;
pub(crate) use experts::{expert_gates, experts};
pub use fused::{composed, fused_on};
pub(crate) use geglu::geglu;
pub(crate) use hyper_connection::{hyper_coefficients, hyper_read, hyper_write};
pub(crate) use memory_gate::{memory_gate, signed_root_gate};
pub(crate) use product::{add_bias, rows_product};
pub(crate) use rms_norm::rms_norm;
pub(crate) use selection::select;
pub(crate) use short_convolution::{ConvolutionShape, short_convolution};
pub(crate) use swiglu::swiglu;
