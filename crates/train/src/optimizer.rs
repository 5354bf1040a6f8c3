//! What trains the weights: Muon for the matrices of the blocks, Adam for everything else.
//!
//! Muon (Jordan et al., 2024, "Muon: an optimizer for hidden layers") replaces a matrix's momentum by the nearest
//! semi-orthogonal matrix, found by five Newton–Schulz steps. Its update is scaled by `0.2·√(max(rows, columns))`
//! (arXiv 2502.16982), so that one rate and one decay serve Muon and Adam alike. A stack of experts
//! `[experts, rows, columns]` is a batch of matrices, each orthogonalised by itself. Burn's own Muon agrees with
//! the published algorithm on one matrix, but norms a stack as if it were one (see `docs/log.md`).
//!
//! Memory rows are not here: the store trains them, and no decay or clipping touches them.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use engram_config::OptimizerConfig;
use engram_import::HostTensor;

use crate::parameters;

/// Gradients of a model's weights, by name, flattened.
pub type Gradients = BTreeMap<String, Tensor<1>>;

/// Muon and Adam with their state.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    device: Device,
    step: u64,
    /// By name and moment: `….momentum` for Muon, `….first` and `….second` for Adam.
    state: BTreeMap<String, Tensor<1>>,
}

impl Optimizer {
    /// An optimiser that has not stepped yet; its state lives on `device`.
    pub fn new(config: OptimizerConfig, device: &Device) -> Self {
        Self { config, device: device.clone().inner(), step: 0, state: BTreeMap::new() }
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Clips `gradients`, whose [`global_norm`] is `norm`, and applies them at `schedule` times the peak rates.
    pub fn step<M: Module>(&mut self, model: M, mut gradients: Gradients, norm: f32, schedule: f32) -> M {
        self.step += 1;
        let clip = (self.config.clip / norm.max(f32::MIN_POSITIVE)).min(1.0);
        parameters::update(model, &mut |name, shape, weight| {
            let Some(gradient) = gradients.remove(name) else { return weight };
            match matrix_shape(name, shape) {
                // Orthogonalisation forgets the gradient's scale, so that clipping it would change nothing but the
                // mixture with earlier steps; it is clipped all the same, as one vector with the rest.
                Some(matrices) => self.muon(name, matrices, weight, gradient, clip, schedule),
                None => self.adam(name, weight, gradient, clip, schedule),
            }
        })
    }

    fn muon(
        &mut self,
        name: &str,
        [count, rows, columns]: [usize; 3],
        weight: Tensor<1>,
        gradient: Tensor<1>,
        clip: f32,
        schedule: f32,
    ) -> Tensor<1> {
        let mu = self.config.momentum;
        let rate = schedule * self.config.muon_rate;
        let scale = rate * 0.2 * (rows.max(columns) as f32).sqrt();
        let keep = 1.0 - rate * self.config.weight_decay;
        let momentum = self.take(name, "momentum", weight.dims()[0]);
        if on_cpu(&self.device) {
            let (mut weight, mut momentum, mut update) = (host(weight), host(momentum), host(gradient));
            for (momentum, gradient) in momentum.iter_mut().zip(&mut update) {
                *momentum = mu * *momentum + clip * *gradient;
                *gradient = clip * *gradient + mu * *momentum;
            }
            let update = engram_kernels::newton_schulz(&update, rows, columns);
            weight
                .iter_mut()
                .zip(&update)
                .for_each(|(weight, update)| *weight = *weight * keep - scale * update);
            self.put(name, "momentum", device_tensor(momentum, &self.device));
            return device_tensor(weight, &self.device);
        }
        let gradient = gradient.mul_scalar(clip);
        let momentum = momentum.mul_scalar(mu) + gradient.clone();
        let nesterov = gradient + momentum.clone().mul_scalar(mu);
        self.put(name, "momentum", momentum);
        let update = newton_schulz(nesterov.reshape([count, rows, columns]));
        weight.mul_scalar(keep) - update.reshape([count * rows * columns]).mul_scalar(scale)
    }

    fn adam(
        &mut self,
        name: &str,
        weight: Tensor<1>,
        gradient: Tensor<1>,
        clip: f32,
        schedule: f32,
    ) -> Tensor<1> {
        let [beta1, beta2] = self.config.betas;
        let rate = schedule * self.config.adam_rate;
        let count = weight.dims()[0];
        let (first, second) = (self.take(name, "first", count), self.take(name, "second", count));
        let step = self.step as i32;
        let (correct1, correct2) = (1.0 - beta1.powi(step), 1.0 - beta2.powi(step));
        if on_cpu(&self.device) {
            let (mut weight, mut gradient) = (host(weight), host(gradient));
            gradient.iter_mut().for_each(|gradient| *gradient *= clip);
            let (mut first, mut second) = (host(first), host(second));
            let adam = engram_kernels::AdamStep {
                rate,
                beta1,
                beta2,
                epsilon: self.config.epsilon,
                decay: 0.0,
                step: self.step,
            };
            engram_kernels::adam_step(&mut weight, &gradient, &mut first, &mut second, &adam);
            self.put(name, "first", device_tensor(first, &self.device));
            self.put(name, "second", device_tensor(second, &self.device));
            return device_tensor(weight, &self.device);
        }
        let gradient = gradient.mul_scalar(clip);
        let first = first.mul_scalar(beta1) + gradient.clone().mul_scalar(1.0 - beta1);
        let second = second.mul_scalar(beta2) + gradient.square().mul_scalar(1.0 - beta2);
        let root = (second.clone().div_scalar(correct2)).sqrt().add_scalar(self.config.epsilon);
        let update = first.clone().div_scalar(correct1) / root;
        self.put(name, "first", first);
        self.put(name, "second", second);
        weight - update.mul_scalar(rate)
    }

    fn take(&mut self, name: &str, moment: &str, count: usize) -> Tensor<1> {
        let state = self.state.remove(&format!("{name}.{moment}"));
        state.unwrap_or_else(|| Tensor::zeros([count], &self.device))
    }

    fn put(&mut self, name: &str, moment: &str, tensor: Tensor<1>) {
        self.state.insert(format!("{name}.{moment}"), tensor);
    }

    /// The whole state, by name and moment.
    pub fn export(&self) -> BTreeMap<String, HostTensor> {
        let tensor =
            |tensor: &Tensor<1>| HostTensor { shape: tensor.dims().to_vec(), values: host(tensor.clone()) };
        self.state.iter().map(|(name, state)| (name.clone(), tensor(state))).collect()
    }

    /// Takes up where [`export`](Self::export) was called, after `step` steps.
    pub fn import(&mut self, state: BTreeMap<String, HostTensor>, step: u64) {
        self.step = step;
        self.state = state
            .into_iter()
            .map(|(name, tensor)| (name, device_tensor(tensor.values, &self.device)))
            .collect();
    }
}

/// Newton–Schulz steps of Muon.
const NEWTON_SCHULZ_STEPS: usize = 5;

/// A weight's shape as a batch of matrices if Muon trains it: projections of attention, feed-forward, experts and
/// memory. Embedding, head, router, norms, convolutions and hyper-connections are Adam's.
fn matrix_shape(name: &str, shape: &[usize]) -> Option<[usize; 3]> {
    let inside_block = name.starts_with("blocks.");
    let others = ["router", "norm", "convolution", "_streams"];
    if !inside_block || others.iter().any(|other| name.contains(other)) {
        return None;
    }
    match *shape {
        [rows, columns] => Some([1, rows, columns]),
        [count, rows, columns] => Some([count, rows, columns]),
        _ => None,
    }
}

/// The quintic Newton–Schulz iteration on a batch of matrices, in Burn's primitives.
fn newton_schulz(g: Tensor<3>) -> Tensor<3> {
    let [_, rows, columns] = g.dims();
    let tall = rows > columns;
    let mut x = if tall { g.swap_dims(1, 2) } else { g };
    let norm = x.clone().square().sum_dim(2).sum_dim(1).sqrt().add_scalar(1e-7);
    x = x / norm;
    for _ in 0..NEWTON_SCHULZ_STEPS {
        let gram = x.clone().matmul(x.clone().swap_dims(1, 2));
        let polynomial = gram.clone().mul_scalar(-4.7750) + gram.clone().matmul(gram).mul_scalar(2.0315);
        x = x.clone().mul_scalar(3.4445) + polynomial.matmul(x);
    }
    if tall { x.swap_dims(1, 2) } else { x }
}

/// Euclidean norm of all gradients as one vector.
pub fn global_norm(gradients: &Gradients) -> f32 {
    let Some(device) = gradients.values().next().map(Tensor::device) else { return 0.0 };
    let squares: Vec<f64> = if on_cpu(&device) {
        let squares =
            |gradient: &Tensor<1>| host(gradient.clone()).iter().map(|&value| f64::from(value).powi(2)).sum();
        gradients.values().map(squares).collect()
    } else {
        // One read for all: each waits for the device.
        let squares = gradients.values().map(|gradient| gradient.clone().square().sum()).collect();
        host(Tensor::cat(squares, 0)).into_iter().map(f64::from).collect()
    };
    squares.iter().sum::<f64>().sqrt() as f32
}

fn on_cpu(device: &Device) -> bool {
    *device == Device::flex()
}

fn host(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("an f32 tensor")
}

fn device_tensor(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
