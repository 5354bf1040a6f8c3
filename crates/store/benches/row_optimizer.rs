//! One optimiser step on 1024 rows of a table of 1M × 64. Compare with `benches/pytorch/sparse_adam.py`.
//!
//! ```text
//! cargo bench -p engram-store --bench row_optimizer
//! python benches/pytorch/sparse_adam.py
//! ```

use std::hint::black_box;

use criterion::{BatchSize, Criterion};
use engram_store::{
    AddressIdentity, DistinctRows, RowInit, RowOptimizer, Storage, TableOrigin, TrainableTable,
};

const ROWS: u64 = 1_000_000;
const WIDTH: usize = 64;
const TOUCHED: usize = 1024;

/// Different rows each time, so that none is still in a cache.
fn batches() -> impl FnMut() -> Vec<u64> {
    let mut state = 1u64;
    move || {
        let mut id = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % ROWS
        };
        (0..TOUCHED).map(|_| id()).collect()
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("1M x 64, 1024 rows touched");
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let init = RowInit::Normal { deviation: 0.02, seed: 1 };
    let occurrences = vec![0.01; TOUCHED * WIDTH];
    let (mut distinct, mut grads) = (DistinctRows::default(), Vec::new());
    for (name, optimizer) in [
        ("Adam", RowOptimizer::adam()),
        ("row-wise Adam", RowOptimizer::row_wise_adam()),
        ("balanced momentum", RowOptimizer::balanced_momentum()),
    ] {
        let mut table =
            TrainableTable::new(ROWS, WIDTH, init, optimizer, origin, &Storage::Ram).expect("1 GiB");
        // Touch every row once: state in first use would also pay for its pages.
        let all: Vec<u64> = (0..ROWS).collect();
        table.update(&all, &vec![0.01; all.len() * WIDTH], 1e-3).expect("all rows");
        // What SparseAdam does in its step: merge duplicates, then update.
        group.bench_function(format!("merge and {name}, one thread"), |bencher| {
            one.install(|| {
                bencher.iter_batched(
                    batches(),
                    |ids| {
                        distinct.assign(black_box(&ids));
                        grads.resize(distinct.len() * WIDTH, 0.0);
                        distinct.sum(&occurrences, WIDTH, &mut grads).expect("lengths fit");
                        table.update(distinct.ids(), &grads, 1e-3).expect("ids are rows");
                    },
                    BatchSize::LargeInput,
                );
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
