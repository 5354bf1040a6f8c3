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
            // The router stays in f32: near ties decide which expert a token sees.
            router: Linear::new(&init.child("router"), [width, experts.routed], config.init.projection, Precision::F32),
            balance,
            input: init.normal("input", [experts.routed, width, 2 * hidden], deviation(width, config.init.projection)),
            output: init.normal("output", [experts.routed, hidden, width], deviation(hidden, scale)),
            shared,
            active: experts.active,
            scaling: experts.scaling,
            bf16: precision == Precision::Bf16,
        }
    }

    /// `[tokens, width]` to the same, and which experts saw which token.
    pub fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Choice) {
        let logits = self.router.forward(x.clone());
        let choice = self.choose(&logits);
        let gates = ops::expert_gates(logits, &choice);
        // Times one is the same to the bit, and one pass more.
        let gates = if self.scaling == 1.0 { gates } else { gates.mul_scalar(self.scaling) };
        let routed = ops::experts(x.clone(), gates, self.input.val(), self.output.val(), &choice, self.bf16);
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
