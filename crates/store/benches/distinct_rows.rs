//! The distinct rows of a training batch: 4096 tokens, 16 rows each, half of them duplicates, of 50M rows.
//!
//! ```text
//! cargo bench -p engram-store --bench distinct_rows
//! ```

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use engram_store::DistinctRows;

const ROWS: u64 = 50_000_000;
const BATCH: usize = 4096 * 16;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut state = 1u64;
    let mut ids: Vec<u64> = Vec::with_capacity(BATCH);
    while ids.len() < BATCH {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Every other id repeats an earlier one.
        let earlier = ids.get(state as usize % ids.len().max(1)).filter(|_| ids.len() % 2 == 1).copied();
        ids.push(earlier.unwrap_or(state % ROWS));
    }
    let mut group = criterion.benchmark_group("65,536 ids, half distinct");
    group.throughput(Throughput::Elements(BATCH as u64));
    let mut distinct = DistinctRows::default();
    group.bench_function("distinct rows", |bencher| bencher.iter(|| distinct.assign(black_box(&ids))));
    group.finish();
    criterion.final_summary();
}
