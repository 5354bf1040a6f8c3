//! Text from a model, one token after another, the plain way: the whole context is computed for each. `engram-serve`
//! computes what is new, gives the same, and is fast.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::trained::Trained;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest tokens are considered; none: all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Seed of the draw.
    pub seed: u64,
}

impl Sampling {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The option that cannot be, and its range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Mismatch(text));
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refuse(format!("temperature {} must be 0 or above", self.temperature));
        }
        if self.top_k == Some(0) {
            return refuse("top-k 0 leaves no token: take 1 or more".into());
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse(format!("top-p {} must lie above 0 and at most at 1", self.top_p));
        }
        Ok(())
    }
}

/// Continues `prompt` by up to `count` tokens, each given to `each`, which stops by returning `false`. The
/// end-of-text token ends the text and is not given.
///
/// # Errors
/// When an option is impossible, the prompt is empty or holds an unknown token.
pub fn generate(
    model: &Trained,
    prompt: &[u32],
    count: usize,
    sampling: Sampling,
    each: &mut dyn FnMut(u32) -> bool,
) -> Result<Vec<u32>> {
    sampling.validate()?;
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = model.next_logits(&tokens)?;
        let token = draw(&logits, sampling, random.random::<f32>());
        if token == model.tokenizer().end_of_text() {
            break;
        }
        tokens.push(token);
        if !each(token) {
            break;
        }
    }
    Ok(tokens.split_off(prompt.len()))
}

/// The token that the uniform number `uniform` in 0..1 chooses.
fn draw(logits: &[f32], sampling: Sampling, uniform: f32) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |token: u32| logits[token as usize];
    order.sort_unstable_by(|&a, &b| logit(b).total_cmp(&logit(a)).then(a.cmp(&b)));
    if sampling.temperature == 0.0 {
        return order[0];
    }
    order.truncate(sampling.top_k.unwrap_or(order.len()));
    let largest = logit(order[0]);
    let mut weights: Vec<f32> =
        order.iter().map(|&token| ((logit(token) - largest) / sampling.temperature).exp()).collect();
    let total: f32 = weights.iter().sum();
    let mut reached = 0.0;
    let kept = weights.iter().position(|weight| {
        reached += weight / total;
        reached >= sampling.top_p
    });
    weights.truncate(kept.map_or(weights.len(), |last| last + 1));
    let total: f32 = weights.iter().sum();
    let mut left = uniform * total;
    let chosen = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    order[chosen.unwrap_or(weights.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::{Sampling, draw};

    const ALL: Sampling = Sampling { temperature: 1.0, top_k: None, top_p: 1.0, seed: 0 };

    /// Logarithms of 0.5, 0.3, 0.2, out of order.
    fn logits() -> Vec<f32> {
        [0.2_f32, 0.5, 0.3].map(f32::ln).to_vec()
    }

    #[test]
    fn draws_follow_the_probabilities() {
        for (uniform, token) in [(0.0, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 0), (0.999, 0)] {
            assert_eq!(draw(&logits(), ALL, uniform), token, "at {uniform}");
        }
    }

    #[test]
    fn zero_temperature_takes_the_likeliest() {
        assert_eq!(draw(&logits(), Sampling { temperature: 0.0, ..ALL }, 0.999), 1);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let k = Sampling { top_k: Some(2), ..ALL };
        assert_eq!(draw(&logits(), k, 0.62), 1);
        assert_eq!(draw(&logits(), k, 0.63), 2);
        assert_eq!(draw(&logits(), Sampling { top_p: 0.5, ..ALL }, 0.999), 1);
        assert_eq!(draw(&logits(), Sampling { top_p: 0.6, ..ALL }, 0.999), 2);
    }

    #[test]
    fn temperature_flattens() {
        let hot = Sampling { temperature: 1e6, ..ALL };
        assert_eq!(draw(&logits(), hot, 0.34), 2);
        assert_eq!(draw(&logits(), hot, 0.67), 0);
    }
}
