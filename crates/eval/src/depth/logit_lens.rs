//! LogitLens (as in arXiv 2601.07372, section 6.1): how far each layer is from the final prediction. The state after
//! every block goes through the model's last norm and head. The result is the divergence KL(p_final ‖ p_layer), in
//! nats, from the final distribution.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;
use serde::Serialize;

/// Divergences of every layer, collected window by window.
#[derive(Debug, Default)]
pub struct LogitLens {
    /// `[windows][layers]`, the mean over the window's tokens.
    windows: Vec<Vec<f64>>,
}

/// The divergence after a number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Divergence {
    /// Number of blocks passed.
    pub depth: usize,
    /// KL(p_final ‖ p_layer) in nats, the mean over tokens.
    pub nats: f64,
    /// Its standard error over windows; none for a single one.
    pub error: Option<f64>,
}

impl LogitLens {
    /// Adds a window: the logits, `[tokens, vocabulary]`, after every block; the last are the model's own.
    pub fn add(&mut self, logits: impl IntoIterator<Item = Tensor<2>>) {
        let layers: Vec<Tensor<2>> = logits.into_iter().map(|logits| log_softmax(logits, 1)).collect();
        let Some(last) = layers.last().cloned() else { return };
        let mean = |layer: Tensor<2>| divergence(last.clone(), layer);
        self.windows.push(layers.into_iter().map(mean).collect());
    }

    /// The result, one per block.
    pub fn divergences(&self) -> Vec<Divergence> {
        let layers = self.windows.first().map_or(0, Vec::len);
        let count = self.windows.len() as f64;
        let of_layer = |layer: usize| {
            let values = || self.windows.iter().map(move |window| window[layer]);
            let nats = values().sum::<f64>() / count;
            let variance = values().map(|value| (value - nats).powi(2)).sum::<f64>() / (count - 1.0);
            let error = (self.windows.len() > 1).then(|| (variance / count).sqrt());
            Divergence { depth: layer + 1, nats, error }
        };
        (0..layers).map(of_layer).collect()
    }
}

/// Mean of KL(p ‖ q) over the rows of log-probabilities p and q.
fn divergence(p: Tensor<2>, q: Tensor<2>) -> f64 {
    let divergences: Vec<f32> = (p.clone().exp() * (p - q)).sum_dim(1).into_data().iter().collect();
    divergences.iter().map(|&value| f64::from(value)).sum::<f64>() / divergences.len() as f64
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn logits<const N: usize>(rows: &[[f32; N]]) -> Tensor<2> {
        let data = TensorData::new(rows.concat(), [rows.len(), N]);
        Tensor::from_data(data, &Device::flex())
    }

    #[test]
    fn divergences_are_those_of_the_definition() {
        let mut lens = LogitLens::default();
        let (half, tilted) = ([0.0, 0.0], [9.0_f32.ln(), 0.0]);
        lens.add([logits(&[tilted, tilted]), logits(&[half, tilted])]);
        // KL((1/2, 1/2) ‖ (9/10, 1/10)) at the first token, 0 at the second.
        let expected = 0.5 * (0.5_f64 / 0.9).ln() + 0.5 * (0.5_f64 / 0.1).ln();
        let found = lens.divergences();
        assert_eq!((found[0].depth, found[0].error), (1, None));
        assert!((found[0].nats - expected / 2.0).abs() < 1e-6, "{found:?}");
        assert_eq!(found[1].nats, 0.0, "the last layer is where it is");
    }

    #[test]
    fn the_error_is_that_of_the_mean_over_windows() {
        let mut lens = LogitLens::default();
        lens.add([logits(&[[1.0, 0.0]]), logits(&[[1.0, 0.0]])]);
        lens.add([logits(&[[0.0, 3.0]]), logits(&[[1.0, 0.0]])]);
        let found = lens.divergences();
        // Values 0 and x: mean x/2, and standard error x/2.
        assert!((found[0].nats - found[0].error.unwrap()).abs() < 1e-9, "{found:?}");
        assert!(found[0].nats > 0.1);
    }
}
