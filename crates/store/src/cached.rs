//! Rows that are asked for often, kept in memory in front of where they come from.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use quick_cache::unsync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, UnitWeighter};
use rayon::prelude::*;

use crate::cache_line::prefetch;
use crate::distinct_rows::DistinctRows;
use crate::error::{Result, StoreError, check_rows};
use crate::memory::{Buffer, Region, Storage};
use crate::row_format::RowFormat;
use crate::row_source::{BYTES_PER_TASK, RowSource, check_read, worth_sharing};

/// Caches that work side by side, so that threads seldom wait for one another.
const SHARDS: usize = 16;
/// What finding and ageing a row takes besides its bytes, at most.
const BYTES_OF_POLICY: u64 = 100;

/// A cache of stored rows in front of another source.
///
/// Which rows stay is decided by the Clock-PRO of `quick_cache`, much like S3-FIFO: rows asked for once, of which
/// text has many, leave soon and do not displace those that come again. Rows are kept as they are stored; what a
/// batch lacks is read from the source in one read, each row once.
///
/// The source must not change under the cache, or the changed rows must be [forgotten](Self::forget).
#[derive(Debug)]
pub struct Cached<S> {
    source: S,
    shards: Box<[Mutex<Shard>]>,
    hits: AtomicU64,
    misses: AtomicU64,
    fetched: AtomicU64,
}

/// How often a [`Cached`] had what it was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Rows asked for that were there.
    pub hits: u64,
    /// Rows asked for that were not.
    pub misses: u64,
    /// Rows read from the source: the misses less those that a batch repeats.
    pub fetched: u64,
}

impl CacheCounts {
    /// The share of rows asked for that were there, from 0 to 1; 0 before any was.
    pub fn hit_rate(&self) -> f64 {
        let asked = self.hits + self.misses;
        if asked == 0 { 0.0 } else { self.hits as f64 / asked as f64 }
    }
}

#[derive(Debug)]
struct Shard {
    /// Row id → its place in `rows`.
    places: Cache<u64, u32, UnitWeighter, DefaultHashBuilder, Evicted>,
    rows: Region,
    /// Places that were used and are free again, and how many were ever used.
    free: Vec<u32>,
    used: u32,
}

/// Puts the places of evicted rows into the list of free ones.
#[derive(Clone, Debug)]
struct Evicted;

impl Lifecycle<u64, u32> for Evicted {
    type RequestState = Vec<u32>;

    fn on_evict(&self, free: &mut Vec<u32>, _id: u64, place: u32) {
        free.push(place);
    }
}

impl<S: RowSource> Cached<S> {
    /// A cache of at most `bytes` in front of `source`: rows and what it takes to find them.
    ///
    /// # Errors
    /// If `bytes` is too little for one row in each of 16 parts, or cannot be allocated.
    pub fn new(source: S, bytes: u64) -> Result<Self> {
        let row_bytes = source.bytes_per_row() as u64;
        // One more place than rows, for the row that comes before another goes.
        let places = bytes / SHARDS as u64 / (row_bytes + BYTES_OF_POLICY);
        let rows = places.min(u64::from(u32::MAX)).saturating_sub(1).min(source.rows());
        if rows == 0 {
            let rule = "room for 32 rows and 100 bytes more for each";
            return Err(StoreError::setting("bytes of the cache", bytes, rule));
        }
        let shard = || {
            let policy = (rows as usize, rows, UnitWeighter, DefaultHashBuilder::default(), Evicted);
            let (items, weight, weighter, hash, lifecycle) = policy;
            let places = Cache::with(items, weight, weighter, hash, lifecycle);
            let rows = Region::zeroed((rows + 1) * row_bytes, &Storage::Ram)?;
            Ok(Mutex::new(Shard { places, rows, free: Vec::new(), used: 0 }))
        };
        let shards = (0..SHARDS).map(|_| shard()).collect::<Result<_>>()?;
        let [hits, misses, fetched] = [const { AtomicU64::new(0) }; 3];
        Ok(Self { source, shards, hits, misses, fetched })
    }

    /// Where rows come from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// What was asked for and found since the cache was made.
    pub fn counts(&self) -> CacheCounts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheCounts { hits: count(&self.hits), misses: count(&self.misses), fetched: count(&self.fetched) }
    }

    /// Rows that are kept now.
    pub fn len(&self) -> usize {
        (0..SHARDS).map(|shard| self.lock(shard).places.len()).sum()
    }

    /// Whether no row is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets rows, which changed in the source.
    pub fn forget(&self, ids: &[u64]) {
        for id in ids {
            let mut shard = self.lock(shard_of(*id));
            if let Some((_, place)) = shard.places.remove(id) {
                shard.free.push(place);
            }
        }
    }

    fn lock(&self, shard: usize) -> MutexGuard<'_, Shard> {
        // A panic in between can lose a place, but cannot make a place hold another row than its id's.
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the rows of `ids` that are kept to their places in `out` \[ids, bytes per row\]; gives the others.
    fn find(&self, ids: &[u64], out: &mut [u8]) -> Missing {
        let row_bytes = self.bytes_per_row();
        let order = ByShard::of(ids);
        let (mut missing, mut found) = (Missing::default(), Vec::with_capacity(ROWS_AT_A_TIME));
        // Threads that share a batch begin at different shards.
        let first = rayon::current_thread_index().unwrap_or(0);
        for number in (first..first + SHARDS).map(|number| number % SHARDS) {
            let positions = order.positions(number);
            if positions.is_empty() {
                continue;
            }
            let shard = self.lock(number);
            for positions in positions.chunks(ROWS_AT_A_TIME) {
                // All are looked up and asked for before the first is copied: many cache misses are then in flight at once.
                for &position in positions {
                    let id = ids[position as usize];
                    if let Some(&place) = shard.places.get(&id) {
                        let start = place as usize * row_bytes;
                        prefetch(shard.rows.address(start), row_bytes);
                        found.push((position, start));
                    } else {
                        missing.ids.push(id);
                        missing.positions.push(position);
                    }
                }
                for (position, start) in found.drain(..) {
                    shard.rows.copy(start, &mut out[position as usize * row_bytes..][..row_bytes]);
                }
            }
        }
        missing
    }

    /// Reads what a batch lacks.
    fn fetch(&self, missing: &Missing, out: &mut [u8]) -> Result<()> {
        let row_bytes = self.bytes_per_row();
        let distinct = DistinctRows::of(&missing.ids);
        let mut rows = vec![0; distinct.len() * row_bytes];
        self.source.read(distinct.ids(), &mut rows)?;
        self.fetched.fetch_add(distinct.len() as u64, Ordering::Relaxed);
        let row = |place: usize| &rows[place * row_bytes..][..row_bytes];
        for place in 0..distinct.len() {
            for &occurrence in distinct.occurrences(place) {
                let position = missing.positions[occurrence as usize] as usize;
                out[position * row_bytes..][..row_bytes].copy_from_slice(row(place));
            }
        }
        let order = ByShard::of(distinct.ids());
        for number in (0..SHARDS).filter(|&number| !order.positions(number).is_empty()) {
            let mut shard = self.lock(number);
            for &place in order.positions(number) {
                shard.keep(distinct.ids()[place as usize], row(place as usize));
            }
        }
        Ok(())
    }
}

/// Rows that are looked up and asked for before the first of them is copied.
const ROWS_AT_A_TIME: usize = 64;

/// What a batch lacks: ids, and their positions in the batch.
#[derive(Debug, Default)]
struct Missing {
    ids: Vec<u64>,
    positions: Vec<u32>,
}

/// A batch's positions by the shard of their ids, in batch order within each: every shard is locked once.
struct ByShard {
    positions: Vec<u32>,
    starts: [usize; SHARDS + 1],
}

impl ByShard {
    fn of(ids: &[u64]) -> Self {
        let mut starts = [0; SHARDS + 1];
        ids.iter().for_each(|&id| starts[shard_of(id) + 1] += 1);
        (0..SHARDS).for_each(|shard| starts[shard + 1] += starts[shard]);
        let (mut next, mut positions) = (starts, vec![0; ids.len()]);
        for (position, &id) in (0..).zip(ids) {
            let place = &mut next[shard_of(id)];
            positions[*place] = position;
            *place += 1;
        }
        Self { positions, starts }
    }

    fn positions(&self, shard: usize) -> &[u32] {
        &self.positions[self.starts[shard]..self.starts[shard + 1]]
    }
}

impl Shard {
    fn keep(&mut self, id: u64, row: &[u8]) {
        // Another thread may have fetched it meanwhile.
        if self.places.contains_key(&id) {
            return;
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.used += 1;
            self.used - 1
        });
        let start = place as usize * row.len();
        self.rows
            .stretch()
            .change(start, row.len(), &mut Buffer::default(), |kept| kept.copy_from_slice(row));
        self.places.insert_with_lifecycle(id, place, &mut self.free);
    }
}

/// The upper bits of a product that every bit of the id reaches.
fn shard_of(id: u64) -> usize {
    (id.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60) as usize % SHARDS
}

impl<S: RowSource> RowSource for Cached<S> {
    fn rows(&self) -> u64 {
        self.source.rows()
    }

    fn width(&self) -> usize {
        self.source.width()
    }

    fn format(&self) -> RowFormat {
        self.source.format()
    }

    /// Of the rows that are not kept; which rows stay does not change.
    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        check_rows(ids, self.rows())?;
        let missing = |id: &u64| !self.lock(shard_of(*id)).places.contains_key(id);
        let missing: Vec<u64> = ids.iter().copied().filter(missing).collect();
        if missing.is_empty() { Ok(()) } else { self.source.prefetch(&missing) }
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        let row_bytes = self.bytes_per_row();
        // Positions are counted in 32 bits.
        const AT_A_TIME: usize = 1 << 20;
        for (ids, out) in ids.chunks(AT_A_TIME).zip(out.chunks_mut(AT_A_TIME * row_bytes)) {
            let missing = if worth_sharing(ids.len() * row_bytes) {
                let rows = (BYTES_PER_TASK / row_bytes).max(1);
                let parts = ids.par_chunks(rows).zip(out.par_chunks_mut(rows * row_bytes));
                let parts: Vec<Missing> = parts.map(|(ids, out)| self.find(ids, out)).collect();
                Missing::joined(&parts, rows)
            } else {
                self.find(ids, out)
            };
            self.hits.fetch_add((ids.len() - missing.ids.len()) as u64, Ordering::Relaxed);
            self.misses.fetch_add(missing.ids.len() as u64, Ordering::Relaxed);
            if !missing.ids.is_empty() {
                self.fetch(&missing, out)?;
            }
        }
        Ok(())
    }
}

impl Missing {
    /// What the parts of a batch lack, each of `rows` ids but the last.
    fn joined(parts: &[Self], rows: usize) -> Self {
        let mut all = Self::default();
        for (number, part) in parts.iter().enumerate() {
            all.ids.extend(&part.ids);
            all.positions.extend(part.positions.iter().map(|position| position + (number * rows) as u32));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicUsize;

    /// Row `id` is `id` as bytes; counts reads and rows, and refuses rows from `broken` on.
    #[derive(Debug)]
    struct Counting {
        broken: u64,
        reads: AtomicUsize,
        rows: AtomicUsize,
    }

    impl RowSource for Counting {
        fn rows(&self) -> u64 {
            1 << 40
        }

        fn width(&self) -> usize {
            2
        }

        fn format(&self) -> RowFormat {
            RowFormat::F32
        }

        fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.rows.fetch_add(ids.len(), Ordering::Relaxed);
            if ids.iter().any(|&id| id >= self.broken) {
                return Err(StoreError::setting("row", "broken", "whole"));
            }
            ids.iter().zip(out.chunks_mut(8)).for_each(|(id, out)| out.copy_from_slice(&id.to_le_bytes()));
            Ok(())
        }
    }

    fn cached(rows: u64) -> Cached<Counting> {
        let source = Counting { broken: u64::MAX, reads: 0.into(), rows: 0.into() };
        Cached::new(source, SHARDS as u64 * (rows / SHARDS as u64 + 1) * 108).unwrap()
    }

    fn read(cached: &Cached<Counting>, ids: &[u64]) {
        let mut out = vec![0; ids.len() * 8];
        cached.read(ids, &mut out).unwrap();
        for (id, row) in ids.iter().zip(out.chunks(8)) {
            assert_eq!(row, id.to_le_bytes());
        }
    }

    #[test]
    fn what_a_batch_lacks_is_read_once_and_together() {
        let cached = cached(1600);
        read(&cached, &[5, 7, 5, 5]);
        read(&cached, &[7, 9, 9, 5]);
        assert_eq!(cached.counts(), CacheCounts { hits: 2, misses: 6, fetched: 3 });
        assert_eq!(cached.source().reads.load(Ordering::Relaxed), 2);
        read(&cached, &[9]);
        assert_eq!(cached.source().reads.load(Ordering::Relaxed), 2, "nothing to read");
        cached.forget(&[9, 10]);
        read(&cached, &[9]);
        assert_eq!((cached.counts().fetched, cached.len()), (4, 3));
    }

    #[test]
    fn its_size_is_bounded_and_what_is_used_often_stays() {
        let cached = cached(1600);
        for round in 0..200u64 {
            let often = 0..400;
            let once = 1000 + round * 500..1500 + round * 500;
            read(&cached, &often.chain(once).collect::<Vec<_>>());
            assert!(cached.len() <= 1600);
        }
        let hits = cached.counts().hits;
        read(&cached, &(0..400).collect::<Vec<_>>());
        let hits = cached.counts().hits - hits;
        assert!(hits > 380, "{hits} of the 400 that every batch wants, among 500 that none wants again");
        for shard in &cached.shards {
            let shard = shard.lock().unwrap();
            assert!(shard.used as usize <= 101, "{} places for 100 rows", shard.used);
        }
    }

    #[test]
    fn errors_pass_through_and_nothing_wrong_is_kept() {
        let source = Counting { broken: 100, reads: 0.into(), rows: 0.into() };
        let cached = Cached::new(source, 1 << 20).unwrap();
        let mut out = [0; 16];
        assert!(cached.read(&[5, 100], &mut out).is_err());
        assert!(cached.is_empty());
        read(&cached, &[5]);
        assert!(matches!(cached.read(&[1 << 40], &mut out[..8]), Err(StoreError::RowOutOfRange { .. })));
        assert!(cached.read(&[5], &mut out).is_err(), "the wrong length");
        let source = Counting { broken: 100, reads: 0.into(), rows: 0.into() };
        assert!(Cached::new(source, 1000).unwrap_err().to_string().contains("room for 32 rows"));
    }

    #[test]
    fn threads_share_it() {
        let cached = cached(320);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let cached = &cached;
                scope.spawn(move || {
                    for i in 0..300 {
                        read(cached, &(0..60).map(|k| (k * k * 7 + i * thread) % 900).collect::<Vec<_>>());
                    }
                });
            }
        });
        let counts = cached.counts();
        assert_eq!(counts.hits + counts.misses, 4 * 300 * 60);
    }

    proptest! {
        #[test]
        fn rows_are_always_their_own(
            batches in prop::collection::vec(prop::collection::vec(0..200u64, 0..80), 1..30),
            rows in 16..200u64,
        ) {
            let cached = cached(rows);
            batches.iter().for_each(|batch| read(&cached, batch));
            prop_assert!(cached.len() as u64 <= rows);
        }
    }
}
