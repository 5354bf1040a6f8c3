//! A cache that has 99.9 % of the rows asked for, beside the same rows in plain RAM: 264 bytes each, batches of 1,024 and
//! 16,384.
//!
//! ```text
//! cargo bench -p engram-store --bench cached
//! ```

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
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

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let table = Table::from_fn(ROWS, 256, RowFormat::Fp8E4m3, origin, &Storage::Ram, fill).expect("1 GiB");
    let cached = Cached::new(&table, 4 * HOT * 364).expect("a cache");
    let mut out = vec![0; 16_384 * 264];
    let every: Vec<u64> = (0..HOT).map(|id| id * (ROWS / HOT)).collect();
    for ids in every.chunks(16_384).chain(every.chunks(16_384)) {
        cached.read(ids, &mut out[..ids.len() * 264]).expect("rows");
    }
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let mut group = criterion.benchmark_group("hot rows of 264 bytes, one thread");
    for count in [1024, 16_384] {
        group.throughput(Throughput::Elements(count as u64));
        let sources: [(&str, &dyn RowSource); 2] = [("RAM", &table), ("cache", &cached)];
        for (name, source) in sources {
            group.bench_with_input(BenchmarkId::new(name, count), &count, |bencher, &count| {
                one.install(|| {
                    bencher.iter_batched(
                        batches(count),
                        |ids| source.read(black_box(&ids), &mut out[..count * 264]).expect("rows"),
                        BatchSize::LargeInput,
                    );
                });
            });
        }
    }
    group.finish();
    println!("hit rate {:.4}", cached.counts().hit_rate());
    criterion.final_summary();
}
