//! Checkpoints to evidence.
//!
//! * [`tasks`]: answers, not only losses. Questions of the kinds that the field uses, written down as files, put to
//!   a model and counted with their standard errors.

pub mod tasks;
