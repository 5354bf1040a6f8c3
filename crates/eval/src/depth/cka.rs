//! Centred kernel alignment of two models' layers (Kornblith et al. 2019, arXiv 1905.00414), over minibatches with the
//! unbiased estimator of HSIC (Song et al. 2012; Nguyen et al. 2021, arXiv 2010.15327, section 2.1), and the soft
//! alignment of Engram's paper (arXiv 2601.07372, section 6.1).
//!
//! With K = XXᵀ and L = YYᵀ for the states X and Y of n tokens, and K̃, L̃ without their diagonals:
//!
//! ```text
//! HSIC(K, L) = [ tr K̃L̃ + 1ᵀK̃1·1ᵀL̃1 / ((n−1)(n−2)) − 2/(n−2)·1ᵀK̃L̃1 ] / (n(n−3))
//! CKA = Σ HSIC(K, L) / √(Σ HSIC(K, K)·Σ HSIC(L, L))      sums over minibatches
//! ```

use rayon::prelude::*;
use serde::Serialize;

/// Minimum number of tokens in a minibatch: the estimator divides by n − 3.
pub const FEWEST: usize = 4;

/// A kernel matrix without its diagonal, `[n, n]`, and its sums for HSIC.
struct Kernel {
    n: usize,
    values: Vec<f64>,
    row_sums: Vec<f64>,
    sum: f64,
}

impl Kernel {
    /// The linear kernel of states `[n, width]`.
    fn of(states: &[f32], width: usize) -> Self {
        let n = states.len() / width;
        let product =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        let row = |i: usize| -> Vec<f64> {
            let entry = |(j, state)| if i == j { 0.0 } else { product(&states[i * width..][..width], state) };
            states.chunks_exact(width).enumerate().map(entry).collect()
        };
        let rows: Vec<Vec<f64>> = (0..n).into_par_iter().map(row).collect();
        let row_sums: Vec<f64> = rows.iter().map(|row| row.iter().sum()).collect();
        Self { n, values: rows.concat(), sum: row_sums.iter().sum(), row_sums }
    }
}

/// The unbiased estimate of HSIC.
fn hsic(k: &Kernel, l: &Kernel) -> f64 {
    let n = k.n as f64;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let trace = product(&k.values, &l.values);
    let means = k.sum * l.sum / ((n - 1.0) * (n - 2.0));
    let rows = 2.0 / (n - 2.0) * product(&k.row_sums, &l.row_sums);
    (trace + means - rows) / (n * (n - 3.0))
}

/// Sums of HSIC over the minibatches of two models' layers.
#[derive(Debug, Clone)]
struct Batch {
    /// `[layers of A][layers of B]`
    between: Vec<Vec<f64>>,
    of_a: Vec<f64>,
    of_b: Vec<f64>,
}

/// Alignment of the layers of a model A with those of a model B, minibatch by minibatch.
#[derive(Debug, Default)]
pub struct Alignment {
    batches: Vec<Batch>,
}

/// A model's states at n tokens: one `[n, width]` per layer.
#[derive(Debug, Clone, Copy)]
pub struct States<'a> {
    /// One per layer, in order.
    pub layers: &'a [Vec<f32>],
    /// Values per token.
    pub width: usize,
}

/// The layer of B that a layer of A resembles most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Aligned {
    /// Layer of A: the number of blocks before the states.
    pub depth: usize,
    /// Mean layer of B over the most similar ones, weighted by similarity.
    pub aligned: f64,
    /// Its standard error, from leaving out one minibatch at a time; none for a single minibatch.
    pub error: Option<f64>,
}

impl Alignment {
    /// Adds a minibatch: states of the same tokens, at least [`FEWEST`], in both models.
    ///
    /// # Panics
    /// When their numbers of tokens differ or are too small.
    pub fn add(&mut self, a: States<'_>, b: States<'_>) {
        let kernels = |states: States<'_>| -> Vec<Kernel> {
            states.layers.iter().map(|layer| Kernel::of(layer, states.width)).collect()
        };
        let (a, b) = (kernels(a), kernels(b));
        let same = a.iter().chain(&b).all(|kernel| kernel.n == a[0].n && kernel.n >= FEWEST);
        assert!(same, "minibatches of the same {FEWEST} tokens or more");
        let itself = |kernels: &[Kernel]| kernels.iter().map(|kernel| hsic(kernel, kernel)).collect();
        let between = a.iter().map(|k| b.iter().map(|l| hsic(k, l)).collect()).collect();
        self.batches.push(Batch { between, of_a: itself(&a), of_b: itself(&b) });
    }

    /// CKA of every pair, `[layers of A][layers of B]`; NaN where a layer has the same state at every token.
    pub fn cka(&self) -> Vec<Vec<f64>> {
        cka(self.batches.iter())
    }

    /// For every layer of A, the layer of B that it resembles: the mean depth of the `neighbours` most similar ones.
    pub fn soft_alignment(&self, neighbours: usize) -> Vec<Aligned> {
        let aligned = soft_alignment(&self.cka(), neighbours);
        let count = self.batches.len();
        let without = |left_out: usize| {
            let kept = self.batches.iter().enumerate().filter(|&(index, _)| index != left_out);
            soft_alignment(&cka(kept.map(|(_, batch)| batch)), neighbours)
        };
        let replicates: Vec<Vec<f64>> =
            if count > 1 { (0..count).map(without).collect() } else { Vec::new() };
        let error = |layer: usize| {
            let values: Vec<f64> = replicates.iter().map(|replicate| replicate[layer]).collect();
            (count > 1).then(|| jackknife(&values))
        };
        let point = |(layer, aligned)| Aligned { depth: layer + 1, aligned, error: error(layer) };
        aligned.into_iter().enumerate().map(point).collect()
    }
}

fn cka<'a>(batches: impl Iterator<Item = &'a Batch> + Clone) -> Vec<Vec<f64>> {
    let Some(first) = batches.clone().next() else { return Vec::new() };
    let sum = |value: &dyn Fn(&Batch) -> f64| batches.clone().map(value).sum::<f64>();
    let entry = |i: usize, j: usize| {
        let norms = sum(&|batch| batch.of_a[i]) * sum(&|batch| batch.of_b[j]);
        if norms > 0.0 { sum(&|batch| batch.between[i][j]) / norms.sqrt() } else { f64::NAN }
    };
    let row = |i| (0..first.of_b.len()).map(|j| entry(i, j)).collect();
    (0..first.of_a.len()).map(row).collect()
}

/// Standard error of a value from its leave-one-out values.
fn jackknife(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    ((count - 1.0) / count * squares).sqrt()
}

/// For every row, the mean depth (from 1) of its `neighbours` largest values, weighted by them.
fn soft_alignment(cka: &[Vec<f64>], neighbours: usize) -> Vec<f64> {
    let of_row = |row: &Vec<f64>| {
        let mut ranked: Vec<(usize, f64)> = row.iter().copied().enumerate().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked.truncate(neighbours);
        let weights: f64 = ranked.iter().map(|(_, weight)| weight).sum();
        ranked.iter().map(|(layer, weight)| (layer + 1) as f64 * weight).sum::<f64>() / weights
    };
    cka.iter().map(of_row).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Sums of twelve uniform values are normal enough.
        (0..count).map(|_| (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0).collect()
    }

    fn between(x: &[f32], x_width: usize, y: &[f32], y_width: usize) -> f64 {
        let mut alignment = Alignment::default();
        let (x, y) = ([x.to_vec()], [y.to_vec()]);
        alignment.add(States { layers: &x, width: x_width }, States { layers: &y, width: y_width });
        alignment.cka()[0][0]
    }

    /// Song et al. 2012, equation 4, as sums over quadruples of distinct tokens.
    #[test]
    fn hsic_is_the_mean_over_distinct_tokens() {
        let n = 6;
        let (k, l) = (Kernel::of(&random(n * 3, 1), 3), Kernel::of(&random(n * 2, 2), 2));
        let (mut sum, mut count) = (0.0, 0.0);
        for i in 0..n {
            for j in (0..n).filter(|&j| j != i) {
                for q in (0..n).filter(|&q| q != i && q != j) {
                    for r in (0..n).filter(|&r| r != i && r != j && r != q) {
                        let k_ij = k.values[i * n + j];
                        sum += k_ij * (l.values[i * n + j] + l.values[q * n + r] - 2.0 * l.values[i * n + q]);
                        count += 1.0;
                    }
                }
            }
        }
        assert!((hsic(&k, &l) - sum / count).abs() < 1e-12 * sum.abs());
    }

    #[test]
    fn a_layer_is_like_itself_turned_shifted_and_scaled() {
        let x = random(40 * 3, 1);
        let turn = |row: &[f32]| [2.0 * row[1] + 5.0, -2.0 * row[0], 2.0 * row[2] - 7.0];
        let y: Vec<f32> = x.chunks(3).flat_map(turn).collect();
        assert!((between(&x, 3, &y, 3) - 1.0).abs() < 1e-5);
    }

    /// The biased estimator's error: with more dimensions than tokens, it finds everything similar.
    #[test]
    fn unrelated_wide_layers_are_unlike() {
        let mut alignment = Alignment::default();
        for batch in 0..50 {
            let (x, y) = ([random(16 * 64, 2 * batch)], [random(16 * 64, 2 * batch + 1)]);
            alignment.add(States { layers: &x, width: 64 }, States { layers: &y, width: 64 });
        }
        assert!(alignment.cka()[0][0].abs() < 0.05, "{:?}", alignment.cka());
    }

    #[test]
    fn constant_states_are_like_nothing() {
        assert!(between(&[1.0; 20], 2, &random(20, 1), 2).is_nan());
    }

    #[test]
    fn the_most_similar_layers_are_averaged_by_similarity() {
        let cka = vec![vec![0.1, 0.2, 0.6, 0.3], vec![0.0, 0.0, 0.0, 1.0]];
        let expected = (3.0 * 0.6 + 4.0 * 0.3) / 0.9;
        assert!((soft_alignment(&cka, 2)[0] - expected).abs() < 1e-12);
        assert_eq!(soft_alignment(&cka, 1), [3.0, 4.0]);
    }

    #[test]
    fn layers_align_with_the_copies_of_themselves() {
        let mut alignment = Alignment::default();
        for batch in 0..4 {
            let layers: Vec<Vec<f32>> = (0..6).map(|layer| random(32 * 4, 10 * batch + layer)).collect();
            let shallow: Vec<Vec<f32>> = [1, 3, 5].map(|layer| layers[layer].clone()).to_vec();
            alignment.add(States { layers: &shallow, width: 4 }, States { layers: &layers, width: 4 });
        }
        let aligned = alignment.soft_alignment(1);
        assert_eq!(aligned.iter().map(|aligned| aligned.aligned).collect::<Vec<_>>(), [2.0, 4.0, 6.0]);
        assert!(aligned.iter().all(|aligned| aligned.error == Some(0.0)));
    }

    proptest! {
        #[test]
        fn cka_does_not_depend_on_order_or_scale(seed: u64, scale in 0.1f32..10.0) {
            let (x, y) = (random(12 * 5, seed), random(12 * 3, seed.wrapping_add(1)));
            let expected = between(&x, 5, &y, 3);
            prop_assume!(expected.is_finite());
            let reversed = |values: &[f32], width| values.chunks(width).rev().flatten().copied().collect::<Vec<_>>();
            let scaled: Vec<f32> = x.iter().map(|value| value * scale).collect();
            prop_assert!((between(&scaled, 5, &y, 3) - expected).abs() < 1e-3 * expected.abs().max(1.0));
            prop_assert!((between(&reversed(&x, 5), 5, &reversed(&y, 3), 3) - expected).abs() < 1e-9 * expected.abs().max(1.0));
            prop_assert!((between(&y, 3, &x, 5) - expected).abs() < 1e-9 * expected.abs().max(1.0));
        }
    }
}
