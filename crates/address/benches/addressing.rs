//! Row ids per second on one core for V4.1's first memory layer (orders 2 to 4, 8 heads each), from token ids.
//! `benches/pytorch/addressing.py` measures the same in numpy.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engram_address::{AddressConfig, Addressing, Arithmetic, Boundary, Vocabulary};

fn addressing(criterion: &mut Criterion) {
    let config = AddressConfig {
        seed: 0,
        layers: vec![1, 14],
        max_order: 4,
        heads: 8,
        base_rows: vec![16_000_000; 3],
        pad_id: 2,
        boundary: Boundary::None,
        arithmetic: Arithmetic::Exact,
    };
    // As many tokens and classes as V4.1 has. Which ids share a class does not matter here.
    let classes = (0..129_280).map(|token| token % 99_092).collect();
    let vocabulary = Vocabulary::from_classes(classes).expect("no gaps");
    let addressing = Addressing::new(&config, vocabulary).expect("a valid configuration");
    let slots = addressing.layers()[0].slots();

    let mut group = criterion.benchmark_group("addressing");
    group.sample_size(20);
    // A decoded token, a prompt, and a batch whose ids exceed the caches.
    for tokens in [1, 4096, 65_536] {
        let ids: Vec<u32> = (0..tokens as u64).map(|i| (i * 2_654_435_761 % 129_280) as u32).collect();
        let mut out = vec![0; tokens * slots];
        group.throughput(Throughput::Elements((tokens * slots) as u64));
        group.bench_function(BenchmarkId::new("whole", tokens), |bencher| {
            bencher.iter(|| {
                addressing.row_ids_into(0, black_box(&ids), &mut out).expect("valid tokens");
                black_box(&mut out);
            });
        });
    }
    group.throughput(Throughput::Elements(slots as u64));
    group.bench_function("one more token", |bencher| {
        let mut history = addressing.history().with_rollback(8);
        let mut out = vec![0; slots];
        bencher.iter(|| {
            let token = history.extend(black_box(&[4711])).expect("a valid token");
            token.row_ids_into(0, &mut out).expect("a valid layer");
            black_box(&mut out);
        });
    });
    group.finish();
}

criterion_group!(benches, addressing);
criterion_main!(benches);
