//! Decoding rows of 256 values that lie in the second-level cache, one thread, by format; and gathering random
//! rows of a 2 GiB table.
//!
//! ```text
//! cargo bench -p engram-store --bench row_format
//! ```

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput};
use engram_store::{AddressIdentity, RowFormat, RowInit, RowSource, Storage, Table, TableOrigin, TableScale};

const WIDTH: usize = 256;
const ROWS: usize = 512;
const BATCH: usize = 1 << 13;

fn main() {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    let scale = TableScale::new(0.01).expect("a scale");
    let formats =
        ["f32", "bf16", "f16", "fp8e4m3", "int8", "int4"].map(|name| name.parse().expect("a format"));
    let formats = formats.into_iter().chain([RowFormat::Fp8E4m3OneScale(scale)]);

    let mut group = criterion.benchmark_group("decode rows of 256");
    group.throughput(Throughput::Elements(ROWS as u64));
    let mut row = vec![0.0; WIDTH];
    let mut out = vec![0.0; ROWS * WIDTH];
    for format in formats {
        let mut bytes = vec![0; ROWS * format.bytes_per_row(WIDTH)];
        for (id, bytes) in (0..).zip(bytes.chunks_mut(format.bytes_per_row(WIDTH))) {
            RowInit::Normal { deviation: 0.02, seed: 1 }.fill(id, &mut row);
            format.encode_row(&row, bytes);
        }
        group.bench_function(format.to_string(), |bencher| {
            bencher.iter(|| format.decode_rows(black_box(&bytes), WIDTH, &mut out));
        });
    }
    group.finish();

    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let rows = (2u64 << 30) / 264;
    let table = Table::from_fn(rows, WIDTH, RowFormat::Fp8E4m3, origin, &Storage::Ram, fill);
    let table = table.expect("2 GiB of memory");
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let mut state = 1u64;
    let mut id = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % rows
    };
    let mut out = vec![0.0; BATCH * WIDTH];
    let mut group = criterion.benchmark_group("2 GiB table");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("gather random fp8e4m3 rows of 264 bytes, one thread", |bencher| {
        one.install(|| {
            bencher.iter_batched(
                || (0..BATCH).map(|_| id()).collect::<Vec<_>>(),
                |ids| table.gather(black_box(&ids), &mut out).expect("ids are rows"),
                BatchSize::LargeInput,
            );
        });
    });
    group.finish();
    criterion.final_summary();
}
