//! Rows that are asked for often, kept in memory in front of where they come from.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rayon::prelude::*;

use crate::cache_sets::CacheSets;
use crate::distinct_rows::DistinctRows;
use crate::error::{Result, StoreError, check_rows};
use crate::row_format::RowFormat;
use crate::row_source::{BYTES_PER_TASK, RowSource, check_read, worth_sharing};

/// A cache of stored rows in front of another source.
///
/// Rows are kept in sets of twelve, of which the rows that come again stay: those asked for once, of which text has
/// many, leave first. Rows are kept as they are stored; what a batch lacks is read from the source in one read, each
/// row once. Threads whose rows are all kept do not wait for one another.
///
/// The source must not change under the cache, or the changed rows must be [forgotten](Self::forget).
#[derive(Debug)]
pub struct Cached<S> {
    source: S,
    kept: RwLock<CacheSets>,
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

impl<S: RowSource> Cached<S> {
    /// A cache of at most `bytes` in front of `source`: rows, each with its id in whole cache lines of 64 bytes, and
    /// 16 bytes more for every twelve of them.
    ///
    /// # Errors
    /// If `bytes` is too little for twelve rows, or cannot be allocated.
    pub fn new(source: S, bytes: u64) -> Result<Self> {
        let row_bytes = source.bytes_per_row();
        let Some(kept) = CacheSets::new(bytes, row_bytes, source.rows())? else {
            let value = format!("{bytes} for rows of {row_bytes} bytes");
            let rule =
                "room for twelve rows, each with 8 bytes more in whole lines of 64 bytes, and 16 bytes";
            return Err(StoreError::setting("bytes of the cache", value, rule));
        };
        let [hits, misses, fetched] = [const { AtomicU64::new(0) }; 3];
        Ok(Self { source, kept: RwLock::new(kept), hits, misses, fetched })
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
        self.kept().len()
    }

    /// Whether no row is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets rows, which changed in the source.
    pub fn forget(&self, ids: &[u64]) {
        let mut kept = self.change();
        ids.iter().for_each(|&id| kept.forget(id));
    }

    // A panic while a row is kept can lose its place, but no place then holds another row than its id's: ids are
    // written by `CacheSets::keep` behind the rows, and neither can fail in between.
    fn kept(&self) -> RwLockReadGuard<'_, CacheSets> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, CacheSets> {
        self.kept.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies the rows of `ids` that are kept to their places in `out` \[ids, bytes per row\]; gives the others.
    fn find(&self, ids: &[u64], out: &mut [u8]) -> Missing {
        let mut missing = Missing::default();
        self.kept().read(ids, out, |position| {
            missing.ids.push(ids[position]);
            missing.positions.push(position);
        });
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
                let position = missing.positions[occurrence as usize];
                out[position * row_bytes..][..row_bytes].copy_from_slice(row(place));
            }
        }
        let mut kept = self.change();
        for (place, &id) in distinct.ids().iter().enumerate() {
            kept.keep(id, row(place));
        }
        Ok(())
    }
}

/// What a batch lacks: ids, and their positions in the batch.
#[derive(Debug, Default)]
struct Missing {
    ids: Vec<u64>,
    positions: Vec<usize>,
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
        let missing: Vec<u64> = {
            let kept = self.kept();
            ids.iter().copied().filter(|&id| !kept.holds(id)).collect()
        };
        if missing.is_empty() { Ok(()) } else { self.source.prefetch(&missing) }
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        let row_bytes = self.bytes_per_row();
        // What a batch lacks is held in memory a second time.
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
            all.positions.extend(part.positions.iter().map(|position| position + number * rows));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reuse_distances::ReuseDistances;
    use crate::split_mix::mix;
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
        Cached::new(source, rows.div_ceil(12) * CacheSets::bytes_of_a_set(8)).unwrap()
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
        let cached = cached(1608);
        for round in 0..200u64 {
            let often = 0..400;
            let once = 1000 + round * 500..1500 + round * 500;
            read(&cached, &often.chain(once).collect::<Vec<_>>());
            assert!(cached.len() <= 1608);
        }
        let hits = cached.counts().hits;
        read(&cached, &(0..400).collect::<Vec<_>>());
        let hits = cached.counts().hits - hits;
        assert!(hits > 380, "{hits} of the 400 that every batch wants, among 500 that none wants again");
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
        let error = Cached::new(source, 783).unwrap_err().to_string();
        assert!(
            error.contains("783 for rows of 8 bytes") && error.contains("room for twelve rows"),
            "{error}"
        );
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

    /// Words of text: few that are used all the time, and many that come once.
    #[test]
    fn it_has_what_a_cache_of_the_rows_used_last_has() {
        let mut state = 1;
        let mut random = || {
            state = mix(state);
            state as f64 / u64::MAX as f64
        };
        // Zipf's law with exponent 1 over a million rows, by its inverse.
        let ids: Vec<u64> = (0..400_000).map(|_| 1e6_f64.powf(random()) as u64).collect();
        for rows in [720, 7_200, 72_000] {
            let (cached, mut least_recent) = (cached(rows), ReuseDistances::new(1.0));
            for ids in ids.chunks(64) {
                read(&cached, ids);
                least_recent.look_up(ids);
            }
            let (found, expected) = (cached.counts().hit_rate(), least_recent.hit_rate(rows));
            assert!(found > expected - 0.01, "{rows} rows: {found:.4}, LRU {expected:.4}");
        }
    }

    proptest! {
        #[test]
        fn rows_are_always_their_own(
            batches in prop::collection::vec(prop::collection::vec(0..200u64, 0..80), 1..30),
            rows in 1..200u64,
        ) {
            let cached = cached(rows);
            batches.iter().for_each(|batch| read(&cached, batch));
            prop_assert!(cached.len() as u64 <= rows.next_multiple_of(12));
        }
    }
}
