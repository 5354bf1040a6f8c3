//! How often a cache would have had the row: hit rates of every size at once.

use std::collections::HashMap;

use crate::row_use::MixBuilder;
use crate::split_mix::mix;

/// Counts, for every lookup of a row, how many other rows were looked up since the last time: a cache that
/// keeps the rows used last (LRU) has the row exactly if it holds more than that. One pass over the lookups
/// thus gives the hit rate of a cache of any size.
///
/// Exact counting is slow and takes memory for every distinct row, so that only the rows whose hashed id
/// falls below a threshold are followed, and distances are scaled up (SHARDS, Waldspurger et al., FAST 2015).
/// The share of lookups that this happens to leave out or take too many of is put right at distance 0, as its
/// authors suggest: the rows that weigh most are those that are used all the time. A share of 1 is exact;
/// below, caches of so few rows that the sample has hardly a hundred of them are told less well than larger
/// ones.
///
/// ```
/// use engram_store::ReuseDistances;
///
/// let mut distances = ReuseDistances::new(1.0);
/// for round in 0..10 {
///     distances.look_up(&[1, 2, 3]);
/// }
/// assert_eq!(distances.hit_rate(2), 0.0); // the row is always the one that just went
/// assert_eq!(distances.hit_rate(3), 27.0 / 30.0); // all but the first time
/// ```
#[derive(Debug)]
pub struct ReuseDistances {
    /// Rows whose mixed id is at most this are followed.
    threshold: u64,
    share: f64,
    lookups: u64,
    sampled: u64,
    /// Time of the last lookup of each row followed.
    last: HashMap<u64, u32, MixBuilder>,
    clock: Clock,
    /// Lookups by the bucket of their sampled distance.
    counts: Vec<u64>,
}

impl ReuseDistances {
    /// Nothing looked up; rows are followed with probability `share`, taken as within 0..=1.
    pub fn new(share: f64) -> Self {
        let share = share.clamp(f64::MIN_POSITIVE, 1.0);
        let threshold = if share < 1.0 { (share * 2f64.powi(64)) as u64 } else { u64::MAX };
        Self {
            threshold,
            share,
            lookups: 0,
            sampled: 0,
            last: HashMap::default(),
            clock: Clock::default(),
            counts: Vec::new(),
        }
    }

    /// Rows are looked up, in this order. Ids may be any numbers.
    pub fn look_up(&mut self, ids: &[u64]) {
        self.lookups += ids.len() as u64;
        for &id in ids {
            if mix(id) <= self.threshold {
                self.follow(id);
            }
        }
    }

    fn follow(&mut self, id: u64) {
        self.sampled += 1;
        if self.clock.is_full() {
            self.clock.restart(&mut self.last);
        }
        let now = self.clock.tick();
        let Some(before) = self.last.insert(id, now) else { return };
        let bucket = bucket_of(self.clock.later_than(before) - 1);
        self.clock.forget(before);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
    }

    /// Counts hits from here on only; the cache keeps what it has.
    pub fn count_from_here(&mut self) {
        (self.lookups, self.sampled) = (0, 0);
        self.counts.clear();
    }

    /// Lookups that are counted.
    pub fn lookups(&self) -> u64 {
        self.lookups
    }

    /// The share of rows that are followed.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// The share of lookups that a cache of `rows` rows would have served, empty at the beginning. Distances
    /// are told apart within one part in 32.
    pub fn hit_rate(&self, rows: u64) -> f64 {
        // What the sample should have held, according to the share, over what it holds.
        let expected = self.lookups as f64 * self.share;
        let surplus = expected - self.sampled as f64;
        let nearer = |bucket: usize| (first_of(bucket) as f64 / self.share) < rows as f64;
        let hits: u64 = self.counts.iter().enumerate().filter(|(i, _)| nearer(*i)).map(|(_, n)| n).sum();
        if expected == 0.0 || rows == 0 {
            return 0.0;
        }
        ((hits as f64 + surplus) / expected).clamp(0.0, 1.0)
    }
}

/// Exact below 64, then 32 buckets for each doubling.
fn bucket_of(distance: u32) -> usize {
    let bits = 32 - distance.leading_zeros();
    let shift = bits.saturating_sub(6);
    (32 * shift + (distance >> shift)) as usize
}

/// The smallest distance in a bucket.
fn first_of(bucket: usize) -> u64 {
    let shift = (bucket / 32).saturating_sub(1);
    ((bucket - 32 * shift) as u64) << shift
}

/// Times at which some row was looked up last, countable by range: a Fenwick tree of ones and zeros.
#[derive(Debug, Default)]
struct Clock {
    /// Entry i, from 1, is the sum over the times that end at i and are as many as i's lowest set bit.
    sums: Vec<u32>,
    now: u32,
    alive: u32,
}

impl Clock {
    const FIRST_SIZE: usize = 1 << 16;

    fn is_full(&self) -> bool {
        self.now as usize == self.sums.len()
    }

    /// The next time, which is some row's last.
    fn tick(&mut self) -> u32 {
        let time = self.now;
        self.now += 1;
        self.alive += 1;
        self.change(time, 1);
        time
    }

    /// A time that is no longer a row's last.
    fn forget(&mut self, time: u32) {
        self.alive -= 1;
        self.change(time, u32::MAX);
    }

    fn change(&mut self, time: u32, by: u32) {
        let mut i = time as usize + 1;
        while i <= self.sums.len() {
            self.sums[i - 1] = self.sums[i - 1].wrapping_add(by);
            i += i & i.wrapping_neg();
        }
    }

    /// How many rows' last times are later than `time`.
    fn later_than(&self, time: u32) -> u32 {
        let mut i = time as usize + 1;
        let mut until = 0u32;
        while i > 0 {
            until = until.wrapping_add(self.sums[i - 1]);
            i &= i - 1;
        }
        self.alive - until
    }

    /// Counts time anew from 0, closing the gaps, with room for at least as many times again.
    fn restart(&mut self, last: &mut HashMap<u64, u32, MixBuilder>) {
        let mut times: Vec<&mut u32> = last.values_mut().collect();
        times.sort_unstable();
        let alive = times.len() as u32;
        (0..).zip(times).for_each(|(new, time)| *time = new);
        let size = (4 * alive as usize).max(Self::FIRST_SIZE);
        // Ones up to `alive`: entry i sums those of its range.
        let ones = |i: usize| {
            let start = i - (i & i.wrapping_neg());
            (i.min(alive as usize).saturating_sub(start)) as u32
        };
        self.sums = (1..=size).map(ones).collect();
        (self.now, self.alive) = (alive, alive);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the words say: a list in order of use.
    fn hits_of_a_list(ids: &[u64], rows: usize) -> usize {
        let mut list: Vec<u64> = Vec::new();
        let mut hits = 0;
        for &id in ids {
            if let Some(at) = list.iter().position(|&other| other == id) {
                hits += usize::from(at < rows);
                list.remove(at);
            }
            list.insert(0, id);
        }
        hits
    }

    #[test]
    fn buckets_are_exact_at_first_and_then_within_a_32nd() {
        for distance in 0..64 {
            assert_eq!(first_of(bucket_of(distance)), u64::from(distance));
        }
        for distance in [64, 65, 1000, 4095, 1 << 20, (1 << 31) + 12_345, u32::MAX] {
            let first = first_of(bucket_of(distance));
            assert!(first <= u64::from(distance), "{distance}");
            assert!(u64::from(distance) - first <= first / 32, "{distance} is not near {first}");
            assert!(u64::from(distance) < first_of(bucket_of(distance) + 1), "{distance}");
        }
    }

    proptest! {
        #[test]
        fn a_full_count_is_what_a_cache_does(
            ids in prop::collection::vec(0u64..50, 0..300),
            rows in 1usize..60,
        ) {
            let mut distances = ReuseDistances::new(1.0);
            ids.chunks(7).for_each(|ids| distances.look_up(ids));
            let wanted = hits_of_a_list(&ids, rows) as f64 / ids.len().max(1) as f64;
            prop_assert!((distances.hit_rate(rows as u64) - wanted).abs() < 1e-12);
        }
    }

    #[test]
    fn a_cache_that_was_filled_before_misses_nothing_it_holds() {
        let mut distances = ReuseDistances::new(1.0);
        distances.look_up(&[1, 2, 3]);
        distances.count_from_here();
        assert_eq!(distances.hit_rate(9), 0.0, "nothing is counted");
        distances.look_up(&[1, 2, 3, 4]);
        assert_eq!((distances.hit_rate(2), distances.hit_rate(3)), (0.0, 0.75));
    }

    #[test]
    fn time_begins_anew_without_a_difference() {
        // More lookups than the clock's first size, of few and of many rows.
        let ids: Vec<u64> = (0..300_000u64).map(|i| if i % 3 == 0 { i } else { mix(i) % 40 }).collect();
        let mut distances = ReuseDistances::new(1.0);
        distances.look_up(&ids);
        let reused = ids.iter().filter(|&&id| id < 40).count() as f64;
        let rate = distances.hit_rate(ids.len() as u64);
        assert!((rate - (reused - 26.0) / 300_000.0).abs() < 1e-3, "{rate}");
    }

    #[test]
    fn a_sample_is_near_the_full_count() {
        // Zipf-like use of 200,000 rows.
        let row = |i: u64| {
            let uniform = (mix(i) >> 11) as f64 / 2f64.powi(53);
            (200_000f64.powf(uniform)) as u64
        };
        let ids: Vec<u64> = (0..2_000_000).map(row).collect();
        let (mut full, mut sampled) = (ReuseDistances::new(1.0), ReuseDistances::new(0.25));
        full.look_up(&ids);
        sampled.look_up(&ids);
        for rows in [1000, 10_000, 50_000, 150_000] {
            let (full, sampled) = (full.hit_rate(rows), sampled.hit_rate(rows));
            assert!((full - sampled).abs() < 0.02, "{rows} rows: {full} and {sampled}");
        }
        assert!(full.hit_rate(1000) > 0.3 && full.hit_rate(1000) < 0.9);
    }
}
