//! A model that stays as it is: its weights in the differentiable forward pass, without gradients.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Device;
use engram_config::{ModelConfig, Precision};
use engram_import::{HostTensor, Model, Weight, Weights};
use engram_model::LanguageModel;

use crate::error::Result;
use crate::parameters;

/// `model` as `config` describes it, in f32 and without gradients on `device`, which must have autodiff. `config` is the
/// model's own, perhaps with a memory whose weights are `memory`, by the names of a checkpoint.
///
/// # Errors
/// When the model is of a kind that has no differentiable forward pass, or weights are missing or of another shape.
pub fn frozen(
    model: &Model,
    config: &ModelConfig,
    memory: BTreeMap<String, HostTensor>,
    device: &Device,
) -> Result<LanguageModel> {
    let blank = LanguageModel::blank(config, device, Precision::F32)?;
    let mut tensors = if model.weights().is_inputs_first() {
        model.weights().iter().map(|(name, weight)| (name.to_owned(), host(weight))).collect()
    } else {
        inputs_first(model.weights())
    };
    tensors.extend(memory);
    let source = model.path().display().to_string();
    Ok(parameters::import(blank, tensors, &source)?.no_grad())
}

fn host(weight: &Weight) -> HostTensor {
    HostTensor { shape: weight.shape().to_vec(), values: weight.values() }
}

/// Weights from outside, `[outputs, inputs]`, as the model here has them: `[inputs, outputs]`, gate and up in one.
fn inputs_first(weights: &Weights) -> BTreeMap<String, HostTensor> {
    let mut tensors = BTreeMap::new();
    for (name, weight) in weights.iter() {
        if let Some(block) = name.strip_suffix(".feed_forward.gate.weight") {
            let up = weights.get(&format!("{block}.feed_forward.up.weight"));
            let rows = [Some(weight), up].into_iter().flatten().map(host);
            tensors.insert(format!("{block}.feed_forward.input.weight"), transposed(&stacked(rows)));
        } else if name.ends_with(".feed_forward.up.weight") {
            // With its gate.
        } else if weight.shape().len() == 2 && name != "embedding" {
            tensors.insert(name.to_owned(), transposed(&host(weight)));
        } else {
            tensors.insert(name.to_owned(), host(weight));
        }
    }
    tensors
}

/// Matrices of equally wide rows below each other.
fn stacked(matrices: impl Iterator<Item = HostTensor>) -> HostTensor {
    let mut all = HostTensor { shape: vec![0, 0], values: Vec::new() };
    for matrix in matrices {
        all.shape = vec![all.shape[0] + matrix.shape[0], matrix.shape[1]];
        all.values.extend(matrix.values);
    }
    all
}

fn transposed(matrix: &HostTensor) -> HostTensor {
    /// Rows and columns of a tile, which stays in the cache.
    const TILE: usize = 32;
    let (rows, columns) = (matrix.shape[0], matrix.shape[1]);
    let mut values = vec![0.0; rows * columns];
    for first_row in (0..rows).step_by(TILE) {
        for first in (0..columns).step_by(TILE) {
            for row in first_row..rows.min(first_row + TILE) {
                for column in first..columns.min(first + TILE) {
                    values[column * rows + row] = matrix.values[row * columns + column];
                }
            }
        }
    }
    HostTensor { shape: vec![columns, rows], values }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_transposed() {
        let values = (0..35 * 67).map(|value| value as f32).collect();
        let matrix = HostTensor { shape: vec![35, 67], values };
        let found = transposed(&matrix);
        assert_eq!(found.shape, [67, 35]);
        assert!(
            (0..35).all(
                |row| (0..67).all(|column| found.values[column * 35 + row] == (row * 67 + column) as f32)
            )
        );
        assert_eq!(transposed(&found), matrix);
    }
}
