//! Rows kept in sets of twelve: what a cache holds, and which row goes when another comes.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::cache_line::{LINE, prefetch};
use crate::copy_rows::CopyRows;
use crate::error::Result;
use crate::memory::{Buffer, Region, Storage};
use crate::split_mix::mix;

/// Rows of a set.
pub(crate) const WAYS: usize = 12;
/// The tag of a place without a row.
const EMPTY: u8 = 0;
/// The use of a row is counted from 0, when it comes, to this.
const MOST_USES: u32 = 3;
/// Sets that are asked for ahead of the one being looked at.
const SETS_AHEAD: usize = 16;
/// Bytes of a row's id.
const ID: usize = size_of::<u64>();

/// A set-associative cache of rows.
///
/// The hash of an id names its set and a tag of one byte. The tags of a set and the use of its rows take 16 bytes, so
/// that those of a million rows stay in a core's own cache. Tags of different rows may agree, so the id itself stands
/// behind its row, in a cache line that copying the row needs anyway: rows of 264 bytes cost no more lines than without
/// a cache.
///
/// Looking up changes nothing but counts of use, which are atomic: any number of threads look up at once. Within a set
/// rows leave in the order in which they came (CLOCK), except that a row that was used since stays for up to three
/// rounds. A row asked for once, of which text has many, thus leaves first.
#[derive(Debug)]
pub(crate) struct CacheSets {
    sets: Box<[Set]>,
    /// \[sets, ways, stride\]: the bytes of a row, then the complement of its id, or zero if there is no row.
    rows: Region,
    row_bytes: usize,
    /// Bytes from a row to the next: whole cache lines.
    stride: usize,
    len: usize,
}

#[derive(Debug)]
#[repr(C, align(16))]
struct Set {
    tags: [u8; WAYS],
    /// Two bits of use for each row, and above them the place of the hand that looks for the row to leave.
    uses: AtomicU32,
}

/// The lowest bit of [`Set::uses`] that belongs to the hand.
const HAND: usize = 2 * WAYS;

fn use_of(uses: u32, way: usize) -> u32 {
    uses >> (2 * way) & 3
}

fn with_use(uses: u32, way: usize, count: u32) -> u32 {
    uses & !(3 << (2 * way)) | count << (2 * way)
}

impl Set {
    fn empty() -> Self {
        Self { tags: [EMPTY; WAYS], uses: AtomicU32::new(0) }
    }

    /// The places whose rows may be the one of this tag, a bit each.
    #[inline(always)]
    fn candidates(&self, tag: u8) -> u32 {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{__m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set1_epi8};
            let mut tags = [EMPTY; 16];
            tags[..WAYS].copy_from_slice(&self.tags);
            // SAFETY: SSE2 is in the base instruction set, and these instructions access no memory.
            let equal = unsafe {
                let equal = _mm_cmpeq_epi8(bytemuck::cast::<_, __m128i>(tags), _mm_set1_epi8(tag as i8));
                _mm_movemask_epi8(equal)
            };
            equal as u32 & ((1 << WAYS) - 1)
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let mut found = 0;
            for (way, &kept) in self.tags.iter().enumerate() {
                found |= u32::from(kept == tag) << way;
            }
            found
        }
    }

    /// Counts a use. A count that another thread makes at the same time may be lost, which costs nothing but precision.
    #[inline(always)]
    fn used(&self, way: usize) {
        let uses = self.uses.load(Ordering::Relaxed);
        let count = use_of(uses, way);
        // Rows that are used all the time are only read, so that threads do not take the line from one another.
        if count < MOST_USES {
            self.uses.store(with_use(uses, way, count + 1), Ordering::Relaxed);
        }
    }

    /// A place for another row.
    fn make_room(&mut self) -> usize {
        let empty = self.candidates(EMPTY);
        if empty != 0 {
            return empty.trailing_zeros() as usize;
        }
        let uses = self.uses.get_mut();
        let mut way = (*uses >> HAND) as usize;
        while use_of(*uses, way) > 0 {
            *uses = with_use(*uses, way, use_of(*uses, way) - 1);
            way = (way + 1) % WAYS;
        }
        *uses = *uses & ((1 << HAND) - 1) | (((way + 1) % WAYS) as u32) << HAND;
        way
    }

    fn put(&mut self, way: usize, tag: u8) {
        self.tags[way] = tag;
        let uses = self.uses.get_mut();
        *uses = with_use(*uses, way, 0);
    }
}

/// The places of `candidates`.
fn places(candidates: u32) -> impl Iterator<Item = usize> {
    (0..WAYS).filter(move |way| candidates >> way & 1 == 1)
}

impl CacheSets {
    /// Sets that take at most `bytes` bytes with their rows of `row_bytes`, and no more than a source of `rows` rows can
    /// use; `None` if there is no room for one set.
    ///
    /// # Errors
    /// If the memory cannot be allocated.
    pub(crate) fn new(bytes: u64, row_bytes: usize, rows: u64) -> Result<Option<Self>> {
        let stride = Self::stride(row_bytes);
        // Rows fall into sets by chance: with four of twelve places filled on average, hardly a set overflows.
        let useful = rows.div_ceil(4).max(1);
        let sets = (bytes / Self::bytes_of_a_set(row_bytes)).min(useful);
        if sets == 0 {
            return Ok(None);
        }
        let places = sets * WAYS as u64;
        let rows = Region::zeroed(places * stride as u64, &Storage::Ram)?;
        let sets = (0..sets).map(|_| Set::empty()).collect();
        Ok(Some(Self { sets, rows, row_bytes, stride, len: 0 }))
    }

    fn stride(row_bytes: usize) -> usize {
        (row_bytes + ID).next_multiple_of(LINE)
    }

    /// Bytes that a set takes with its rows.
    pub(crate) fn bytes_of_a_set(row_bytes: usize) -> u64 {
        (WAYS * Self::stride(row_bytes) + size_of::<Set>()) as u64
    }

    /// Rows that are kept.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The number of an id's set, and its tag.
    #[inline(always)]
    fn home(&self, id: u64) -> (usize, u8) {
        let hash = mix(id);
        // The upper bits of a product: an even spread over any number of sets. The tag is of the lower bits.
        let set = ((u128::from(hash) * self.sets.len() as u128) >> 64) as usize;
        (set, (hash as u8).max(EMPTY + 1))
    }

    /// The bytes of all rows.
    fn bytes(&self) -> &[u8] {
        self.rows.ram().unwrap_or_default()
    }

    /// Whether the row at `place` (counted over all sets) is that of `id`.
    #[inline(always)]
    fn is_at(&self, bytes: &[u8], place: usize, id: u64) -> bool {
        let kept = bytes[place * self.stride + self.row_bytes..].first_chunk();
        kept == Some(&(!id).to_le_bytes())
    }

    /// The place (counted over all sets) of the row of `id`.
    fn place(&self, id: u64) -> Option<usize> {
        let ((set, tag), bytes) = (self.home(id), self.bytes());
        let candidates = places(self.sets[set].candidates(tag));
        candidates.map(|way| set * WAYS + way).find(|&place| self.is_at(bytes, place, id))
    }

    /// Whether the row of `id` is kept.
    pub(crate) fn holds(&self, id: u64) -> bool {
        self.place(id).is_some()
    }

    /// Copies the rows of `ids` that are kept to their places in `out` \[ids, row bytes\], of which the others then hold
    /// anything; calls `missing` with the positions of those, which ascend.
    pub(crate) fn read(&self, ids: &[u64], out: &mut [u8], mut missing: impl FnMut(usize)) {
        let ask = |id: u64| prefetch((&raw const self.sets[self.home(id).0]).cast(), 1);
        ids.iter().take(SETS_AHEAD).for_each(|&id| ask(id));
        let rows = self.bytes();
        let copy = CopyRows { rows, stride: self.stride, row_bytes: self.row_bytes };
        copy.copy_checked(
            out,
            #[inline(always)]
            |position| {
                if let Some(&later) = ids.get(position + SETS_AHEAD) {
                    ask(later);
                }
                let (number, tag) = self.home(ids[position]);
                let set = &self.sets[number];
                let candidates = set.candidates(tag);
                if candidates == 0 {
                    // Any place will do: its row is another's.
                    return (number * WAYS) as u64;
                }
                let way = candidates.trailing_zeros() as usize;
                set.used(way);
                if !candidates.is_power_of_two() {
                    self.ask_for_others(number, candidates);
                }
                (number * WAYS + way) as u64
            },
            #[inline(always)]
            |position, place| {
                if self.is_at(rows, place as usize, ids[position]) {
                    return place;
                }
                self.place(ids[position]).unwrap_or_else(|| {
                    missing(position);
                    // Any row will do: what the source has is written over it.
                    place as usize
                }) as u64
            },
        );
    }

    /// Asks for the rows of all candidates but the first.
    #[cold]
    fn ask_for_others(&self, set: usize, candidates: u32) {
        let rows = self.bytes();
        for way in places(candidates).skip(1) {
            prefetch(rows.as_ptr().wrapping_add((set * WAYS + way) * self.stride), self.stride);
        }
    }

    /// Keeps the row of `id`, in the place of another if its set is full.
    pub(crate) fn keep(&mut self, id: u64, row: &[u8]) {
        // Another thread may have fetched it meanwhile.
        if self.holds(id) {
            return;
        }
        let (number, tag) = self.home(id);
        let set = &mut self.sets[number];
        let way = set.make_room();
        self.len += usize::from(set.tags[way] == EMPTY);
        set.put(way, tag);
        self.write(number * WAYS + way, row, (!id).to_le_bytes());
    }

    /// Forgets the row of `id`.
    pub(crate) fn forget(&mut self, id: u64) {
        let Some(place) = self.place(id) else { return };
        self.sets[place / WAYS].put(place % WAYS, EMPTY);
        self.len -= 1;
        self.write(place, &[], [0; ID]);
    }

    /// Writes the first bytes of the row at `place`, and its id.
    fn write(&mut self, place: usize, row: &[u8], id: [u8; ID]) {
        let row_bytes = self.row_bytes;
        let write = |kept: &mut [u8]| {
            kept[..row.len()].copy_from_slice(row);
            kept[row_bytes..].copy_from_slice(&id);
        };
        self.rows.stretch().change(place * self.stride, row_bytes + ID, &mut Buffer::default(), write);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_that_came_first_and_was_not_used_leaves() {
        let mut sets = CacheSets::new(CacheSets::bytes_of_a_set(8), 8, 1000).unwrap().unwrap();
        let keep = |sets: &mut CacheSets, id: u64| sets.keep(id, &id.to_le_bytes());
        (0..12).for_each(|id| keep(&mut sets, id));
        let mut out = [0; 16];
        sets.read(&[0, 2], &mut out, |position| panic!("row {position} is kept"));
        assert_eq!(out, [[0u64, 2].map(u64::to_le_bytes)].concat().concat()[..]);
        keep(&mut sets, 12);
        keep(&mut sets, 13);
        let kept = |sets: &CacheSets| (0..15).filter(|&id| sets.holds(id)).collect::<Vec<_>>();
        let others = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
        assert_eq!(kept(&sets), [&[0, 2][..], &others].concat(), "1 and 3 leave; 0 and 2 were used");
        sets.forget(5);
        assert_eq!((kept(&sets).len(), sets.len()), (11, 11));
        keep(&mut sets, 14);
        assert_eq!(sets.len(), 12);
        assert!(sets.holds(14) && !sets.holds(5));
    }

    /// A thousand rows in one set's worth of tags: most tags are those of several rows.
    #[test]
    fn rows_of_one_tag_are_told_apart() {
        let mut sets = CacheSets::new(CacheSets::bytes_of_a_set(8), 8, 1000).unwrap().unwrap();
        let tag = sets.home(0).1;
        let alike: Vec<u64> = (0..20_000).filter(|&id| sets.home(id).1 == tag).take(20).collect();
        let (kept, others) = alike.split_at(WAYS);
        kept.iter().for_each(|&id| sets.keep(id, &id.to_le_bytes()));
        let mut out = vec![0; 8 * alike.len()];
        let mut missing = Vec::new();
        sets.read(&alike, &mut out, |position| missing.push(position));
        assert_eq!(missing, (WAYS..WAYS + others.len()).collect::<Vec<_>>());
        for (id, row) in kept.iter().zip(out.chunks(8)) {
            assert_eq!(row, id.to_le_bytes());
        }
        assert!(kept.iter().all(|&id| sets.holds(id)) && !others.iter().any(|&id| sets.holds(id)));
        sets.forget(kept[3]);
        assert!(!sets.holds(kept[3]) && sets.holds(kept[4]) && sets.len() == WAYS - 1);
    }

    #[test]
    fn an_empty_cache_has_no_row_not_even_row_0() {
        let sets = CacheSets::new(1 << 16, 8, 1000).unwrap().unwrap();
        let mut missing = Vec::new();
        sets.read(&[0, 1], &mut [0; 16], |position| missing.push(position));
        assert_eq!(missing, [0, 1]);
    }

    #[test]
    fn a_set_is_a_quarter_line_and_the_whole_is_as_large_as_asked() {
        assert_eq!(size_of::<Set>(), LINE / 4);
        let sets = CacheSets::new(1 << 20, 264, 1 << 30).unwrap().unwrap();
        assert_eq!(sets.stride, 320, "the id fits the last line of the row");
        let bytes = sets.sets.len() * size_of::<Set>() + sets.sets.len() * WAYS * sets.stride;
        assert!(((1 << 20) - 4000..=1 << 20).contains(&bytes), "{bytes}");
        assert!(CacheSets::new(3855, 264, 1 << 30).unwrap().is_none());
        assert_eq!(CacheSets::new(1 << 40, 264, 9).unwrap().unwrap().sets.len(), 3, "no more than is useful");
    }
}
