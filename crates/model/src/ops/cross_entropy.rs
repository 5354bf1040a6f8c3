//! The output head and the loss in one. Fused, logits exist only a few rows at a time; composed, all at once.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;

use super::fused::{self, Operation, Pass, choose};
use super::product::rows_product;
use crate::host::{int, values};

/// Mean cross-entropy, in nats per token, of `hidden·head` against `targets`.
///
/// `hidden`: `[tokens, width]`, `head`: `[width, vocabulary]`, `targets`: `[tokens]`.
pub fn cross_entropy(hidden: Tensor<2>, head: Tensor<2>, targets: Arc<[u32]>, bf16: bool) -> Tensor<1> {
    let fused = |(hidden, head): (Tensor<2>, Tensor<2>)| {
        let operation = Fused { targets: Arc::clone(&targets), gradients: hidden.is_autodiff() };
        fused::apply(operation, [fused::input(hidden), fused::input(head)], [1])
    };
    let composed =
        |(hidden, head): (Tensor<2>, Tensor<2>)| log_likelihoods(hidden, head, &targets, bf16).mean().neg();
    choose(&hidden.device(), (hidden, head), fused, composed)
}

/// Logarithm of every target's probability, `[tokens, 1]`, in Burn's primitives.
fn log_likelihoods(hidden: Tensor<2>, head: Tensor<2>, targets: &[u32], bf16: bool) -> Tensor<2> {
    let targets = int(targets, &hidden.device()).reshape([targets.len(), 1]);
    log_softmax(rows_product(hidden, head, bf16), 1).gather(1, targets)
}

/// Cross-entropy of every token, in nats, without gradients. Shapes as for [`cross_entropy`].
pub fn token_losses(hidden: Tensor<2>, head: Tensor<2>, targets: &[u32], bf16: bool) -> Vec<f32> {
    let fused = |(hidden, head): (Tensor<2>, Tensor<2>)| {
        engram_kernels::linear_cross_entropy(&values(hidden), &values(head), targets, false).losses
    };
    let composed =
        |(hidden, head): (Tensor<2>, Tensor<2>)| values(log_likelihoods(hidden, head, targets, bf16).neg());
    choose(&hidden.device(), (hidden, head), fused, composed)
}

/// How a token fares among those that may follow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetScore {
    /// Logarithm of its probability, in nats.
    pub log_probability: f32,
    /// Whether no other is likelier; of equals, the first is.
    pub likeliest: bool,
}

/// Scores of `targets` `[tokens]`, without gradients. Shapes as for [`cross_entropy`].
pub fn target_scores(hidden: Tensor<2>, head: Tensor<2>, targets: &[u32], bf16: bool) -> Vec<TargetScore> {
    let fused = |(hidden, head): (Tensor<2>, Tensor<2>)| {
        let scores = engram_kernels::linear_target_scores(&values(hidden), &values(head), targets);
        let score = |(score, &target): (engram_kernels::TargetScore, &u32)| TargetScore {
            log_probability: score.log_probability,
            likeliest: score.likeliest == target,
        };
        scores.into_iter().zip(targets).map(score).collect()
    };
    let composed =
        |(hidden, head): (Tensor<2>, Tensor<2>)| composed_scores(rows_product(hidden, head, bf16), targets);
    choose(&hidden.device(), (hidden, head), fused, composed)
}

/// [`target_scores`] of logits, `[tokens, vocabulary]`.
fn composed_scores(logits: Tensor<2>, targets: &[u32]) -> Vec<TargetScore> {
    let logarithms = log_softmax(logits, 1);
    let ids = int(targets, &logarithms.device()).reshape([targets.len(), 1]);
    let likeliest = logarithms.clone().argmax(1).equal(ids.clone()).into_data();
    let scores = values(logarithms.gather(1, ids)).into_iter().zip(likeliest.iter::<bool>());
    scores.map(|(log_probability, likeliest)| TargetScore { log_probability, likeliest }).collect()
}

#[derive(Debug)]
struct Fused {
    targets: Arc<[u32]>,
    gradients: bool,
}

impl Operation<2> for Fused {
    /// Gradients of hidden and head for an upstream gradient of one: they fall out of the forward pass.
    type Saved = Option<(Vec<f32>, Vec<f32>)>;

    fn forward(&self, [hidden, head]: [&[f32]; 2]) -> (Vec<f32>, Self::Saved) {
        let loss = engram_kernels::linear_cross_entropy(hidden, head, &self.targets, self.gradients);
        (vec![loss.mean], loss.gradients.map(|gradients| (gradients.hidden, gradients.weight)))
    }

    fn backward(&self, pass: Pass<'_, Self::Saved, 2>) -> [Vec<f32>; 2] {
        let upstream = pass.gradient[0];
        let (hidden, head) = pass.saved.as_ref().expect("gradients were asked for when tracked");
        let scaled = |values: &[f32]| values.iter().map(|value| value * upstream).collect();
        [scaled(hidden), scaled(head)]
    }
}
