//! Routed experts beside a shared one (DeepSeekMoE, arXiv 2401.06066), for decoding.

use engram_config::ModelConfig;
use engram_kernels::{PackedMatrix, WeightFormat};
use engram_model::Experts;
use rayon::prelude::*;

use crate::feed_forward::FeedForwardDecoder;
use crate::weights::{pack, values};

/// The feed-forward of a block with experts.
#[derive(Debug)]
pub(crate) struct ExpertsDecoder {
    router: PackedMatrix,
    balance: Vec<f32>,
    routed: Vec<FeedForwardDecoder>,
    shared: Option<FeedForwardDecoder>,
    active: usize,
}

/// A token that an expert sees.
#[derive(Debug, Clone, Copy)]
struct Assignment {
    row: usize,
    /// Which of the token's choices this is: they are added up in their order.
    rank: usize,
    gate: f32,
}

impl ExpertsDecoder {
    pub(crate) fn new(experts: &Experts, config: &ModelConfig, format: WeightFormat) -> Self {
        let [count, width, double] = experts.input.dims();
        let (input, output) = (values(&experts.input), values(&experts.output));
        let weights = input.chunks_exact(width * double).zip(output.chunks_exact(double / 2 * width));
        let routed = weights.map(|(input, output)| {
            FeedForwardDecoder::of(
                PackedMatrix::new(input, width, double, format),
                PackedMatrix::new(output, double / 2, width, format),
            )
        });
        let active = config.experts.as_ref().map_or(count, |experts| experts.active);
        Self {
            // Never rounded: near ties decide which expert a token sees.
            router: pack(&experts.router, WeightFormat::F32),
            balance: values(&experts.balance),
            routed: routed.collect(),
            shared: experts.shared.as_ref().map(|shared| FeedForwardDecoder::new(shared, format)),
            active,
        }
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let width = self.router.inputs();
        let assignments = self.assign(&self.router.product(x));
        let see = |(expert, seen): (&FeedForwardDecoder, &Vec<Assignment>)| {
            let rows: Vec<f32> = seen.iter().flat_map(|a| &x[a.row * width..][..width]).copied().collect();
            if rows.is_empty() { rows } else { expert.forward_here(&rows) }
        };
        let outputs: Vec<Vec<f32>> = self.routed.par_iter().zip(&assignments).map(see).collect();
        // [rows, active, width], so that a token's sum does not depend on which expert was computed first.
        let mut parts = vec![0.0; x.len() * self.active];
        for (seen, output) in assignments.iter().zip(&outputs) {
            for (assignment, y) in seen.iter().zip(output.chunks_exact(width)) {
                let place = (assignment.row * self.active + assignment.rank) * width;
                let part = &mut parts[place..place + width];
                part.iter_mut().zip(y).for_each(|(part, y)| *part = assignment.gate * y);
            }
        }
        let mut sum = match &self.shared {
            Some(shared) => shared.forward(x),
            None => vec![0.0; x.len()],
        };
        for (sum, parts) in sum.chunks_exact_mut(width).zip(parts.chunks_exact(self.active * width)) {
            for (i, sum) in sum.iter_mut().enumerate() {
                let routed: f32 = parts.iter().skip(i).step_by(width).sum();
                *sum += routed;
            }
        }
        sum
    }

    /// The tokens that each expert sees: each token takes the `active` largest of sigmoid score and bias, ties going
    /// to the lower index, weighted by their scores normalised to sum to one.
    fn assign(&self, logits: &[f32]) -> Vec<Vec<Assignment>> {
        let mut assignments = vec![Vec::new(); self.routed.len()];
        for (row, logits) in logits.chunks_exact(self.routed.len()).enumerate() {
            let scores: Vec<f32> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
            let mut order: Vec<usize> = (0..scores.len()).collect();
            let biased = |expert: usize| scores[expert] + self.balance[expert];
            order.sort_by(|&a, &b| biased(b).total_cmp(&biased(a)));
            order.truncate(self.active);
            let total: f32 = order.iter().map(|&expert| scores[expert]).sum();
            for (rank, &expert) in order.iter().enumerate() {
                assignments[expert].push(Assignment { row, rank, gate: scores[expert] / total });
            }
        }
        assignments
    }

    pub(crate) fn bytes(&self) -> usize {
        let routed: usize = self.routed.iter().map(FeedForwardDecoder::bytes).sum();
        routed + self.router.bytes() + self.shared.as_ref().map_or(0, FeedForwardDecoder::bytes)
    }
}
