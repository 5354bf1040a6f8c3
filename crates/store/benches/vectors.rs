//! Row-sparse Adam and the sums of repeated rows, in cache, beside the same loops compiled for the oldest machine.
//!
//! ```text
//! cargo bench -p engram-store --bench vectors
//! ```
//!
//! Compare `vectors` with `oldest machine` of one run.

use std::hint::black_box;

use criterion::Criterion;
use engram_store::{
    AddressIdentity, DistinctRows, RowInit, RowOptimizer, Storage, TableOrigin, TrainableTable,
};

/// Rows, values and both moments of which the second-level cache holds.
const ROWS: usize = 512;
const WIDTH: usize = 64;

/// Adam as it is defined, on records of values and both moments.
#[inline(never)]
fn plain_adam(records: &mut [f32], ids: &[u64], grads: &[f32], [take1, take2, epsilon, size]: [f32; 4]) {
    for (&id, grads) in ids.iter().zip(grads.chunks_exact(WIDTH)) {
        let record = &mut records[id as usize * 3 * WIDTH..][..3 * WIDTH];
        let (values, state) = record.split_at_mut(WIDTH);
        let (first, second) = state.split_at_mut(WIDTH);
        for (((p, m), v), &g) in values.iter_mut().zip(first).zip(second).zip(grads) {
            *m += take1 * (g - *m);
            *v += take2 * (g * g - *v);
            *p -= size * (*m / (v.sqrt() + epsilon));
        }
    }
}

#[inline(never)]
fn plain_sum(distinct: &DistinctRows, grads: &[f32], sums: &mut [f32]) {
    for (row, sum) in sums.chunks_exact_mut(WIDTH).enumerate() {
        let occurrences = distinct.occurrences(row);
        sum.copy_from_slice(&grads[occurrences[0] as usize * WIDTH..][..WIDTH]);
        for &position in &occurrences[1..] {
            let grad = &grads[position as usize * WIDTH..][..WIDTH];
            sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
        }
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let init = RowInit::Normal { deviation: 0.02, seed: 1 };
    let mut table =
        TrainableTable::new(ROWS as u64, WIDTH, init, RowOptimizer::adam(), origin, &Storage::Ram)
            .expect("a small table");
    let ids: Vec<u64> = (0..ROWS as u64).collect();
    let grads: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i % 17) as f32 * 1e-3 - 0.008).collect();
    let mut group = criterion.benchmark_group("Adam, 512 rows of 64 in cache");
    group.bench_function("vectors", |bencher| {
        one.install(|| bencher.iter(|| table.update(&ids, black_box(&grads), 1e-3).expect("ids are rows")));
    });
    let mut records = vec![0.01; ROWS * 3 * WIDTH];
    group.bench_function("oldest machine", |bencher| {
        bencher.iter(|| plain_adam(&mut records, &ids, black_box(&grads), [0.1, 0.001, 1e-8, 1e-3]));
    });
    group.finish();

    let batch: Vec<u64> = (0..4 * ROWS as u64).map(|i| i * 7919 % (ROWS as u64)).collect();
    let distinct = DistinctRows::of(&batch);
    let grads: Vec<f32> = (0..batch.len() * WIDTH).map(|i| (i % 23) as f32).collect();
    let mut sums = vec![0.0; distinct.len() * WIDTH];
    let mut group = criterion.benchmark_group("sums, 2048 rows of 64 to 512 in cache");
    group.bench_function("vectors", |bencher| {
        one.install(|| {
            bencher.iter(|| distinct.sum(black_box(&grads), WIDTH, &mut sums).expect("lengths fit"));
        });
    });
    group.bench_function("oldest machine", |bencher| {
        bencher.iter(|| plain_sum(&distinct, black_box(&grads), &mut sums));
    });
    group.finish();
    criterion.final_summary();
}
