//! Adam for a few dense weights on the host, named. What has no gradient stays as it is.

use std::collections::BTreeMap;

use engram_import::HostTensor;
use engram_kernels::{AdamStep, adam_step};

/// Weights or their gradients, by name.
pub(crate) type Named = BTreeMap<String, Vec<f32>>;

/// Both moments of every weight that had a gradient.
#[derive(Debug, Default)]
pub(crate) struct DenseAdam {
    moments: BTreeMap<String, [Vec<f32>; 2]>,
}

impl DenseAdam {
    /// Moves `weights` against `gradients`.
    pub(crate) fn step(
        &mut self,
        weights: &mut BTreeMap<String, HostTensor>,
        gradients: &Named,
        step: &AdamStep,
    ) {
        for (name, gradient) in gradients {
            let Some(weight) = weights.get_mut(name) else { continue };
            let zeros = || [vec![0.0; gradient.len()], vec![0.0; gradient.len()]];
            let [mean, square] = self.moments.entry(name.clone()).or_insert_with(zeros);
            adam_step(&mut weight.values, gradient, mean, square, step);
        }
    }

    /// The state as tensors: each moment under the weight's name and its number.
    pub(crate) fn export(&self) -> BTreeMap<String, HostTensor> {
        let tensors = self.moments.iter().flat_map(|(name, moments)| {
            let tensor = |values: &Vec<f32>| HostTensor { shape: vec![values.len()], values: values.clone() };
            moments
                .iter()
                .enumerate()
                .map(move |(moment, values)| (format!("{name}#{moment}"), tensor(values)))
        });
        tensors.collect()
    }

    /// What [`export`](Self::export) gave.
    pub(crate) fn import(tensors: BTreeMap<String, HostTensor>) -> Self {
        let mut moments: BTreeMap<String, [Vec<f32>; 2]> = BTreeMap::new();
        for (name, tensor) in tensors {
            let Some((weight, moment)) = name.rsplit_once('#') else { continue };
            let moment = usize::from(moment == "1");
            moments.entry(weight.to_owned()).or_default()[moment] = tensor.values;
        }
        Self { moments }
    }
}

/// Scales `gradients` down to the global norm `most`, if theirs is larger. Returns theirs.
pub(crate) fn clip(gradients: &mut Named, most: f32) -> f32 {
    let squares = |values: &Vec<f32>| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
    let norm = gradients.values().map(squares).sum::<f64>().sqrt() as f32;
    if norm > most {
        gradients.values_mut().flatten().for_each(|value| *value *= most / norm);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_without_gradient_stay_and_the_state_goes_through_tensors() {
        let tensor = |value| HostTensor { shape: vec![1], values: vec![value] };
        let mut weights = BTreeMap::from([("a".to_owned(), tensor(1.0)), ("b".to_owned(), tensor(1.0))]);
        let gradients = Named::from([("a".to_owned(), vec![0.5])]);
        let step = |step| AdamStep { rate: 0.1, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, decay: 0.0, step };
        let mut adam = DenseAdam::default();
        adam.step(&mut weights, &gradients, &step(1));
        assert!((weights["a"].values[0] - 0.9).abs() < 1e-5);
        assert_eq!(weights["b"].values, [1.0]);
        let mut again = (DenseAdam::import(adam.export()), weights.clone());
        adam.step(&mut weights, &gradients, &step(2));
        again.0.step(&mut again.1, &gradients, &step(2));
        assert_eq!(weights, again.1);
    }

    #[test]
    fn gradients_are_clipped_as_one() {
        let mut gradients = Named::from([("a".to_owned(), vec![3.0]), ("b".to_owned(), vec![4.0])]);
        assert_eq!(clip(&mut gradients, 10.0), 5.0);
        assert_eq!(clip(&mut gradients, 1.0), 5.0);
        assert!((gradients["a"][0] - 0.6).abs() < 1e-6 && (gradients["b"][0] - 0.8).abs() < 1e-6);
    }
}
