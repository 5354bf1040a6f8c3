//! An adapter of low rank, to compare with: every matrix W of the blocks becomes W + 2·D·U, D `[in, rank]` and U
//! `[rank, out]` (arXiv 2106.09685).
//!
//! The product is merged into the weight before each step, and the weight's gradient is taken back to D and U after it.
//! The result is that of the usual form; a step costs as much as one of full fine-tuning.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use engram_import::HostTensor;
use engram_model::LanguageModel;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::dense_adam::Named;
use crate::parameters;

/// α / rank.
const SCALE: f32 = 2.0;

/// The matrices of a model that have an adapter, as they were.
#[derive(Debug)]
pub(crate) struct LowRank {
    rank: usize,
    device: Device,
    /// By name, with inputs and outputs.
    matrices: BTreeMap<String, (Tensor<1>, [usize; 2])>,
}

impl LowRank {
    /// For the matrices of the blocks of `model`, of the rank whose parameters are nearest to `parameters`, or of `rank`.
    /// `device` is one without autodiff.
    pub(crate) fn new(
        model: &LanguageModel,
        rank: Option<usize>,
        parameters: usize,
        device: &Device,
    ) -> Self {
        let mut matrices = BTreeMap::new();
        parameters::update(model.clone(), &mut |weight, values| {
            if let (true, &[input, output]) = (weight.name.starts_with("blocks."), &weight.shape[..]) {
                matrices.insert(weight.name.clone(), (values.clone(), [input, output]));
            }
            values
        });
        let each: usize = matrices.values().map(|(_, [input, output])| input + output).sum();
        let nearest = ((parameters as f64 / each.max(1) as f64).round() as usize).max(1);
        Self { rank: rank.unwrap_or(nearest), device: device.clone(), matrices }
    }

    /// The rank.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Whether the weight `name` has an adapter.
    pub(crate) fn changes(&self, name: &str) -> bool {
        self.matrices.contains_key(name)
    }

    /// Both factors of every matrix: D normal, of deviation 1/√in; U zero, so that nothing changes yet.
    pub(crate) fn draw(&self, seed: u64) -> BTreeMap<String, HostTensor> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut factors = BTreeMap::new();
        for (name, &(_, [input, output])) in &self.matrices {
            let deviation = (input as f32).sqrt().recip();
            let draw = |_| {
                let value: f32 = StandardNormal.sample(&mut random);
                value * deviation
            };
            let values = (0..input * self.rank).map(draw).collect();
            factors.insert(down(name), HostTensor { shape: vec![input, self.rank], values });
            let values = vec![0.0; self.rank * output];
            factors.insert(up(name), HostTensor { shape: vec![self.rank, output], values });
        }
        factors
    }

    /// W + 2·D·U, flat.
    pub(crate) fn merged(&self, name: &str, factors: &BTreeMap<String, HostTensor>) -> Option<Tensor<1>> {
        let (weight, [input, output]) = self.matrices.get(name)?;
        let product = self.tensor(&factors[&down(name)]).matmul(self.tensor(&factors[&up(name)]));
        Some(weight.clone() + product.mul_scalar(SCALE).reshape([input * output]))
    }

    /// Gradients of the factors from those of the matrices, flat and by name.
    pub(crate) fn gradients(
        &self,
        of_matrices: BTreeMap<String, Tensor<1>>,
        factors: &BTreeMap<String, HostTensor>,
    ) -> Named {
        let mut gradients = Named::new();
        for (name, gradient) in of_matrices {
            let Some(&(_, shape)) = self.matrices.get(&name) else { continue };
            let gradient = if gradient.is_autodiff() { gradient.inner() } else { gradient };
            let gradient = gradient.reshape(shape).mul_scalar(SCALE);
            let (of_down, of_up) = (down(&name), up(&name));
            let d = gradient.clone().matmul(self.tensor(&factors[&of_up]).transpose());
            let u = self.tensor(&factors[&of_down]).transpose().matmul(gradient);
            gradients.insert(of_down, d.into_data().try_into_vec().expect("f32"));
            gradients.insert(of_up, u.into_data().try_into_vec().expect("f32"));
        }
        gradients
    }

    fn tensor(&self, factor: &HostTensor) -> Tensor<2> {
        let data = TensorData::new(factor.values.clone(), [factor.shape[0], factor.shape[1]]);
        Tensor::from_data(data, &self.device)
    }
}

fn down(name: &str) -> String {
    format!("{name}.down")
}

fn up(name: &str) -> String {
    format!("{name}.up")
}
