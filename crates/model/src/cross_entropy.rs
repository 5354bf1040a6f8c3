//! The output head and the loss in one: logits exist only a few rows at a time.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;

use crate::experts::values;
use crate::fused::{self, Operation, Pass};
use crate::linear::rows_product;
use crate::selection::int;

/// Mean cross-entropy, in nats per token, of `hidden·head` against `targets`, and each token's own.
///
/// `hidden`: `[tokens, width]`, `head`: `[width, vocabulary]`, `targets`: `[tokens]`.
pub fn cross_entropy(hidden: Tensor<2>, head: Tensor<2>, targets: Arc<[u32]>, bf16: bool) -> Tensor<1> {
    let [tokens, _] = hidden.dims();
    if fused::available(&hidden) {
        let operation = Fused { targets, gradients: hidden.is_autodiff() };
        return fused::apply(operation, [fused::input(hidden), fused::input(head)], [1]);
    }
    let targets = int(&targets, &hidden.device()).reshape([tokens, 1]);
    log_softmax(rows_product(hidden, head, bf16), 1).gather(1, targets).mean().neg()
}

/// Cross-entropy of every token, in nats, without gradients. Shapes as for [`cross_entropy`].
pub fn token_losses(hidden: Tensor<2>, head: Tensor<2>, targets: &[u32], bf16: bool) -> Vec<f32> {
    let [tokens, _] = hidden.dims();
    if fused::available(&hidden) {
        let (hidden, head) = (values(hidden), values(head));
        return engram_kernels::linear_cross_entropy(&hidden, &head, targets, false).losses;
    }
    let targets = int(targets, &hidden.device()).reshape([tokens, 1]);
    values(log_softmax(rows_product(hidden, head, bf16), 1).gather(1, targets).neg())
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
    if fused::available(&hidden) {
        let (hidden, head) = (values(hidden), values(head));
        let scores = engram_kernels::linear_target_scores(&hidden, &head, targets).into_iter().zip(targets);
        let score = |(score, &target): (engram_kernels::TargetScore, &u32)| TargetScore {
            log_probability: score.log_probability,
            likeliest: score.likeliest == target,
        };
        return scores.map(score).collect();
    }
    let logarithms = log_softmax(rows_product(hidden, head, bf16), 1);
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
