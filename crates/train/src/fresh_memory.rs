//! A new memory for a model that has none: random projections, rows that others set.
//!
//! With rows of zero its values are zero, so that the model computes what it did, bit for bit. Keys are projected at
//! random. Values are projected orthogonally and scaled to the size of the states that they are added to, so that a row
//! of norm one moves a state by its own size.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use engram_config::{MemoryConfig, Precision};
use engram_import::HostTensor;
use engram_model::{BlockMemory, Init, LanguageModel, Memory, Projection, Sequences};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::error::{Error, Result};
use crate::parameters;

/// Gives every memory block of `model` a memory drawn from `seed`. `text` is what its states are measured on. Returns
/// the new weights by their names in a checkpoint.
///
/// # Errors
/// When the memory is not of the paper's form.
pub(crate) fn draw(
    model: &mut LanguageModel,
    memory: &MemoryConfig,
    (streams, width): (usize, usize),
    seed: u64,
    text: (&[u32], &Sequences),
    device: &Device,
) -> Result<BTreeMap<String, HostTensor>> {
    let mut weights = BTreeMap::new();
    for &layer in &memory.layers {
        let size = median_norm(model, layer, text, width);
        let init = Init::new(device, seed).child("blocks").child(layer).child("memory");
        let mut module = Memory::new(memory, streams, width, &init, Precision::F32);
        let Projection::Separate(projection) = &mut module.projection else {
            return Err(Error::Mismatch(
                "a new memory has the paper's form, with keys and values apart".into(),
            ));
        };
        let values = orthogonal(memory.width(), width, size, seed ^ layer as u64);
        let data = TensorData::new(values, [memory.width(), width]);
        projection.value = Param::from_tensor(Tensor::from_data(data, device));
        let module = module.no_grad();
        let named = parameters::export(&module).into_iter();
        weights.extend(named.map(|(name, weight)| (format!("blocks.{layer}.memory.{name}"), weight)));
        model.blocks[layer].memory = Some(BlockMemory::Gated(module));
    }
    Ok(weights)
}

/// The median over tokens of the root mean square of the states before block `layer`.
fn median_norm(model: &LanguageModel, layer: usize, text: (&[u32], &Sequences), width: usize) -> f32 {
    let states = model.states_before(layer, text.0, text.1);
    let values: Vec<f32> = states.into_data().try_into_vec().expect("states are f32");
    let size = |state: &[f32]| (state.iter().map(|v| v * v).sum::<f32>() / width as f32).sqrt();
    let mut sizes: Vec<f32> = values.chunks_exact(width).map(size).collect();
    sizes.sort_by(f32::total_cmp);
    sizes.get(sizes.len() / 2).copied().unwrap_or(1.0)
}

/// A random matrix `[inputs, outputs]` whose shorter side is orthonormal, times `size`.
fn orthogonal(inputs: usize, outputs: usize, size: f32, seed: u64) -> Vec<f32> {
    let (long, short) = (inputs.max(outputs), inputs.min(outputs));
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut vectors: Vec<Vec<f64>> = Vec::with_capacity(short);
    while vectors.len() < short {
        let mut vector: Vec<f64> = (0..long).map(|_| StandardNormal.sample(&mut random)).collect();
        // Twice is enough (Gram-Schmidt).
        for _ in 0..2 {
            for other in &vectors {
                let along: f64 = vector.iter().zip(other).map(|(a, b)| a * b).sum();
                vector.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
        }
        let norm = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
        vector.iter_mut().for_each(|value| *value /= norm);
        vectors.push(vector);
    }
    let at = |input: usize, output: usize| match inputs >= outputs {
        true => vectors[output][input],
        false => vectors[input][output],
    };
    let places = (0..inputs).flat_map(|input| (0..outputs).map(move |output| (input, output)));
    places.map(|(input, output)| at(input, output) as f32 * size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projections_keep_angles() {
        for (inputs, outputs) in [(20, 12), (12, 20)] {
            let matrix = orthogonal(inputs, outputs, 3.0, 1);
            let short = inputs.min(outputs);
            let side = |i: usize| -> Vec<f32> {
                match inputs >= outputs {
                    true => (0..inputs).map(|input| matrix[input * outputs + i]).collect(),
                    false => matrix[i * outputs..][..outputs].to_vec(),
                }
            };
            for (a, b) in (0..short).flat_map(|a| (0..short).map(move |b| (a, b))) {
                let product: f32 = side(a).iter().zip(side(b)).map(|(a, b)| a * b).sum();
                let expected = if a == b { 9.0 } else { 0.0 };
                assert!((product - expected).abs() < 1e-4, "{a} {b}: {product}");
            }
        }
    }
}
