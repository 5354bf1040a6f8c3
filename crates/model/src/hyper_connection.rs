//! Manifold-constrained hyper-connections (arXiv 2512.24880): n residual streams, from which a layer reads a
//! mixture and to which it writes back, while a doubly stochastic matrix mixes the streams among themselves.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use engram_kernels::HyperShape;

use crate::init::Init;
use crate::ops;
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
    epsilon: f32,
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
            epsilon,
        }
    }

    /// The coefficients of streams `[tokens, n·width]`.
    pub fn coefficients(&self, x: Tensor<2>) -> Coefficients {
        let shape = HyperShape {
            streams: self.streams,
            width: self.width,
            epsilon: self.epsilon,
            iterations: self.iterations,
        };
        let (projection, scale, bias) = (self.projection.val(), self.scale.val(), self.bias.val());
        Coefficients(ops::hyper_coefficients(x, projection, scale, bias, shape))
    }

    /// What the layer sees: `Σ_m pre_m · x_m`, `[tokens, width]`.
    pub fn read(&self, x: Tensor<2>, coefficients: &Coefficients) -> Tensor<2> {
        ops::hyper_read(x, coefficients.0.clone(), self.streams)
    }

    /// The streams after the layer gave `y`: `x'_m = Σ_j res_mj · x_j + post_m · y`, `[tokens, n·width]`.
    pub fn write(&self, x: Tensor<2>, y: Tensor<2>, coefficients: &Coefficients) -> Tensor<2> {
        ops::hyper_write(x, y, coefficients.0.clone(), self.streams)
    }
}

impl DeclareTraining for HyperConnection {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam(&self.projection);
        plan.adam_without_decay(&self.scale);
        plan.adam_without_decay(&self.bias);
    }
}
