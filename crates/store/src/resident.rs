//! A limit on the pages of a mapped file that are in memory.
//!
//! The system takes pages of a mapped file back only when memory runs short, which in a container may be too late. Here
//! every page that is touched is noted, and once there are too many, those that were not used lately are given back:
//! second chance, as in the CLOCK algorithm (Corbató 1968).
//!
//! A fault maps more than the page that was touched: what lies around it in the system's page cache, and all of a large
//! folio. So the file's clean pages leave the page cache when the limit is set, and after pages were touched for the first
//! time the system is asked what is mapped around them (`/proc/self/pagemap`); that is noted, too.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use memmap2::{MmapRaw, UncheckedAdvice};

/// Linux maps up to this many bytes of its page cache with the page that is touched (`fault_around_bytes`).
const FAULT_BYTES: usize = 64 << 10;

/// Pages of a mapping, one bit each.
#[derive(Debug)]
struct Pages(Box<[AtomicU64]>);

impl Pages {
    fn none(count: usize) -> Self {
        Self(std::iter::repeat_with(AtomicU64::default).take(count.div_ceil(64)).collect())
    }

    /// Notes a page; whether it was not yet.
    fn add(&self, page: usize) -> bool {
        let (word, bit) = (&self.0[page / 64], 1 << (page % 64));
        // Most pages are noted already, and a load leaves the line with all who read it.
        word.load(Relaxed) & bit == 0 && word.fetch_or(bit, Relaxed) & bit == 0
    }
}

/// Which pages of a mapping are in memory, and how many may be. Threads that touch pages while others are given back can
/// make the count fall short by the rows that they are reading.
#[derive(Debug)]
pub(crate) struct ResidentPages {
    page_bytes: usize,
    most: u64,
    count: AtomicU64,
    resident: Pages,
    /// Used since the hand last passed.
    used: Pages,
    /// The word that is looked at next.
    hand: Mutex<usize>,
    /// What the system has mapped, as it tells this process; none where it does not.
    mapped: Option<File>,
}

/// Words of 64 pages in which pages were touched that were not in memory.
pub(crate) type Fresh = Vec<usize>;

impl ResidentPages {
    /// At most `bytes` of a mapping of `mapped` bytes.
    pub(crate) fn at_most(bytes: u64, mapped: usize, page_bytes: usize) -> Self {
        let pages = mapped.div_ceil(page_bytes);
        Self {
            page_bytes,
            most: (bytes / page_bytes as u64).max(1),
            count: AtomicU64::new(0),
            resident: Pages::none(pages),
            used: Pages::none(pages),
            hand: Mutex::new(0),
            mapped: if cfg!(target_os = "linux") { File::open("/proc/self/pagemap").ok() } else { None },
        }
    }

    /// Takes clean pages of `file` that nobody has mapped out of the system's page cache, so that faults find no neighbours.
    pub(crate) fn forget(file: &File) {
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
        #[cfg(not(target_os = "linux"))]
        let _ = file;
    }

    /// Bytes that may be in memory.
    pub(crate) fn limit(&self) -> usize {
        usize::try_from(self.most).unwrap_or(usize::MAX).saturating_mul(self.page_bytes)
    }

    /// Bytes in memory, as far as is known.
    pub(crate) fn bytes(&self) -> u64 {
        self.count.load(Relaxed) * self.page_bytes as u64
    }

    /// Notes that these bytes are about to be touched.
    #[inline]
    pub(crate) fn touch(&self, bytes: Range<usize>, fresh: &mut Fresh) {
        for page in bytes.start / self.page_bytes..bytes.end.div_ceil(self.page_bytes) {
            if self.resident.add(page) {
                self.count.fetch_add(1, Relaxed);
                fresh.push(page / 64);
            }
            self.used.add(page);
        }
    }

    /// Notes what faults on pages of the words `fresh` have mapped besides.
    pub(crate) fn survey(&self, map: &MmapRaw, mut fresh: Fresh) {
        let Some(mapped) = &self.mapped else { return };
        fresh.sort_unstable();
        fresh.dedup();
        let most = self.resident.0.len();
        for &word in &fresh {
            // A folio may reach into the words around.
            let mut next = word;
            while let Some(present) = self.present(mapped, map, next) {
                let new = present & !self.resident.0[next].fetch_or(present, Relaxed);
                self.count.fetch_add(u64::from(new.count_ones()), Relaxed);
                next += 1;
                if new >> 63 == 0 || next == most {
                    break;
                }
            }
            let mut next = word;
            while next > 0 && self.resident.0[next].load(Relaxed) & 1 == 1 {
                next -= 1;
                let Some(present) = self.present(mapped, map, next) else { break };
                let new = present & !self.resident.0[next].fetch_or(present, Relaxed);
                self.count.fetch_add(u64::from(new.count_ones()), Relaxed);
                if new == 0 {
                    break;
                }
            }
        }
    }

    /// Pages of a word that are mapped.
    fn present(&self, mapped: &File, map: &MmapRaw, word: usize) -> Option<u64> {
        let first = map.as_ptr() as usize / self.page_bytes + 64 * word;
        let pages = map.len().div_ceil(self.page_bytes).saturating_sub(64 * word).min(64);
        let mut entries = [0; 8 * 64];
        let entries = &mut entries[..8 * pages];
        #[cfg(unix)]
        std::os::unix::fs::FileExt::read_exact_at(mapped, entries, 8 * first as u64).ok()?;
        #[cfg(not(unix))]
        let _ = (mapped, first);
        // The highest bit of an entry says that the page is there.
        let there = entries.chunks_exact(8).map(|entry| entry[7] >> 7);
        Some(there.enumerate().fold(0, |bits, (page, there)| bits | u64::from(there) << page))
    }

    /// Gives pages of `file`, which `map` maps from its beginning, back to the system, if there are too many.
    pub(crate) fn trim(&self, map: &MmapRaw, file: &File) {
        if self.count.load(Relaxed) <= self.most {
            return;
        }
        // One thread is enough, and the others need not wait for it unless far too many pages are touched meanwhile.
        let mut hand = match self.hand.try_lock() {
            Ok(hand) => hand,
            Err(_) if self.count.load(Relaxed) <= self.most + self.most / 4 => return,
            Err(_) => self.hand.lock().unwrap_or_else(PoisonError::into_inner),
        };
        // An eighth less, so that not every batch has to.
        let enough = self.most - self.most / 8;
        // Twice around: the first time every page may have been used.
        for _ in 0..2 * self.resident.0.len() {
            if self.count.load(Relaxed) <= enough {
                return;
            }
            let word = *hand;
            *hand = (word + 1) % self.resident.0.len();
            let used = self.used.0[word].swap(0, Relaxed);
            let old = self.resident.0[word].load(Relaxed) & !used;
            if old != 0 {
                self.resident.0[word].fetch_and(!old, Relaxed);
                self.count.fetch_sub(u64::from(old.count_ones()), Relaxed);
                runs(old)
                    .for_each(|run| self.give_back(64 * word + run.start..64 * word + run.end, map, file));
            }
        }
    }

    fn give_back(&self, pages: Range<usize>, map: &MmapRaw, file: &File) {
        let (start, bytes) = (pages.start * self.page_bytes, pages.len() * self.page_bytes);
        let bytes = bytes.min(map.len() - start);
        // A fault also maps pages around it that are in the system's memory anyway: those go along.
        let around =
            start / FAULT_BYTES * FAULT_BYTES..(start + bytes).next_multiple_of(FAULT_BYTES).min(map.len());
        // SAFETY: pages of a file that is mapped to be read lose nothing: they are read again when they are touched.
        // Advice that the system does not take leaves them where they are.
        let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, around.start, around.len()) };
        // From the system's own memory, too, unless others have them mapped.
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(
            file,
            start as u64,
            std::num::NonZeroU64::new(bytes as u64),
            rustix::fs::Advice::DontNeed,
        );
        #[cfg(not(target_os = "linux"))]
        let _ = file;
    }
}

/// The stretches of ones in `bits`, from the lowest on.
fn runs(mut bits: u64) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let zeros = bits.trailing_zeros();
        bits >>= zeros;
        let ones = bits.trailing_ones();
        let start = at + zeros as usize;
        at = start + ones as usize;
        bits = bits.checked_shr(ones).unwrap_or(0);
        Some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_ones(bits in prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), Just(1 << 63)]) {
            let back = runs(bits).flatten().fold(0, |all, bit| all | 1u64 << bit);
            prop_assert_eq!(back, bits);
            let runs: Vec<_> = runs(bits).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }

    #[test]
    fn what_is_used_stays_and_the_rest_goes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        // SAFETY: nobody else has the file, and no byte of the mapping is looked at.
        let map = MmapRaw::from(unsafe { memmap2::Mmap::map(&file) }.unwrap());
        let pages = ResidentPages::at_most(32 * 4096, 1 << 20, 4096);
        for round in 0..40 {
            // Two pages that are always used, and others.
            for page in [7, 200, (round * 6) % 256, (round * 6 + 3) % 256] {
                pages.touch(page * 4096 + 10..page * 4096 + 20, &mut Vec::new());
            }
            pages.trim(&map, &file);
            assert!(pages.bytes() <= 32 * 4096, "{}", pages.bytes());
        }
        for page in [7, 200] {
            assert!(!pages.resident.add(page), "page {page} is still there");
        }
        let mut fresh = Vec::new();
        pages.touch(4095..4097, &mut fresh);
        assert!(fresh.iter().all(|&word| word == 0), "{fresh:?}");
        assert!(!pages.resident.add(0) && !pages.resident.add(1), "a row may lie in two pages");
    }

    /// What is mapped around a page is counted, as far as it reaches.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_fault_maps_besides_is_counted() {
        let page = rustix::param::page_size();
        let file = tempfile::tempfile().unwrap();
        file.set_len(300 * page as u64).unwrap();
        // SAFETY: nobody else has the file, and it is not shortened.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let pages = ResidentPages::at_most(1 << 30, map.len(), page);
        for touched in 60..140 {
            std::hint::black_box(map[touched * page]);
        }
        let map = MmapRaw::from(map);
        let mut fresh = Vec::new();
        pages.touch(100 * page..100 * page + 1, &mut fresh);
        pages.survey(&map, fresh);
        assert!(pages.bytes() >= 80 * page as u64, "{}", pages.bytes());
    }
}
