//! Every kernel forward and backward, at the sizes of a small transformer trained on a CPU:
//! 16 sequences of 256 tokens, width 256, 8 heads, vocabulary 4096.
//!
//! `cargo bench -p engram-kernels -- latent_attention` runs those whose name matches.

use criterion::{Criterion, criterion_group, criterion_main};
use engram_kernels::*;
use std::hint::black_box;
use std::time::Duration;

const BATCH: usize = 16;
const TIME: usize = 256;
const TOKENS: usize = BATCH * TIME;
const WIDTH: usize = 256;

/// `len` values in (−1, 1).
fn values(len: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn normalisation(c: &mut Criterion) {
    let (x, grad, weight) = (values(TOKENS * WIDTH), values(TOKENS * WIDTH), values(WIDTH));
    c.bench_function("rms_norm/forward", |b| b.iter(|| rms_norm(black_box(&x), Some(&weight), WIDTH, 1e-6)));
    let inverse_rms = rms_norm(&x, Some(&weight), WIDTH, 1e-6).inverse_rms;
    c.bench_function("rms_norm/backward", |b| {
        b.iter(|| rms_norm_backward(black_box(&grad), &x, Some(&weight), &inverse_rms, WIDTH))
    });
}

fn activation(c: &mut Criterion) {
    let width = 512;
    let (x, grad) = (values(TOKENS * 2 * width), values(TOKENS * width));
    c.bench_function("swiglu/forward", |b| b.iter(|| swiglu(black_box(&x), width)));
    c.bench_function("swiglu/backward", |b| b.iter(|| swiglu_backward(black_box(&grad), &x, width)));
}

fn product(c: &mut Criterion) {
    let (inputs, outputs) = (WIDTH, 1024);
    let (x, w, grad) = (values(TOKENS * inputs), values(inputs * outputs), values(TOKENS * outputs));
    c.bench_function("linear/forward", |b| b.iter(|| linear(black_box(&x), &w, inputs)));
    c.bench_function("linear/backward", |b| {
        b.iter(|| {
            let dx = linear_backward_input(black_box(&grad), &w, inputs);
            (dx, linear_backward_weight(&x, &grad, inputs))
        })
    });
}

/// A decoder's products: few rows by weights that do not fit the caches, and a prompt's.
fn packed(c: &mut Criterion) {
    let (inputs, outputs) = (2560, 2560);
    let w = values(inputs * outputs);
    for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8] {
        let packed = PackedMatrix::new(&w, inputs, outputs, format);
        for rows in [1, 4, 16, 256] {
            let x = values(rows * inputs);
            c.bench_function(&format!("packed/{format:?}/{rows}"), |b| {
                b.iter(|| packed.product(black_box(&x)))
            });
        }
    }
    for rows in [1, 4, 16, 256] {
        let x = values(rows * inputs);
        c.bench_function(&format!("packed/gemm/{rows}"), |b| b.iter(|| linear(black_box(&x), &w, inputs)));
    }
}

/// A decoder's attention: a prompt of 512 tokens, and one token after 511; nine heads, one and three to a key.
fn cached(c: &mut Criterion) {
    let (heads, width, time, page) = (9, 64, 512, 16);
    let queries = values(time * heads * width);
    for key_heads in [9, 3] {
        let entry = 2 * key_heads * width;
        let shape = CachedAttentionShape {
            heads,
            key_heads,
            key: width,
            value: width,
            value_start: key_heads * width,
            entry,
        };
        let entries = values(time * entry);
        let pages: Vec<&[f32]> = entries.chunks(page * entry).collect();
        let seen: Vec<_> = (1..=time).map(|count| Seen { pages: &pages, first: 0, count }).collect();
        c.bench_function(&format!("cached/prompt/{key_heads} key heads"), |b| {
            b.iter(|| cached_attention(black_box(&queries), &seen, shape, 0.125))
        });
        let last = &queries[..heads * width];
        c.bench_function(&format!("cached/token/{key_heads} key heads"), |b| {
            b.iter(|| cached_attention(black_box(last), &seen[time - 1..], shape, 0.125))
        });
    }
}

fn positions(c: &mut Criterion) {
    let (heads, width) = (8, 32);
    let x = values(TOKENS * heads * width);
    let (cos, sin) = (values(TIME * width / 2), values(TIME * width / 2));
    let angles = Angles { cos: &cos, sin: &sin };
    c.bench_function("rotary/forward", |b| b.iter(|| rotary(black_box(&x), angles, heads, width)));
    c.bench_function("rotary/backward", |b| b.iter(|| rotary_backward(black_box(&x), angles, heads, width)));
}

fn plain_attention(c: &mut Criterion) {
    let shape = AttentionShape { batch: BATCH, time: TIME, heads: 8, key: 48, value: 32 };
    let rows = TOKENS * shape.heads;
    let (q, k) = (values(rows * shape.key), values(rows * shape.key));
    let (v, grad) = (values(rows * shape.value), values(rows * shape.value));
    c.bench_function("causal_attention/forward", |b| {
        b.iter(|| causal_attention(black_box(&q), &k, &v, shape, 0.1))
    });
    let found = causal_attention(&q, &k, &v, shape, 0.1);
    c.bench_function("causal_attention/backward", |b| {
        b.iter(|| causal_attention_backward(black_box(&grad), &q, &k, &v, found.view(), shape, 0.1))
    });
}

fn attention_over_latents(c: &mut Criterion) {
    let shape = LatentShape { batch: BATCH, time: TIME, heads: 8, content: 32, rotary: 16, value: 32 };
    let rows = TOKENS * shape.heads;
    let (q, kv, grad) = (values(rows * 48), values(rows * 64), values(rows * 32));
    let (k_rotary, cos, sin) = (values(TOKENS * 16), values(TIME * 8), values(TIME * 8));
    let angles = Angles { cos: &cos, sin: &sin };
    let forward = || latent_attention(black_box(&q), &kv, &k_rotary, angles, shape, 0.1);
    c.bench_function("latent_attention/forward", |b| b.iter(forward));
    let found = forward();
    c.bench_function("latent_attention/backward", |b| {
        b.iter(|| {
            latent_attention_backward(black_box(&grad), &q, &kv, &k_rotary, angles, found.view(), shape, 0.1)
        })
    });
}

fn loss(c: &mut Criterion) {
    let vocabulary = 4096;
    let (hidden, weight) = (values(TOKENS * WIDTH), values(WIDTH * vocabulary));
    let targets: Vec<u32> = (0..TOKENS as u32).map(|i| i * 7 % vocabulary as u32).collect();
    c.bench_function("linear_cross_entropy/forward", |b| {
        b.iter(|| linear_cross_entropy(black_box(&hidden), &weight, &targets, false))
    });
    c.bench_function("linear_cross_entropy/with gradients", |b| {
        b.iter(|| linear_cross_entropy(black_box(&hidden), &weight, &targets, true))
    });
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = normalisation, activation, product, packed, cached, positions, plain_attention, attention_over_latents, loss
}
criterion_main!(kernels);
