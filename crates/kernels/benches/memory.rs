//! The kernels of conditional memory, hyper-connections, experts and optimisers, forward and backward,
//! at the sizes of a small transformer trained on a CPU: 16 sequences of 256 tokens, width 256, four
//! residual streams.
//!
//! `cargo bench -p engram-kernels --bench memory -- experts` runs those whose name matches.

use criterion::{Criterion, criterion_group, criterion_main};
use engram_kernels::*;
use std::hint::black_box;
use std::time::Duration;

const BATCH: usize = 16;
const TIME: usize = 256;
const TOKENS: usize = BATCH * TIME;
const WIDTH: usize = 256;
const STREAMS: usize = 4;
const ROW: usize = STREAMS * WIDTH;

/// `len` values in (−1, 1).
fn values(len: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// `len` whole numbers below `limit`.
fn indices(len: usize, limit: usize) -> Vec<u32> {
    values(len).iter().map(|v| ((v + 1.0) * 0.5 * limit as f32) as u32).collect()
}

fn routed_experts(c: &mut Criterion) {
    for (experts_, active, hidden) in [(8, 2, 256), (32, 4, 128), (64, 6, 64)] {
        let shape = ExpertsShape { experts: experts_, active, width: WIDTH, hidden };
        let (x, gate, grad) = (values(TOKENS * WIDTH), values(TOKENS * active), values(TOKENS * WIDTH));
        let choice = indices(TOKENS * active, experts_);
        let w_in = values(experts_ * WIDTH * 2 * hidden);
        let w_out = values(experts_ * hidden * WIDTH);
        let input = ExpertsInput { x: &x, choice: &choice, gate: &gate, w_in: &w_in, w_out: &w_out };
        let name = format!("experts/E{experts_} K{active} F{hidden}");
        c.bench_function(&format!("{name}/forward"), |b| b.iter(|| experts(black_box(&input), shape)));
        let saved = experts(&input, shape).saved;
        c.bench_function(&format!("{name}/backward"), |b| {
            b.iter(|| experts_backward(black_box(&grad), &input, shape, &saved))
        });
    }
}

fn hyper_connections(c: &mut Criterion) {
    let count = coefficient_count(STREAMS);
    let shape = HyperShape { streams: STREAMS, width: WIDTH, epsilon: 1e-6, iterations: 20 };
    let (x, grad) = (values(TOKENS * ROW), values(TOKENS * ROW));
    let (f, phi, bias) = (values(TOKENS * WIDTH), values(ROW * count), values(count));
    let weights = HyperWeights { phi: &phi, alpha: [0.01; 3], bias: &bias };
    let forward = hyper_coefficients(&x, weights, shape);
    let coefficients = &forward.output;
    let coefficients_grad = values(TOKENS * count);
    c.bench_function("hyper_coefficients/forward", |b| {
        b.iter(|| hyper_coefficients(black_box(&x), weights, shape))
    });
    c.bench_function("hyper_coefficients/backward", |b| {
        b.iter(|| hyper_coefficients_backward(black_box(&coefficients_grad), &x, weights, shape, &forward))
    });
    c.bench_function("hyper_read/forward", |b| b.iter(|| hyper_read(black_box(&x), coefficients, STREAMS)));
    c.bench_function("hyper_read/backward", |b| {
        b.iter(|| hyper_read_backward(black_box(&f), &x, coefficients, STREAMS))
    });
    c.bench_function("hyper_write/forward", |b| {
        b.iter(|| hyper_write(black_box(&x), &f, coefficients, STREAMS))
    });
    c.bench_function("hyper_write/backward", |b| {
        b.iter(|| hyper_write_backward(black_box(&grad), &x, &f, coefficients, STREAMS))
    });
}

fn memory(c: &mut Criterion) {
    let (hidden, key, grad) = (values(TOKENS * ROW), values(TOKENS * ROW), values(TOKENS * ROW));
    let (value, weight, filter) = (values(TOKENS * WIDTH), values(ROW), values(ROW * 4));
    let input = MemoryGateInput {
        hidden: &hidden,
        key: &key,
        value: &value,
        query_weight: &weight,
        key_weight: &weight,
        streams: STREAMS,
        epsilon: 1e-6,
    };
    let gate = memory_gate(&input);
    c.bench_function("memory_gate/forward", |b| b.iter(|| memory_gate(black_box(&input))));
    c.bench_function("memory_gate/backward", |b| {
        b.iter(|| memory_gate_backward(black_box(&grad), &input, &gate))
    });

    let shape = ShortConvolutionShape {
        time: TIME,
        streams: STREAMS,
        width: WIDTH,
        kernel: 4,
        dilation: 3,
        epsilon: 1e-5,
    };
    let weights = ShortConvolutionWeights { norm: &weight, filter: &filter };
    let inverse_rms = short_convolution(&hidden, weights, shape).inverse_rms;
    c.bench_function("short_convolution/forward", |b| {
        b.iter(|| short_convolution(black_box(&hidden), weights, shape))
    });
    c.bench_function("short_convolution/backward", |b| {
        b.iter(|| short_convolution_backward(black_box(&grad), &hidden, weights, shape, &inverse_rms))
    });
}

fn token_embedding(c: &mut Criterion) {
    let rows = 4096;
    let (table, ids, grad) = (values(rows * WIDTH), indices(TOKENS, rows), values(TOKENS * WIDTH));
    c.bench_function("embedding/forward", |b| b.iter(|| embedding(black_box(&table), &ids, WIDTH)));
    c.bench_function("embedding/backward", |b| {
        b.iter(|| embedding_backward(black_box(&grad), &ids, rows, WIDTH))
    });
}

fn optimisers(c: &mut Criterion) {
    let len = 4_000_000;
    let gradient = values(len);
    let (mut parameter, mut mean, mut square) = (values(len), vec![0.0; len], vec![0.0; len]);
    let step = AdamStep { rate: 1e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, decay: 0.1, step: 10 };
    c.bench_function("adam_step/4M", |b| {
        b.iter(|| adam_step(&mut parameter, black_box(&gradient), &mut mean, &mut square, &step))
    });
    for (count, rows, columns) in [(1, 256, 1024), (32, 256, 256)] {
        let matrices = values(count * rows * columns);
        c.bench_function(&format!("newton_schulz/{count}x{rows}x{columns}"), |b| {
            b.iter(|| newton_schulz(black_box(&matrices), rows, columns))
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = routed_experts, hyper_connections, memory, token_embedding, optimisers
}
criterion_main!(benches);
