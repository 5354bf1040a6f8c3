//! Fused CPU operations of Engram's models, forward and backward, on plain slices.

mod adam;
mod attention;
mod cross_entropy;
mod embedding;
mod experts;
mod heads;
mod hyper_connection;
mod linear;
mod memory_gate;
mod newton_schulz;
mod parallel;
mod product;
mod rms_norm;
mod rotary;
mod short_convolution;
mod simd;
mod swiglu;
#[cfg(test)]
mod testing;

pub use adam::{AdamStep, adam_step};
pub use attention::{
    Attention, AttentionGradients, AttentionShape, LatentGradients, LatentShape, causal_attention,
    causal_attention_backward, latent_attention, latent_attention_backward,
};
pub use cross_entropy::{LinearCrossEntropy, LinearCrossEntropyGradients, linear_cross_entropy};
pub use embedding::{embedding, embedding_backward};
pub use experts::{
    Experts, ExpertsGradients, ExpertsInput, ExpertsSaved, ExpertsShape, experts, experts_backward,
};
pub use hyper_connection::{
    HyperCoefficients, HyperGradients, HyperShape, HyperWeights, HyperWriteGradients, MAX_STREAMS,
    coefficient_count, hyper_coefficients, hyper_coefficients_backward, hyper_read, hyper_read_backward,
    hyper_write, hyper_write_backward,
};
pub use linear::{linear, linear_backward_input, linear_backward_weight};
pub use memory_gate::{MemoryGate, MemoryGateGradients, MemoryGateInput, memory_gate, memory_gate_backward};
pub use newton_schulz::newton_schulz;
pub use rms_norm::{RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward};
pub use rotary::{Angles, rotary, rotary_backward};
pub use short_convolution::{
    ShortConvolution, ShortConvolutionGradients, ShortConvolutionShape, ShortConvolutionWeights,
    short_convolution, short_convolution_backward,
};
pub use swiglu::{swiglu, swiglu_backward};
