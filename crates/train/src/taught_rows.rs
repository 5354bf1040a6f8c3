//! The few rows of a table that are taught, with their optimiser's state. Nothing has the size of the table.

use engram_config::TeachConfig;

/// Rows of one memory layer and Adam's moments, `[ids, width]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct TaughtRows {
    pub(crate) width: usize,
    /// Ascending.
    ids: Vec<u64>,
    pub(crate) values: Vec<f32>,
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl TaughtRows {
    /// Rows `ids`, which ascend, that begin as `values`.
    pub(crate) fn new(width: usize, ids: Vec<u64>, values: Vec<f32>) -> Self {
        debug_assert!(ids.is_sorted_by(|a, b| a < b) && values.len() == ids.len() * width);
        let zeros = vec![0.0; values.len()];
        Self { width, ids, values, first: zeros.clone(), second: zeros }
    }

    /// Ids of the rows, ascending.
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// The rows, each with its id.
    pub fn rows(&self) -> impl Iterator<Item = (u64, &[f32])> {
        self.ids.iter().copied().zip(self.values.chunks_exact(self.width))
    }

    /// Where row `id` is among them.
    pub(crate) fn place(&self, id: u64) -> Option<usize> {
        self.ids.binary_search(&id).ok()
    }

    /// Step `step`, from 0, of Adam with the gradient of all rows.
    pub(crate) fn update(&mut self, gradient: &[f32], step: usize, config: &TeachConfig) {
        let TeachConfig { beta1, beta2, epsilon, .. } = *config;
        let (steps, rate) = (step as i32 + 1, config.rate_of(step));
        let (of_first, of_second) = (1.0 - beta1.powi(steps), 1.0 - beta2.powi(steps));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((value, (first, second)), &slope) in self.values.iter_mut().zip(moments).zip(gradient) {
            *first = beta1 * *first + (1.0 - beta1) * slope;
            *second = beta2 * *second + (1.0 - beta2) * slope * slope;
            *value -= rate * (*first / of_first) / ((*second / of_second).sqrt() + epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first step of Adam is the rate, against the gradient; a value without gradient stays.
    #[test]
    fn the_first_step_is_the_rate() {
        let config = TeachConfig { warmup: 0, rate: 0.5, ..TeachConfig::default() };
        let mut rows = TaughtRows::new(2, vec![3, 9], vec![0.0; 4]);
        rows.update(&[2.0, -0.1, 0.0, 7.0], 0, &config);
        let expected = [-0.5, 0.5, 0.0, -0.5];
        rows.values
            .iter()
            .zip(expected)
            .for_each(|(found, expected)| assert!((found - expected).abs() < 1e-4));
        assert_eq!((rows.place(9), rows.place(4)), (Some(1), None));
        assert_eq!(rows.rows().map(|(id, _)| id).collect::<Vec<_>>(), [3, 9]);
    }
}
