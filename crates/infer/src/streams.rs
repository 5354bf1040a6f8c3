//! Hyper-connections: residual streams around a layer (arXiv 2512.24880), for decoding.

use engram_config::ModelConfig;
use engram_kernels::{
    HyperShape, HyperWeights, PackedMatrix, add, hyper_coefficients_of_product, hyper_read, hyper_write,
};

use crate::weights::{Loader, WeightError};

/// One layer's connection to the streams.
#[derive(Debug)]
pub(crate) struct Streams {
    projection: PackedMatrix,
    /// φ as it is, whose shape the kernel checks.
    phi: Vec<f32>,
    scale: [f32; 3],
    bias: Vec<f32>,
    shape: HyperShape,
}

impl Streams {
    /// The connection called `name`; none where the model has one plain stream.
    pub(crate) fn load(
        loader: &Loader<'_>,
        name: &str,
        config: &ModelConfig,
    ) -> Result<Option<Self>, WeightError> {
        let Some(hyper) = &config.hyper_connections else { return Ok(None) };
        let loader = loader.child(name);
        let (n, width) = (hyper.streams, config.width);
        let (inputs, outputs) = (n * width, 2 * n + n * n);
        let phi = loader.values("projection", &[inputs, outputs])?;
        let scale = loader.vector("scale", 3)?;
        Ok(Some(Self {
            // Never rounded: it decides how streams mix, and is small.
            projection: loader.exact("projection", inputs, outputs)?,
            phi,
            scale: [scale[0], scale[1], scale[2]],
            bias: loader.vector("bias", outputs)?,
            shape: HyperShape {
                streams: n,
                width,
                epsilon: config.norm_epsilon,
                iterations: hyper.sinkhorn_iterations,
            },
        }))
    }

    pub(crate) fn bytes(&self) -> usize {
        self.projection.bytes() + size_of_val(&self.phi[..])
    }
}

/// `x + layer(x)`, or its hyper-connected form, `[rows, streams · width]`.
pub(crate) fn around(
    mut x: Vec<f32>,
    streams: Option<&Streams>,
    layer: impl FnOnce(&[f32]) -> Vec<f32>,
) -> Vec<f32> {
    match streams {
        Some(streams) => {
            let weights = HyperWeights { phi: &streams.phi, alpha: streams.scale, bias: &streams.bias };
            let product = streams.projection.product(&x);
            let coefficients = hyper_coefficients_of_product(&x, product, weights, streams.shape);
            let y = layer(&hyper_read(&x, &coefficients, streams.shape.streams));
            hyper_write(&x, &y, &coefficients, streams.shape.streams)
        }
        None => {
            let y = layer(&x);
            add(&mut x, &y);
            x
        }
    }
}
