//! Random 512-byte rows of an 8 GiB table, one thread. Compare with `benches/pytorch/embedding.py`.
//!
//! ```text
//! cargo bench -p engram-store --bench gather
//! python benches/pytorch/embedding.py
//! ```

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput};
use engram_store::{AddressIdentity, RowFormat, RowSource, Storage, Table, TableOrigin};

const ROWS: u64 = 1 << 24;
const WIDTH: usize = 128;
const BATCH: usize = 1 << 14;

/// A different batch each time, so that no row is still in a cache.
fn batches() -> impl FnMut() -> Vec<u64> {
    let mut state = 1u64;
    move || {
        let mut id = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % ROWS
        };
        (0..BATCH).map(|_| id()).collect()
    }
}

fn main() {
    let mut criterion = Criterion::default().sample_size(30).configure_from_args();
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let table =
        Table::from_fn(ROWS, WIDTH, RowFormat::F32, origin, &Storage::Ram, fill).expect("8 GiB of memory");
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let mut out = vec![0.0; BATCH * WIDTH];

    let mut group = criterion.benchmark_group("8 GiB table");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("gather random 512-byte rows, one thread", |bencher| {
        one.install(|| {
            bencher.iter_batched(
                batches(),
                |ids| table.gather(black_box(&ids), &mut out).expect("ids are rows"),
                BatchSize::LargeInput,
            );
        });
    });
    group.finish();
    criterion.final_summary();
}
