//! Checkpoints to evidence.
//!
//! * [`depth`]: how early a model's layers know what it will say, and which layers of another model they are like.
//! * [`gates`]: the n-grams at which a memory opens most.

pub mod depth;
pub mod gates;
