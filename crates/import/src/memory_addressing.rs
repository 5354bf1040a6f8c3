//! The addressing of a memory under a tokenizer.

use engram_address::{AddressError, Addressing, Vocabulary};
use engram_config::{Compression, MemoryConfig};
use engram_data::Tokenizer;

/// From tokens to the rows that `memory` reads.
///
/// # Errors
/// When the memory and the tokenizer do not fit.
pub fn memory_addressing(memory: &MemoryConfig, tokenizer: &Tokenizer) -> Result<Addressing, AddressError> {
    let vocabulary = match memory.compression {
        Compression::Normalised => Vocabulary::from_tokenizer(tokenizer.inner())?,
        Compression::None => Vocabulary::identity(tokenizer.vocabulary()),
    };
    Addressing::new(&memory.addressing(), vocabulary)
}
