//! Tables of memory rows for programs in C.
//!
//! A handle is a number. One that is 0, was closed, or never existed is an error, not a crash; so is a null pointer, or a
//! buffer of another size than the rows need. Every function may be called from any thread. What a call could not do it
//! says by its result, and in words by [`engram_last_error`] on the same thread.
//!
//! `include/engram.h` is the header, `tests/c/program.c` a program that uses all of it, and `examples/backend.c` how a
//! backend of ggml's kind fetches the rows of a batch while it computes the one before.

mod failure;
mod handles;
mod interface;

pub use interface::*;
