//! Checkpoints to answers: incremental decoding, continuous batching, and HTTP in the form of OpenAI's API.
mod cache;
mod decoder;
mod engine;
mod experts;
mod feed_forward;
mod memory_decoder;
mod metrics;
mod prompt_lookup;
mod request;
mod row_fetch;
mod sampling;
mod stop_strings;
mod text_stream;

pub use cache::{Cache, CacheFull, CacheLayout, Root, Sequence};
pub use decoder::{Chunk, Decoder, StepOutput};
pub use engine::{Engine, EngineError, EngineOptions, Model};
pub use metrics::Metrics;
pub use request::{Event, Failure, Finish, GeneratedToken, PositionGates, Refusal, Request, Summary};
pub use row_fetch::{RowFetch, RowIds, RowTiers, TierError};
pub use sampling::{BadParameter, Sampling, TokenLogprob};
pub use text_stream::TextStream;
