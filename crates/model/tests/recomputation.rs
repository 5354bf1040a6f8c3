//! Recomputation changes no bit of a loss or a gradient.

mod common;

use std::collections::BTreeMap;

use burn::tensor::Gradients;
use common::{Batch, Options, PAPER, combinations, values, weights};
use engram_model::{LanguageModel, Trace};

/// Everything that training takes from a pass, as bits.
fn everything(
    model: &LanguageModel,
    batch: &Batch,
    differentiate: impl Fn(&mut Trace) -> (f32, Gradients),
) -> (BTreeMap<String, Vec<u32>>, Vec<(usize, Vec<u64>)>) {
    let mut trace = Trace::default();
    let (loss, gradients) = differentiate(&mut trace);
    let mut all = weights(model, |weight| weight.gradient(&gradients));
    for (layer, memory) in batch.memory.iter().enumerate() {
        let gradient = memory.rows.grad(&gradients).expect("rows have a gradient");
        all.insert(format!("rows {layer}"), values(gradient));
    }
    all.insert("loss".to_owned(), vec![loss]);
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    (all.into_iter().map(|(name, values)| (name, bits(values))).collect(), trace.loads)
}

#[track_caller]
fn check(options: Options, batch: &Batch, share: f32) {
    let model = options.model(3);
    let (kept, loads) = everything(&model, batch, |trace| {
        let loss = model.loss(batch.tokens(), batch.targets.clone(), trace);
        (values(loss.clone())[0], loss.mul_scalar(share).backward())
    });
    let (again, found_loads) = everything(&model, batch, |trace| {
        model.loss_recomputing(batch.tokens(), batch.targets.clone(), share, trace)
    });
    for (name, expected) in &kept {
        assert_eq!(&again[name], expected, "{options:?}: {name}");
        assert!(expected.iter().any(|&bits| bits != 0), "{options:?}: {name} is zero");
    }
    assert_eq!(found_loads, loads, "{options:?}");
}

#[test]
fn losses_and_gradients_are_those_of_the_whole_graph_bit_for_bit() {
    for options in combinations() {
        check(options, &Batch::random(&options.config(), 2, 9, 4), 1.0);
        check(options, &Batch::ragged(&options.config(), &[7, 1, 4, 4], 4), 1.0);
    }
    check(PAPER, &Batch::random(&PAPER.config(), 2, 9, 4), 1.0 / 3.0);
}
