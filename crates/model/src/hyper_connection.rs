//! Manifold-constrained hyper-connections (arXiv 2512.24880): n residual streams, from which a layer reads a
//! mixture and to which it writes back, while a doubly stochastic matrix mixes the streams among themselves.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use engram_kernels::{HyperCoefficients, HyperShape, HyperWeights};

use crate::fused::{self, Operation, Pass};
use crate::init::Init;
use crate::linear::rows_product;
use crate::rms_norm::normalise;
use crate::token_sums::for_every_token;
use crate::training::{DeclareTraining, TrainingPlan};
use engram_config::HyperConnectionConfig;

/// One layer's connection to the streams.
#[derive(Module, Debug)]
pub struct HyperConnection {
    /// From the normalised, flattened streams to all coefficients, `[n·width, 2n + n²]`.
    pub projection: Param<Tensor<2>>,
    /// Scale of the token-dependent part, of reading, writing and mixing, `[3]`.
    pub scale: Param<Tensor<1>>,
    /// The part that does not depend on the token, `[2n + n²]`.
    pub bias: Param<Tensor<1>>,
    streams: usize,
    width: usize,
    iterations: usize,
    epsilon: f64,
}

/// H_pre `[n]`, H_post `[n]` and H_res `[n, n]` of every token, `[tokens, 2n + n²]`.
#[derive(Debug, Clone)]
pub struct Coefficients(Tensor<2>);

impl HyperConnection {
    /// Starts as a plain residual: streams stay apart (mixing near the identity), the layer reads mostly stream
    /// `index mod n` and writes to all alike. Reading one stream each is what later tells the streams apart.
    pub(crate) fn new(
        config: &HyperConnectionConfig,
        width: usize,
        index: usize,
        epsilon: f32,
        init: &Init,
    ) -> Self {
        let n = config.streams;
        let logit = |p: f32| (p / (1.0 - p)).ln();
        let (most, rest) = (0.7, 0.3 / (n as f32 - 1.0));
        let read = (0..n).map(|m| logit(if m == index % n { most } else { rest }));
        let mix = (0..n * n).map(|i| if i / n == i % n { 0.0 } else { -8.0 });
        let bias = read.chain(std::iter::repeat_n(0.0, n)).chain(mix).collect();
        let deviation = ((n * width) as f32).sqrt().recip();
        Self {
            projection: init.normal("projection", [n * width, 2 * n + n * n], deviation),
            scale: init.constant([3], 0.01),
            bias: init.values([2 * n + n * n], bias),
            streams: n,
            width,
            iterations: config.sinkhorn_iterations,
            epsilon: f64::from(epsilon),
        }
    }

    /// The coefficients of streams `[tokens, n·width]`.
    pub fn coefficients(&self, x: Tensor<2>) -> Coefficients {
        let tokens = x.dims()[0];
        let n = self.streams;
        if fused::available(&x) {
            let shape = HyperShape {
                streams: n,
                width: self.width,
                epsilon: self.epsilon as f32,
                iterations: self.iterations,
            };
            let operation = FusedCoefficients { shape };
            let inputs = [
                fused::input(x),
                fused::input(self.projection.val()),
                fused::input(self.scale.val()),
                fused::input(self.bias.val()),
            ];
            return Coefficients(fused::apply(operation, inputs, [tokens, 2 * n + n * n]));
        }
        let scale = self.scale.val();
        let scale = |index: usize, count: usize| scale.clone().narrow(0, index, 1).repeat_dim(0, count);
        let scale = Tensor::cat(vec![scale(0, n), scale(1, n), scale(2, n * n)], 0);
        let z = rows_product(normalise(x, self.epsilon), self.projection.val(), false)
            * for_every_token(scale, tokens)
            + for_every_token(self.bias.val(), tokens);
        let part = |start: usize, count: usize| z.clone().narrow(1, start, count);
        let read = sigmoid(part(0, n));
        let write = sigmoid(part(n, n)).mul_scalar(2.0);
        let mix = sinkhorn(part(2 * n, n * n).reshape([tokens, n, n]), self.iterations);
        Coefficients(Tensor::cat(vec![read, write, mix.reshape([tokens, n * n])], 1))
    }

    /// What the layer sees: `Σ_m pre_m · x_m`, `[tokens, width]`.
    pub fn read(&self, x: Tensor<2>, coefficients: &Coefficients) -> Tensor<2> {
        let tokens = x.dims()[0];
        let coefficients = coefficients.0.clone();
        if fused::available(&x) {
            let operation = FusedRead { streams: self.streams };
            return fused::apply(
                operation,
                [fused::input(x), fused::input(coefficients)],
                [tokens, self.width],
            );
        }
        let n = self.streams;
        let read = coefficients.narrow(1, 0, n).reshape([tokens, n, 1]);
        (x.reshape([tokens, n, self.width]) * read).sum_dim(1).reshape([tokens, self.width])
    }

    /// The streams after the layer gave `y`: `x'_m = Σ_j res_mj · x_j + post_m · y`, `[tokens, n·width]`.
    pub fn write(&self, x: Tensor<2>, y: Tensor<2>, coefficients: &Coefficients) -> Tensor<2> {
        let shape = x.dims();
        let tokens = shape[0];
        let coefficients = coefficients.0.clone();
        if fused::available(&x) {
            let operation = FusedWrite { streams: self.streams };
            let inputs = [fused::input(x), fused::input(y), fused::input(coefficients)];
            return fused::apply(operation, inputs, shape);
        }
        let (n, width) = (self.streams, self.width);
        let write = coefficients.clone().narrow(1, n, n).reshape([tokens, n, 1]);
        let mix = coefficients.narrow(1, 2 * n, n * n).reshape([tokens, n, n]);
        let mixed = mix.matmul(x.reshape([tokens, n, width]));
        (mixed + write * y.reshape([tokens, 1, width])).reshape(shape)
    }
}

impl DeclareTraining for HyperConnection {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam(&self.projection);
        plan.adam_without_decay(&self.scale);
        plan.adam_without_decay(&self.bias);
    }
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
