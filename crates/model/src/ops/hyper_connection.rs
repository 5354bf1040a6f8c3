//! Manifold-constrained hyper-connections (arXiv 2512.24880): coefficients, reading, writing.

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use engram_kernels::{HyperCoefficients, HyperShape, HyperWeights};

use super::fused::{self, Operation, Pass, choose};
use super::product::rows_product;
use super::rms_norm::normalise;
use super::token_sums::for_every_token;

/// H_pre `[n]`, H_post `[n]` and H_res `[n, n]` of every token, `[tokens, 2n + n²]`, from streams `[tokens, n·width]`.
///
/// `projection`: `[n·width, 2n + n²]`, `scale`: `[3]`, `bias`: `[2n + n²]`.
pub(crate) fn hyper_coefficients(
    x: Tensor<2>,
    projection: Tensor<2>,
    scale: Tensor<1>,
    bias: Tensor<1>,
    shape: HyperShape,
) -> Tensor<2> {
    let (tokens, n) = (x.dims()[0], shape.streams);
    let fused = |(x, projection, scale, bias): (Tensor<2>, Tensor<2>, Tensor<1>, Tensor<1>)| {
        let inputs = [fused::input(x), fused::input(projection), fused::input(scale), fused::input(bias)];
        fused::apply(FusedCoefficients { shape }, inputs, [tokens, 2 * n + n * n])
    };
    let composed = |(x, projection, scale, bias)| composed_coefficients(x, projection, scale, bias, shape);
    choose(&x.device(), (x, projection, scale, bias), fused, composed)
}

fn composed_coefficients(
    x: Tensor<2>,
    projection: Tensor<2>,
    scale: Tensor<1>,
    bias: Tensor<1>,
    shape: HyperShape,
) -> Tensor<2> {
    let (tokens, n) = (x.dims()[0], shape.streams);
    let scale = |index: usize, count: usize| scale.clone().narrow(0, index, 1).repeat_dim(0, count);
    let scale = Tensor::cat(vec![scale(0, n), scale(1, n), scale(2, n * n)], 0);
    let z = rows_product(normalise(x, f64::from(shape.epsilon)), projection, false)
        * for_every_token(scale, tokens)
        + for_every_token(bias, tokens);
    let part = |start: usize, count: usize| z.clone().narrow(1, start, count);
    let read = sigmoid(part(0, n));
    let write = sigmoid(part(n, n)).mul_scalar(2.0);
    let mix = sinkhorn(part(2 * n, n * n).reshape([tokens, n, n]), shape.iterations);
    Tensor::cat(vec![read, write, mix.reshape([tokens, n * n])], 1)
}

/// What a layer sees: `Σ_m pre_m · x_m`, `[tokens, width]`.
pub(crate) fn hyper_read(x: Tensor<2>, coefficients: Tensor<2>, streams: usize) -> Tensor<2> {
    let [tokens, channels] = x.dims();
    let width = channels / streams;
    let fused = |(x, coefficients)| {
        let inputs = [fused::input::<2>(x), fused::input::<2>(coefficients)];
        fused::apply(FusedRead { streams }, inputs, [tokens, width])
    };
    let composed = |(x, coefficients): (Tensor<2>, Tensor<2>)| {
        let read = coefficients.narrow(1, 0, streams).reshape([tokens, streams, 1]);
        (x.reshape([tokens, streams, width]) * read).sum_dim(1).reshape([tokens, width])
    };
    choose(&x.device(), (x, coefficients), fused, composed)
}

/// The streams after a layer gave `y`: `x'_m = Σ_j res_mj · x_j + post_m · y`, `[tokens, n·width]`.
pub(crate) fn hyper_write(x: Tensor<2>, y: Tensor<2>, coefficients: Tensor<2>, streams: usize) -> Tensor<2> {
    let shape = x.dims();
    let fused = |(x, y, coefficients)| {
        let inputs = [fused::input::<2>(x), fused::input::<2>(y), fused::input::<2>(coefficients)];
        fused::apply(FusedWrite { streams }, inputs, shape)
    };
    let composed = |(x, y, coefficients): (Tensor<2>, Tensor<2>, Tensor<2>)| {
        let ([tokens, channels], n) = (shape, streams);
        let width = channels / n;
        let write = coefficients.clone().narrow(1, n, n).reshape([tokens, n, 1]);
        let mix = coefficients.narrow(1, 2 * n, n * n).reshape([tokens, n, n]);
        let mixed = mix.matmul(x.reshape([tokens, n, width]));
        (mixed + write * y.reshape([tokens, 1, width])).reshape(shape)
    };
    choose(&x.device(), (x, y, coefficients), fused, composed)
}

/// `exp`, then rows and columns normalised in turn: close to doubly stochastic. `[tokens, n, n]`. What is added to
/// each entry keeps every sum above zero; it is lost in the rounding of all that matter.
fn sinkhorn(logits: Tensor<3>, iterations: usize) -> Tensor<3> {
    let largest = logits.clone().detach().max_dim(2);
    let mut matrix = (logits - largest).exp().add_scalar(1e-26);
    for _ in 0..iterations {
        matrix = matrix.clone() / matrix.sum_dim(2);
        matrix = matrix.clone() / matrix.sum_dim(1);
    }
    matrix
}

#[derive(Debug)]
struct FusedCoefficients {
    shape: HyperShape,
}

impl FusedCoefficients {
    fn weights<'a>(&self, projection: &'a [f32], scale: &[f32], bias: &'a [f32]) -> HyperWeights<'a> {
        HyperWeights { phi: projection, alpha: [scale[0], scale[1], scale[2]], bias }
    }
}

impl Operation<4> for FusedCoefficients {
    /// The kernel's saved values; its output lies in the graph.
    type Saved = HyperCoefficients;

    fn forward(&self, [x, projection, scale, bias]: [&[f32]; 4]) -> (Vec<f32>, Self::Saved) {
        let weights = self.weights(projection, scale, bias);
        let mut coefficients = engram_kernels::hyper_coefficients(x, weights, self.shape);
        (std::mem::take(&mut coefficients.output), coefficients)
    }

    fn backward(&self, pass: Pass<'_, Self::Saved, 4>) -> [Vec<f32>; 4] {
        let [x, projection, scale, bias] = pass.inputs;
        let weights = self.weights(projection, scale, bias);
        let gradients =
            engram_kernels::hyper_coefficients_backward(pass.gradient, x, weights, self.shape, pass.saved);
        [gradients.input, gradients.phi, gradients.alpha.to_vec(), gradients.bias]
    }
}

#[derive(Debug)]
struct FusedRead {
    streams: usize,
}

impl Operation<2> for FusedRead {
    type Saved = ();

    fn forward(&self, [x, coefficients]: [&[f32]; 2]) -> (Vec<f32>, ()) {
        (engram_kernels::hyper_read(x, coefficients, self.streams), ())
    }

    fn backward(&self, pass: Pass<'_, (), 2>) -> [Vec<f32>; 2] {
        let [x, coefficients] = pass.inputs;
        engram_kernels::hyper_read_backward(pass.gradient, x, coefficients, self.streams).into()
    }
}

#[derive(Debug)]
struct FusedWrite {
    streams: usize,
}

impl Operation<3> for FusedWrite {
    type Saved = ();

    fn forward(&self, [x, y, coefficients]: [&[f32]; 3]) -> (Vec<f32>, ()) {
        (engram_kernels::hyper_write(x, y, coefficients, self.streams), ())
    }

    fn backward(&self, pass: Pass<'_, (), 3>) -> [Vec<f32>; 3] {
        let [x, y, coefficients] = pass.inputs;
        let gradients = engram_kernels::hyper_write_backward(pass.gradient, x, y, coefficients, self.streams);
        [gradients.input, gradients.block, gradients.coefficients]
    }
}
