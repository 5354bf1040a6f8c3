//! What a table's rows belong to, and which file they are from.

use std::fmt;

use engram_identity::{AddressIdentity, Hexadecimal, NotHexadecimal, parse_hexadecimal};

/// Which addressing placed a table's rows, and for which layer: rows mean nothing under any other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TableOrigin {
    /// The identity of the addressing.
    pub identity: AddressIdentity,
    /// The layer of the model, counted from 0.
    pub layer: u64,
}

impl fmt::Display for TableOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} of the addressing {}", self.layer, self.identity)
    }
}

impl fmt::Debug for TableOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableOrigin({self})")
    }
}

/// The hash of all that a table file holds: of its header, which holds the hash of the list of checksums, which
/// holds those of all blocks. Files have equal hashes if, and only if, they have equal bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// The hash of these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hexadecimal(&self.0).fmt(f)
    }
}

impl std::str::FromStr for ContentHash {
    type Err = NotHexadecimal;

    fn from_str(text: &str) -> Result<Self, NotHexadecimal> {
        parse_hexadecimal(text).map(Self)
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ContentHash({self})")
    }
}
