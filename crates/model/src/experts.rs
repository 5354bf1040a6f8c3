//! Mixture of experts: fine-grained routed experts beside a shared one (DeepSeekMoE, arXiv 2401.06066), chosen by
//! sigmoid scores and balanced without a loss (arXiv 2408.15664).

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Tensor, TensorData};

use crate::choice::Choice;
use crate::feed_forward::FeedForward;
use crate::host::{InnerOrSelf, values};
use crate::init::Init;
use crate::linear::Linear;
use crate::ops;
use crate::sequences::Sequences;
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
    /// Factor on the weights of the routed experts.
    scaling: f32,
    /// α of the loss that balances the experts within each sequence.
    sequence_balance: f32,
    bf16: bool,
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
            .then(|| FeedForward::new(&init.child("shared"), config, experts.shared_width, precision));
        let balance = init.constant([experts.routed], 0.0).set_require_grad(false);
        Self {
            // The router is never bf16: near ties decide which expert a token sees. A GPU may still compute f32 in TF32.
            router: Linear::new(
                &init.child("router"),
                [width, experts.routed],
                config.init.projection,
                Precision::F32,
            ),
            balance,
            input: init.normal(
                "input",
                [experts.routed, width, 2 * hidden],
                deviation(width, config.init.projection),
            ),
            output: init.normal("output", [experts.routed, hidden, width], deviation(hidden, scale)),
            shared,
            active: experts.active,
            scaling: experts.scaling,
            sequence_balance: experts.sequence_balance,
            bf16: precision == Precision::Bf16,
        }
    }

    /// `[tokens, width]` to the same, and which experts saw which token.
    pub fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Choice) {
        let (logits, choice) = self.route(x.clone());
        (self.apply(x, logits, &choice), choice)
    }

    /// The router's logits, `[tokens, routed]`, and the choice that follows from them.
    pub(crate) fn route(&self, x: Tensor<2>) -> (Tensor<2>, Choice) {
        let logits = self.router.forward(x);
        let choice = self.choose(&logits);
        (logits, choice)
    }

    /// The router's logits of `x`, `[tokens, routed]`, and the loss that balances the experts within each of `sequences`.
    pub fn balance(&self, x: Tensor<2>, sequences: &Sequences) -> (Tensor<2>, Option<Tensor<1>>) {
        let (logits, choice) = self.route(x);
        let loss = self.balance_loss(&logits, &choice, sequences);
        (logits, loss)
    }

    /// The loss that balances the experts within each sequence; none where it has no weight or nothing is
    /// differentiated. With s' the scores of a token divided by their sum, it is the mean over the sequences of
    /// α·Σ_i f_i·P_i: P_i is the mean of s'_i, and f_i the number of tokens that see expert i, in units of the number
    /// that each would see if all saw as many (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).
    pub(crate) fn balance_loss(
        &self,
        logits: &Tensor<2>,
        choice: &Choice,
        sequences: &Sequences,
    ) -> Option<Tensor<1>> {
        if self.sequence_balance == 0.0 || !logits.is_autodiff() {
            return None;
        }
        let factors = choice.sequence_factors(sequences).into_iter();
        let factors: Vec<f32> = factors.map(|factor| self.sequence_balance * factor).collect();
        let factors = Tensor::from_data(TensorData::new(factors, logits.dims()), &logits.device());
        let scores = sigmoid(logits.clone());
        let shares = scores.clone() / scores.sum_dim(1);
        Some((shares * factors).sum())
    }

    /// What the chosen experts and the shared one make of `x`, `[tokens, width]`.
    pub(crate) fn apply(&self, x: Tensor<2>, logits: Tensor<2>, choice: &Choice) -> Tensor<2> {
        let gates = ops::expert_gates(logits, choice);
        // Times one is the same to the bit, and one pass more.
        let gates = if self.scaling == 1.0 { gates } else { gates.mul_scalar(self.scaling) };
        let routed = ops::experts(x.clone(), gates, self.input.val(), self.output.val(), choice, self.bf16);
        match &self.shared {
            Some(shared) => routed + shared.forward(x),
            None => routed,
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
