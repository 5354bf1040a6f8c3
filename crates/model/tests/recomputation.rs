//! Recomputation changes no bit of a loss or a gradient where the operations are fused, and elsewhere no more than
//! rounding does: Burn's primitives round otherwise with a graph than without.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;

use burn::tensor::Gradients;
use common::{Batch, Options, PAPER, assert_close, combinations, device, shaken, values, weights};
use engram_config::Precision;
use engram_model::{LanguageModel, Shares, Trace, composed};

/// What training takes from a pass.
struct Found {
    /// The loss, and the gradients of weights and rows.
    numbers: BTreeMap<String, Vec<f32>>,
    loads: Vec<(usize, Vec<u64>)>,
}

fn everything(
    model: &LanguageModel,
    batch: &Batch,
    differentiate: impl Fn(&mut Trace) -> (f32, Gradients),
) -> Found {
    let mut trace = Trace::default();
    let (loss, gradients) = differentiate(&mut trace);
    let mut numbers = weights(model, |weight| weight.gradient(&gradients));
    for (layer, memory) in batch.memory.iter().enumerate() {
        let gradient = memory.rows.grad(&gradients).expect("rows have a gradient");
        numbers.insert(format!("rows {layer}"), values(gradient));
    }
    numbers.insert("loss".to_owned(), vec![loss]);
    Found { numbers, loads: trace.loads }
}

/// Kept and recomputed, everything is the `same`.
fn check(options: Options, batch: &Batch, share: f32, same: impl Fn(&str, &[f32], &[f32])) {
    check_model(&options.model(3), options, batch, share, same);
}

fn check_model(
    model: &LanguageModel,
    options: Options,
    batch: &Batch,
    share: f32,
    same: impl Fn(&str, &[f32], &[f32]),
) {
    let kept = everything(model, batch, |trace| {
        let loss = model.loss(batch.tokens(), batch.targets.clone(), trace);
        let all = trace.balance.drain(..).fold(loss.clone(), |sum, balance| sum + balance);
        (values(loss)[0], all.mul_scalar(share).backward())
    });
    let again = everything(model, batch, |trace| {
        let shares = Shares { loss: share, balance: share };
        model.loss_recomputing(batch.tokens(), &batch.targets.clone().into(), shares, trace)
    });
    for (name, expected) in &kept.numbers {
        same(&format!("{options:?}: {name}"), &again.numbers[name], expected);
        assert!(expected.iter().any(|&value| value != 0.0), "{options:?}: {name} is zero");
    }
    assert_eq!(again.loads, kept.loads, "{options:?}");
}

fn same_bits(name: &str, found: &[f32], expected: &[f32]) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(found), bits(expected), "{name}");
}

#[test]
fn losses_and_gradients_are_those_of_the_whole_graph() {
    for options in combinations() {
        let config = options.config();
        for batch in [Batch::random(&config, 2, 9, 4), Batch::ragged(&config, &[7, 1, 4, 4], 4)] {
            check(options, &batch, 1.0, same_bits);
            composed(|| {
                check(options, &batch, 1.0, |name, found, expected| {
                    assert_close(name, found, expected);
                });
            });
        }
    }
    check(PAPER, &Batch::random(&PAPER.config(), 2, 9, 4), 1.0 / 3.0, same_bits);
}

/// A loss that balances experts is differentiated where it arises; sums of gradients are then taken in another order.
#[test]
fn losses_that_balance_experts_are_recomputed_too() {
    let mut config = PAPER.config();
    config.experts.as_mut().unwrap().sequence_balance = 0.3;
    let model = LanguageModel::new(&config, &device(), 3, Precision::F32).unwrap();
    let model = shaken(model, 3);
    let batch = Batch::ragged(&config, &[7, 1, 4, 4], 4);
    check_model(&model, PAPER, &batch, 0.5, |name, found, expected| {
        assert_close(name, found, expected);
    });
}
