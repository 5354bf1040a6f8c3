//! Manifold-constrained hyper-connections (Xie et al. 2025, arXiv 2512.24880): a residual of several streams. Every
//! block reads one mixture of them and writes back to all.
//!
//! For the streams x₁…xₙ of a token, each of one width, and the block F:
//!
//! ```text
//! x̂ = (x₁ … xₙ) / rms(x₁ … xₙ)            z = x̂·φ, split in three: pre n, post n, res n×n
//! pre = σ(α₀z + b)     post = 2σ(α₁z + b)     res = Sinkhorn(exp(α₂z + b)), doubly stochastic
//! x'ₘ = Σⱼ resₘⱼ xⱼ + postₘ F(Σⱼ preⱼ xⱼ)
//! ```
//!
//! [`hyper_coefficients`] computes pre, post and res, [`hyper_read`] the block's input and
//! [`hyper_write`] the new streams. A row of coefficients is `(pre n, post n, res n·n row-major)`.

use crate::parallel::{self, block_rows};
use crate::product::{Matrix, MatrixMut, Threads, multiply};
use crate::simd::{LANES, dot, exp, sigmoid, vectorized};
use std::array::from_fn;

/// Added to every entry of res before it is normalised. Without it, a column whose logits all lie 88 below the largest
/// of their rows would sum to zero, and the division would give NaN. It vanishes in the rounding of all entries above
/// e^−43.
const LEAST: f32 = 1e-26;

/// Maximum number of streams.
pub const MAX_STREAMS: usize = 8;

/// The coefficients of one token for each number of streams: pre, post and res.
pub const fn coefficient_count(streams: usize) -> usize {
    streams * (2 + streams)
}

/// Shape and constants of [`hyper_coefficients`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HyperShape {
    /// Residual streams, 1 to [`MAX_STREAMS`].
    pub streams: usize,
    /// Width of one stream.
    pub width: usize,
    /// Added to the mean square before its root.
    pub epsilon: f32,
    /// Alternating normalisations of rows and of columns, at least 1 (the paper uses 20).
    pub iterations: usize,
}

/// The learnt part of [`hyper_coefficients`].
#[derive(Debug, Clone, Copy)]
pub struct HyperWeights<'a> {
    /// φ `[streams · width, coefficient_count]`.
    pub phi: &'a [f32],
    /// α of pre, post and res.
    pub alpha: [f32; 3],
    /// b `[coefficient_count]`.
    pub bias: &'a [f32],
}

/// What [`hyper_coefficients`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct HyperCoefficients {
    /// `[rows, coefficient_count]`: pre, post and res of each row.
    pub output: Vec<f32>,
    /// z `[rows, coefficient_count]`, for the backward pass.
    pub projected: Vec<f32>,
    /// `[rows]`: 1 / rms of each row, for the backward pass.
    pub inverse_rms: Vec<f32>,
}

/// What [`hyper_coefficients_backward`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct HyperGradients {
    /// `[rows, streams, width]`: gradient of the streams.
    pub input: Vec<f32>,
    /// `[streams · width, coefficient_count]`: gradient of φ.
    pub phi: Vec<f32>,
    /// Gradient of α.
    pub alpha: [f32; 3],
    /// `[coefficient_count]`: gradient of b.
    pub bias: Vec<f32>,
}

/// Rows per task of [`hyper_coefficients`]: enough for an efficient product with the narrow φ.
const PRODUCT_ROWS: usize = 128;

/// The mixing coefficients of each row of streams in `x` `[rows, streams, width]`.
///
/// # Panics
/// When the shape is empty, has more than [`MAX_STREAMS`] streams, or a slice does not have it.
pub fn hyper_coefficients(x: &[f32], weights: HyperWeights<'_>, shape: HyperShape) -> HyperCoefficients {
    let rows = shape.check(x, weights);
    let (row, count) = (shape.streams * shape.width, coefficient_count(shape.streams));
    let mut output = vec![0.0; rows * count];
    let mut projected = vec![0.0; rows * count];
    let mut inverse_rms = vec![0.0; rows];
    let blocks = (x.chunks(PRODUCT_ROWS * row).zip(output.chunks_mut(PRODUCT_ROWS * count)))
        .zip(projected.chunks_mut(PRODUCT_ROWS * count).zip(inverse_rms.chunks_mut(PRODUCT_ROWS)));
    parallel::for_each(blocks, |((x, output), (projected, inverse_rms))| {
        let (a, b) = (Matrix::new(x, inverse_rms.len(), row), Matrix::new(weights.phi, row, count));
        let c = MatrixMut::new(projected, inverse_rms.len(), count);
        multiply(1.0, a, b, 0.0, c, Threads::One);
        shape.finish(weights, x, projected, inverse_rms, output);
    });
    HyperCoefficients { output, projected, inverse_rms }
}

/// The coefficients `[rows, coefficient_count]` of [`hyper_coefficients`] from `product` `[rows, coefficient_count]`,
/// which is `x`·φ computed by the caller: a decoder's products have their own order of sums.
///
/// # Panics
/// As [`hyper_coefficients`], and when `product` is not of that shape.
pub fn hyper_coefficients_of_product(
    x: &[f32],
    mut product: Vec<f32>,
    weights: HyperWeights<'_>,
    shape: HyperShape,
) -> Vec<f32> {
    let rows = shape.check(x, weights);
    let (row, count) = (shape.streams * shape.width, coefficient_count(shape.streams));
    assert_eq!(product.len(), rows * count, "hyper_coefficients: the product is not [{rows}, {count}]");
    let mut output = vec![0.0; rows * count];
    let mut inverse_rms = vec![0.0; rows];
    let blocks = (x.chunks(PRODUCT_ROWS * row).zip(output.chunks_mut(PRODUCT_ROWS * count)))
        .zip(product.chunks_mut(PRODUCT_ROWS * count).zip(inverse_rms.chunks_mut(PRODUCT_ROWS)));
    parallel::for_each(blocks, |((x, output), (product, inverse_rms))| {
        shape.finish(weights, x, product, inverse_rms, output);
    });
    output
}

/// Gradients of [`hyper_coefficients`], given `grad` `[rows, coefficient_count]` of its output.
///
/// Sinkhorn's iterations run again and are differentiated one by one.
/// With z = r·(x·φ) and dz: g = r·dz, dφ = xᵀg, dx = g·φᵀ − x·r²·mean over the row of (dz·z).
///
/// # Panics
/// As [`hyper_coefficients`], and when `grad` or `forward` belong to another shape.
pub fn hyper_coefficients_backward(
    grad: &[f32],
    x: &[f32],
    weights: HyperWeights<'_>,
    shape: HyperShape,
    forward: &HyperCoefficients,
) -> HyperGradients {
    let rows = shape.check(x, weights);
    let (row, count) = (shape.streams * shape.width, coefficient_count(shape.streams));
    assert_eq!(grad.len(), rows * count, "hyper_coefficients: one gradient for each coefficient");
    assert_eq!(forward.projected.len(), rows * count, "hyper_coefficients: saved values of another shape");
    assert_eq!(forward.inverse_rms.len(), rows, "hyper_coefficients: saved values of another shape");
    let mut input = vec![0.0; x.len()];
    let blocks = (x.chunks(PRODUCT_ROWS * row).zip(grad.chunks(PRODUCT_ROWS * count)))
        .zip(forward.projected.chunks(PRODUCT_ROWS * count).zip(forward.inverse_rms.chunks(PRODUCT_ROWS)))
        .zip(input.chunks_mut(PRODUCT_ROWS * row));
    let parts = parallel::map(blocks, |(((x, grad), (projected, inverse_rms)), input)| {
        let rows = inverse_rms.len();
        let mut phi = vec![0.0; row * count];
        let mut scaled = vec![0.0; rows * count]; // dz, then g
        let mut group = Group::new(weights, shape);
        let mut along = vec![0.0; rows];
        vectorized(
            #[inline(always)]
            || {
                let groups = projected.chunks(LANES * count).zip(grad.chunks(LANES * count));
                for ((z, grad), dz) in groups.zip(scaled.chunks_mut(LANES * count)) {
                    group.backward(z, grad, dz);
                }
                let rows = projected.chunks_exact(count).zip(scaled.chunks_exact_mut(count));
                for (((z, dz), &r), along) in rows.zip(inverse_rms).zip(&mut along) {
                    *along = r * r * dot(dz, z) / row as f32;
                    dz.iter_mut().for_each(|g| *g *= r);
                }
            },
        );
        let g = Matrix::new(&scaled, rows, count);
        let x_matrix = Matrix::new(x, rows, row);
        multiply(1.0, x_matrix.transposed(), g, 0.0, MatrixMut::new(&mut phi, row, count), Threads::One);
        let phi_transposed = Matrix::new(weights.phi, row, count).transposed();
        multiply(1.0, g, phi_transposed, 0.0, MatrixMut::new(input, rows, row), Threads::One);
        vectorized(
            #[inline(always)]
            || {
                let rows = input.chunks_exact_mut(row).zip(x.chunks_exact(row)).zip(&along);
                for ((dx, x), along) in rows {
                    dx.iter_mut().zip(x).for_each(|(dx, x)| *dx -= along * x);
                }
            },
        );
        (phi, group.alpha_grad, group.bias_grad)
    });
    let mut phis = Vec::with_capacity(parts.len());
    let (mut alpha, mut bias) = ([0.0; 3], vec![0.0; count]);
    for (phi, alpha_part, bias_part) in parts {
        phis.push(phi);
        alpha.iter_mut().zip(alpha_part).for_each(|(total, part)| *total += part);
        bias.iter_mut().zip(bias_part).for_each(|(total, part)| *total += part);
    }
    HyperGradients { input, phi: parallel::sum_in_order(phis, row * count), alpha, bias }
}

impl HyperShape {
    /// From `projected`, x·φ of a block of rows, to z, their 1/rms and their coefficients.
    fn finish(
        self,
        weights: HyperWeights<'_>,
        x: &[f32],
        projected: &mut [f32],
        inverse_rms: &mut [f32],
        output: &mut [f32],
    ) {
        let (row, count) = (self.streams * self.width, coefficient_count(self.streams));
        vectorized(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(row).zip(projected.chunks_exact_mut(count)).zip(inverse_rms);
                for ((x, z), inverse) in rows {
                    *inverse = 1.0 / (dot(x, x) / row as f32 + self.epsilon).sqrt();
                    z.iter_mut().for_each(|z| *z *= *inverse);
                }
                let mut group = Group::new(weights, self);
                let groups = projected.chunks(LANES * count).zip(output.chunks_mut(LANES * count));
                for (z, output) in groups {
                    group.forward(z, output);
                }
            },
        );
    }

    /// Checks the slices against the shape and returns the number of rows.
    fn check(&self, x: &[f32], weights: HyperWeights<'_>) -> usize {
        let (row, count) = (self.streams * self.width, coefficient_count(self.streams));
        check_streams(self.streams);
        assert!(self.iterations > 0, "hyper_coefficients: without normalisation res is no mixture");
        assert!(row > 0 && x.len().is_multiple_of(row), "hyper_coefficients: {} in rows of {row}", x.len());
        assert_eq!(weights.phi.len(), row * count, "hyper_coefficients: phi must be {row}x{count}");
        assert_eq!(weights.bias.len(), count, "hyper_coefficients: one bias for each coefficient");
        x.len() / row
    }
}

fn check_streams(streams: usize) {
    assert!((1..=MAX_STREAMS).contains(&streams), "{streams} streams; 1 to {MAX_STREAMS} are possible");
}

/// One value per row, for the rows computed side by side.
type Lane = [f32; LANES];

/// Coefficients of [`LANES`] rows at once, value by value: one row's matrix of streams × streams is small, and many
/// rows fill the vectors.
struct Group<'a> {
    weights: HyperWeights<'a>,
    streams: usize,
    iterations: usize,
    /// Res of each row `[streams · streams]`; after the forward pass, the result of the last step.
    matrix: Vec<Lane>,
    /// Every step's result `[2 · iterations, streams · streams]`, if differentiating.
    steps: Vec<Lane>,
    /// Every step's 1 / sum of each line `[2 · iterations, streams]`.
    inverse_sums: Vec<Lane>,
    alpha_grad: [f32; 3],
    bias_grad: Vec<f32>,
}

impl<'a> Group<'a> {
    fn new(weights: HyperWeights<'a>, shape: HyperShape) -> Self {
        Self {
            weights,
            streams: shape.streams,
            iterations: shape.iterations,
            matrix: vec![[0.0; LANES]; shape.streams * shape.streams],
            steps: Vec::new(),
            inverse_sums: Vec::new(),
            alpha_grad: [0.0; 3],
            bias_grad: vec![0.0; coefficient_count(shape.streams)],
        }
    }

    /// Coefficients of up to [`LANES`] rows of `z`.
    #[inline(always)]
    fn forward(&mut self, z: &[f32], output: &mut [f32]) {
        let (n, count) = (self.streams, self.bias_grad.len());
        for (z, output) in z.chunks_exact(count).zip(output.chunks_exact_mut(count)) {
            for (i, output) in output[..n].iter_mut().enumerate() {
                *output = sigmoid(self.logit(0, z, i));
            }
            for (i, output) in output[n..2 * n].iter_mut().enumerate() {
                *output = 2.0 * sigmoid(self.logit(1, z, n + i));
            }
        }
        self.exponentiate(z);
        for _ in 0..self.iterations {
            for line in 0..n {
                normalise(&mut self.matrix, line * n, 1, n);
            }
            for line in 0..n {
                normalise(&mut self.matrix, line, n, n);
            }
        }
        for (lane, output) in output.chunks_exact_mut(count).enumerate() {
            for (res, matrix) in output[2 * n..].iter_mut().zip(&self.matrix) {
                *res = matrix[lane];
            }
        }
    }

    /// Writes the gradient `dz` of up to [`LANES`] rows of `z`, and adds those of α and b.
    #[inline(always)]
    fn backward(&mut self, z: &[f32], grad: &[f32], dz: &mut [f32]) {
        let (n, count) = (self.streams, self.bias_grad.len());
        self.backward_sinkhorn(z, grad);
        for (lane, ((z, grad), dz)) in
            z.chunks_exact(count).zip(grad.chunks_exact(count)).zip(dz.chunks_exact_mut(count)).enumerate()
        {
            for i in 0..count {
                let (part, dlogit) = if i < n {
                    let s = sigmoid(self.logit(0, z, i));
                    (0, grad[i] * s * (1.0 - s))
                } else if i < 2 * n {
                    let s = sigmoid(self.logit(1, z, i));
                    (1, 2.0 * grad[i] * s * (1.0 - s))
                } else {
                    (2, self.matrix[i - 2 * n][lane])
                };
                dz[i] = self.weights.alpha[part] * dlogit;
                self.alpha_grad[part] += dlogit * z[i];
                self.bias_grad[i] += dlogit;
            }
        }
    }

    /// α·z + b of coefficient `i`, which belongs to `part`.
    #[inline(always)]
    fn logit(&self, part: usize, z: &[f32], i: usize) -> f32 {
        self.weights.alpha[part] * z[i] + self.weights.bias[i]
    }

    /// Sets `matrix` to exp(α₂z + b − the largest of its row) + [`LEAST`]: a factor of a row has no effect
    /// on anything after the first normalisation. Lanes beyond the last row hold ones.
    #[inline(always)]
    fn exponentiate(&mut self, z: &[f32]) {
        let (n, count) = (self.streams, self.bias_grad.len());
        self.matrix.fill([0.0; LANES]);
        for (lane, z) in z.chunks_exact(count).enumerate() {
            for i in 0..n * n {
                self.matrix[i][lane] = self.logit(2, z, 2 * n + i);
            }
        }
        for row in self.matrix.chunks_exact_mut(n) {
            let mut largest = row[0];
            for value in &row[1..] {
                for lane in 0..LANES {
                    largest[lane] = if value[lane] > largest[lane] { value[lane] } else { largest[lane] };
                }
            }
            for value in row {
                for lane in 0..LANES {
                    value[lane] = exp(value[lane] - largest[lane]) + LEAST;
                }
            }
        }
    }

    /// Writes the gradient of α₂z + b to `matrix`, given that of the coefficients.
    #[inline(always)]
    fn backward_sinkhorn(&mut self, z: &[f32], grad: &[f32]) {
        let (n, count) = (self.streams, self.bias_grad.len());
        self.exponentiate(z);
        let start = self.matrix.clone();
        self.steps.clear();
        self.inverse_sums.clear();
        for _ in 0..self.iterations {
            for line in 0..n {
                self.inverse_sums.push(normalise(&mut self.matrix, line * n, 1, n));
            }
            self.steps.extend_from_slice(&self.matrix);
            for line in 0..n {
                self.inverse_sums.push(normalise(&mut self.matrix, line, n, n));
            }
            self.steps.extend_from_slice(&self.matrix);
        }
        self.matrix.fill([0.0; LANES]);
        for (lane, grad) in grad.chunks_exact(count).enumerate() {
            for (matrix, grad) in self.matrix.iter_mut().zip(&grad[2 * n..]) {
                matrix[lane] = *grad;
            }
        }
        let steps = self.steps.chunks_exact(n * n).zip(self.inverse_sums.chunks_exact(n));
        for (index, (result, inverse_sums)) in steps.enumerate().rev() {
            for (line, inverse_sum) in inverse_sums.iter().enumerate() {
                let (first, stride) = if index % 2 == 0 { (line * n, 1) } else { (line, n) };
                normalise_backward(&mut self.matrix, result, inverse_sum, first, stride, n);
            }
        }
        for (grad, start) in self.matrix.iter_mut().zip(&start) {
            for lane in 0..LANES {
                grad[lane] *= start[lane] - LEAST;
            }
        }
    }
}

/// Divides the line `first, first + stride, …` of `n` entries by its sum, and returns 1 / sum.
#[inline(always)]
fn normalise(matrix: &mut [Lane], first: usize, stride: usize, n: usize) -> Lane {
    let mut total = matrix[first];
    for i in 1..n {
        for lane in 0..LANES {
            total[lane] += matrix[first + i * stride][lane];
        }
    }
    let inverse: Lane = from_fn(|lane| 1.0 / total[lane]);
    for i in 0..n {
        for lane in 0..LANES {
            matrix[first + i * stride][lane] *= inverse[lane];
        }
    }
    inverse
}

/// For y = x / s with s = Σx: dxᵢ = (dyᵢ − Σ dy·y) / s, in place of dy.
#[inline(always)]
fn normalise_backward(
    grad: &mut [Lane],
    result: &[Lane],
    inverse_sum: &Lane,
    first: usize,
    stride: usize,
    n: usize,
) {
    let mut along = [0.0; LANES];
    for i in 0..n {
        for lane in 0..LANES {
            along[lane] += grad[first + i * stride][lane] * result[first + i * stride][lane];
        }
    }
    for i in 0..n {
        for lane in 0..LANES {
            let grad = &mut grad[first + i * stride][lane];
            *grad = (*grad - along[lane]) * inverse_sum[lane];
        }
    }
}

/// Calls `$f::<N>` for N = `$streams`.
macro_rules! for_streams {
    ($streams:expr, $f:ident($($argument:expr),* $(,)?)) => {
        match $streams {
            1 => $f::<1>($($argument),*),
            2 => $f::<2>($($argument),*),
            3 => $f::<3>($($argument),*),
            4 => $f::<4>($($argument),*),
            5 => $f::<5>($($argument),*),
            6 => $f::<6>($($argument),*),
            7 => $f::<7>($($argument),*),
            8 => $f::<8>($($argument),*),
            other => unreachable!("{other} streams passed the check"),
        }
    };
}

/// The block's input `[rows, width]`: Σₘ preₘ·xₘ of each row of `x` `[rows, streams, width]`, with
/// `coefficients` `[rows, coefficient_count]`.
///
/// # Panics
/// When `streams` is not in 1..=[`MAX_STREAMS`] or the sizes do not agree.
pub fn hyper_read(x: &[f32], coefficients: &[f32], streams: usize) -> Vec<f32> {
    let (rows, width) = read_shape(x, coefficients, streams);
    let mut output = vec![0.0; rows * width];
    let block = block_rows((streams + 1) * width);
    let blocks = (x.chunks(block * streams * width).zip(output.chunks_mut(block * width)))
        .zip(coefficients.chunks(block * coefficient_count(streams)));
    parallel::for_each(blocks, |((x, output), coefficients)| {
        for_streams!(streams, read_block(x, coefficients, output, width));
    });
    output
}

fn read_block<const N: usize>(x: &[f32], coefficients: &[f32], output: &mut [f32], width: usize) {
    vectorized(
        #[inline(always)]
        || {
            let rows = x.chunks_exact(N * width).zip(output.chunks_exact_mut(width));
            for ((x, output), c) in rows.zip(coefficients.chunks_exact(coefficient_count(N))) {
                combine::<N>(from_fn(|m| c[m]), streams_of(x, width), |_| 0.0, output);
            }
        },
    );
}

/// Gradients of [`hyper_read`]'s streams and coefficients (only pre is not zero), given `grad`
/// `[rows, width]` of its output.
///
/// # Panics
/// As [`hyper_read`], and when `grad` has another size than its output.
pub fn hyper_read_backward(
    grad: &[f32],
    x: &[f32],
    coefficients: &[f32],
    streams: usize,
) -> (Vec<f32>, Vec<f32>) {
    let (rows, width) = read_shape(x, coefficients, streams);
    assert_eq!(grad.len(), rows * width, "hyper_read: the gradient has another size than the output");
    let count = coefficient_count(streams);
    let mut input = vec![0.0; x.len()];
    let mut coefficients_grad = vec![0.0; coefficients.len()];
    let block = block_rows((2 * streams + 1) * width);
    let blocks = (grad.chunks(block * width).zip(x.chunks(block * streams * width)))
        .zip(coefficients.chunks(block * count))
        .zip(input.chunks_mut(block * streams * width).zip(coefficients_grad.chunks_mut(block * count)));
    parallel::for_each(blocks, |(((grad, x), coefficients), (input, coefficients_grad))| {
        vectorized(
            #[inline(always)]
            || {
                let rows = (grad.chunks_exact(width).zip(x.chunks_exact(streams * width)))
                    .zip(input.chunks_exact_mut(streams * width))
                    .zip(coefficients.chunks_exact(count).zip(coefficients_grad.chunks_exact_mut(count)));
                for (((grad, x), input), (c, dc)) in rows {
                    let streams = x.chunks_exact(width).zip(input.chunks_exact_mut(width));
                    for (m, (x, input)) in streams.enumerate() {
                        dc[m] = dot(grad, x);
                        input.iter_mut().zip(grad).for_each(|(dx, g)| *dx = c[m] * g);
                    }
                }
            },
        );
    });
    (input, coefficients_grad)
}

/// The new streams `[rows, streams, width]`: x'ₘ = Σⱼ resₘⱼ·xⱼ + postₘ·f, for `x`
/// `[rows, streams, width]`, the block's output `f` `[rows, width]` and `coefficients`
/// `[rows, coefficient_count]`.
///
/// # Panics
/// When `streams` is not in 1..=[`MAX_STREAMS`] or the sizes do not agree.
pub fn hyper_write(x: &[f32], f: &[f32], coefficients: &[f32], streams: usize) -> Vec<f32> {
    let (rows, width) = read_shape(x, coefficients, streams);
    assert_eq!(f.len(), rows * width, "hyper_write: the block's output is not as wide as a stream");
    let mut output = vec![0.0; x.len()];
    let block = block_rows((2 * streams + 1) * width);
    let blocks = (x.chunks(block * streams * width).zip(f.chunks(block * width)))
        .zip(coefficients.chunks(block * coefficient_count(streams)))
        .zip(output.chunks_mut(block * streams * width));
    parallel::for_each(blocks, |(((x, f), coefficients), output)| {
        for_streams!(streams, write_block(x, f, coefficients, output, width));
    });
    output
}

fn write_block<const N: usize>(x: &[f32], f: &[f32], coefficients: &[f32], output: &mut [f32], width: usize) {
    vectorized(
        #[inline(always)]
        || {
            let rows = (x.chunks_exact(N * width).zip(f.chunks_exact(width)))
                .zip(output.chunks_exact_mut(N * width))
                .zip(coefficients.chunks_exact(coefficient_count(N)));
            for (((x, f), output), c) in rows {
                let (post, res) = c[N..].split_at(N);
                let x = streams_of(x, width);
                for (m, output) in output.chunks_exact_mut(width).enumerate() {
                    combine::<N>(from_fn(|j| res[m * N + j]), x, |i| post[m] * f[i], output);
                }
            }
        },
    );
}

/// What [`hyper_write_backward`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct HyperWriteGradients {
    /// `[rows, streams, width]`: gradient of the streams.
    pub input: Vec<f32>,
    /// `[rows, width]`: gradient of the block's output.
    pub block: Vec<f32>,
    /// `[rows, coefficient_count]`: gradient of the coefficients (that of pre is zero).
    pub coefficients: Vec<f32>,
}

/// Gradients of [`hyper_write`], given `grad` `[rows, streams, width]` of its output.
///
/// # Panics
/// As [`hyper_write`], and when `grad` has another size than its output.
pub fn hyper_write_backward(
    grad: &[f32],
    x: &[f32],
    f: &[f32],
    coefficients: &[f32],
    streams: usize,
) -> HyperWriteGradients {
    let (rows, width) = read_shape(x, coefficients, streams);
    assert_eq!(f.len(), rows * width, "hyper_write: the block's output is not as wide as a stream");
    assert_eq!(grad.len(), x.len(), "hyper_write: the gradient has another size than the output");
    let count = coefficient_count(streams);
    let mut input = vec![0.0; x.len()];
    let mut block_grad = vec![0.0; f.len()];
    let mut coefficients_grad = vec![0.0; coefficients.len()];
    let block = block_rows((3 * streams + 2) * width);
    let blocks = (grad.chunks(block * streams * width).zip(x.chunks(block * streams * width)))
        .zip(f.chunks(block * width).zip(coefficients.chunks(block * count)))
        .zip(input.chunks_mut(block * streams * width))
        .zip(block_grad.chunks_mut(block * width).zip(coefficients_grad.chunks_mut(block * count)));
    parallel::for_each(blocks, |((((grad, x), (f, c)), dx), (df, dc))| {
        for_streams!(streams, write_backward_block([grad, x, f, c], dx, df, dc, width));
    });
    HyperWriteGradients { input, block: block_grad, coefficients: coefficients_grad }
}

fn write_backward_block<const N: usize>(
    [grad, x, f, coefficients]: [&[f32]; 4],
    input: &mut [f32],
    block_grad: &mut [f32],
    coefficients_grad: &mut [f32],
    width: usize,
) {
    let count = coefficient_count(N);
    vectorized(
        #[inline(always)]
        || {
            let rows = (grad.chunks_exact(N * width).zip(x.chunks_exact(N * width)))
                .zip(f.chunks_exact(width).zip(coefficients.chunks_exact(count)))
                .zip(input.chunks_exact_mut(N * width))
                .zip(block_grad.chunks_exact_mut(width).zip(coefficients_grad.chunks_exact_mut(count)));
            for ((((grad, x), (f, c)), dx), (df, dc)) in rows {
                let (grad, x) = (streams_of::<N>(grad, width), streams_of::<N>(x, width));
                let (post, res) = c[N..].split_at(N);
                let (dpost, dres) = dc[N..].split_at_mut(N);
                combine::<N>(from_fn(|m| post[m]), grad, |_| 0.0, df);
                for (j, dx) in dx.chunks_exact_mut(width).enumerate() {
                    combine::<N>(from_fn(|m| res[m * N + j]), grad, |_| 0.0, dx);
                }
                for m in 0..N {
                    dpost[m] = dot(grad[m], f);
                    for j in 0..N {
                        dres[m * N + j] = dot(grad[m], x[j]);
                    }
                }
            }
        },
    );
}

/// The streams of one row.
#[inline(always)]
fn streams_of<const N: usize>(row: &[f32], width: usize) -> [&[f32]; N] {
    from_fn(|m| &row[m * width..][..width])
}

/// outputᵢ = startᵢ + Σⱼ weightⱼ·rowⱼᵢ.
#[inline(always)]
fn combine<const N: usize>(
    weights: [f32; N],
    rows: [&[f32]; N],
    start: impl Fn(usize) -> f32,
    output: &mut [f32],
) {
    let rows = rows.map(|row| &row[..output.len()]);
    for (i, output) in output.iter_mut().enumerate() {
        let mut total = start(i);
        for j in 0..N {
            total = weights[j].mul_add(rows[j][i], total);
        }
        *output = total;
    }
}

/// Checks that `x` is `[rows, streams, width]` for the rows of coefficients; returns rows and width.
fn read_shape(x: &[f32], coefficients: &[f32], streams: usize) -> (usize, usize) {
    check_streams(streams);
    let count = coefficient_count(streams);
    let rows = coefficients.len() / count;
    assert!(
        coefficients.len() == rows * count && rows > 0 && x.len().is_multiple_of(rows * streams),
        "hyper-connection: {} values of {streams} streams and {} coefficients in rows of {count}",
        x.len(),
        coefficients.len(),
    );
    assert!(!x.is_empty(), "hyper-connection: streams of no width");
    (rows, x.len() / (rows * streams))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    const SHAPE: HyperShape = HyperShape { streams: 4, width: 8, epsilon: 1e-6, iterations: 20 };

    struct Case {
        x: Vec<f32>,
        phi: Vec<f32>,
        alpha: [f32; 3],
        bias: Vec<f32>,
    }

    impl Case {
        fn new(shape: HyperShape, rows: usize, seed: u64) -> Self {
            let (row, count) = (shape.streams * shape.width, coefficient_count(shape.streams));
            Self {
                x: random(rows * row, seed),
                phi: random(row * count, seed ^ 1),
                alpha: [0.7, -0.4, 0.5],
                bias: random(count, seed ^ 2),
            }
        }

        fn weights(&self) -> HyperWeights<'_> {
            HyperWeights { phi: &self.phi, alpha: self.alpha, bias: &self.bias }
        }
    }

    /// The formulas at the top, in f64.
    fn naive(case: &Case, shape: HyperShape) -> Vec<f32> {
        let (n, row, count) = (shape.streams, shape.streams * shape.width, coefficient_count(shape.streams));
        let mut output = Vec::new();
        for x in case.x.chunks(row) {
            let square: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
            let rms = (square / row as f64 + f64::from(shape.epsilon)).sqrt();
            let logit = |i: usize, alpha: f32| -> f64 {
                let z: f64 =
                    (0..row).map(|l| f64::from(x[l]) / rms * f64::from(case.phi[l * count + i])).sum();
                f64::from(alpha) * z + f64::from(case.bias[i])
            };
            let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
            output.extend((0..n).map(|i| sigmoid(logit(i, case.alpha[0])) as f32));
            output.extend((n..2 * n).map(|i| 2.0 * sigmoid(logit(i, case.alpha[1])) as f32));
            let mut m: Vec<f64> = (2 * n..count).map(|i| logit(i, case.alpha[2]).exp()).collect();
            for _ in 0..shape.iterations {
                for i in 0..n {
                    let sum: f64 = (0..n).map(|j| m[i * n + j]).sum();
                    (0..n).for_each(|j| m[i * n + j] /= sum);
                }
                for j in 0..n {
                    let sum: f64 = (0..n).map(|i| m[i * n + j]).sum();
                    (0..n).for_each(|i| m[i * n + j] /= sum);
                }
            }
            output.extend(m.iter().map(|&v| v as f32));
        }
        output
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn coefficients_and_gradients(
            streams in 1_usize..=8, width in 1_usize..12, rows in 1_usize..20,
            iterations in 1_usize..21, seed: u64,
        ) {
            let shape = HyperShape { streams, width, epsilon: 0.1, iterations };
            let case = Case::new(shape, rows, seed);
            let forward = hyper_coefficients(&case.x, case.weights(), shape);
            assert_close(&forward.output, &naive(&case, shape), 1e-5);
            let grad = random(forward.output.len(), seed ^ 3);
            let found = hyper_coefficients_backward(&grad, &case.x, case.weights(), shape, &forward);
            let output = |x: &[f32], w: HyperWeights<'_>| hyper_coefficients(x, w, shape).output;
            let loss = |x: &[f32], w: HyperWeights<'_>| weighted(&output(x, w), &grad);
            let w = case.weights();
            assert_gradient("x", &case.x, &found.input, |x| loss(x, w));
            assert_gradient("phi", &case.phi, &found.phi, |phi| loss(&case.x, HyperWeights { phi, ..w }));
            assert_gradient("bias", &case.bias, &found.bias, |bias| {
                loss(&case.x, HyperWeights { bias, ..w })
            });
            assert_gradient("alpha", &case.alpha, &found.alpha, |alpha| {
                loss(&case.x, HyperWeights { alpha: from_fn(|i| alpha[i]), ..w })
            });
        }

        /// Streams with vanishing weights must not become NaN, which would end a run.
        #[test]
        fn any_logits_give_a_mixture_and_finite_gradients(
            streams in 2_usize..=8, low in -1e4_f32..-50.0, seed: u64,
        ) {
            let shape = HyperShape { streams, width: 3, epsilon: 1e-6, iterations: 20 };
            let mut case = Case::new(shape, 4, seed);
            // The last column is far below the largest of each row.
            let column = |i: usize| (2 * streams + i * streams) + streams - 1;
            (0..streams).for_each(|i| case.bias[column(i)] = low);
            let forward = hyper_coefficients(&case.x, case.weights(), shape);
            for row in forward.output.chunks_exact(coefficient_count(streams)) {
                for line in row[2 * streams..].chunks_exact(streams) {
                    prop_assert!((line.iter().sum::<f32>() - 1.0).abs() < 0.2, "{line:?}");
                }
                let last: f32 = (0..streams).map(|i| row[column(i)]).sum();
                prop_assert!((last - 1.0).abs() < 1e-3, "{last}");
            }
            let grad = random(forward.output.len(), seed ^ 3);
            let found = hyper_coefficients_backward(&grad, &case.x, case.weights(), shape, &forward);
            let all = [&found.input[..], &found.phi, &found.alpha, &found.bias].concat();
            prop_assert!(all.iter().all(|value| value.is_finite()));
        }

        #[test]
        fn read_write_and_gradients(
            streams in 1_usize..=8, width in 1_usize..40, rows in 1_usize..6, seed: u64,
        ) {
            let count = coefficient_count(streams);
            let x = random(rows * streams * width, seed);
            let c = random(rows * count, seed ^ 1);
            let f = random(rows * width, seed ^ 2);

            let read = hyper_read(&x, &c, streams);
            let write = hyper_write(&x, &f, &c, streams);
            for row in 0..rows {
                let c = &c[row * count..][..count];
                let x = |m: usize, i: usize| x[(row * streams + m) * width + i];
                for i in 0..width {
                    let expected: f32 = (0..streams).map(|m| c[m] * x(m, i)).sum();
                    prop_assert!((read[row * width + i] - expected).abs() < 1e-5);
                    for m in 0..streams {
                        let res = |j: usize| c[2 * streams + m * streams + j];
                        let mixed: f32 = (0..streams).map(|j| res(j) * x(j, i)).sum();
                        let expected = mixed + c[streams + m] * f[row * width + i];
                        prop_assert!((write[(row * streams + m) * width + i] - expected).abs() < 1e-5);
                    }
                }
            }

            let grad = random(read.len(), seed ^ 3);
            let (dx, dc) = hyper_read_backward(&grad, &x, &c, streams);
            assert_gradient("read x", &x, &dx, |x| weighted(&hyper_read(x, &c, streams), &grad));
            assert_gradient("read c", &c, &dc, |c| weighted(&hyper_read(&x, c, streams), &grad));

            let grad = random(write.len(), seed ^ 4);
            let found = hyper_write_backward(&grad, &x, &f, &c, streams);
            assert_gradient("write x", &x, &found.input, |x| {
                weighted(&hyper_write(x, &f, &c, streams), &grad)
            });
            assert_gradient("write f", &f, &found.block, |f| {
                weighted(&hyper_write(&x, f, &c, streams), &grad)
            });
            assert_gradient("write c", &c, &found.coefficients, |c| {
                weighted(&hyper_write(&x, &f, c, streams), &grad)
            });
        }
    }

    #[test]
    fn res_is_doubly_stochastic() {
        let case = Case { alpha: [0.01; 3], ..Case::new(SHAPE, 50, 9) }; // as at the start of training
        let output = hyper_coefficients(&case.x, case.weights(), SHAPE).output;
        for c in output.chunks(coefficient_count(4)) {
            for i in 0..4 {
                let row: f32 = (0..4).map(|j| c[8 + 4 * i + j]).sum();
                let column: f32 = (0..4).map(|j| c[8 + 4 * j + i]).sum();
                assert!((row - 1.0).abs() < 1e-4 && (column - 1.0).abs() < 1e-5, "{row} {column}");
            }
        }
    }

    #[test]
    fn many_blocks_match_single_rows_and_repeat_their_bits() {
        let rows = 3 * PRODUCT_ROWS + 7;
        let case = Case::new(SHAPE, rows, 4);
        let grad = random(rows * coefficient_count(4), 5);
        let run = || {
            let forward = hyper_coefficients(&case.x, case.weights(), SHAPE);
            let backward = hyper_coefficients_backward(&grad, &case.x, case.weights(), SHAPE, &forward);
            (forward, backward)
        };
        let (forward, backward) = run();
        assert_eq!((forward.clone(), backward.clone()), run());
        let mut phi = vec![0.0; case.phi.len()];
        let mut bias = vec![0.0; case.bias.len()];
        for row in 0..rows {
            let x = &case.x[row * 32..][..32];
            let one = hyper_coefficients(x, case.weights(), SHAPE);
            assert_close(&one.output, &forward.output[row * 24..][..24], 1e-5);
            let one = hyper_coefficients_backward(&grad[row * 24..][..24], x, case.weights(), SHAPE, &one);
            assert_close(&one.input, &backward.input[row * 32..][..32], 1e-5);
            phi.iter_mut().zip(&one.phi).for_each(|(total, part)| *total += part);
            bias.iter_mut().zip(&one.bias).for_each(|(total, part)| *total += part);
        }
        assert_close(&backward.phi, &phi, 1e-4);
        assert_close(&backward.bias, &bias, 1e-4);
    }

    #[test]
    fn logits_far_apart_do_not_overflow() {
        let mut case = Case::new(SHAPE, 3, 6);
        case.bias[8] = 200.0;
        case.bias[20] = 150.0;
        let output = hyper_coefficients(&case.x, case.weights(), SHAPE).output;
        assert!(output.iter().all(|v| v.is_finite()), "{output:?}");
    }

    #[test]
    #[should_panic(expected = "9 streams; 1 to 8 are possible")]
    fn refuses_too_many_streams() {
        hyper_read(&[0.0; 9], &[0.0; 99], 9);
    }
}
