//! A loss that counts some of the targets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{Gradients, Tensor};
use common::{Batch, PAPER, assert_close, combinations, device, values, weights};
use engram_model::{LanguageModel, MemoryRows, Shares, Targets, Tokens, Trace, composed};

/// Gradients of all weights and rows.
fn slopes(model: &LanguageModel, batch: &Batch, gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
    let mut all = weights(model, |weight| weight.gradient(gradients));
    for (layer, memory) in batch.memory.iter().enumerate() {
        all.insert(format!("rows {layer}"), values(memory.rows.grad(gradients).unwrap()));
    }
    all
}

fn counted(model: &LanguageModel, batch: &Batch, targets: &Targets) -> (f32, BTreeMap<String, Vec<f32>>) {
    let loss = model.loss_counting(batch.tokens(), targets, &mut Trace::default());
    (values(loss.clone())[0], slopes(model, batch, &loss.backward()))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn every_other(batch: &Batch) -> Vec<bool> {
    (0..batch.ids.len()).map(|place| place % 3 != 1).collect()
}

#[test]
fn a_loss_that_counts_all_is_the_loss_to_the_bit() {
    for options in combinations() {
        let (model, batch) = (options.model(3), Batch::random(&options.config(), 2, 9, 4));
        let whole = model.loss(batch.tokens(), batch.targets.clone(), &mut Trace::default());
        let all = Targets::counting(batch.targets.clone(), &vec![true; batch.ids.len()]);
        let (loss, found) = counted(&model, &batch, &all);
        assert_eq!(loss.to_bits(), values(whole.clone())[0].to_bits(), "{options:?}");
        for (name, expected) in slopes(&model, &batch, &whole.backward()) {
            assert_eq!(bits(&found[&name]), bits(&expected), "{options:?}: {name}");
        }
    }
}

#[test]
fn the_loss_is_the_mean_of_those_that_count_fused_and_composed() {
    for options in combinations() {
        let (model, batch) = (options.model(3), Batch::ragged(&options.config(), &[7, 1, 4, 4], 4));
        let marks = every_other(&batch);
        let targets = Targets::counting(batch.targets.clone(), &marks);
        let (loss, found) = counted(&model, &batch, &targets);
        let losses = model.token_losses(batch.tokens(), &batch.targets, &mut Trace::default());
        let of_counted = losses.iter().zip(&marks).filter(|(_, counts)| **counts).map(|(loss, _)| loss);
        let mean = of_counted.sum::<f32>() / targets.count() as f32;
        assert_close("loss", &[loss], &[mean]);
        let (_, expected) = composed(|| counted(&model, &batch, &targets));
        for (name, found) in &found {
            assert_close(&format!("{options:?}: {name}"), found, &expected[name]);
            assert!(found.iter().any(|&value| value != 0.0), "{options:?}: {name} is zero");
        }
        // Computing activations again changes no gradient.
        let mut trace = Trace::default();
        let shares = Shares { loss: 1.0, balance: 0.0 };
        let (again, gradients) = model.loss_recomputing(batch.tokens(), &targets, shares, &mut trace);
        assert_eq!(again.to_bits(), loss.to_bits());
        for (name, again) in slopes(&model, &batch, &gradients) {
            assert_close(&format!("{options:?}: {name}"), &again, &found[&name]);
        }
    }
}

#[test]
fn a_target_that_does_not_count_has_no_gradient() {
    let config = PAPER.config();
    let model = PAPER.model(3);
    // Token 5 stands only at the end of its sequence, so that it acts on that target alone.
    let ids: Vec<u32> = [1, 2, 3, 4, 2, 1, 3, 5].to_vec();
    let batch = Batch::of(&config, ids, 1);
    let of_five = |last: bool| {
        let mut marks = vec![true; 8];
        marks[7] = last;
        let (_, slopes) = counted(&model, &batch, &Targets::counting(batch.targets.clone(), &marks));
        slopes["embedding"][5 * config.width..6 * config.width].to_vec()
    };
    assert!(of_five(true).iter().any(|&slope| slope != 0.0));
    assert!(of_five(false).iter().all(|&slope| slope == 0.0));
    // No target at all: a loss of 0 and gradients of 0 for every weight.
    let (loss, slopes) = counted(&model, &batch, &Targets::counting(batch.targets.clone(), &[false; 8]));
    assert_eq!(loss, 0.0);
    assert!(slopes.values().flatten().all(|&slope| slope == 0.0));
}

#[test]
fn gradients_are_finite_differences() {
    let (model, config) = (PAPER.model(3), PAPER.config());
    let batch = Batch::random(&config, 2, 9, 4);
    let marks = every_other(&batch);
    let targets = Targets::counting(batch.targets.clone(), &marks);
    let (_, slopes) = counted(&model, &batch, &targets);
    let (rows, slope) = (&batch.memory[0].rows, &slopes["rows 0"]);
    let norm = slope.iter().map(|slope| f64::from(slope * slope)).sum::<f64>().sqrt();
    let along = |step: f64| {
        let at = values(rows.clone());
        let moved = at.iter().zip(slope).map(|(at, slope)| at + (step / norm) as f32 * slope);
        let data = burn::tensor::TensorData::new(moved.collect::<Vec<f32>>(), rows.dims());
        let mut memory: Vec<MemoryRows> = batch.memory.clone();
        memory[0].rows = Tensor::from_data(data, &device());
        let tokens = Tokens { memory: &memory, ..batch.tokens() };
        let losses = model.token_losses(tokens, &batch.targets, &mut Trace::default());
        let of_counted = losses.iter().zip(&marks).filter(|(_, counts)| **counts);
        of_counted.map(|(&loss, _)| f64::from(loss)).sum::<f64>() / targets.count() as f64
    };
    let found = (along(0.02) - along(-0.02)) / 0.04;
    assert!((found / norm - 1.0).abs() < 0.02, "{found} along the gradient, whose length is {norm}");
}

#[test]
#[should_panic(expected = "a mark for each target")]
fn a_mark_for_each_target_is_needed() {
    Targets::counting(Arc::from([1, 2]), &[true]);
}
