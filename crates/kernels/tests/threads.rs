//! Every kernel that sums over rows gives the same bits with any number of threads.

use engram_kernels::*;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[track_caller]
fn the_number_of_threads_changes_no_bit<R: PartialEq + Send>(work: impl Fn() -> R + Sync) {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("threads can be started").install(&work)
    };
    let one = with(1);
    assert!(one == with(2), "two threads differ from one");
    assert!(one == with(5), "five threads differ from one");
}

#[test]
fn of_experts() {
    let shape = ExpertsShape { experts: 3, active: 2, width: 24, hidden: 16 };
    let rows = 3000;
    let (x, gate, grad) = (values(rows * 24, 1), values(rows * 2, 2), values(rows * 24, 3));
    let choice: Vec<u32> = (0..rows as u32).flat_map(|i| [0, 1 + i % 2]).collect(); // 0 is split
    let (w_in, w_out) = (values(3 * 24 * 32, 4), values(3 * 16 * 24, 5));
    let input = ExpertsInput { x: &x, choice: &choice, gate: &gate, w_in: &w_in, w_out: &w_out };
    the_number_of_threads_changes_no_bit(|| {
        let forward = experts(&input, shape);
        (experts_backward(&grad, &input, shape, &forward.saved), forward.output)
    });
}

#[test]
fn of_hyper_connections() {
    let shape = HyperShape { streams: 4, width: 32, epsilon: 1e-6, iterations: 20 };
    let (rows, count) = (700, coefficient_count(4));
    let (x, grad) = (values(rows * 128, 1), values(rows * count, 2));
    let (phi, bias) = (values(128 * count, 3), values(count, 4));
    let weights = HyperWeights { phi: &phi, alpha: [0.3; 3], bias: &bias };
    the_number_of_threads_changes_no_bit(|| {
        let forward = hyper_coefficients(&x, weights, shape);
        (hyper_coefficients_backward(&grad, &x, weights, shape, &forward), forward)
    });
}

#[test]
fn of_the_memory_module() {
    let (time, streams, width) = (300, 2, 40);
    let (hidden, key) = (values(2 * time * streams * width, 1), values(2 * time * streams * width, 2));
    let (value, weight) = (values(2 * time * width, 3), values(streams * width, 4));
    let filter = values(streams * width * 4, 5);
    let input = MemoryGateInput {
        hidden: &hidden,
        key: &key,
        value: &value,
        query_weight: &weight,
        key_weight: &weight,
        streams,
        epsilon: 1e-6,
    };
    let shape = ShortConvolutionShape { time, streams, width, kernel: 4, dilation: 3, epsilon: 1e-5 };
    let weights = ShortConvolutionWeights { norm: &weight, filter: &filter };
    the_number_of_threads_changes_no_bit(|| {
        let gate = memory_gate(&input);
        let forward = short_convolution(&gate.output, weights, shape);
        let grad = &forward.output;
        let grad = short_convolution_backward(grad, &gate.output, weights, shape, &forward.inverse_rms);
        (memory_gate_backward(&grad.input, &input, &gate), grad, forward)
    });
}

#[test]
fn of_newton_schulz() {
    for (count, rows, columns) in [(1, 200, 300), (3, 70, 50)] {
        let matrices = values(count * rows * columns, 1);
        the_number_of_threads_changes_no_bit(|| newton_schulz(&matrices, rows, columns));
    }
}
