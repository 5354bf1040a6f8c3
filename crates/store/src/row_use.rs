//! How a corpus uses a table: which n-grams it looks up, how often, and which rows they share.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::error::{Result, StoreError};
use crate::split_mix::mix;

/// How n-grams of one order are used, and which rows of its heads they fall on.
///
/// The n-gram is told by a key: any number that is the same for the same n-gram, and, but for rare accidents,
/// for no other. Memory: some 40 bytes per distinct n-gram, and two bits per row.
#[derive(Debug)]
pub struct RowUse {
    /// By key.
    n_grams: HashMap<u64, NGramUse, MixBuilder>,
    heads: Vec<HeadRows>,
    lookups: u32,
    windows: Vec<Window>,
}

/// How one n-gram is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NGramUse {
    /// How often it was looked up.
    pub count: u32,
    /// The last of these times, counting lookups of the order from 0.
    pub last: u32,
}

/// Rows of a head that are used at all, and by more than one n-gram.
#[derive(Debug)]
struct HeadRows {
    /// The head's first row in the table, and how many it has.
    first: u64,
    rows: u64,
    used: Bits,
    shared: Bits,
    distinct: u64,
    shared_rows: u64,
}

#[derive(Debug)]
struct Window {
    /// At least 1.
    size: u32,
    distinct: u64,
}

/// How a head's rows are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadUse {
    /// The head's rows.
    pub rows: u64,
    /// Rows that some n-gram falls on.
    pub used: u64,
    /// Rows that several n-grams fall on.
    pub shared: u64,
    /// N-grams that share their row with another.
    pub colliding: u64,
    /// What `used` would be on average if every n-gram fell on a row by chance.
    pub expected_used: f64,
    /// What `colliding` would be.
    pub expected_colliding: f64,
}

impl RowUse {
    /// No lookups yet. `heads` are the rows of each head, the first of which begins at row `first`. Windows
    /// of so many lookups of the order are watched for repetitions.
    ///
    /// # Errors
    /// If a window is of 0 lookups.
    pub fn new(first: u64, heads: &[u64], windows: &[u32]) -> Result<Self> {
        if windows.contains(&0) {
            return Err(StoreError::setting("window", 0, "at least 1 lookup"));
        }
        let mut first = first;
        let head = |&rows: &u64| {
            let head = HeadRows {
                first,
                rows,
                used: Bits::new(rows),
                shared: Bits::new(rows),
                distinct: 0,
                shared_rows: 0,
            };
            first += rows;
            head
        };
        let heads = heads.iter().map(head).collect();
        let windows = windows.iter().map(|&size| Window { size, distinct: 0 }).collect();
        Ok(Self { n_grams: HashMap::default(), heads, lookups: 0, windows })
    }

    /// The n-gram `key` is looked up in `rows`, one of each head.
    ///
    /// # Panics
    /// If a row is outside its head, or after 2³² − 1 lookups.
    pub fn look_up(&mut self, key: u64, rows: &[u64]) {
        let now = self.lookups;
        self.lookups = now.checked_add(1).expect("fewer than 2^32 lookups of an order");
        match self.n_grams.get_mut(&key) {
            Some(n_gram) => {
                for window in &mut self.windows {
                    window.distinct += u64::from(n_gram.last / window.size != now / window.size);
                }
                *n_gram = NGramUse { count: n_gram.count + 1, last: now };
            }
            None => {
                self.windows.iter_mut().for_each(|window| window.distinct += 1);
                self.n_grams.insert(key, NGramUse { count: 1, last: now });
                self.heads.iter_mut().zip(rows).for_each(|(head, &row)| head.add(row));
            }
        }
    }

    /// Lookups so far: each reads a row of every head.
    pub fn lookups(&self) -> u64 {
        u64::from(self.lookups)
    }

    /// The distinct n-grams, in no order.
    pub fn n_grams(&self) -> impl ExactSizeIterator<Item = NGramUse> + '_ {
        self.n_grams.values().copied()
    }

    /// How the rows of every head are used.
    pub fn heads(&self) -> Vec<HeadUse> {
        let n_grams = self.n_grams.len() as u64;
        let head = |head: &HeadRows| HeadUse {
            rows: head.rows,
            used: head.distinct,
            shared: head.shared_rows,
            colliding: n_grams - (head.distinct - head.shared_rows),
            expected_used: expected_used(n_grams, head.rows),
            expected_colliding: expected_colliding(n_grams, head.rows),
        };
        self.heads.iter().map(head).collect()
    }

    /// For every window size: the share of lookups that are the first of their n-gram in their window,
    /// windows following each other. What is looked up together is fetched once.
    pub fn windows(&self) -> impl Iterator<Item = (u32, f64)> + '_ {
        let lookups = f64::from(self.lookups.max(1));
        self.windows.iter().map(move |window| (window.size, window.distinct as f64 / lookups))
    }

    /// The `count` n-grams that are looked up most, the most first.
    pub fn hottest(&self, count: usize) -> Vec<NGramUse> {
        let mut n_grams: Vec<NGramUse> = self.n_grams().collect();
        let order = |n_gram: &NGramUse| (std::cmp::Reverse(n_gram.count), n_gram.last);
        if n_grams.len() > count && count > 0 {
            n_grams.select_nth_unstable_by_key(count - 1, order);
        }
        n_grams.truncate(count);
        n_grams.sort_unstable_by_key(order);
        n_grams
    }
}

impl HeadRows {
    fn add(&mut self, row: u64) {
        let own = row.checked_sub(self.first).filter(|&own| own < self.rows).expect("a row of the head");
        if self.used.set(own) {
            self.distinct += 1;
        } else if self.shared.set(own) {
            self.shared_rows += 1;
        }
    }
}

/// Rows of `rows` that `n_grams` n-grams fall on if each falls on one by chance.
pub fn expected_used(n_grams: u64, rows: u64) -> f64 {
    let (n_grams, rows) = (n_grams as f64, rows as f64);
    // 1 − (1 − 1/r)^n, without losing digits where it is small.
    -rows * (n_grams * (-1.0 / rows).ln_1p()).exp_m1()
}

/// N-grams of `n_grams` that share their row of `rows` with another if each falls on one by chance.
pub fn expected_colliding(n_grams: u64, rows: u64) -> f64 {
    let (count, rows) = (n_grams as f64, rows as f64);
    -count * ((count - 1.0).max(0.0) * (-1.0 / rows).ln_1p()).exp_m1()
}

#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u64) -> Self {
        Self(vec![0; count.div_ceil(64) as usize])
    }

    /// Sets a bit; whether it was not.
    fn set(&mut self, i: u64) -> bool {
        let (word, bit) = (&mut self.0[(i / 64) as usize], 1 << (i % 64));
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// Hashes a `u64` by [`mix`]: keys are not an adversary's, and there are many.
#[derive(Debug, Default)]
pub(crate) struct Mix(u64);

pub(crate) type MixBuilder = BuildHasherDefault<Mix>;

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u64(&mut self, value: u64) {
        // Apart from `mix` itself, by which sampled rows were chosen.
        self.0 = mix(self.0 ^ value.rotate_left(32));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_is_counted() {
        let mut of = RowUse::new(100, &[10, 20], &[1, 2, 4]).unwrap();
        for (key, rows) in
            [(7, [100, 110]), (8, [100, 111]), (7, [100, 110]), (9, [109, 129]), (7, [100, 110])]
        {
            of.look_up(key, &rows);
        }
        assert_eq!(of.lookups(), 5);
        assert_eq!(of.hottest(1), [NGramUse { count: 3, last: 4 }]);
        assert_eq!(
            of.hottest(9).iter().map(|n| (n.count, n.last)).collect::<Vec<_>>(),
            [(3, 4), (1, 1), (1, 3)]
        );
        let [first, second] = of.heads()[..] else { panic!("two heads") };
        assert_eq!((first.rows, first.used, first.shared, first.colliding), (10, 2, 1, 2));
        assert_eq!((second.rows, second.used, second.shared, second.colliding), (20, 3, 0, 0));
        // Windows of two: 7 8 | 7 9 | 7; of four: 7 8 7 9 | 7.
        assert_eq!(of.windows().collect::<Vec<_>>(), [(1, 1.0), (2, 1.0), (4, 0.8)]);
        let refused = RowUse::new(0, &[10], &[4, 0]).unwrap_err().to_string();
        assert!(refused.contains("window is 0"), "{refused}");
    }

    #[test]
    #[should_panic(expected = "a row of the head")]
    fn a_row_outside_its_head_is_a_defect() {
        RowUse::new(100, &[10], &[]).unwrap().look_up(1, &[110]);
    }

    #[test]
    fn chance_is_met_by_chance() {
        let (n_grams, rows) = (30_000, 20_011);
        let mut of = RowUse::new(0, &[rows], &[]).unwrap();
        (0..n_grams).for_each(|key| of.look_up(key, &[mix(key) % rows]));
        let head = of.heads()[0];
        assert!((head.used as f64 / head.expected_used - 1.0).abs() < 0.01, "{head:?}");
        assert!((head.colliding as f64 / head.expected_colliding - 1.0).abs() < 0.01, "{head:?}");
        // By hand: two balls in two boxes.
        assert!((expected_used(2, 2) - 1.5).abs() < 1e-12);
        assert!((expected_colliding(2, 2) - 1.0).abs() < 1e-12);
        assert_eq!((expected_colliding(1, 7), expected_used(1, 7).round()), (0.0, 1.0));
        assert_eq!((expected_used(0, 7), expected_colliding(0, 7)), (0.0, 0.0));
    }
}
