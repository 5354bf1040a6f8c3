//! Rows kept in sets of seven: what a cache holds, and which row goes when another comes.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache_line::{LINE, prefetch};
use crate::copy_rows::CopyRows;
use crate::error::Result;
use crate::memory::{Buffer, Region, Storage};
use crate::split_mix::mix;

/// Rows of a set: as many ids as fit a cache line beside their use.
pub(crate) const WAYS: usize = 7;
/// No row's id.
const EMPTY: u64 = u64::MAX;
/// The use of a row is counted from 0, when it comes, to this.
const MOST_USES: u64 = 3;
/// Sets that are asked for ahead of the one being looked at.
const SETS_AHEAD: usize = 16;

/// A set-associative cache of rows.
///
/// The hash of an id names its set, which is one cache line of ids, so that a row costs one miss of the processor's
/// cache more than without a cache. Looking up changes nothing but counts of use, which are atomic: any number of
/// threads look up at once. Within a set rows leave in the order in which they came (CLOCK), except that a row that
/// was used since stays for up to three rounds. A row asked for once, of which text has many, thus leaves first.
#[derive(Debug)]
pub(crate) struct CacheSets {
    sets: Box<[Set]>,
    /// \[sets, ways, stride\]
    rows: Region,
    row_bytes: usize,
    /// Bytes from a row to the next: whole cache lines.
    stride: usize,
    len: usize,
}

#[derive(Debug)]
#[repr(align(64))]
struct Set {
    ids: [u64; WAYS],
    /// A byte of use for each row, and the place of the hand that looks for the row to leave.
    uses: AtomicU64,
}

/// The byte of [`Set::uses`] that holds the hand.
const HAND: usize = WAYS;

fn byte(uses: u64, place: usize) -> u64 {
    uses >> (8 * place) & 0xff
}

fn with_byte(uses: u64, place: usize, value: u64) -> u64 {
    uses & !(0xff << (8 * place)) | value << (8 * place)
}

impl Set {
    fn empty() -> Self {
        Self { ids: [EMPTY; WAYS], uses: AtomicU64::new(0) }
    }

    /// The place of `id`.
    #[inline(always)]
    fn find(&self, id: u64) -> Option<usize> {
        let mut found = 0u32;
        for (way, &kept) in self.ids.iter().enumerate() {
            found |= u32::from(kept == id) << way;
        }
        (found != 0).then(|| found.trailing_zeros() as usize)
    }

    /// Counts a use. A count that another thread makes at the same time may be lost, which costs nothing but precision.
    #[inline(always)]
    fn used(&self, way: usize) {
        let uses = self.uses.load(Ordering::Relaxed);
        let count = byte(uses, way);
        // Rows that are used all the time are only read, so that threads do not take the line from one another.
        if count < MOST_USES {
            self.uses.store(with_byte(uses, way, count + 1), Ordering::Relaxed);
        }
    }

    /// A place for another row.
    fn make_room(&mut self) -> usize {
        if let Some(way) = self.find(EMPTY) {
            return way;
        }
        let uses = self.uses.get_mut();
        let mut way = byte(*uses, HAND) as usize;
        while byte(*uses, way) > 0 {
            *uses = with_byte(*uses, way, byte(*uses, way) - 1);
            way = (way + 1) % WAYS;
        }
        *uses = with_byte(*uses, HAND, ((way + 1) % WAYS) as u64);
        way
    }

    fn put(&mut self, way: usize, id: u64) {
        self.ids[way] = id;
        let uses = self.uses.get_mut();
        *uses = with_byte(*uses, way, 0);
    }
}

impl CacheSets {
    /// Sets that take at most `bytes` bytes with their rows of `row_bytes`, and no more than a source of `rows` rows can
    /// use; `None` if there is no room for one set.
    ///
    /// # Errors
    /// If the memory cannot be allocated.
    pub(crate) fn new(bytes: u64, row_bytes: usize, rows: u64) -> Result<Option<Self>> {
        let stride = row_bytes.next_multiple_of(LINE);
        // Rows fall into sets by chance: with two of seven places filled on average, hardly a set overflows.
        let useful = rows.div_ceil(2).max(1);
        let sets = (bytes / Self::bytes_of_a_set(row_bytes)).min(useful);
        if sets == 0 {
            return Ok(None);
        }
        let places = sets * WAYS as u64;
        let rows = Region::zeroed(places * stride as u64, &Storage::Ram)?;
        let sets = (0..sets).map(|_| Set::empty()).collect();
        Ok(Some(Self { sets, rows, row_bytes, stride, len: 0 }))
    }

    /// Bytes that a set takes with its rows.
    pub(crate) fn bytes_of_a_set(row_bytes: usize) -> u64 {
        (WAYS * row_bytes.next_multiple_of(LINE) + size_of::<Set>()) as u64
    }

    /// Rows that are kept.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The upper bits of a product: an even spread over any number of sets.
    #[inline(always)]
    fn set_of(&self, id: u64) -> usize {
        ((u128::from(mix(id)) * self.sets.len() as u128) >> 64) as usize
    }

    /// Whether the row of `id` is kept.
    pub(crate) fn holds(&self, id: u64) -> bool {
        self.sets[self.set_of(id)].find(id).is_some()
    }

    /// Copies the rows of `ids` that are kept to their places in `out` \[ids, row bytes\], of which the others then hold
    /// anything; calls `missing` with the positions of those, which ascend.
    pub(crate) fn read(&self, ids: &[u64], out: &mut [u8], mut missing: impl FnMut(usize)) {
        let ask = |id: u64| prefetch((&raw const self.sets[self.set_of(id)]).cast(), 1);
        ids.iter().take(SETS_AHEAD).for_each(|&id| ask(id));
        let rows = self.rows.ram().unwrap_or_default();
        let copy = CopyRows { rows, stride: self.stride, row_bytes: self.row_bytes };
        copy.copy(
            out,
            #[inline(always)]
            |position| {
                if let Some(&later) = ids.get(position + SETS_AHEAD) {
                    ask(later);
                }
                let number = self.set_of(ids[position]);
                let set = &self.sets[number];
                match set.find(ids[position]) {
                    Some(way) => {
                        set.used(way);
                        (number * WAYS + way) as u64
                    }
                    None => {
                        missing(position);
                        // Any row will do: what the source has is written over it.
                        0
                    }
                }
            },
        );
    }

    /// Keeps the row of `id`, in the place of another if its set is full.
    pub(crate) fn keep(&mut self, id: u64, row: &[u8]) {
        let number = self.set_of(id);
        let set = &mut self.sets[number];
        // Another thread may have fetched it meanwhile.
        if set.find(id).is_some() {
            return;
        }
        let way = set.make_room();
        let start = (number * WAYS + way) * self.stride;
        let write = |kept: &mut [u8]| kept.copy_from_slice(row);
        self.rows.stretch().change(start, row.len(), &mut Buffer::default(), write);
        self.len += usize::from(set.ids[way] == EMPTY);
        set.put(way, id);
    }

    /// Forgets the row of `id`.
    pub(crate) fn forget(&mut self, id: u64) {
        let number = self.set_of(id);
        let set = &mut self.sets[number];
        if let Some(way) = set.find(id) {
            set.put(way, EMPTY);
            self.len -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_that_came_first_and_was_not_used_leaves() {
        let mut sets = CacheSets::new(CacheSets::bytes_of_a_set(8), 8, 1000).unwrap().unwrap();
        let keep = |sets: &mut CacheSets, id: u64| sets.keep(id, &id.to_le_bytes());
        (0..7).for_each(|id| keep(&mut sets, id));
        let mut out = [0; 16];
        sets.read(&[0, 2], &mut out, |position| panic!("row {position} is kept"));
        assert_eq!(out, [[0u64, 2].map(u64::to_le_bytes)].concat().concat()[..]);
        keep(&mut sets, 7);
        keep(&mut sets, 8);
        let kept = |sets: &CacheSets| (0..10).filter(|&id| sets.holds(id)).collect::<Vec<_>>();
        assert_eq!(kept(&sets), [0, 2, 4, 5, 6, 7, 8], "1 and 3 leave; 0 and 2 were used");
        sets.forget(5);
        assert_eq!((kept(&sets).len(), sets.len()), (6, 6));
        keep(&mut sets, 9);
        assert_eq!((kept(&sets), sets.len()), (vec![0, 2, 4, 6, 7, 8, 9], 7));
    }

    #[test]
    fn a_set_is_a_cache_line_and_the_whole_is_as_large_as_asked() {
        assert_eq!(size_of::<Set>(), LINE);
        let sets = CacheSets::new(1 << 20, 264, 1 << 30).unwrap().unwrap();
        let bytes = sets.sets.len() * size_of::<Set>() + sets.sets.len() * WAYS * sets.stride;
        assert!(((1 << 20) - 2400..=1 << 20).contains(&bytes), "{bytes}");
        assert!(CacheSets::new(2303, 264, 1 << 30).unwrap().is_none());
        assert_eq!(CacheSets::new(1 << 40, 264, 9).unwrap().unwrap().sets.len(), 5, "no more than is useful");
    }
}
