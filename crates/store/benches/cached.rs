//! A cache that has 99.9 % of the rows asked for, beside the same rows in plain RAM: 264 bytes each, batches of 1,024 and
//! 16,384, one thread. The two take turns with the same batches, so that what else the machine does slows both.
//!
//! ```text
//! cargo bench -p engram-store --bench cached
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use engram_store::{AddressIdentity, Cached, RowFormat, RowSource, Storage, Table, TableOrigin};

const ROWS: u64 = 4_000_000;
/// Rows that are asked for again and again: they fill a quarter of the cache.
const HOT: u64 = 250_000;

fn batches(count: usize) -> impl FnMut() -> Vec<u64> {
    let mut state = 1u64;
    move || {
        let mut id = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let spread = state % HOT * (ROWS / HOT);
            if state >> 32 & 1023 == 0 { state % ROWS } else { spread }
        };
        (0..count).map(|_| id()).collect()
    }
}

/// Seconds of the fastest tenth of calls, at most: what the machine does besides only makes calls slower.
fn fast(mut calls: Vec<Duration>) -> Duration {
    calls.sort_unstable();
    calls[calls.len() / 10]
}

fn main() {
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let table = Table::from_fn(ROWS, 256, RowFormat::Fp8E4m3, origin, &Storage::Ram, fill).expect("1 GiB");
    let cached = Cached::new(&table, 4 * HOT * 330).expect("a cache");
    let mut out = vec![0; 16_384 * 264];
    let every: Vec<u64> = (0..HOT).map(|id| id * (ROWS / HOT)).collect();
    for ids in every.chunks(16_384).chain(every.chunks(16_384)) {
        cached.read(ids, &mut out[..ids.len() * 264]).expect("rows");
    }
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let before = cached.counts();
    println!("{:>8} {:>16} {:>16} {:>8}", "batch", "RAM, M rows/s", "cache, M rows/s", "ratio");
    for (count, rounds) in [(1024, 8000), (16_384, 800)] {
        let mut batch = batches(count);
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            // Each has batches of its own: what one has just read is in the processor's cache for the other.
            for (source, times) in [&table as &dyn RowSource, &cached].into_iter().zip(&mut times) {
                let ids = batch();
                let out = &mut out[..count * 264];
                let start = Instant::now();
                one.install(|| source.read(black_box(&ids), out)).expect("rows");
                times.push(start.elapsed());
            }
        }
        let [ram, cache] = times.map(|times| count as f64 / fast(times).as_secs_f64() / 1e6);
        println!("{count:>8} {ram:>16.1} {cache:>16.1} {:>8.2}", cache / ram);
    }
    let after = cached.counts();
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    println!("hit rate {:.4}", hits as f64 / (hits + misses) as f64);
}
