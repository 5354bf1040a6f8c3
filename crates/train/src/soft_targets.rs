//! The loss of teaching at chosen positions: cross-entropy of a token, or divergence from what the base says there.
//!
//! Both have the gradient `weight · (softmax(logits) − wanted distribution)`, so that logits exist only a few positions at
//! a time and outside of autodiff.

use burn::tensor::{Device, Int, Tensor, TensorData};
use engram_model::LanguageModel;
use rayon::prelude::*;

/// What a position is to say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wanted {
    /// This token.
    Token(u32),
    /// What the base says, whose hidden state is this row.
    Base(u32),
}

/// Weighted sums over positions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Losses {
    /// Cross-entropy.
    pub(crate) answers: f64,
    /// KL(base ‖ model).
    pub(crate) divergence: f64,
}

/// Positions whose logits exist at once.
const POSITIONS: usize = 128;

/// Losses at the rows of `hidden`, `[rows, width]`, of which each has a weight, and their gradient, of that shape.
/// `base`: hidden states of the base, `[rows, width]`.
pub(crate) fn soft_targets(
    model: &LanguageModel,
    hidden: Tensor<2>,
    base: &[f32],
    wanted: &[(Wanted, f32)],
    device: &Device,
) -> (Losses, Tensor<2>) {
    let width = hidden.dims()[1];
    let mut losses = Losses::default();
    let mut gradients = Vec::new();
    for (part, first) in wanted.chunks(POSITIONS).zip((0..).step_by(POSITIONS)) {
        let rows = hidden.clone().narrow(0, first, part.len());
        let mut logits = host(model.logits(rows));
        let vocabulary = logits.len() / part.len();
        let of_base: Vec<f32> = part
            .iter()
            .filter_map(|(wanted, _)| match wanted {
                Wanted::Base(row) => Some(&base[*row as usize * width..][..width]),
                Wanted::Token(_) => None,
            })
            .flatten()
            .copied()
            .collect();
        let count = of_base.len() / width;
        let of_base = match count {
            0 => Vec::new(),
            count => host(model.logits(Tensor::from_data(TensorData::new(of_base, [count, width]), device))),
        };
        let mut next = 0;
        let sources: Vec<Option<&[f32]>> = part
            .iter()
            .map(|(wanted, _)| match wanted {
                Wanted::Base(_) => {
                    next += 1;
                    Some(&of_base[(next - 1) * vocabulary..][..vocabulary])
                }
                Wanted::Token(_) => None,
            })
            .collect();
        let found: Vec<f64> = logits
            .par_chunks_exact_mut(vocabulary)
            .zip(part)
            .zip(sources)
            .map(|((logits, &(wanted, weight)), base)| match (wanted, base) {
                (Wanted::Token(token), _) => of_token(logits, token, weight),
                (Wanted::Base(_), Some(base)) => of_base_row(logits, base, weight),
                (Wanted::Base(_), None) => 0.0,
            })
            .collect();
        // In order, whatever thread computed what.
        for (loss, (wanted, _)) in found.into_iter().zip(part) {
            match wanted {
                Wanted::Token(_) => losses.answers += loss,
                Wanted::Base(_) => losses.divergence += loss,
            }
        }
        let slope = Tensor::from_data(TensorData::new(logits, [part.len(), vocabulary]), device);
        gradients.push(model.hidden_gradient(slope));
    }
    (losses, Tensor::cat(gradients, 0))
}

/// The rows `rows` of `states`.
pub(crate) fn select(states: Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &states.device());
    states.select(0, rows)
}

pub(crate) fn host(tensor: Tensor<2>) -> Vec<f32> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.into_data().try_into_vec().expect("f32")
}

/// The logarithm of the sum of exponentials.
pub(crate) fn log_sum(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(most) + logits.iter().map(|&logit| f64::from((logit - most).exp())).sum::<f64>().ln()
}

/// KL(base ‖ model) of the distributions that have these logits, in nats.
pub(crate) fn divergence(base: &[f32], model: &[f32]) -> f64 {
    let (of_base, of_model) = (log_sum(base), log_sum(model));
    let term = |(&base, &model): (&f32, &f32)| {
        let (base, model) = (f64::from(base) - of_base, f64::from(model) - of_model);
        base.exp() * (base - model)
    };
    base.iter().zip(model).map(term).sum()
}

/// Turns logits into their gradient; gives the weighted loss.
fn of_token(logits: &mut [f32], token: u32, weight: f32) -> f64 {
    let sum = log_sum(logits);
    let loss = sum - f64::from(logits[token as usize]);
    logits.iter_mut().for_each(|logit| *logit = weight * (*logit - sum as f32).exp());
    logits[token as usize] -= weight;
    f64::from(weight) * loss
}

fn of_base_row(logits: &mut [f32], base: &[f32], weight: f32) -> f64 {
    let (sum, of_base) = (log_sum(logits), log_sum(base));
    let mut divergence = 0.0;
    for (logit, &base) in logits.iter_mut().zip(base) {
        let (own, wanted) = (*logit - sum as f32, base - of_base as f32);
        let probability = wanted.exp();
        divergence += f64::from(probability * (wanted - own));
        *logit = weight * (own.exp() - probability);
    }
    f64::from(weight) * divergence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_those_of_the_losses() {
        let logits = [0.3_f32, -1.0, 2.0, 0.0];
        let base = [1.0_f32, 0.5, -0.5, 0.0];
        type Loss<'a> = &'a dyn Fn(&mut [f32]) -> f64;
        let losses: [Loss<'_>; 2] =
            [&|logits| of_token(logits, 1, 0.7), &|logits| of_base_row(logits, &base, 0.7)];
        for loss in losses {
            let mut slopes = logits;
            loss(&mut slopes);
            for place in 0..logits.len() {
                let at = |step: f32| {
                    let mut moved = logits;
                    moved[place] += step;
                    loss(&mut moved)
                };
                let expected = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!((expected - f64::from(slopes[place])).abs() < 1e-3, "{expected} {}", slopes[place]);
            }
        }
        assert!(of_base_row(&mut base.to_vec(), &base, 1.0).abs() < 1e-6);
    }
}
