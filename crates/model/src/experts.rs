//! Mixture of experts: fine-grained routed experts beside a shared one (DeepSeekMoE, arXiv 2401.06066), chosen by
//! sigmoid scores and balanced without a loss (arXiv 2408.15664).

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Int, Tensor, TensorData};
use engram_kernels::{ExpertsInput, ExpertsSaved, ExpertsShape};
use rayon::prelude::*;

use crate::feed_forward::{FeedForward, swiglu};
use crate::fused::{self, Operation, Pass};
use crate::init::Init;
use crate::linear::{Linear, product};
use crate::selection::{int, select};
use crate::training::{DeclareTraining, Matrices, TrainingPlan};
use engram_config::{ExpertsConfig, ModelConfig, Precision};

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
        let mut experts = vec![0; scores.len() / routed * active];
        let rows = scores.par_chunks_exact(routed).with_min_len(1 << 10);
        rows.zip(experts.par_chunks_exact_mut(active)).for_each_with(Vec::new(), |order, (row, best)| {
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
            best.iter_mut().zip(order).for_each(|(best, &mut (_, expert))| *best = expert);
        });
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

    /// Tokens take the places of their experts in order.
    fn dispatch(&self) -> Dispatch {
        let loads = self.loads();
        let most = loads.iter().max().map_or(0, |&most| most as usize);
        let places = most.next_multiple_of(PLACES);
        let tokens = self.experts.len() / self.active;
        let mut token: Vec<u32> = (0..self.routed * places).map(|place| (place % tokens) as u32).collect();
        let mut next: Vec<usize> = (0..self.routed).map(|expert| expert * places).collect();
        let mut place = Vec::with_capacity(self.experts.len());
        for (slot, &expert) in self.experts.iter().enumerate() {
            let next = &mut next[expert as usize];
            token[*next] = (slot / self.active) as u32;
            place.push(*next as u32);
            *next += 1;
        }
        Dispatch { token: token.into(), place: place.into() }
    }

    fn tensor(&self, device: &burn::tensor::Device) -> Tensor<2, Int> {
        let tokens = self.experts.len() / self.active;
        int(&self.experts, device).reshape([tokens, self.active])
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

    /// All experts at once, in places for as many tokens as the most chosen one sees.
    fn composed(&self, x: Tensor<2>, gates: Tensor<2>, choice: &Choice) -> Tensor<2> {
        let [tokens, width] = x.dims();
        let routed = self.input.val().dims()[0];
        let dispatch = choice.dispatch();
        let places = dispatch.token.len() / routed;
        let x = select(x, dispatch.token).reshape([routed, places, width]);
        let hidden = product(x, self.input.val(), self.bf16);
        let double = hidden.dims()[2];
        let hidden = swiglu(hidden.reshape([routed * places, double])).reshape([routed, places, double / 2]);
        let y = product(hidden, self.output.val(), self.bf16).reshape([routed * places, width]);
        let y = select(y, dispatch.place).reshape([tokens, self.active, width]);
        (y * gates.reshape([tokens, self.active, 1])).sum_dim(1).reshape([tokens, width])
    }
}

impl DeclareTraining for Experts {
    /// The balancing bias has no gradient.
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam(&self.router.weight);
        let [_, _, double] = self.input.val().dims();
        plan.muon(&self.input, Matrices::side_by_side(vec![double / 2; 2]));
        let [_, _, width] = self.output.val().dims();
        plan.muon(&self.output, Matrices::whole(width));
        self.shared.declare_training(plan);
    }
}

/// Which token stands where when every expert has equally many places.
struct Dispatch {
    /// Of each place of each expert, `[routed·places]`. Those that no token chose hold some other token, whose result
    /// nobody reads.
    token: Arc<[u32]>,
    /// Where each token's chosen experts see it, `[tokens·active]`.
    place: Arc<[u32]>,
}

/// Places of an expert come in so many: shapes then change seldom, and products are in whole tiles.
const PLACES: usize = 64;

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
