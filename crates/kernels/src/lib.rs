//! Fused CPU operations of Engram's models, forward and backward, on plain slices.
//!
//! A general tensor library computes attention, normalisation or a loss as a chain of small operations. Each writes its
//! result to memory, and the next reads it. On a CPU that traffic costs as much as the arithmetic. Here each of those
//! chains is one function that reads its inputs once, works on blocks that stay in cache, and writes the result.
//!
//! * **Layout.** Tensors are row-major `f32` slices; shapes are stated with every argument. A token's
//!   values are adjacent, and weights are `[inputs, outputs]`.
//! * **Backward.** A forward pass returns what its backward pass needs (a norm, a logarithm), but never an intermediate
//!   as large as the work itself. Attention recomputes its probabilities. The cross-entropy computes its gradients in
//!   the forward pass, so logits exist for only a few hundred tokens at a time.
//! * **Threads.** Work is divided over rayon's current pool in blocks that depend on shapes alone, and sums over blocks
//!   are added in block order. The same input gives the same bits on every run, with any number of threads.
//! * **Quantised weights.** [`BlockFormat`] names the block types of GGUF files and dequantises them as ggml does.
//!   [`PackedMatrix::from_blocks`] multiplies by them in their stored form, with rows rounded to eight bits or exact.
//! * **Decoding.** [`PackedMatrix`] and [`cached_attention`] give a row the same bits in any batch, so a server's
//!   answer does not depend on its other requests.
//! * **Instruction sets.** Loops are compiled several times, and the best version is chosen at run time (AVX-512, AVX2
//!   with FMA, NEON). No compiler flag is needed. Without fused multiply-add the results are the same, but slow.
//! * **Errors.** The caller guarantees shapes: a slice of another size panics with the expected shape. NaN and infinity
//!   pass through.
//!
//! ```
//! use engram_kernels::{AttentionShape, causal_attention, causal_attention_backward, rms_norm};
//!
//! // One sequence of three positions, one head of width 2.
//! let shape = AttentionShape { batch: 1, time: 3, heads: 1, key: 2, value: 2 };
//! let hidden = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
//! let x = rms_norm(&hidden, None, 2, 1e-6).output;
//! let attention = causal_attention(&x, &x, &hidden, shape, 1.0);
//! assert_eq!(attention.output[..2], hidden[..2]); // the first position sees itself only
//!
//! // The loss "sum of the outputs" has gradient 1 everywhere.
//! let gradients = causal_attention_backward(&[1.0; 6], &x, &x, &hidden, attention.view(), shape, 1.0);
//! let total: f32 = gradients.v.iter().sum();
//! assert!((total - 6.0).abs() < 1e-5); // each output is a weighted mean of values
//! ```

mod adam;
mod attention;
mod block_format;
mod cached_attention;
mod columns;
mod cross_entropy;
mod embedding;
mod experts;
mod heads;
mod hyper_connection;
mod linear;
mod memory_gate;
mod newton_schulz;
mod packed;
mod parallel;
mod product;
mod residual;
mod rms_norm;
mod rotary;
mod segment_attention;
mod short_convolution;
mod simd;
mod swiglu;
#[cfg(test)]
mod testing;

pub use adam::{AdamStep, adam_step};
pub use attention::{
    Attention, AttentionGradients, AttentionOutput, AttentionShape, LatentGradients, LatentShape,
    causal_attention, causal_attention_backward, latent_attention, latent_attention_backward,
};
pub use block_format::{BlockError, BlockFormat};
pub use cached_attention::{CachedAttentionShape, Seen, cached_attention};
pub use cross_entropy::{
    LinearCrossEntropy, LinearCrossEntropyGradients, TargetScore, linear_cross_entropy, linear_target_scores,
    log_sum_exp,
};
pub use embedding::{embedding, embedding_backward};
pub use experts::{
    Experts, ExpertsGradients, ExpertsInput, ExpertsSaved, ExpertsShape, experts, experts_backward,
};
pub use hyper_connection::{
    HyperCoefficients, HyperGradients, HyperShape, HyperWeights, HyperWriteGradients, MAX_STREAMS,
    coefficient_count, hyper_coefficients, hyper_coefficients_backward, hyper_coefficients_of_product,
    hyper_read, hyper_read_backward, hyper_write, hyper_write_backward,
};
pub use linear::{linear, linear_add, linear_backward_input, linear_backward_weight};
pub use memory_gate::{MemoryGate, MemoryGateGradients, MemoryGateInput, memory_gate, memory_gate_backward};
pub use newton_schulz::newton_schulz;
pub use packed::{Activations, BlockPacker, PackedMatrix, WeightFormat, head_products};
pub use parallel::with_awake_threads;
pub use residual::add;
pub use rms_norm::{RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward, rms_norm_into};
pub use rotary::{Angles, rotary, rotary_backward};
pub use segment_attention::{GroupedShape, Segment, segment_attention};
pub use short_convolution::{
    ShortConvolution, ShortConvolutionGradients, ShortConvolutionShape, ShortConvolutionWeights,
    short_convolution, short_convolution_backward,
};
pub use swiglu::{
    geglu, geglu_apart, geglu_backward, geglu_into, swiglu, swiglu_apart, swiglu_backward, swiglu_into,
};

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
