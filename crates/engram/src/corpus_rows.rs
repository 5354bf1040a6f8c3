//! How a corpus uses the rows of one memory layer, token by token.

use std::collections::HashMap;

use anyhow::Context;
use engram_address::{Addressing, History, LayerAddress, StoredAddressing, StoredLayer};
use engram_store::{ReuseDistances, RowUse, StoreError};
use rayon::prelude::*;

/// Windows of tokens in which repetitions are counted: rows looked up together are fetched once.
pub(crate) const WINDOWS: [u32; 5] = [64, 512, 4096, 32_768, 262_144];

/// Tokens addressed at a time.
pub(crate) const PIECE: usize = 8192;

/// The two largest primes below 2³². A hash is told from every other by its remainders modulo both, whose product is
/// nearly 2⁶⁴.
const TELLING_PRIMES: [u64; 2] = [4_294_967_291, 4_294_967_279];

/// Statistics of the tokens added so far, which form one sequence.
#[derive(Debug)]
pub(crate) struct CorpusRows {
    /// 2-grams first.
    pub(crate) orders: Vec<OrderRows>,
    /// All rows of all orders, in one cache.
    pub(crate) all: ReuseDistances,
    tokens: TokenRows,
    heads: usize,
}

/// The rows of one order.
#[derive(Debug)]
pub(crate) struct OrderRows {
    /// Length of its n-grams.
    pub(crate) order: usize,
    pub(crate) of: RowUse,
    pub(crate) distances: ReuseDistances,
}

/// A sequence's rows, and a number for each of its n-grams.
#[derive(Debug)]
pub(crate) struct TokenRows {
    history: History,
    telling: History,
    layer: usize,
    orders: usize,
    /// `[time, order, head]`
    rows: Vec<u64>,
    /// `[time, order, 2]`: the hash of the n-gram modulo either prime, with an offset for each order and
    /// prime.
    remainders: Vec<u64>,
}

impl CorpusRows {
    /// Statistics without tokens. `layer` is the index among memory layers. Hit rates come from a share of the rows.
    pub(crate) fn new(addressing: &Addressing, layer: usize, share: f64) -> anyhow::Result<Self> {
        let address = &addressing.layers()[layer];
        let mut first = 0;
        let order = |(order, primes): (usize, &Vec<u64>)| {
            let of = RowUse::new(first, primes, &WINDOWS)?;
            first += primes.iter().sum::<u64>();
            Ok(OrderRows { order, of, distances: ReuseDistances::new(share) })
        };
        Ok(Self {
            orders: (2..).zip(address.primes()).map(order).collect::<Result<_, StoreError>>()?,
            all: ReuseDistances::new(share),
            tokens: TokenRows::new(addressing, layer)?,
            heads: address.heads(),
        })
    }

    /// The next tokens of the sequence.
    pub(crate) fn add(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        self.tokens.next(tokens)?;
        let (tokens, all, orders, heads) = (&self.tokens, &mut self.all, &mut self.orders, self.heads);
        let each_order = || {
            orders.par_iter_mut().enumerate().for_each(|(index, order)| {
                for (key, rows) in tokens.of_order(index, heads) {
                    order.of.look_up(key, rows);
                    order.distances.look_up(rows);
                }
            });
        };
        rayon::join(|| all.look_up(&tokens.rows), each_order);
        Ok(())
    }

    /// Counts hits only from here on; the caches keep their rows.
    pub(crate) fn count_hits_from_here(&mut self) {
        self.all.count_from_here();
        self.orders.iter_mut().for_each(|order| order.distances.count_from_here());
    }
}

impl TokenRows {
    /// A sequence before its first token.
    pub(crate) fn new(addressing: &Addressing, layer: usize) -> anyhow::Result<Self> {
        let orders = addressing.max_order() - 1;
        let StoredAddressing { layers, pad_id, boundary, arithmetic } = addressing.to_stored();
        let StoredLayer { layer: id, multipliers, .. } = layers[layer].clone();
        let primes = vec![TELLING_PRIMES.to_vec(); orders];
        let layers = vec![StoredLayer { layer: id, multipliers, primes }];
        let telling = StoredAddressing { layers, pad_id, boundary, arithmetic };
        let telling = Addressing::from_stored(telling, addressing.vocabulary().clone())
            .context("distinguishing n-grams")?;
        Ok(Self {
            history: addressing.history().with_rollback(0),
            telling: telling.history().with_rollback(0),
            layer,
            orders,
            rows: Vec::new(),
            remainders: Vec::new(),
        })
    }

    /// Moves to the next tokens.
    pub(crate) fn next(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        self.history.extend(tokens)?.row_ids(self.layer, &mut self.rows)?;
        self.telling.extend(tokens)?.row_ids(0, &mut self.remainders)?;
        Ok(())
    }

    /// For each of these tokens, its n-gram's number and its rows in the `heads` heads of order number `index`.
    pub(crate) fn of_order(&self, index: usize, heads: usize) -> impl Iterator<Item = (u64, &[u64])> {
        let first: u64 = TELLING_PRIMES.iter().sum::<u64>() * index as u64;
        let key = move |remainders: &[u64]| {
            let [one, other] = [remainders[2 * index] - first, remainders[2 * index + 1] - first];
            one << 32 | (other - TELLING_PRIMES[0])
        };
        let rows = self.rows.chunks_exact(self.orders * heads);
        let rows = rows.map(move |rows| &rows[index * heads..][..heads]);
        self.remainders.chunks_exact(2 * self.orders).map(key).zip(rows)
    }
}

/// The n-grams that fall on some rows of one order, found in a second pass over the corpus.
#[derive(Debug)]
pub(crate) struct Sharers {
    index: usize,
    heads: usize,
    /// For each row of the first head, its n-grams by number: how often, and the last time.
    rows: HashMap<u64, HashMap<u64, (u64, u64)>>,
    time: u64,
}

impl Sharers {
    /// For the rows `rows` of the first head of order number `index`.
    pub(crate) fn new(index: usize, heads: usize, rows: impl IntoIterator<Item = u64>) -> Self {
        let rows = rows.into_iter().map(|row| (row, HashMap::new())).collect();
        Self { index, heads, rows, time: 0 }
    }

    /// Adds the next tokens, whose rows these are.
    pub(crate) fn add(&mut self, tokens: &TokenRows) {
        for (key, rows) in tokens.of_order(self.index, self.heads) {
            if let Some(n_grams) = self.rows.get_mut(&rows[0]) {
                let (count, last) = n_grams.entry(key).or_default();
                (*count, *last) = (*count + 1, self.time);
            }
            self.time += 1;
        }
    }

    /// How often each n-gram read the row, and when last; the most frequent first.
    pub(crate) fn of_row(&self, row: u64) -> Vec<(u64, u64)> {
        let n_grams = self.rows.get(&row).into_iter().flat_map(HashMap::values);
        let mut n_grams: Vec<(u64, u64)> = n_grams.copied().collect();
        n_grams.sort_unstable_by_key(|&(count, last)| (std::cmp::Reverse(count), last));
        n_grams
    }
}

/// The rows that the last of `tokens` reads in the first head of every order. `layer` is the index among memory layers.
/// As many tokens as the longest n-gram has are enough.
pub(crate) fn first_rows(addressing: &Addressing, layer: usize, tokens: &[u32]) -> anyhow::Result<Vec<u64>> {
    let address: &LayerAddress = &addressing.layers()[layer];
    let mut rows = Vec::new();
    addressing.row_ids(layer, tokens, &mut rows)?;
    let last = &rows[rows.len().saturating_sub(address.slots())..];
    Ok(last.iter().copied().step_by(address.heads()).collect())
}

#[cfg(test)]
mod tests {
    use engram_address::{AddressConfig, Vocabulary};

    use super::*;

    fn addressing() -> Addressing {
        let config = AddressConfig {
            seed: 3,
            layers: vec![1],
            max_order: 3,
            heads: 2,
            base_rows: vec![20, 30],
            pad_id: 0,
            boundary: Default::default(),
            arithmetic: Default::default(),
        };
        Addressing::new(&config, Vocabulary::identity(50)).unwrap()
    }

    /// Tokens with many repetitions.
    fn tokens() -> Vec<u32> {
        (0..3000u32).map(|i| i.wrapping_mul(i).wrapping_mul(2_654_435_761) >> 27).collect()
    }

    #[test]
    fn n_grams_are_told_apart_as_their_tokens_are() {
        let tokens = tokens();
        for pieces in [3000, 7] {
            let mut study = CorpusRows::new(&addressing(), 0, 1.0).unwrap();
            tokens.chunks(pieces).for_each(|piece| study.add(piece).unwrap());
            for order in &study.orders {
                // Before the beginning stands the pad token.
                let padded: Vec<u32> = vec![0; order.order - 1].into_iter().chain(tokens.clone()).collect();
                let distinct: std::collections::HashSet<&[u32]> = padded.windows(order.order).collect();
                assert_eq!(order.of.n_grams().len(), distinct.len());
                assert_eq!(order.of.lookups(), 3000);
            }
            assert_eq!(study.all.lookups(), 3000 * 4);
            // With room for every row, only the first lookup of each misses.
            let used: u64 = study.orders.iter().flat_map(|o| o.of.heads()).map(|head| head.used).sum();
            let wanted = 1.0 - used as f64 / 12_000.0;
            assert!((study.all.hit_rate(1_000_000) - wanted).abs() < 1e-12);
        }
    }

    #[test]
    fn who_shares_a_row_is_found() {
        let (addressing, tokens) = (addressing(), tokens());
        let rows = first_rows(&addressing, 0, &tokens[..100]).unwrap();
        assert_eq!(rows, first_rows(&addressing, 0, &tokens[97..100]).unwrap(), "three tokens suffice");
        let mut sharers = Sharers::new(1, 2, [rows[1]]);
        let mut sequence = TokenRows::new(&addressing, 0).unwrap();
        for piece in tokens.chunks(64) {
            sequence.next(piece).unwrap();
            sharers.add(&sequence);
        }
        let mut all = Vec::new();
        addressing.row_ids(0, &tokens[..], &mut all).unwrap();
        let reads = all.chunks(4).filter(|of_token| of_token[2] == rows[1]).count() as u64;
        let n_grams = sharers.of_row(rows[1]);
        assert_eq!(n_grams.iter().map(|n_gram| n_gram.0).sum::<u64>(), reads);
        assert!(n_grams.is_sorted_by_key(|n_gram| std::cmp::Reverse(n_gram.0)));
        for (_, last) in n_grams {
            assert_eq!(all[last as usize * 4 + 2], rows[1]);
        }
    }
}
