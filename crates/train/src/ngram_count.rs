//! How many different n-grams a text has, to compare with the rows that a memory has for them.

use std::collections::HashSet;

use engram_address::Addressing;
use engram_data::{TokenShards, mix};
use serde::Serialize;

use crate::error::Result;

/// Different n-grams of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NgramCount {
    /// Tokens of an n-gram.
    pub order: usize,
    /// Different n-grams; counting ends at the number of rows.
    pub distinct: u64,
    /// Rows of a hash head.
    pub rows: u64,
}

/// Tokens read at once.
const CHUNK: u64 = 1 << 20;

impl NgramCount {
    /// Of the orders of `addressing` in `shards`; `rows` per head and order, from the second on.
    ///
    /// # Errors
    /// When the shards cannot be read.
    pub fn of(shards: &TokenShards, addressing: &Addressing, rows: &[u64]) -> Result<Vec<Self>> {
        let count = |(order, &rows): (usize, &u64)| Self::of_order(shards, addressing, order, rows);
        (2..).zip(rows).map(count).collect()
    }

    fn of_order(shards: &TokenShards, addressing: &Addressing, order: usize, rows: u64) -> Result<Self> {
        let mut met = HashSet::new();
        let mut start = 0;
        while start < shards.len() && (met.len() as u64) < rows {
            let end = shards.len().min(start + CHUNK);
            // The first n-grams of a piece reach back into the one before.
            let tokens = shards.tokens(start.saturating_sub(order as u64 - 1)..end)?;
            let vocabulary = addressing.vocabulary();
            let classes: Vec<u32> =
                tokens.iter().map(|&token| Ok(vocabulary.class(token)?)).collect::<Result<_>>()?;
            let key = |ngram: &[u32]| ngram.iter().fold(0, |key, &class| mix(key ^ u64::from(class)));
            met.extend(classes.windows(order).map(key));
            start = end;
        }
        Ok(Self { order, distinct: (met.len() as u64).min(rows), rows })
    }

    /// Whether some rows of every head stay unused, whatever the hashes.
    pub fn leaves_rows(&self) -> bool {
        self.distinct < self.rows
    }
}
