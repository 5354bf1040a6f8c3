//! Mixture of experts: fine-grained routed experts beside a shared one (DeepSeekMoE, arXiv 2401.06066), chosen by
//! sigmoid scores and balanced without a loss (arXiv 2408.15664).

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Int, Tensor, TensorData};
use engram_kernels::{ExpertsInput, ExpertsSaved, ExpertsShape};

use crate::config::{ExpertsConfig, ModelConfig};
use crate::feed_forward::{FeedForward, swiglu};
use crate::fused::{self, Operation, Pass};
use crate::init::Init;
use crate::linear::{Linear, Precision, product};

/// The feed-forward of a block with experts.
#[derive(Module, Debug)]
pub struct Experts {
    /// Affinities of tokens and experts, `[width, routed]`.
    pub router: Linear,
    /// Balancing bias, `[routed]`: it moves the choice of experts, never their weight, and has no gradient.
    pub balance: Param<Tensor<1>>,
    /// Gate, then up of every expert, `[routed, width, 2·hidden]`.
    pub input: Param<Tensor<3>>,
    /// `[routed, hidden, width]`.
    pub output: Param<Tensor<3>>,
    /// Seen by every token.
    pub shared: Option<FeedForward>,
    active: usize,
    bf16: bool,
}

/// The experts chosen for each token, `[tokens, active]`, best first.
#[derive(Debug, Clone)]
pub struct Choice {
    experts: Arc<[u32]>,
    active: usize,
    routed: usize,
}

impl Choice {
    /// Takes the `active` largest of `scores + balance` per token, `[tokens, routed]`; ties go to the lower index.
    fn best(scores: &[f32], balance: &[f32], active: usize) -> Self {
        let routed = balance.len();
        let mut experts = Vec::with_capacity(scores.len() / routed * active);
        let mut order: Vec<(f32, u32)> = Vec::with_capacity(routed);
        for row in scores.chunks_exact(routed) {
            order.clear();
            order.extend(
                row.iter().zip(balance).zip(0..).map(|((score, bias), expert)| (score + bias, expert)),
            );
            let better = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if active < routed {
                order.select_nth_unstable_by(active - 1, better);
                order.truncate(active);
            }
            order.sort_unstable_by(better);
            experts.extend(order.iter().map(|&(_, expert)| expert));
        }
        Self { experts: experts.into(), active, routed }
    }

    /// Tokens that each expert sees, `[routed]`.
    pub fn loads(&self) -> Vec<u64> {
        let mut loads = vec![0; self.routed];
        for &expert in self.experts.iter() {
            loads[expert as usize] += 1;
        }
        loads
    }

    fn tensor(&self, device: &burn::tensor::Device) -> Tensor<2, Int> {
        let experts: Vec<i32> = self.experts.iter().map(|&expert| expert as i32).collect();
        let tokens = experts.len() / self.active;
        Tensor::from_data(TensorData::new(experts, [tokens, self.active]), device)
    }
}

impl Experts {
    pub(crate) fn new(
        config: &ModelConfig,
        experts: &ExpertsConfig,
        init: &Init,
        precision: Precision,
    ) -> Self {
        let (width, hidden, scale) = (config.width, experts.width, config.output_scale());
        let deviation = |fan_in: usize, scale: f32| scale / (fan_in as f32).sqrt();
        let shared = (experts.shared_width > 0)
            .then(|| FeedForward::new(&init.child("shared"), width, experts.shared_width, scale, precision));
        let balance = init.constant([experts.routed], 0.0).set_require_grad(false);
        Self {
            // The router stays in f32: near ties decide which expert a token sees.
            router: Linear::new(&init.child("router"), [width, experts.routed], 1.0, Precision::F32),
            balance,
            input: init.normal("input", [experts.routed, width, 2 * hidden], deviation(width, 1.0)),
            output: init.normal("output", [experts.routed, hidden, width], deviation(hidden, scale)),
            shared,
            active: experts.active,
            bf16: precision == Precision::Bf16,
        }
    }

    /// `[tokens, width]` to the same, and which experts saw which token.
    pub fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Choice) {
        let logits = self.router.forward(x.clone());
        let choice = self.choose(&logits);
        let gates = gates(logits, &choice);
        let routed = if fused::available(&x) {
            self.fused(x.clone(), gates, choice.clone())
        } else {
            self.composed(x.clone(), gates, &choice)
        };
        match &self.shared {
            Some(shared) => (routed + shared.forward(x), choice),
            None => (routed, choice),
        }
    }

    /// The balancing bias after a step in which experts saw `loads` tokens: up by `rate` where an expert saw fewer
    /// than the mean, down where it saw more (arXiv 2408.15664, algorithm 1).
    pub fn rebalance(&mut self, loads: &[u64], rate: f32) {
        let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
        let step = loads.iter().map(|&load| {
            let error = mean - load as f64;
            if error == 0.0 { 0.0 } else { rate * error.signum() as f32 }
        });
        let step: Vec<f32> = step.collect();
        let device = self.balance.val().device();
        let step = Tensor::from_data(TensorData::new(step, [loads.len()]), &device);
        self.balance =
            self.balance.clone().map(|balance| (balance.detach() + step).detach().set_require_grad(false));
    }

    fn choose(&self, logits: &Tensor<2>) -> Choice {
        let scores = values(sigmoid(logits.clone().inner_or_self()));
        let balance = values(self.balance.val().inner_or_self());
        Choice::best(&scores, &balance, self.active)
    }

    fn fused(&self, x: Tensor<2>, gates: Tensor<2>, choice: Choice) -> Tensor<2> {
        let output_shape = x.dims();
        let [experts, width, double] = self.input.val().dims();
        let shape = ExpertsShape { experts, active: self.active, width, hidden: double / 2 };
        let inputs = [
            fused::input(x),
            fused::input(gates),
            fused::input(self.input.val()),
            fused::input(self.output.val()),
        ];
        fused::apply(FusedExperts { shape, choice }, inputs, output_shape)
    }

    /// Every expert in turn over the tokens that chose it.
    fn composed(&self, x: Tensor<2>, gates: Tensor<2>, choice: &Choice) -> Tensor<2> {
        let [tokens, width] = x.dims();
        let device = x.device();
        let [routed, _, double] = self.input.val().dims();
        let flat_gates = gates.reshape([tokens * self.active, 1]);
        let mut sum = Tensor::zeros([tokens, width], &device);
        for expert in 0..routed {
            let slots: Vec<i32> = (0..)
                .zip(choice.experts.iter())
                .filter(|&(_, &e)| e as usize == expert)
                .map(|(s, _)| s)
                .collect();
            if slots.is_empty() {
                continue;
            }
            let count = slots.len();
            let rows: Vec<i32> = slots.iter().map(|slot| slot / self.active as i32).collect();
            let slots = Tensor::<1, Int>::from_data(TensorData::new(slots, [count]), &device);
            let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &device);
            let input = self.input.val().narrow(0, expert, 1).reshape([width, double]);
            let output = self.output.val().narrow(0, expert, 1).reshape([double / 2, width]);
            let hidden = swiglu(product(x.clone().select(0, rows.clone()), input, self.bf16));
            let y = product(hidden, output, self.bf16) * flat_gates.clone().select(0, slots);
            sum = sum.select_assign(0, rows, y, burn::tensor::IndexingUpdateOp::Add);
        }
        sum
    }
}

/// Weights of the chosen experts, `[tokens, active]`: their sigmoid scores, normalised to sum to one.
fn gates(logits: Tensor<2>, choice: &Choice) -> Tensor<2> {
    if fused::available(&logits) {
        let shape = [logits.dims()[0], choice.active];
        return fused::apply(FusedGates { choice: choice.clone() }, [fused::input(logits)], shape);
    }
    let chosen = choice.tensor(&logits.device());
    let scores = sigmoid(logits).gather(1, chosen);
    scores.clone() / scores.sum_dim(1)
}

#[derive(Debug)]
struct FusedGates {
    choice: Choice,
}

impl Operation<1> for FusedGates {
    type Saved = ();

    fn forward(&self, [logits]: [&[f32]; 1]) -> (Vec<f32>, ()) {
        let mut gates = Vec::with_capacity(self.choice.experts.len());
        self.each_token(logits, |row, chosen| {
            let start = gates.len();
            gates.extend(chosen.iter().map(|&expert| logistic(row[expert as usize])));
            let sum: f32 = gates[start..].iter().sum();
            gates[start..].iter_mut().for_each(|gate| *gate /= sum);
        });
        (gates, ())
    }

    /// With s the scores, S their sum and g = s/S: ds = (dg − Σ dg·g)/S, and dlogit = ds·s·(1−s).
    fn backward(&self, pass: Pass<'_, (), 1>) -> [Vec<f32>; 1] {
        let mut gradient = vec![0.0; pass.inputs[0].len()];
        let routed = self.choice.routed;
        let active = self.choice.active;
        let rows = pass.inputs[0].chunks_exact(routed).zip(self.choice.experts.chunks_exact(active));
        let gates = pass.output.chunks_exact(active).zip(pass.gradient.chunks_exact(active));
        for (((row, chosen), (gate, upstream)), out) in rows.zip(gates).zip(gradient.chunks_exact_mut(routed))
        {
            let sum: f32 = chosen.iter().map(|&expert| logistic(row[expert as usize])).sum();
            let mean: f32 = gate.iter().zip(upstream).map(|(g, d)| g * d).sum();
            for (&expert, d) in chosen.iter().zip(upstream) {
                let score = logistic(row[expert as usize]);
                out[expert as usize] += (d - mean) / sum * score * (1.0 - score);
            }
        }
        [gradient]
    }
}

impl FusedGates {
    fn each_token(&self, logits: &[f32], mut visit: impl FnMut(&[f32], &[u32])) {
        let rows = logits.chunks_exact(self.choice.routed);
        for (row, chosen) in rows.zip(self.choice.experts.chunks_exact(self.choice.active)) {
            visit(row, chosen);
        }
    }
}

fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[derive(Debug)]
struct FusedExperts {
    shape: ExpertsShape,
    choice: Choice,
}

impl FusedExperts {
    fn input<'a>(&'a self, [x, gate, w_in, w_out]: [&'a [f32]; 4]) -> ExpertsInput<'a> {
        ExpertsInput { x, choice: &self.choice.experts, gate, w_in, w_out }
    }
}

impl Operation<4> for FusedExperts {
    type Saved = ExpertsSaved;

    fn forward(&self, inputs: [&[f32]; 4]) -> (Vec<f32>, ExpertsSaved) {
        let experts = engram_kernels::experts(&self.input(inputs), self.shape);
        (experts.output, experts.saved)
    }

    fn backward(&self, pass: Pass<'_, ExpertsSaved, 4>) -> [Vec<f32>; 4] {
        let input = self.input(pass.inputs);
        let gradients = engram_kernels::experts_backward(pass.gradient, &input, self.shape, pass.saved);
        [gradients.x, gradients.gate, gradients.w_in, gradients.w_out]
    }
}

/// The values of a tensor, on the host.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("an f32 tensor")
}

/// A tensor without its graph, whether or not it has one.
pub(crate) trait InnerOrSelf {
    /// The tensor outside of autodiff.
    fn inner_or_self(self) -> Self;
}

impl<const D: usize> InnerOrSelf for Tensor<D> {
    fn inner_or_self(self) -> Self {
        if self.is_autodiff() { self.inner() } else { self }
    }
}
