//! The identity of an addressing: what a table of memory rows and its reader must agree on.
//!
//! Which rows an n-gram has is decided by many numbers (vocabulary classes, multipliers, primes). Rows read under other
//! ones belong to other n-grams, and nothing would show it but a worse model. So all of them are hashed into 32 bytes,
//! which tables and checkpoints carry. `engram-address` makes identities and `engram-store` compares them: this crate is
//! all that the two share.
//!
//! ```
//! use engram_identity::AddressIdentity;
//!
//! let identity: AddressIdentity = "07".repeat(32).parse()?;
//! assert_eq!(identity, AddressIdentity::from_bytes([7; 32]));
//! assert!(identity.check(&AddressIdentity::from_bytes([8; 32])).is_err());
//! # Ok::<(), engram_identity::NotHexadecimal>(())
//! ```
#![forbid(unsafe_code)]

mod hexadecimal;
mod identity;

pub use hexadecimal::{Hexadecimal, NotHexadecimal, parse_hexadecimal};
pub use identity::{AddressIdentity, IdentityMismatch};

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
