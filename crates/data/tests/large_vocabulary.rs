//! A vocabulary of the size that models have today takes little memory, at rest and while it is read.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use engram_data::Tokenizer;

/// Counts the bytes that are taken, and the most that ever were.
struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        MOST.fetch_max(TAKEN.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller says.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Letters, of which each two are a token.
const LETTERS: u32 = 500;

fn letter(index: u32) -> char {
    char::from_u32(0x4e00 + index).unwrap()
}

/// A `tokenizer.json` of 250,500 tokens and 250,000 merges.
fn large() -> String {
    let (mut vocabulary, mut merges) = (String::from("\"<eos>\":0"), String::new());
    for index in 0..LETTERS {
        write!(vocabulary, ",\"{}\":{}", letter(index), index + 1).unwrap();
    }
    for (left, right) in (0..LETTERS).flat_map(|left| (0..LETTERS).map(move |right| (left, right))) {
        let (one, other) = (letter(left), letter(right));
        write!(vocabulary, ",\"{one}{other}\":{}", 1 + LETTERS + left * LETTERS + right).unwrap();
        let comma = if merges.is_empty() { "" } else { "," };
        write!(merges, "{comma}[\"{one}\",\"{other}\"]").unwrap();
    }
    format!(
        "{{\"version\":\"1.0\",\"added_tokens\":[],\"model\":{{\"type\":\"BPE\",\"vocab\":{{{vocabulary}}},\"merges\":[{merges}]}}}}"
    )
}

#[test]
fn a_large_vocabulary_takes_little_memory() {
    let json = large();
    let before = TAKEN.load(Relaxed);
    MOST.store(before, Relaxed);
    let tokenizer = Tokenizer::from_json(json.as_bytes(), "test", Some("<eos>")).unwrap();
    let (rest, most) = (TAKEN.load(Relaxed) - before, MOST.load(Relaxed) - before);
    let tokens = tokenizer.encode(&[letter(2), letter(3), letter(1)].iter().collect::<String>()).unwrap();
    assert_eq!(tokens, [1 + LETTERS + 2 * LETTERS + 3, 2]);
    // Names that are kept twice and merges in a map are beyond both.
    assert!(rest < 4 * json.len(), "{rest} bytes at rest for a file of {}", json.len());
    assert!(most < 8 * json.len(), "{most} bytes while a file of {} is read", json.len());

    let before = TAKEN.load(Relaxed);
    let copies = [tokenizer.clone(), tokenizer.clone()];
    let more = TAKEN.load(Relaxed) - before;
    assert!(more < 100_000, "{} copies take {more} bytes", copies.len());
}
