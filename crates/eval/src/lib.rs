//! Checkpoints to evidence.
//!
//! * [`tasks`]: answers, not only losses. Questions of the kinds that the field uses, written down as files, put to
//!   a model and counted with their standard errors.
//! * [`depth`]: how early a model's layers know what it will say, and which layers of another model they are like.
//! * [`sensitivity`]: what a model's answers lose without its memory, task by task, facts against reading.
//! * [`teaching`]: which taught facts a model answers, and what changed elsewhere.
//! * [`gates`]: the n-grams at which a memory opens most.

pub mod depth;
pub mod figure;
pub mod gates;
mod ratio;
pub mod sensitivity;
pub mod statistics;
pub mod tasks;
pub mod teaching;
