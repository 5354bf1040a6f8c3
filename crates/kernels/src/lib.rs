//! Fused CPU operations of Engram's models, forward and backward, on plain slices.

mod attention;
mod cross_entropy;
mod heads;
mod linear;
mod parallel;
mod product;
mod rms_norm;
mod rotary;
mod simd;
mod swiglu;
#[cfg(test)]
mod testing;

pub use attention::{
    Attention, AttentionGradients, AttentionShape, LatentGradients, LatentShape, causal_attention,
    causal_attention_backward, latent_attention, latent_attention_backward,
};
pub use cross_entropy::{LinearCrossEntropy, LinearCrossEntropyGradients, linear_cross_entropy};
pub use linear::{linear, linear_backward_input, linear_backward_weight};
pub use rms_norm::{RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward};
pub use rotary::{Angles, rotary, rotary_backward};
pub use swiglu::{swiglu, swiglu_backward};
