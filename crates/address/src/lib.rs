//! Token ids to memory row ids: the exact addressing of Engram's hashed n-gram tables.
//!
//! Engram (arXiv 2601.07372) gives a language model a memory that is looked up rather than computed: the last few
//! tokens are hashed, and the hash selects rows of a large table. The rows depend on tokens alone, so they are known
//! before the forward pass begins. This crate computes them. It knows nothing of tensors or of files of rows.
//!
//! 1. [`Vocabulary`]: tokens whose texts differ only in case, accents or white space become one class.
//! 2. [`draw_multipliers`]: every layer draws an odd 64-bit multiplier for each position of an n-gram,
//!    from numpy's generator, bit for bit.
//! 3. [`assign_primes`]: every hash head of the model gets its own prime number of rows.
//! 4. [`LayerAddress`]: classes times multipliers, xored, modulo each head's prime. A layer's heads follow each other
//!    in one table.
//! 5. [`History`]: the state of a sequence that grows, is forked, or is rolled back. Ids do not depend on how the
//!    sequence is divided into pieces. Dead positions ([`Tokens::dead`]) and document boundaries ([`Boundary`],
//!    [`Tokens::starts`]) end n-grams.
//! 6. [`AddressIdentity`]: one hash over all of it, stored in tables and checkpoints. With one wrong digit in a
//!    multiplier, or one class too many, every row would silently belong to other words. So a different identity is
//!    refused.
//!
//! ```
//! use engram_address::{AddressConfig, Addressing, Arithmetic, Boundary, Vocabulary};
//!
//! // V4.1's memory layers. `Vocabulary::from_tokenizer_file("tokenizer.json")` gives its classes.
//! let config = AddressConfig {
//!     seed: 0,
//!     layers: vec![1, 14],
//!     max_order: 4,
//!     heads: 8,
//!     base_rows: vec![16_000_000; 3],
//!     pad_id: 2,
//!     boundary: Boundary::None,
//!     arithmetic: Arithmetic::Exact,
//! };
//! let addressing = Addressing::new(&config, Vocabulary::identity(99_092))?;
//! let layer = &addressing.layers()[0];
//! assert_eq!(layer.multipliers()[0], 76_632_096_046_245);
//! assert_eq!((layer.rows(), layer.slots()), (384_006_168, 24));
//!
//! // A whole sequence: [time, order, head].
//! let mut whole = Vec::new();
//! addressing.row_ids(0, &[237, 5095, 251, 7208], &mut whole)?;
//! assert_eq!(whole[..3], [5_184_683, 27_616_858, 44_205_083]);
//!
//! // The same, a token at a time.
//! let mut history = addressing.history();
//! let mut ids = Vec::new();
//! for (time, token) in [237, 5095, 251, 7208].into_iter().enumerate() {
//!     history.extend(&[token])?.row_ids(0, &mut ids)?;
//!     assert_eq!(ids, whole[time * 24..(time + 1) * 24]);
//! }
//!
//! // Another seed reads other rows: a table of one is refused by the other.
//! let other = Addressing::new(&AddressConfig { seed: 1, ..config }, Vocabulary::identity(99_092))?;
//! assert!(addressing.identity().check(&other.identity()).is_err());
//! # Ok::<(), engram_address::AddressError>(())
//! ```
//!
//! [`StoredAddressing`] takes multipliers and sizes from a checkpoint instead of drawing them. Qwen3.8-Flash-Next needs
//! it: raw token ids ([`Vocabulary::identity`]), [`Arithmetic::Wrapping`], and its end-of-sequence token both as
//! `pad_id` and as [`Boundary::After`].
//!
//! Ids are exact on every machine. AVX2 or AVX-512 are used if the processor has them, and give the same bits.
#![forbid(unsafe_code)]

mod addressing;
#[cfg(feature = "tokenizers")]
mod compression;
mod config;
mod error;
mod hash;
mod history;
mod identity_hasher;
mod multipliers;
mod numpy_random;
mod primes;
mod scheme;
mod vocabulary;

pub use engram_identity::{AddressIdentity, IdentityMismatch, NotHexadecimal};

pub use addressing::Addressing;
pub use config::{AddressConfig, Arithmetic, Boundary, MAX_HEADS, MAX_ORDER, StoredAddressing, StoredLayer};
pub use error::{AddressError, Result};
pub use hash::LayerAddress;
pub use history::{History, NewTokens, Tokens};
pub use multipliers::draw_multipliers;
pub use primes::{MAX_HEAD_ROWS, assign_primes};
pub use vocabulary::Vocabulary;

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
