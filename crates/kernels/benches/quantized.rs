//! Products with a GGUF file's blocks, and with f32 weights in each packed form: bytes of weights per second for one row,
//! compared with a plain read of the same number of bytes, and operations per second for a prompt.
//!
//! `cargo bench -p engram-kernels --bench quantized -- [threads] [format …]`; each number is a median of several
//! rounds, in which kernels and the plain read alternate.

use engram_kernels::{Activations, BlockFormat, PackedMatrix, WeightFormat};
use std::hint::black_box;
use std::time::Instant;

/// Sizes of each matrix: those of a small model's feed-forward layers.
const INPUTS: usize = 1536;
const OUTPUTS: usize = 1536;
/// Bytes read for one row: more than the caches of most machines.
const BYTES: usize = 128 << 20;
const PROMPT: usize = 512;
const ROUNDS: usize = 7;

/// `count` blocks with small scales and numbers of every size.
fn blocks(format: BlockFormat, count: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8 & 0x1f // as f16: at most 2^-8
    };
    (0..count * format.block_bytes()).map(|_| next()).collect()
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Adds up all words; each thread adds those of its part.
fn read(bytes: &[u64]) -> u64 {
    let threads = rayon::current_num_threads();
    let parts = bytes.chunks(bytes.len().div_ceil(threads));
    let sum = |part: &[u64]| part.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word));
    let mut sums = vec![0; threads];
    rayon::scope(|scope| {
        for (target, part) in sums.iter_mut().zip(parts) {
            scope.spawn(move |_| *target = sum(part));
        }
    });
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// Bytes per second of the plain read and of one row by each matrix, and operations per second of a prompt. Medians
/// over matrices and parts, which ignore threads that are occasionally interrupted.
fn measure(name: &str, matrices: &[PackedMatrix], memory: &[u64]) {
    let x: Vec<f32> = (0..PROMPT * INPUTS).map(|i| (i as f32 * 0.37).sin()).collect();
    let (mut decoding, mut plain, mut prompt) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for (matrix, part) in matrices.iter().zip(memory.chunks(memory.len() / matrices.len())) {
            plain.push(seconds(|| {
                black_box(read(black_box(part)));
            }));
            decoding.push(seconds(|| drop(black_box(matrix.product(black_box(&x[..INPUTS]))))));
        }
        let matrix = &matrices[round % matrices.len()];
        prompt.push(seconds(|| drop(black_box(matrix.product(black_box(&x))))));
    }
    let decoding = matrices[0].bytes() as f64 / median(decoding) / 1e9;
    let plain = (size_of_val(memory) / matrices.len()) as f64 / median(plain) / 1e9;
    let prompt = 2.0 * (PROMPT * INPUTS * OUTPUTS) as f64 / median(prompt) / 1e9;
    println!(
        "{name:11} one row {decoding:6.1} GB/s (plain read {plain:6.1})   {PROMPT} rows {prompt:7.1} GFLOP/s"
    );
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let threads = arguments.first().and_then(|count| count.parse().ok()).unwrap_or(2);
    let wanted = |name: &str| arguments.len() < 2 || arguments[1..].iter().any(|wanted| wanted == name);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
    pool.install(|| {
        let memory = vec![1_u64; BYTES / 8];
        for format in
            BlockFormat::ALL.into_iter().filter(|format| format.is_quantized() && wanted(format.name()))
        {
            let data = blocks(format, INPUTS * OUTPUTS / format.block_values());
            let pack = |activations| PackedMatrix::from_blocks(format, &data, INPUTS, OUTPUTS, activations);
            for (activations, name) in [(Activations::Rounded, ""), (Activations::Exact, " f32")] {
                let matrix = pack(activations).expect("whole blocks");
                let count = BYTES / matrix.bytes();
                measure(&format!("{}{name}", format.name()), &vec![matrix; count], &memory);
            }
        }
        let formats =
            [("int8", WeightFormat::Int8), ("bf16", WeightFormat::Bf16), ("f32", WeightFormat::F32)];
        for (name, format) in formats.into_iter().filter(|(name, _)| wanted(name)) {
            let matrix = PackedMatrix::new(&vec![0.5; INPUTS * OUTPUTS], INPUTS, OUTPUTS, format);
            let count = BYTES / matrix.bytes();
            measure(name, &vec![matrix; count], &memory);
        }
    });
}
