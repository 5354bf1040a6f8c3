//! Fused CPU operations of Engram's models, forward and backward, on plain slices.

mod parallel;
mod product;
