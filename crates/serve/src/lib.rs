//! The engine over HTTP, in the form of OpenAI's API, with limits on all that a client can send or leave undone, and a
//! page that shows where the memory's gates open. Everything that computes is in `engram-infer`.
#![forbid(unsafe_code)]

mod answer;
mod api;
mod api_error;
mod fields;
mod messages;
mod openapi;
mod origin;
mod output_format;
mod server;
mod told_logprobs;

pub use origin::Origins;
pub use server::{Facts, MemoryFacts, Server, ServerOptions};
