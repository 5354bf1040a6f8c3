//! Asking the processor for memory ahead of its use.

/// How many bytes of rows to ask for ahead of the row being read: enough to keep the memory system's queue of
/// outstanding misses full, little enough to stay in the second-level cache until used.
const AHEAD_BYTES: usize = 16 << 10;

/// [`rows_ahead`] is at most this less one.
pub(crate) const MOST_AHEAD: usize = 64;

/// How many rows of `row_bytes` to prefetch ahead. More than 40 made Zen 4 slower again (`docs/log.md`).
#[inline]
pub(crate) fn rows_ahead(row_bytes: usize) -> usize {
    (AHEAD_BYTES / row_bytes.max(1)).clamp(4, 40)
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks the processor to fetch every cache line of the `bytes` bytes from `row` on. A hint: it reads nothing, and any
/// address will do.
#[inline(always)]
pub(crate) fn prefetch(row: *const u8, bytes: usize) {
    let end = row.wrapping_add(bytes);
    // Each line once: asking again for one that is on its way takes as much time as another would.
    let mut line = row.wrapping_sub(row.addr() % LINE);
    while line < end {
        prefetch_line(line);
        line = line.wrapping_add(LINE);
    }
}

/// [`prefetch`] of `bytes` bytes that are at least `LINES` lines, and less than one more.
#[inline(always)]
pub(crate) fn prefetch_lines<const LINES: usize>(row: *const u8, bytes: usize) {
    for line in 0..LINES {
        prefetch_line(row.wrapping_add(line * LINE));
    }
    if !bytes.is_multiple_of(LINE) || !row.addr().is_multiple_of(LINE) {
        prefetch_line(row.wrapping_add(bytes - 1));
    }
}

/// To the second cache: that one can wait for more lines at once than the first, and random rows then come half as
/// fast again (`docs/log.md`).
#[inline(always)]
fn prefetch_line(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: prefetching is in the base instruction set and does not access memory: an address that is not mapped
        // is ignored.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above, a hint that accesses no memory.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{line}]", line = in(reg) line, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
}
