//! Checkpoints to evidence.
//!
//! * [`tasks`]: answers, not only losses. Questions of the kinds that the field uses, written down as files, put to
//!   a model and counted with their standard errors.
//! * [`outside`]: models that others have trained, so that the same questions can be put to them.

pub mod outside;
pub mod tasks;
