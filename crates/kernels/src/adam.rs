//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), one fused pass in place.

use crate::parallel::{self, block_rows};
use crate::simd::vectorized;

/// The constants of one step of Adam with decoupled weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Learning rate of this step.
    pub rate: f32,
    /// Decay of the mean of gradients.
    pub beta1: f32,
    /// Decay of the mean of squared gradients.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Weight decay: parameters shrink by `rate · decay` before the update.
    pub decay: f32,
    /// The number of this step, from 1, for the correction of the moments' bias.
    pub step: u64,
}

/// Updates `parameter` and its moments in place from `gradient`; all of one length.
///
/// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
/// p ← p·(1 − rate·decay) − rate · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε).
///
/// # Panics
/// When the lengths differ or the step is 0.
pub fn adam_step(
    parameter: &mut [f32],
    gradient: &[f32],
    mean: &mut [f32],
    square: &mut [f32],
    step: &AdamStep,
) {
    assert!(step.step > 0, "adam: steps count from 1");
    let len = parameter.len();
    assert!(
        [gradient.len(), mean.len(), square.len()] == [len; 3],
        "adam: {len} parameters, {} gradients, {} and {} moments",
        gradient.len(),
        mean.len(),
        square.len(),
    );
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(step.step as f64);
    let scale = (f64::from(step.rate) / correction(step.beta1)) as f32;
    let root = (1.0 / correction(step.beta2)).sqrt() as f32;
    let keep = 1.0 - step.rate * step.decay;
    let AdamStep { beta1, beta2, epsilon, .. } = *step;
    let block = block_rows(4);
    let blocks = (parameter.chunks_mut(block).zip(gradient.chunks(block)))
        .zip(mean.chunks_mut(block).zip(square.chunks_mut(block)));
    parallel::for_each(blocks, |((parameter, gradient), (mean, square))| {
        vectorized(
            #[inline(always)]
            || {
                for (((p, g), m), v) in parameter.iter_mut().zip(gradient).zip(mean).zip(square) {
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *p = *p * keep - scale * *m / (v.sqrt() * root + epsilon);
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};

    /// The published algorithm in f64.
    fn reference(start: &[f32], gradients: &[Vec<f32>], constants: &AdamStep) -> Vec<f32> {
        let (b1, b2) = (f64::from(constants.beta1), f64::from(constants.beta2));
        let rate = f64::from(constants.rate);
        (0..start.len())
            .map(|i| {
                let (mut p, mut m, mut v) = (f64::from(start[i]), 0.0, 0.0);
                for (t, gradient) in (1..).zip(gradients) {
                    let g = f64::from(gradient[i]);
                    p -= rate * f64::from(constants.decay) * p;
                    m = b1 * m + (1.0 - b1) * g;
                    v = b2 * v + (1.0 - b2) * g * g;
                    let (m, v) = (m / (1.0 - b1.powi(t)), v / (1.0 - b2.powi(t)));
                    p -= rate * m / (v.sqrt() + f64::from(constants.epsilon));
                }
                p as f32
            })
            .collect()
    }

    #[test]
    fn follows_the_published_algorithm() {
        let constants = AdamStep { rate: 0.01, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, decay: 0.1, step: 0 };
        for len in [1, 17, 40_000] {
            let start = random(len, 1);
            let gradients: Vec<Vec<f32>> = (0..6).map(|t| random(len, 10 + t)).collect();
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
            for (step, gradient) in (1..).zip(&gradients) {
                adam_step(&mut p, gradient, &mut m, &mut v, &AdamStep { step, ..constants });
            }
            assert_close(&p, &reference(&start, &gradients, &constants), 1e-6);
        }
    }

    #[test]
    fn a_zero_gradient_only_decays() {
        let step = AdamStep { rate: 0.5, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, decay: 0.5, step: 3 };
        let mut p = [4.0, -8.0];
        adam_step(&mut p, &[0.0; 2], &mut [0.0; 2], &mut [0.0; 2], &step);
        assert_eq!(p, [3.0, -6.0]);
    }

    #[test]
    #[should_panic(expected = "2 parameters, 3 gradients")]
    fn refuses_different_lengths() {
        let step = AdamStep { rate: 0.5, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, decay: 0.5, step: 1 };
        adam_step(&mut [0.0; 2], &[0.0; 3], &mut [0.0; 2], &mut [0.0; 2], &step);
    }
}
