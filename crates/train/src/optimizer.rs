//! What trains the weights: Muon for the matrices of the blocks, Adam for everything else, as each module declares it
//! ([`DeclareTraining`]).
//!
//! Muon (Jordan et al., 2024, "Muon: an optimizer for hidden layers") replaces a matrix's momentum by the nearest
//! semi-orthogonal matrix, found by five Newton–Schulz steps. Its update is scaled by `0.2·√(max(rows, columns))`
//! (arXiv 2502.16982), so that one rate and one decay serve Muon and Adam alike. Every matrix is orthogonalised by
//! itself, also where a weight holds several: gate and up, keys and values, the keys of every gate, the experts of a
//! stack. Matrices of one shape are orthogonalised in one batch. Burn's own Muon agrees with the published algorithm
//! on one matrix, but norms a stack as if it were one (see `docs/log.md`).
//!
//! Memory rows are not here: the store trains them, and no decay or clipping touches them.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use engram_config::OptimizerConfig;
use engram_import::HostTensor;
use engram_model::{DeclareTraining, Matrices, TrainingPlan, WeightTraining, fused_on};

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

/// What one step takes from its gradients and schedule.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// Factor on the gradients.
    clip: f32,
    /// Factor on the peak rates.
    schedule: f32,
}

/// Updates of Muon by the weight's name, before its rate: orthogonal matrices times `0.2·√(max(rows, columns))`.
type MuonUpdates = BTreeMap<String, Tensor<1>>;

impl Optimizer {
    /// An optimiser that has not stepped yet; its state lives on `device`.
    pub fn new(config: OptimizerConfig, device: &Device) -> Self {
        Self { config, device: device.clone().inner(), step: 0, state: BTreeMap::new() }
    }

    /// Steps taken.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Clips `gradients`, whose [`global_norm`] is `norm`, and applies them at `schedule` times the peak rates. Weights
    /// without a gradient stay as they are.
    ///
    /// # Panics
    /// When a weight has a gradient, but its module does not declare how it is trained.
    pub fn step<M: Module + DeclareTraining>(
        &mut self,
        model: M,
        mut gradients: Gradients,
        norm: f32,
        schedule: f32,
    ) -> M {
        self.step += 1;
        let step = Step { clip: (self.config.clip / norm.max(f32::MIN_POSITIVE)).min(1.0), schedule };
        let plan = TrainingPlan::of(&model);
        let mut updates = self.muon_updates(&model, &plan, &mut gradients, step);
        parameters::update(model, &mut |weight, values| {
            let name = &weight.name;
            if let Some(update) = updates.remove(name) {
                return self.apply_muon(values, update, step);
            }
            let Some(gradient) = gradients.remove(name) else { return values };
            match plan.get(weight.id) {
                Some(WeightTraining::Adam { decay }) => self.adam(name, values, gradient, *decay, step),
                _ => panic!("no module declares how `{name}` is trained"),
            }
        })
    }

    /// The updates of all weights of `model` that Muon trains; takes their `gradients`.
    fn muon_updates<M: Module>(
        &mut self,
        model: &M,
        plan: &TrainingPlan,
        gradients: &mut Gradients,
        step: Step,
    ) -> MuonUpdates {
        let apart = self.config.muon_heads_apart;
        let mut batches = Batches::default();
        let mut weights = Vec::new();
        for weight in parameters::list(model) {
            let Some(WeightTraining::Muon(matrices)) = plan.get(weight.id) else { continue };
            let Some(gradient) = gradients.remove(&weight.name) else { continue };
            // Orthogonalisation forgets the gradient's scale, so that clipping it would change nothing but the
            // mixture with earlier steps; it is clipped all the same, as one vector with the rest.
            let momentum = self.nesterov(&weight.name, gradient, step.clip);
            let parts = matrices.split(momentum, &weight.shape, apart).into_iter();
            let places = parts.map(|part| batches.add(part)).collect();
            weights.push((weight, matrices, places));
        }
        let batches = batches.orthogonalised(fused_on(&self.device));
        let update = |(weight, matrices, places): (parameters::Weight, &Matrices, Vec<Place>)| {
            let parts = places.into_iter().map(|place| batches.get(place)).collect();
            (weight.name, matrices.join(parts, &weight.shape, apart))
        };
        weights.into_iter().map(update).collect()
    }

    /// Nesterov's momentum after a gradient: with m ← μ·m + g, it is g + μ·m.
    fn nesterov(&mut self, name: &str, gradient: Tensor<1>, clip: f32) -> Tensor<1> {
        let mu = self.config.momentum;
        let momentum = self.take(name, "momentum", gradient.dims()[0]);
        if fused_on(&self.device) {
            let (mut momentum, mut nesterov) = (host(momentum), host(gradient));
            for (momentum, gradient) in momentum.iter_mut().zip(&mut nesterov) {
                *momentum = mu * *momentum + clip * *gradient;
                *gradient = clip * *gradient + mu * *momentum;
            }
            self.put(name, "momentum", device_tensor(momentum, &self.device));
            return device_tensor(nesterov, &self.device);
        }
        let gradient = gradient.mul_scalar(clip);
        let momentum = momentum.mul_scalar(mu) + gradient.clone();
        let nesterov = gradient + momentum.clone().mul_scalar(mu);
        self.put(name, "momentum", momentum);
        nesterov
    }

    fn apply_muon(&self, weight: Tensor<1>, update: Tensor<1>, step: Step) -> Tensor<1> {
        let rate = step.schedule * self.config.muon_rate;
        let keep = 1.0 - rate * self.config.weight_decay;
        if fused_on(&self.device) {
            let (mut weight, update) = (host(weight), host(update));
            let pairs = weight.iter_mut().zip(&update);
            pairs.for_each(|(weight, update)| *weight = *weight * keep - rate * update);
            return device_tensor(weight, &self.device);
        }
        weight.mul_scalar(keep) - update.mul_scalar(rate)
    }

    fn adam(
        &mut self,
        name: &str,
        weight: Tensor<1>,
        gradient: Tensor<1>,
        decays: bool,
        step: Step,
    ) -> Tensor<1> {
        let [beta1, beta2] = self.config.betas;
        let rate = step.schedule * self.config.adam_rate;
        let decay = if decays { self.config.adam_weight_decay } else { 0.0 };
        let count = weight.dims()[0];
        let (first, second) = (self.take(name, "first", count), self.take(name, "second", count));
        if fused_on(&self.device) {
            let (mut weight, mut gradient) = (host(weight), host(gradient));
            gradient.iter_mut().for_each(|gradient| *gradient *= step.clip);
            let (mut first, mut second) = (host(first), host(second));
            let epsilon = self.config.epsilon;
            let adam = engram_kernels::AdamStep { rate, beta1, beta2, epsilon, decay, step: self.step };
            engram_kernels::adam_step(&mut weight, &gradient, &mut first, &mut second, &adam);
            self.put(name, "first", device_tensor(first, &self.device));
            self.put(name, "second", device_tensor(second, &self.device));
            return device_tensor(weight, &self.device);
        }
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(self.step as f64)) as f32;
        let gradient = gradient.mul_scalar(step.clip);
        let first = first.mul_scalar(beta1) + gradient.clone().mul_scalar(1.0 - beta1);
        let second = second.mul_scalar(beta2) + gradient.square().mul_scalar(1.0 - beta2);
        let root = second.clone().div_scalar(correction(beta2)).sqrt().add_scalar(self.config.epsilon);
        let update = first.clone().div_scalar(correction(beta1)) / root;
        self.put(name, "first", first);
        self.put(name, "second", second);
        weight.mul_scalar(1.0 - rate * decay) - update.mul_scalar(rate)
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
            .map(|(name, tensor)| {
                (parameters::name_of_today(name), device_tensor(tensor.values, &self.device))
            })
            .collect();
    }
}

/// Matrices of one shape are orthogonalised together: `[matrices, rows, columns]` by rows and columns.
#[derive(Default)]
struct Batches {
    by_shape: BTreeMap<[usize; 2], Vec<Tensor<3>>>,
    /// Matrices of each shape so far.
    counts: BTreeMap<[usize; 2], usize>,
}

/// Where matrices stand among those of their shape.
struct Place {
    shape: [usize; 2],
    first: usize,
    count: usize,
}

impl Batches {
    /// Adds `matrices`, `[matrices, rows, columns]`.
    fn add(&mut self, matrices: Tensor<3>) -> Place {
        let [count, rows, columns] = matrices.dims();
        let shape = [rows, columns];
        let next = self.counts.entry(shape).or_default();
        let place = Place { shape, first: *next, count };
        *next += count;
        self.by_shape.entry(shape).or_default().push(matrices);
        place
    }

    /// Every matrix made orthogonal and scaled.
    fn orthogonalised(self, fused: bool) -> Orthogonal {
        let orthogonal = |([rows, columns], matrices): ([usize; 2], Vec<Tensor<3>>)| {
            let matrices = Tensor::cat(matrices, 0);
            let found = if fused { newton_schulz_fused(matrices) } else { newton_schulz(matrices) };
            ([rows, columns], found.mul_scalar(MUON_SCALE * (rows.max(columns) as f32).sqrt()))
        };
        Orthogonal(self.by_shape.into_iter().map(orthogonal).collect())
    }
}

/// Orthogonal matrices by shape.
struct Orthogonal(BTreeMap<[usize; 2], Tensor<3>>);

impl Orthogonal {
    fn get(&self, place: Place) -> Tensor<3> {
        self.0[&place.shape].clone().narrow(0, place.first, place.count)
    }
}

/// Root mean square of an update per unit of rate, of a square matrix times its root of rows: as long as Adam's steps
/// (arXiv 2502.16982, section 2.2).
const MUON_SCALE: f32 = 0.2;

/// Newton–Schulz steps of Muon.
const NEWTON_SCHULZ_STEPS: usize = 5;

/// [`newton_schulz`] by the CPU's kernel.
fn newton_schulz_fused(g: Tensor<3>) -> Tensor<3> {
    let ([count, rows, columns], device) = (g.dims(), g.device());
    let x = engram_kernels::newton_schulz(&host(g.reshape([count * rows * columns])), rows, columns);
    Tensor::from_data(TensorData::new(x, [count, rows, columns]), &device)
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
    let squares: Vec<f64> = if fused_on(&device) {
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

fn host(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("an f32 tensor")
}

fn device_tensor(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
