//! A causal depthwise convolution with its norm and residual.

use burn::tensor::Tensor;
use burn::tensor::activation::silu;
use engram_kernels::{ShortConvolutionShape, ShortConvolutionWeights};

use super::fused::{self, Operation, Pass, choose};
use super::rms_norm::normalise;
use super::token_sums::for_every_token;
use crate::sequences::{Run, Sequences};

/// What the convolution computes with beside its tensors.
#[derive(Debug, Clone)]
pub(crate) struct ConvolutionShape {
    pub(crate) sequences: Sequences,
    pub(crate) streams: usize,
    pub(crate) width: usize,
    /// Taps.
    pub(crate) kernel: usize,
    /// Tokens between taps.
    pub(crate) dilation: usize,
    pub(crate) epsilon: f64,
}

/// `u + SiLU(conv(RMSNorm(u)))`, `[tokens, M·width]`, with weights of the norm `[M, width]` and taps
/// `[M, width, kernel]`, the last at the token itself.
pub(crate) fn short_convolution(
    u: Tensor<2>,
    norm: Tensor<2>,
    taps: Tensor<3>,
    shape: ConvolutionShape,
) -> Tensor<2> {
    let output = u.dims();
    let fused = |(u, norm, taps, shape): (Tensor<2>, Tensor<2>, Tensor<3>, ConvolutionShape)| {
        fused::apply(shape, [fused::input(u), fused::input(norm), fused::input(taps)], output)
    };
    let composed = |(u, norm, taps, shape): (Tensor<2>, Tensor<2>, Tensor<3>, ConvolutionShape)| {
        shape.sequences.map_tensors([u], |run, [u]| composed(u, norm.clone(), taps.clone(), run, &shape))
    };
    choose(&u.device(), (u, norm, taps, shape), fused, composed)
}

fn composed(u: Tensor<2>, norm: Tensor<2>, taps: Tensor<3>, run: Run, shape: &ConvolutionShape) -> Tensor<2> {
    let ConvolutionShape { streams, width, kernel, dilation, epsilon, .. } = *shape;
    let (shape, batch, time) = (u.dims(), run.sequences, run.time);
    let channels = streams * width;
    let every_token = |weight: Tensor<2>| for_every_token(weight.reshape([channels]), shape[0]);
    let normed =
        normalise(u.clone().reshape([shape[0], streams, width]), epsilon).reshape(shape) * every_token(norm);
    let normed = normed.reshape([batch, time, channels]);
    let taps = taps.reshape([channels, kernel]);
    let mut sum = Tensor::zeros([batch, time, channels], &u.device());
    for tap in 0..kernel {
        let delay = (kernel - 1 - tap) * dilation;
        if delay >= time {
            continue;
        }
        let silence = Tensor::zeros([batch, delay, channels], &u.device());
        let shifted = Tensor::cat(vec![silence, normed.clone().narrow(1, 0, time - delay)], 1);
        let tap = every_token(taps.clone().narrow(1, tap, 1)).reshape([batch, time, channels]);
        sum = sum + shifted * tap;
    }
    u + silu(sum).reshape(shape)
}

impl ConvolutionShape {
    fn of(&self, run: Run) -> ShortConvolutionShape {
        let Self { streams, width, kernel, dilation, .. } = *self;
        let epsilon = self.epsilon as f32;
        ShortConvolutionShape { time: run.time, streams, width, kernel, dilation, epsilon }
    }
}

impl Operation<3> for ConvolutionShape {
    /// 1/rms of every stream of every token.
    type Saved = Vec<f32>;

    fn forward(&self, [u, norm, filter]: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
        let weights = ShortConvolutionWeights { norm, filter };
        let all = self.sequences.map([u], |run, [u]| {
            let convolution = engram_kernels::short_convolution(u, weights, self.of(run));
            [convolution.output, convolution.inverse_rms]
        });
        all.into()
    }

    fn backward(&self, pass: Pass<'_, Vec<f32>, 3>) -> [Vec<f32>; 3] {
        let [u, norm, filter] = pass.inputs;
        let weights = ShortConvolutionWeights { norm, filter };
        let (mut of_norm, mut of_filter) = (Vec::new(), Vec::new());
        let data = [pass.gradient, u, pass.saved];
        let [of_input] = self.sequences.map(data, |run, [gradient, u, inverse_rms]| {
            let shape = self.of(run);
            let gradients =
                engram_kernels::short_convolution_backward(gradient, u, weights, shape, inverse_rms);
            add(&mut of_norm, gradients.norm);
            add(&mut of_filter, gradients.filter);
            [gradients.input]
        });
        [of_input, of_norm, of_filter]
    }
}

/// Adds `values` to the `sum`, if there is one yet.
fn add(sum: &mut Vec<f32>, values: Vec<f32>) {
    if sum.is_empty() {
        *sum = values;
    } else {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
}
