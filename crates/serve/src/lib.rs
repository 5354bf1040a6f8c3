//! The engine over HTTP, in the form of OpenAI's API, with limits on all that a client can send or leave undone, and a
//! page that shows where the memory's gates open. Everything that computes is in `engram-infer`.
#![forbid(unsafe_code)]

mod access_log;
mod answer;
mod api;
mod api_error;
mod call_parser;
mod call_style;
mod fields;
mod grammars;
mod messages;
mod openapi;
mod origin;
mod output_format;
mod server;
mod told_logprobs;
mod tools;
mod unread_body;

pub use origin::Origins;
pub use server::{Facts, MemoryFacts, Server, ServerOptions};
