//! Work split into fixed blocks, spread over rayon's pool.
//!
//! A value's block depends on shapes alone, never on thread timing, so sums over blocks (added in block order) have the
//! same bits on every run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

/// Elements a block should touch: large enough to pay for waking a thread (tens of microseconds of
/// streaming work), small enough to stay in a core's second-level cache.
const BLOCK_ELEMENTS: usize = 1 << 15;

/// Rows per block when one row touches `elements_per_row` values: at least one, and few enough
/// that a block stays in cache. The last block of a partition may be shorter.
pub(crate) fn block_rows(elements_per_row: usize) -> usize {
    (BLOCK_ELEMENTS / elements_per_row.max(1)).max(1)
}

/// Rows per block when every block keeps sums as large as a weight: at most 64 blocks, each of
/// enough rows to be worth adding up.
pub(crate) fn reduction_rows(rows: usize) -> usize {
    rows.div_ceil(64).max(32)
}

/// Calls `work` once for every block, in parallel when there is more than one.
///
/// `blocks` is an ordinary iterator, typically zipped `chunks` and `chunks_mut` of the operands.
pub(crate) fn for_each<T: Send>(blocks: impl Iterator<Item = T>, work: impl Fn(T) + Send + Sync) {
    map(blocks, work);
}

/// Like [`for_each`], and returns what `work` returned, in block order.
pub(crate) fn map<T: Send, R: Send>(
    blocks: impl Iterator<Item = T>,
    work: impl Fn(T) -> R + Send + Sync,
) -> Vec<R> {
    let blocks: Vec<T> = blocks.collect();
    if blocks.len() <= 1 || rayon::current_num_threads() == 1 {
        return blocks.into_iter().map(work).collect();
    }
    blocks.into_par_iter().with_max_len(1).map(work).collect()
}

/// How long a thread without a task stays awake.
const AWAKE: Duration = Duration::from_micros(500);

/// Runs `work` while the other threads of the current pool look for its tasks without falling asleep.
///
/// Waking a thread takes tens of microseconds, as long as a whole product of a few rows. A step of a model is hundreds of
/// such products with little between them, so it wakes the threads once. A thread that finds no task lets others run,
/// and falls asleep after half a millisecond. Outside a pool, `work` just runs.
pub fn with_awake_threads<R>(work: impl FnOnce() -> R) -> R {
    let Some(own) = rayon::current_thread_index().filter(|_| rayon::current_num_threads() > 1) else {
        return work();
    };
    let done = AtomicBool::new(false);
    rayon::in_place_scope(|scope| {
        scope.spawn_broadcast(|_, thread| {
            // A thread may come here while it waits for a part of `work` itself. So it never stays for long.
            if thread.index() != own {
                stay_awake(&done);
            }
        });
        // Also when the work panics: the scope waits for the threads.
        let _end = SetOnDrop(&done);
        work()
    })
}

/// Computes tasks of others until `done`, or until there has been none for a while.
fn stay_awake(done: &AtomicBool) {
    let mut last = Instant::now();
    while !done.load(Ordering::Acquire) && last.elapsed() < AWAKE {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => last = Instant::now(),
            _ => std::thread::yield_now(),
        }
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Adds `parts` (all of one length) element by element, in order, into the first of them.
///
/// Returns zeros of length `len` when there is no part.
pub(crate) fn sum_in_order(parts: Vec<Vec<f32>>, len: usize) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_else(|| vec![0.0; len]);
    assert_eq!(total.len(), len, "a partial sum has another length than the whole");
    for part in parts {
        let width = block_rows(2);
        for_each(total.chunks_mut(width).zip(part.chunks(width)), |(total, part)| {
            for (t, p) in total.iter_mut().zip(part) {
                *t += p;
            }
        });
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_keeps_block_order() {
        let squares = map(0..100_usize, |i| i * i);
        assert_eq!(squares, (0..100).map(|i| i * i).collect::<Vec<_>>());
    }

    #[test]
    fn for_each_visits_every_block_once() {
        let mut values = vec![0_u32; 1000];
        for_each(values.chunks_mut(7), |block| block.iter_mut().for_each(|v| *v += 1));
        assert!(values.iter().all(|&v| v == 1));
    }

    #[test]
    fn awake_threads_share_the_work_and_stop_after_it() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let squares = || map(0..100_usize, |i| i * i);
        let expected: Vec<usize> = (0..100).map(|i| i * i).collect();
        for _ in 0..100 {
            assert_eq!(pool.install(|| with_awake_threads(squares)), expected);
        }
        assert_eq!(pool.install(|| with_awake_threads(|| with_awake_threads(squares))), expected);
        assert_eq!(with_awake_threads(squares), expected, "outside a pool");
    }

    #[test]
    #[should_panic(expected = "the work failed")]
    fn awake_threads_stop_when_the_work_panics() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        pool.install(|| with_awake_threads(|| panic!("the work failed")))
    }

    #[test]
    fn sums_parts_in_order() {
        let parts = vec![vec![1e8_f32, 1.0], vec![-1e8, 2.0], vec![1.0, 3.0]];
        assert_eq!(sum_in_order(parts, 2), [1.0, 6.0]);
        assert_eq!(sum_in_order(Vec::new(), 3), [0.0; 3]);
    }

    #[test]
    fn a_block_has_at_least_one_row() {
        assert_eq!(block_rows(usize::MAX), 1);
        assert_eq!(block_rows(0), BLOCK_ELEMENTS);
    }
}
