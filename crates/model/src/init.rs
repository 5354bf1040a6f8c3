//! Initial weights, a function of the seed and the weight's name alone.
//!
//! Neither the device nor the order in which modules are built changes a weight, so that two models that share a
//! backbone share its first step, too.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

/// Where the weights of a module being built come from: a device, a seed and the path so far.
#[derive(Debug, Clone)]
pub struct Init {
    device: Device,
    /// None: every weight that would be drawn is zero.
    seed: Option<u64>,
    path: String,
}

impl Init {
    /// The root: weights on `device`, drawn from `seed`.
    pub fn new(device: &Device, seed: u64) -> Self {
        Self { device: device.clone(), seed: Some(seed), path: String::new() }
    }

    /// The root of weights that are all zero where others are drawn: they are to be replaced.
    pub(crate) fn blank(device: &Device) -> Self {
        Self { device: device.clone(), seed: None, path: String::new() }
    }

    /// The device that weights are made on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The submodule `name` of this one.
    pub fn child(&self, name: impl std::fmt::Display) -> Self {
        Self { path: format!("{}.{name}", self.path), ..self.clone() }
    }

    /// A weight of normal values with standard deviation `deviation`; 0 gives zeros.
    pub fn normal<const D: usize>(&self, name: &str, shape: [usize; D], deviation: f32) -> Param<Tensor<D>> {
        let Some(seed) = self.seed.filter(|_| deviation != 0.0) else {
            return self.constant(shape, 0.0);
        };
        let mut random = self.random(seed, name);
        let normal = Normal::new(0.0, deviation).expect("a finite, positive deviation");
        let values = (0..shape.iter().product()).map(|_| normal.sample(&mut random)).collect();
        self.values(shape, values)
    }

    /// A weight that is `value` everywhere.
    pub fn constant<const D: usize>(&self, shape: [usize; D], value: f32) -> Param<Tensor<D>> {
        self.values(shape, vec![value; shape.iter().product()])
    }

    /// A weight of the given values, row-major.
    pub fn values<const D: usize>(&self, shape: [usize; D], values: Vec<f32>) -> Param<Tensor<D>> {
        Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), &self.device))
    }

    fn random(&self, seed: u64, name: &str) -> ChaCha8Rng {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(self.path.as_bytes()).update(b".").update(name.as_bytes());
        ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
    }
}
