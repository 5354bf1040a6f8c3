//! Routed experts beside a shared one (DeepSeekMoE, arXiv 2401.06066), for decoding.

use engram_config::{ExpertGroups, ExpertScore, ExpertsConfig, GroupScore, ModelConfig};
use engram_kernels::PackedMatrix;
use rayon::prelude::*;

use crate::feed_forward::FeedForwardDecoder;
use crate::rows;
use crate::weights::{Loader, WeightError};

/// The feed-forward of a block with experts.
#[derive(Debug)]
pub(crate) struct ExpertsDecoder {
    router: PackedMatrix,
    routing: Routing,
    routed: Vec<FeedForwardDecoder>,
    shared: Option<FeedForwardDecoder>,
}

/// From a token's logits of the experts to its experts and their weights.
#[derive(Debug)]
struct Routing {
    score: ExpertScore,
    /// Added to scores for the choice alone; none where the model has none.
    balance: Option<Vec<f32>>,
    groups: Option<ExpertGroups>,
    active: usize,
    normalise: bool,
    scaling: f32,
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
    pub(crate) fn load(
        loader: &Loader<'_>,
        experts: &ExpertsConfig,
        config: &ModelConfig,
    ) -> Result<Self, WeightError> {
        let (width, activation) = (config.width, config.feed_forward.activation);
        let balance = (experts.score == ExpertScore::Sigmoid || loader.has("balance"))
            .then(|| loader.vector("balance", experts.routed));
        let shape = [experts.routed, width, experts.width];
        let shared = (experts.shared_width > 0).then(|| {
            FeedForwardDecoder::load(&loader.child("shared"), width, experts.shared_width, activation)
        });
        Ok(Self {
            // Never rounded: near ties decide which expert a token sees.
            router: loader.exact("router.weight", width, experts.routed)?,
            routing: Routing {
                score: experts.score,
                balance: balance.transpose()?,
                groups: experts.groups,
                active: experts.active,
                normalise: experts.normalise,
                scaling: experts.scaling,
            },
            routed: FeedForwardDecoder::load_experts(loader, shape, activation)?,
            shared: shared.transpose()?,
        })
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let (width, active) = (self.router.inputs(), self.routing.active);
        let assignments = self.assign(&self.router.product(x));
        let see = |(expert, seen): (&FeedForwardDecoder, &Vec<Assignment>)| {
            let rows = rows::select(x, width, seen.iter().map(|assignment| assignment.row));
            if rows.is_empty() { rows } else { expert.forward_here(&rows) }
        };
        let outputs: Vec<Vec<f32>> = self.routed.par_iter().zip(&assignments).map(see).collect();
        // [rows, active, width], so that a token's sum does not depend on which expert was computed first.
        let mut parts = vec![0.0; x.len() * active];
        for (seen, output) in assignments.iter().zip(&outputs) {
            for (assignment, y) in seen.iter().zip(output.chunks_exact(width)) {
                let place = (assignment.row * active + assignment.rank) * width;
                let part = &mut parts[place..place + width];
                part.iter_mut().zip(y).for_each(|(part, y)| *part = assignment.gate * y);
            }
        }
        let mut sum = match &self.shared {
            Some(shared) => shared.forward(x),
            None => vec![0.0; x.len()],
        };
        for (sum, parts) in sum.chunks_exact_mut(width).zip(parts.chunks_exact(active * width)) {
            for (i, sum) in sum.iter_mut().enumerate() {
                let routed: f32 = parts.iter().skip(i).step_by(width).sum();
                *sum += routed;
            }
        }
        sum
    }

    /// The tokens that each expert sees.
    fn assign(&self, logits: &[f32]) -> Vec<Vec<Assignment>> {
        let mut assignments = vec![Vec::new(); self.routed.len()];
        for (row, logits) in logits.chunks_exact(self.routed.len()).enumerate() {
            for (rank, (expert, gate)) in self.routing.choose(logits).into_iter().enumerate() {
                assignments[expert].push(Assignment { row, rank, gate });
            }
        }
        assignments
    }

    pub(crate) fn bytes(&self) -> usize {
        let routed: usize = self.routed.iter().map(FeedForwardDecoder::bytes).sum();
        routed + self.router.bytes() + self.shared.as_ref().map_or(0, FeedForwardDecoder::bytes)
    }
}

impl Routing {
    /// A token's experts, best first, and their weights: the `active` largest of score and bias, ties going to the lower
    /// index, of the best groups where the model limits them.
    fn choose(&self, logits: &[f32]) -> Vec<(usize, f32)> {
        let scores = self.scores(logits);
        let biased: Vec<f32> = match &self.balance {
            Some(balance) => scores.iter().zip(balance).map(|(score, bias)| score + bias).collect(),
            None => scores.clone(),
        };
        let mut order: Vec<usize> = match self.groups {
            Some(groups) => best_groups(&biased, groups),
            None => (0..biased.len()).collect(),
        };
        order.sort_by(|&a, &b| biased[b].total_cmp(&biased[a]));
        order.truncate(self.active);
        let total: f32 = order.iter().map(|&expert| scores[expert]).sum();
        let divisor = if self.normalise { total } else { 1.0 };
        order.into_iter().map(|expert| (expert, scores[expert] / divisor * self.scaling)).collect()
    }

    fn scores(&self, logits: &[f32]) -> Vec<f32> {
        match self.score {
            ExpertScore::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
            ExpertScore::Softmax => {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
                let total: f32 = powers.iter().sum();
                powers.into_iter().map(|power| power / total).collect()
            }
        }
    }
}

/// The experts of the best groups, ascending (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
fn best_groups(biased: &[f32], groups: ExpertGroups) -> Vec<usize> {
    let size = biased.len() / groups.count;
    let score = |group: &[f32]| {
        let mut best = [f32::NEG_INFINITY; 2];
        for &value in group {
            if value > best[0] {
                best = [value, best[0]];
            } else if value > best[1] {
                best[1] = value;
            }
        }
        match groups.score {
            GroupScore::Best => best[0],
            GroupScore::TwoBest => best[0] + best[1],
        }
    };
    let scores: Vec<f32> = biased.chunks_exact(size).map(score).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(groups.active);
    order.sort_unstable();
    order.into_iter().flat_map(|group| group * size..(group + 1) * size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing() -> Routing {
        Routing {
            score: ExpertScore::Softmax,
            balance: None,
            groups: None,
            active: 2,
            normalise: false,
            scaling: 3.0,
        }
    }

    #[test]
    fn a_token_sees_its_best_experts_of_its_best_groups() {
        // Probabilities 0.1, 0.4, 0.3, 0.2.
        let logits = [0.1_f32, 0.4, 0.3, 0.2].map(f32::ln);
        let experts = |routing: Routing| -> Vec<(usize, i32)> {
            let chosen = routing.choose(&logits).into_iter();
            chosen.map(|(expert, gate)| (expert, (gate * 1000.0).round() as i32)).collect()
        };
        assert_eq!(experts(routing()), [(1, 1200), (2, 900)]);
        assert_eq!(experts(Routing { normalise: true, ..routing() }), [(1, 1714), (2, 1286)]);
        let groups = |score| Some(ExpertGroups { count: 2, active: 1, score });
        // Both groups sum to 0.5; the first holds the best.
        assert_eq!(experts(Routing { groups: groups(GroupScore::Best), ..routing() }), [(1, 1200), (0, 300)]);
        let balance = Some(vec![0.0, 0.0, 0.0, 0.3]);
        let biased = Routing { groups: groups(GroupScore::TwoBest), balance, ..routing() };
        assert_eq!(experts(biased), [(3, 600), (2, 900)], "a bias moves the choice alone");
    }
}
