//! Fused CPU operations of Engram's models, forward and backward, on plain slices.

mod linear;
mod parallel;
mod product;
mod rms_norm;
mod simd;
mod swiglu;
#[cfg(test)]
mod testing;

pub use linear::{linear, linear_backward_input, linear_backward_weight};
pub use rms_norm::{RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward};
pub use swiglu::{swiglu, swiglu_backward};
