//! Evaluation of checkpoints.
//!
//! * [`tasks`]: questions of the kinds that the field uses, defined in files, put to a model and scored with standard
//!   errors.
//! * [`depth`]: how early a model's layers predict its output, and which layers of another model they resemble.
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
