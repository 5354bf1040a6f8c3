//! Checkpoints to evidence.
//!
//! A [`study`] asks a question of many runs at once, such as where memory pays: a grid of arms and seeds that are
//! trained, measured on the same held-out documents, and compared in pairs.

pub mod figure;
pub mod study;
