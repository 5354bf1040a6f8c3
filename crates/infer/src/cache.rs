//! What is kept of positions already computed, in pages that sequences share.
//!
//! A page holds a fixed number of positions. A sequence is a list of pages and a length; where two sequences begin
//! with the same tokens they may list the same pages, and whoever writes to a shared page gets a copy of it first.
//! Full pages can be found again by the tokens they hold after those of the page before, also when no sequence
//! lists them any more, until their room is needed.
//!
//! Nothing of a position is kept elsewhere, so that taking back tokens is shortening the list.

use std::collections::{BTreeMap, HashMap};

/// What a cache keeps of a position: a number of values for each of its parts, which are the blocks' latents (or
/// keys and values) and what a memory's short convolution sees of the past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheLayout {
    /// Positions of a page.
    pub page: usize,
    /// Values of a position, for each part.
    pub parts: Vec<usize>,
}

impl CacheLayout {
    /// Values of a page.
    pub fn page_values(&self) -> usize {
        self.page * self.parts.iter().sum::<usize>()
    }

    /// Bytes of a page; none if they are more than can be addressed.
    pub fn page_bytes(&self) -> Option<usize> {
        self.parts.iter().sum::<usize>().checked_mul(self.page)?.checked_mul(size_of::<f32>())
    }

    /// Pages that `positions` fill.
    pub fn pages_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.page)
    }
}

/// No page is free, and none can be freed: sequences hold them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all {pages} pages of the cache are in use")]
pub struct CacheFull {
    /// Pages of the cache.
    pub pages: usize,
}

/// The positions that have been computed of one sequence. It belongs to one [`Cache`], which must take it back with
/// [`Cache::release`].
#[derive(Debug, Default)]
pub struct Sequence {
    root: Root,
    pages: Vec<u32>,
    len: usize,
    /// Pages from the first whose contents can be found by their tokens.
    published: usize,
}

impl Sequence {
    /// Positions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its pages.
    pub(crate) fn pages(&self) -> &[u32] {
        &self.pages
    }
}

/// Sequences of different roots share nothing, even where their tokens agree: they were computed in other ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Root {
    /// With this one of the memories.
    Memory(usize),
    /// Without a memory.
    #[default]
    NoMemory,
}

/// A full page is known by the page before it and its own tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PageKey {
    before: Before,
    tokens: Box<[u32]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Before {
    Nothing(Root),
    /// Number of a page's contents; contents never have the number of others.
    Contents(u64),
}

#[derive(Debug, Default)]
struct Page {
    /// Sequences that list it.
    users: u32,
    contents: u64,
    key: Option<PageKey>,
    /// When it was last let go of.
    idle_since: u64,
}

/// Pages for many sequences.
#[derive(Debug)]
pub struct Cache {
    layout: CacheLayout,
    /// Where each part begins in a page.
    starts: Vec<usize>,
    values: Vec<f32>,
    pages: Vec<Page>,
    free: Vec<u32>,
    known: HashMap<PageKey, u32>,
    /// Pages that nobody lists and whose contents can be found, by when they were let go of.
    idle: BTreeMap<u64, u32>,
    /// Pages that sequences list.
    in_use: usize,
    contents: u64,
    clock: u64,
}

impl Cache {
    /// A cache of `pages` pages.
    ///
    /// # Panics
    /// When there is no page, or a page no position.
    pub fn new(layout: CacheLayout, pages: usize) -> Self {
        assert!(pages > 0 && layout.page > 0, "a cache of {pages} pages of {} positions", layout.page);
        let mut start = 0;
        let starts = layout.parts.iter().map(|width| {
            let here = start;
            start += layout.page * width;
            here
        });
        let starts = starts.collect();
        Self {
            values: vec![0.0; pages * layout.page_values()],
            starts,
            pages: (0..pages).map(|_| Page::default()).collect(),
            free: (0..pages as u32).rev().collect(),
            known: HashMap::new(),
            idle: BTreeMap::new(),
            in_use: 0,
            contents: 0,
            clock: 0,
            layout,
        }
    }

    /// What it keeps of a position.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Pages that sequences list.
    pub fn pages_in_use(&self) -> usize {
        self.in_use
    }

    /// Pages that sequences can still get.
    pub fn pages_left(&self) -> usize {
        self.pages.len() - self.in_use
    }

    /// A sequence whose first positions are those of `tokens` that are known already: whole pages, and never all
    /// tokens, as the logits after the last have to be computed in any case.
    pub fn begin(&mut self, root: Root, tokens: &[u32]) -> Sequence {
        let mut sequence = Sequence { root, ..Sequence::default() };
        let most = tokens.len().saturating_sub(1) / self.layout.page;
        let mut before = Before::Nothing(root);
        for tokens in tokens.chunks_exact(self.layout.page).take(most) {
            let Some(&page) = self.known.get(&PageKey { before, tokens: tokens.into() }) else { break };
            self.take_up(page);
            before = Before::Contents(self.pages[page as usize].contents);
            sequence.pages.push(page);
        }
        sequence.published = sequence.pages.len();
        sequence.len = sequence.pages.len() * self.layout.page;
        sequence
    }

    /// The same positions a second time; they are stored once until one of the two goes on.
    pub fn fork(&mut self, sequence: &Sequence) -> Sequence {
        for &page in &sequence.pages {
            self.take_up(page);
        }
        Sequence { pages: sequence.pages.clone(), ..*sequence }
    }

    /// Makes room for `count` positions more, which can then be written.
    ///
    /// # Errors
    /// When there is none. The sequence's positions are as they were.
    pub fn reserve(&mut self, sequence: &mut Sequence, count: usize) -> Result<(), CacheFull> {
        // Pages that others list too, and that would be written to.
        for index in sequence.len / self.layout.page..sequence.pages.len() {
            let page = sequence.pages[index];
            if count > 0 && self.pages[page as usize].users > 1 {
                let copy = self.take_page()?;
                let size = self.layout.page_values();
                let from = page as usize * size;
                self.values.copy_within(from..from + size, copy as usize * size);
                self.let_go(page);
                sequence.pages[index] = copy;
            }
        }
        let had = sequence.pages.len();
        while sequence.pages.len() < self.layout.pages_for(sequence.len + count) {
            match self.take_page() {
                Ok(page) => sequence.pages.push(page),
                Err(full) => {
                    sequence.pages.split_off(had).into_iter().for_each(|page| self.let_go(page));
                    return Err(full);
                }
            }
        }
        Ok(())
    }

    /// The sequence now has `len` positions of those that were reserved; `tokens` are all of its tokens. Pages
    /// that are full can be found by others from now on.
    ///
    /// # Panics
    /// When so many positions are not reserved, or `tokens` are fewer.
    pub fn commit(&mut self, sequence: &mut Sequence, len: usize, tokens: &[u32]) {
        assert!(len <= sequence.pages.len() * self.layout.page && len <= tokens.len(), "{len} positions");
        sequence.len = len;
        let size = self.layout.page;
        for index in sequence.published..len / size {
            let before = match index {
                0 => Before::Nothing(sequence.root),
                _ => Before::Contents(self.pages[sequence.pages[index - 1] as usize].contents),
            };
            let key = PageKey { before, tokens: tokens[index * size..(index + 1) * size].into() };
            if let Some(&twin) = self.known.get(&key) {
                // Another sequence was here first. Its page has the same bits, so that one of the two can go, and
                // what follows is found after either.
                self.take_up(twin);
                let own = std::mem::replace(&mut sequence.pages[index], twin);
                self.let_go(own);
            } else {
                let page = sequence.pages[index];
                self.contents += 1;
                let entry = &mut self.pages[page as usize];
                (entry.contents, entry.key) = (self.contents, Some(key.clone()));
                self.known.insert(key, page);
            }
            sequence.published = index + 1;
        }
    }

    /// Takes back the newest positions, down to `len`, and the pages beyond.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn truncate(&mut self, sequence: &mut Sequence, len: usize) {
        assert!(len <= sequence.len, "cannot shorten {} positions to {len}", sequence.len);
        sequence.len = len;
        let keep = self.layout.pages_for(len);
        sequence.pages.split_off(keep).into_iter().for_each(|page| self.let_go(page));
        // A page that is no longer full keeps its contents for others; it is copied before it is written to.
        let full = len / self.layout.page;
        if full < sequence.published {
            sequence.published = full;
            self.unshare_last(sequence, full);
        }
    }

    /// A page that can be found by its tokens must not be written to: the partly filled last one is replaced by
    /// nothing that is known.
    fn unshare_last(&mut self, sequence: &Sequence, index: usize) {
        if let Some(&page) = sequence.pages.get(index)
            && let Some(key) = self.pages[page as usize].key.take()
        {
            self.known.remove(&key);
        }
    }

    /// Takes a sequence back. Its full pages can still be found.
    pub fn release(&mut self, sequence: Sequence) {
        // The last pages go first: they are of less use to others.
        sequence.pages.into_iter().rev().for_each(|page| self.let_go(page));
    }

    /// Values of one part in a page, `[page, width]`.
    pub(crate) fn part(&self, page: u32, part: usize) -> &[f32] {
        &self.values[self.place(page, part)..][..self.layout.page * self.layout.parts[part]]
    }

    /// Values of one part at a position of a sequence with these pages.
    pub(crate) fn position(&self, pages: &[u32], part: usize, position: usize) -> &[f32] {
        let (page, width) = (self.layout.page, self.layout.parts[part]);
        &self.part(pages[position / page], part)[position % page * width..][..width]
    }

    /// Those values, to be written.
    pub(crate) fn position_mut(&mut self, pages: &[u32], part: usize, position: usize) -> &mut [f32] {
        let (page, width) = (self.layout.page, self.layout.parts[part]);
        let start = self.place(pages[position / page], part) + position % page * width;
        &mut self.values[start..start + width]
    }

    fn place(&self, page: u32, part: usize) -> usize {
        page as usize * self.layout.page_values() + self.starts[part]
    }

    /// A page that nobody lists: a free one, or the one that has been idle for longest.
    fn take_page(&mut self) -> Result<u32, CacheFull> {
        let longest_idle = |idle: &mut BTreeMap<u64, u32>| idle.pop_first().map(|(_, page)| page);
        let page = self.free.pop().or_else(|| longest_idle(&mut self.idle));
        let page = page.ok_or(CacheFull { pages: self.pages.len() })?;
        let entry = &mut self.pages[page as usize];
        entry.users = 1;
        self.in_use += 1;
        if let Some(key) = entry.key.take() {
            self.known.remove(&key);
        }
        Ok(page)
    }

    /// One more sequence lists a page.
    fn take_up(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        entry.users += 1;
        if entry.users == 1 {
            self.in_use += 1;
            self.idle.remove(&entry.idle_since);
        }
    }

    fn let_go(&mut self, page: u32) {
        self.clock += 1;
        let entry = &mut self.pages[page as usize];
        entry.users -= 1;
        entry.idle_since = self.clock;
        if entry.users > 0 {
            return;
        }
        self.in_use -= 1;
        if entry.key.is_none() {
            self.free.push(page);
        } else {
            self.idle.insert(self.clock, page);
        }
    }
}

/// Where a row of a step stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) pages: &'a [u32],
    pub(crate) position: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cache(pages: usize) -> Cache {
        Cache::new(CacheLayout { page: 4, parts: vec![1, 2] }, pages)
    }

    /// Writes each token's number to its positions.
    fn compute(cache: &mut Cache, sequence: &mut Sequence, tokens: &[u32]) -> Result<(), CacheFull> {
        let first = sequence.len();
        cache.reserve(sequence, tokens.len() - first)?;
        for (position, &token) in tokens.iter().enumerate().skip(first) {
            for part in 0..2 {
                let pages = sequence.pages.clone();
                cache.position_mut(&pages, part, position).fill(token as f32);
            }
        }
        cache.commit(sequence, tokens.len(), tokens);
        Ok(())
    }

    fn check(cache: &Cache, sequence: &Sequence, tokens: &[u32]) {
        assert_eq!(sequence.len(), tokens.len());
        for (position, &token) in tokens.iter().enumerate() {
            for part in 0..2 {
                let values = cache.position(&sequence.pages, part, position);
                assert!(values.iter().all(|&value| value == token as f32), "position {position}: {values:?}");
            }
        }
    }

    #[test]
    fn a_common_beginning_is_stored_once() {
        let mut cache = cache(8);
        let tokens: Vec<u32> = (0..10).collect();
        let mut first = cache.begin(Root::Memory(0), &tokens);
        assert!(first.is_empty());
        compute(&mut cache, &mut first, &tokens).unwrap();
        let second = cache.begin(Root::Memory(0), &tokens);
        assert_eq!((second.len(), cache.pages_in_use()), (8, 3));
        check(&cache, &second, &tokens[..8]);
        assert!(cache.begin(Root::NoMemory, &tokens).is_empty());
        // The last token is left to compute even where it ends a page.
        let eight = cache.begin(Root::Memory(0), &tokens[..8]);
        assert_eq!(eight.len(), 4);
        for sequence in [first, second, eight] {
            cache.release(sequence);
        }
        assert_eq!(cache.pages_in_use(), 0);
        assert_eq!(cache.begin(Root::Memory(0), &tokens).len(), 8, "idle pages are found");
    }

    #[test]
    fn forks_do_not_see_each_other() {
        let mut cache = cache(8);
        let mut left: Vec<u32> = (0..6).collect();
        let mut first = cache.begin(Root::Memory(0), &left);
        compute(&mut cache, &mut first, &left).unwrap();
        let mut second = cache.fork(&first);
        let mut right = left.clone();
        left.push(100);
        right.push(200);
        compute(&mut cache, &mut first, &left).unwrap();
        compute(&mut cache, &mut second, &right).unwrap();
        check(&cache, &first, &left);
        check(&cache, &second, &right);
        assert_eq!(cache.pages_in_use(), 3);
    }

    #[test]
    fn a_full_cache_says_so_and_recovers() {
        let mut cache = cache(2);
        let tokens: Vec<u32> = (0..9).collect();
        let mut sequence = cache.begin(Root::Memory(0), &tokens);
        assert_eq!(cache.reserve(&mut sequence, 9), Err(CacheFull { pages: 2 }));
        compute(&mut cache, &mut sequence, &tokens[..8]).unwrap();
        cache.release(sequence);
        let other: Vec<u32> = (50..58).collect();
        let mut sequence = cache.begin(Root::Memory(0), &other);
        compute(&mut cache, &mut sequence, &other).unwrap();
        check(&cache, &sequence, &other);
    }

    #[derive(Debug, Clone)]
    enum Act {
        Begin(Vec<u32>),
        Extend(usize, Vec<u32>),
        Fork(usize),
        Truncate(usize, usize),
        Release(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        let tokens = || prop::collection::vec(0_u32..2, 0..9);
        prop_oneof![
            tokens().prop_map(Act::Begin),
            (any::<usize>(), tokens()).prop_map(|(which, tokens)| Act::Extend(which, tokens)),
            any::<usize>().prop_map(Act::Fork),
            (any::<usize>(), any::<usize>()).prop_map(|(which, len)| Act::Truncate(which, len)),
            any::<usize>().prop_map(Act::Release),
        ]
    }

    proptest! {
        /// Whatever sequences do, each holds its own tokens, and what nobody holds is free again.
        #[test]
        fn every_sequence_keeps_its_own(acts in prop::collection::vec(act(), 0..60), pages in 1_usize..12) {
            let mut cache = cache(pages);
            let mut live: Vec<(Sequence, Vec<u32>)> = Vec::new();
            for act in acts {
                match act {
                    Act::Begin(tokens) => {
                        let mut sequence = cache.begin(Root::Memory(0), &tokens);
                        let known = tokens[..sequence.len()].to_vec();
                        check(&cache, &sequence, &known);
                        match compute(&mut cache, &mut sequence, &tokens) {
                            Ok(()) => live.push((sequence, tokens)),
                            Err(_) => live.push((sequence, known)),
                        }
                    }
                    Act::Extend(which, more) if !live.is_empty() => {
                        let count = live.len();
                        let (sequence, tokens) = &mut live[which % count];
                        let all: Vec<u32> = tokens.iter().chain(&more).copied().collect();
                        if compute(&mut cache, sequence, &all).is_ok() {
                            *tokens = all;
                        }
                    }
                    Act::Fork(which) if !live.is_empty() => {
                        let (sequence, tokens) = &live[which % live.len()];
                        let fork = (cache.fork(sequence), tokens.clone());
                        live.push(fork);
                    }
                    Act::Truncate(which, len) if !live.is_empty() => {
                        let count = live.len();
                        let (sequence, tokens) = &mut live[which % count];
                        tokens.truncate(len % (tokens.len() + 1));
                        cache.truncate(sequence, tokens.len());
                    }
                    Act::Release(which) if !live.is_empty() => {
                        let (sequence, _) = live.swap_remove(which % live.len());
                        cache.release(sequence);
                    }
                    _ => {}
                }
                for (sequence, tokens) in &live {
                    check(&cache, sequence, tokens);
                }
                let listed = cache.pages.iter().filter(|page| page.users > 0).count();
                prop_assert_eq!((cache.pages_in_use(), cache.pages_left()), (listed, pages - listed));
                prop_assert_eq!(cache.free.len() + cache.idle.len(), pages - listed);
            }
            live.into_iter().for_each(|(sequence, _)| cache.release(sequence));
            prop_assert_eq!(cache.pages_in_use(), 0);
            let tokens: Vec<u32> = (100..100 + 4 * pages as u32).collect();
            let mut all = cache.begin(Root::Memory(0), &tokens);
            prop_assert!(compute(&mut cache, &mut all, &tokens).is_ok(), "every page can be had again");
        }
    }
}
