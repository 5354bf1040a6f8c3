//! What holds for every model: its gradients are the loss's, it cannot see ahead, sequences do not touch, and memory
//! that says nothing changes nothing.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use common::{Batch, Options, PAPER, PLAIN, changed, combinations, device, values, weights};
use engram_config::{
    Account, AttentionConfig, Gate, GateForm, Lookup, MemoryConfig, MemoryForm, ModelConfig, PlainConfig,
    Precision,
};
use engram_model::{
    BlockFeedForward, BlockMemory, LanguageModel, Memory, MemoryRows, Projection, Sequences, Tokens, Trace,
};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// By about how much a step of the finite differences changes the loss: enough to stand out from its rounding.
const CHANGE: f64 = 1e-3;
/// Largest error of a directional derivative, as a share of the gradient's length.
const SHARE: f64 = 5e-3;
/// By how much rounding changes a loss, which tells the less the longer the step.
const ROUNDING: f64 = 4e-7;
/// Least distance of a gate from 1/2, where the root of its score is too steep for differences.
const GATE_DISTANCE: f32 = 0.07;

/// The slope of the loss along `direction`, by differences of fourth order: losses two steps either way.
fn slope(step: f32, mut loss: impl FnMut(f32) -> f64) -> f64 {
    let difference = |loss: &mut dyn FnMut(f32) -> f64, step: f32| loss(step) - loss(-step);
    let (near, far) = (difference(&mut loss, step), difference(&mut loss, 2.0 * step));
    (8.0 * near - far) / (12.0 * f64::from(step))
}

/// The gradient's own direction, and one at random, both of length 1.
fn directions(gradient: &[f32], seed: u64) -> [Vec<f32>; 2] {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let noise: Vec<f32> = gradient.iter().map(|_| random.sample(StandardNormal)).collect();
    [gradient.to_vec(), noise].map(|direction| {
        let length = length(&direction) as f32;
        direction.iter().map(|value| value / length).collect()
    })
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

fn product(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// How far the slopes of `loss`, which takes a weight's values, are from its gradient, as a share of its length.
/// None where `loss` is not smooth.
fn error(at: &[f32], gradient: &[f32], mut loss: impl FnMut(&[f32]) -> Option<f64>) -> Option<f64> {
    assert!(length(gradient) > 1e-6, "the loss does not depend on it");
    let mut smooth = true;
    let step = (CHANGE / length(gradient)).clamp(5e-4, 2e-2) as f32;
    let errors = directions(gradient, 9).map(|direction| {
        let found = slope(step, |step| {
            let moved: Vec<f32> = at.iter().zip(&direction).map(|(value, d)| value + step * d).collect();
            loss(&moved).unwrap_or_else(|| {
                smooth = false;
                0.0
            })
        });
        let blur = ROUNDING / f64::from(step);
        ((found - product(gradient, &direction)).abs() - blur).max(0.0) / length(gradient)
    });
    smooth.then(|| errors[0].max(errors[1]))
}

/// The [`error`] of every weight and of the memory's rows. None where the loss is not smooth: where a gate's score
/// is near 0, or a step makes a token change its experts.
fn gradient_errors(options: Options, lengths: &[usize], seed: u64) -> Option<Vec<(String, f64)>> {
    let (mut model, config) = (options.model(seed), options.config());
    let gated = config.memory.iter().filter(|memory| memory.gates(options.streams) > 0);
    let normed = gated.filter(|memory| memory.gate_form == GateForm::SignedRoot);
    for layer in normed.flat_map(|memory| &memory.layers) {
        // Larger scores, few of them near 0.
        let name = format!("blocks.{layer}.memory.norms.query");
        model = changed(model, &name, &|weight| weight.iter_mut().for_each(|weight| *weight *= 5.0));
    }
    let batch = Batch::ragged(&config, lengths, seed);
    let gradients = model.loss(batch.tokens(), batch.targets.clone(), &mut Trace::default()).backward();
    let mut trace = Trace::with_gates();
    model.hidden(batch.tokens(), &mut trace);
    let gates = trace.gates.unwrap().into_iter().flat_map(|(_, gates)| gates);
    let choices = trace.loads;
    let has_kink = config.memory.as_ref().is_some_and(|memory| memory.gate_form == GateForm::SignedRoot);
    if has_kink && gates.into_iter().any(|gate| (gate - 0.5).abs() < GATE_DISTANCE) {
        return None;
    }
    let loss_of = |model: &LanguageModel, rows: &[MemoryRows]| {
        let mut trace = Trace::default();
        let tokens = Tokens { memory: rows, ..batch.tokens() };
        let losses = model.token_losses(tokens, &batch.targets, &mut trace);
        let mean = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / losses.len() as f64;
        (trace.loads == choices).then_some(mean)
    };
    let mut errors = Vec::new();
    for (name, (at, gradient)) in weights(&model, |weight| {
        let gradient = weight.gradient(&gradients);
        (weight.values, gradient)
    }) {
        let error = error(&at, &gradient, |moved| {
            loss_of(&changed(model.clone(), &name, &|values| values.copy_from_slice(moved)), &batch.memory)
        });
        errors.push((name, error?));
    }
    for (layer, memory) in batch.memory.iter().enumerate() {
        let gradient = values(memory.rows.grad(&gradients).unwrap());
        let error = error(&values(memory.rows.clone()), &gradient, |moved| {
            let mut rows = batch.memory.clone();
            let shape = rows[layer].rows.dims();
            rows[layer].rows = Tensor::from_data(TensorData::new(moved.to_vec(), shape), &device());
            loss_of(&model, &rows)
        });
        errors.push((format!("rows {layer}"), error?));
    }
    Some(errors)
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for options in combinations() {
        for lengths in [&[3, 3], &[4, 2]] {
            let found = (0..500).find_map(|seed| gradient_errors(options, lengths, seed));
            for (name, error) in found.expect("a smooth loss") {
                assert!(error < SHARE, "{options:?}, {lengths:?}: {name}: {error} of its length");
            }
        }
    }
}

/// The model with values of zero behind its gates.
fn with_silent_memory(mut model: LanguageModel, width: usize) -> LanguageModel {
    for block in &mut model.blocks {
        let Some(BlockMemory::Gated(memory)) = &mut block.memory else { panic!("a gated form") };
        match &mut memory.projection {
            Projection::Value(only) => {
                only.value = only.value.clone().map(|value| value.zeros_like());
                only.value_bias = only.value_bias.clone().map(|bias| bias.zeros_like());
            }
            Projection::Separate(separate) => {
                separate.value = separate.value.clone().map(|value| value.zeros_like());
                separate.value_bias = separate.value_bias.clone().map(|bias| bias.zeros_like());
            }
            Projection::Fused(both) => {
                *both = both.clone().map(|both| {
                    let [rows, columns] = both.dims();
                    let value = Tensor::zeros([rows, width], &both.device());
                    match columns - width {
                        0 => value,
                        keys => Tensor::cat(vec![both.narrow(1, 0, keys), value], 1),
                    }
                });
            }
        }
    }
    model
}

#[test]
fn memory_that_says_nothing_changes_nothing() {
    let gates =
        [(1, Gate::PerStream), (4, Gate::PerStream), (4, Gate::Shared), (1, Gate::None), (4, Gate::None)];
    for form in [MemoryForm::Paper, MemoryForm::V41] {
        for (streams, gate) in gates {
            let options = Options { memory: Some(form), gate, streams, ..PAPER };
            let batch = Batch::random(&options.config(), 2, 9, 4);
            let model = with_silent_memory(options.model(3), 16);
            let mut without = model.clone();
            without.blocks.iter_mut().for_each(|block| block.memory = None);
            let tokens = Tokens { memory: &[], ..batch.tokens() };
            let expected = without.hidden(tokens, &mut Trace::default());
            let found = model.hidden(batch.tokens(), &mut Trace::default());
            assert_eq!(bits(found), bits(expected), "{options:?}");
            // And memory that speaks is heard.
            let heard = options.model(3).hidden(batch.tokens(), &mut Trace::default());
            assert_ne!(bits(heard), bits(without.hidden(tokens, &mut Trace::default())), "{options:?}");
        }
    }
}

/// The routed experts are scaled (DeepSeek-V3's `routed_scaling_factor`), the shared one is not.
#[test]
fn routed_experts_are_scaled() {
    let experts = |scaling: f32| {
        let mut config = PAPER.config();
        config.experts.as_mut().unwrap().scaling = scaling;
        let mut model = LanguageModel::new(&config, &common::device(), 3, Precision::F32).unwrap();
        match model.blocks.remove(1).feed_forward {
            BlockFeedForward::Experts(experts) => experts,
            BlockFeedForward::Dense(_) => panic!("a block with experts"),
        }
    };
    let x = common::normal([7, 16], 4);
    let (plain, scaled) = (experts(1.0), experts(2.5));
    let shared = values(plain.shared.as_ref().unwrap().forward(x.clone()));
    let (plain, scaled) = (values(plain.forward(x.clone()).0), values(scaled.forward(x).0));
    let expected = plain.iter().zip(&shared).map(|(plain, shared)| 2.5 * (plain - shared) + shared);
    common::assert_close("scaled", &scaled, &expected.collect::<Vec<_>>());
    assert!(plain.iter().zip(&scaled).any(|(plain, scaled)| (plain - scaled).abs() > 1e-3));
}

/// The loss that balances experts within a sequence is the one of DeepSeek-V3's equations 17 to 20, sequence by sequence.
#[test]
fn the_balance_loss_is_that_of_each_sequence() {
    let mut config = PAPER.config();
    let (alpha, [routed, active]) = (0.3, [5, 2]);
    config.experts.as_mut().unwrap().sequence_balance = alpha;
    let mut model = common::shaken(LanguageModel::new(&config, &device(), 3, Precision::F32).unwrap(), 3);
    if let BlockFeedForward::Experts(experts) = &mut model.blocks[1].feed_forward {
        experts.balance = experts.balance.clone().map(|balance| balance.zeros_like().set_require_grad(false));
    }
    let lengths = [7, 1, 4, 4];
    let batch = Batch::ragged(&config, &lengths, 4);
    let BlockFeedForward::Experts(experts) = &model.blocks[1].feed_forward else { panic!("experts") };
    let mut flat = model.clone();
    if let BlockFeedForward::Experts(experts) = &mut flat.blocks[1].feed_forward {
        experts.router.weight = experts.router.weight.clone().map(|weight| weight.zeros_like());
    }
    let mut trace = Trace::default();
    flat.hidden(batch.tokens(), &mut trace);
    // P_i = 1/routed, and Σ f_i = routed: the loss is α, whatever the lengths.
    assert_eq!(trace.balance.len(), 1, "one block has experts");
    let found = values(trace.balance.remove(0))[0];
    assert!((found - alpha).abs() < 1e-6, "{found}");
    let by_definition = |scores: &[Vec<f32>]| -> f64 {
        let mut total = 0.0;
        let mut rest = scores;
        for time in lengths {
            let (own, later) = rest.split_at(time);
            for expert in 0..routed {
                let better = |row: &Vec<f32>| row.iter().filter(|&&score| score > row[expert]).count();
                let seen = own.iter().filter(|row| better(row) < active).count() as f64;
                let share: f64 = own.iter().map(|row| f64::from(row[expert] / row.iter().sum::<f32>())).sum();
                let f = seen * routed as f64 / (active * time) as f64;
                total += f64::from(alpha) * f * share / time as f64 / lengths.len() as f64;
            }
            rest = later;
        }
        total
    };
    let x = common::normal([16, 16], 8);
    let (logits, found) = experts.balance(x, &batch.sequences);
    let score = |logit: &f32| 1.0 / (1.0 + (-logit).exp());
    let rows: Vec<Vec<f32>> =
        values(logits).chunks(routed).map(|row| row.iter().map(score).collect()).collect();
    let expected = by_definition(&rows);
    let found = f64::from(values(found.unwrap())[0]);
    assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
}

/// The memory of a gated form in a model of `options`.
fn gated(options: Options) -> Memory {
    match options.model(6).blocks.remove(0).memory {
        Some(BlockMemory::Gated(memory)) => memory,
        _ => panic!("a gated form"),
    }
}

/// One gate for all streams is the gate of one stream that is their mean.
#[test]
fn a_shared_gate_is_that_of_the_mean_of_the_streams() {
    let shared = Options { gate: Gate::Shared, ..PAPER };
    let memory = gated(shared);
    let mut alone = gated(Options { streams: 1, ..PAPER });
    let rows = Batch::random(&shared.config(), 1, 9, 1).memory.remove(0);
    let h = common::normal([9, 4 * 16], 2);
    let mean = h.clone().reshape([9, 4, 16]).mean_dim(1).reshape([9, 16]);
    let found = memory.gates(h, &rows);
    assert_eq!(found.len(), 9);
    alone.projection = memory.projection;
    alone.norms = memory.norms;
    common::assert_close("gates", &found, &alone.gates(mean, &rows));
}

/// Without gates a memory adds the same to whatever is in the streams.
#[test]
fn without_a_gate_the_streams_decide_nothing() {
    for form in [MemoryForm::Paper, MemoryForm::V41] {
        let options = Options { gate: Gate::None, memory: Some(form), ..PAPER };
        let memory = gated(options);
        let rows = Batch::random(&options.config(), 1, 9, 1).memory.remove(0);
        let added = |seed| memory.forward(common::normal([9, 4 * 16], seed), &Sequences::equal(1, 9), &rows);
        assert_eq!(bits(added(1)), bits(added(2)));
        assert!(memory.gates(common::normal([9, 4 * 16], 1), &rows).is_empty());
    }
}

/// Each form against its formula, worked out from the rows of every token.
#[test]
fn rows_without_gates_are_added_by_their_forms_formula() {
    for (form, streams) in [
        (MemoryForm::Added, 1),
        (MemoryForm::Added, 3),
        (MemoryForm::OverEncoding, 1),
        (MemoryForm::OverEncoding, 3),
        (MemoryForm::AttentionValues, 2),
    ] {
        let options = Options { memory: Some(form), streams, ..PAPER };
        let Some(BlockMemory::Added(module)) = options.model(6).blocks.remove(0).memory else {
            panic!("a form without gates")
        };
        let rows = Batch::random(&options.config(), 1, 9, 1).memory.remove(0);
        let width = rows.rows.dims()[1];
        let of_token = |token: usize| -> Vec<f32> {
            let slots = &rows.index[token * 4..][..4];
            let table = values(rows.rows.clone());
            slots.iter().flat_map(|&slot| table[slot as usize * width..][..width].to_vec()).collect()
        };
        let projected = |e: &[f32]| -> Vec<f32> {
            let weight = module.projection.as_ref().unwrap().val();
            let [inputs, outputs] = weight.dims();
            let weight = values(weight);
            let column = |o: usize| (0..inputs).map(|i| e[i] * weight[i * outputs + o]).sum();
            (0..outputs).map(column).collect()
        };
        let x = common::normal([9, streams * 16], 2);
        let found = values(module.forward(x.clone(), Some(&rows)));
        let x = values(x);
        let added = module.values(Some(&rows)).map(values);
        for token in 0..9 {
            let e = of_token(token);
            let streams_of = |values: &[f32]| values[token * streams * 16..][..streams * 16].to_vec();
            let expected: Vec<f32> = match form {
                MemoryForm::Added => {
                    let mean = |i: usize| (0..4).map(|slot| e[slot * 16 + i % 16]).sum::<f32>() / 4.0;
                    streams_of(&x).iter().enumerate().map(|(i, x)| x + mean(i)).collect()
                }
                MemoryForm::OverEncoding => {
                    let projected = projected(&e);
                    let average = |(i, x): (usize, &f32)| (x + projected[i % 16]) / 5.0;
                    streams_of(&x).iter().enumerate().map(average).collect()
                }
                _ => {
                    common::assert_close(
                        "values",
                        &added.as_ref().unwrap()[token * 21..][..21],
                        &projected(&e),
                    );
                    streams_of(&x)
                }
            };
            common::assert_close("streams", &streams_of(&found), &expected);
        }
        assert_eq!(added.is_some(), form == MemoryForm::AttentionValues);
    }
}

#[test]
fn a_memory_switched_off_is_one_whose_rows_are_zero() {
    for options in combinations().into_iter().filter(|options| options.memory.is_some()) {
        let batch = Batch::random(&options.config(), 2, 9, 4);
        let on = options.model(3);
        let mut off = on.clone();
        off.switch_memory_off();
        let silent = Tokens { memory: &[], ..batch.tokens() };
        let found = bits(off.hidden(silent, &mut Trace::default()));
        assert_ne!(found, bits(on.hidden(batch.tokens(), &mut Trace::default())), "{options:?}");
        if options.memory == Some(MemoryForm::Paper) {
            // Its biases speak without rows, too; switched off they do not.
            let mut without = on;
            without.blocks.iter_mut().for_each(|block| block.memory = None);
            assert_eq!(found, bits(without.hidden(silent, &mut Trace::default())), "{options:?}");
            continue;
        }
        let mut zeros = Batch::random(&options.config(), 2, 9, 4);
        zeros.memory.iter_mut().for_each(|memory| memory.rows = memory.rows.zeros_like());
        let expected = values(on.hidden(zeros.tokens(), &mut Trace::default()));
        let found = values(off.hidden(silent, &mut Trace::default()));
        common::assert_close(&format!("{options:?}"), &found, &expected);
    }
}

#[test]
fn the_lens_on_the_last_state_shows_what_the_model_says() {
    for options in [PAPER, PLAIN] {
        let model = options.model(3);
        let batch = Batch::random(&options.config(), 2, 9, 4);
        let mut trace = Trace::with_states();
        model.hidden(batch.tokens(), &mut trace);
        let states = trace.states.unwrap();
        assert_eq!(states.len(), 2);
        let logits = values(model.lens(states[1].clone()));
        let expected = model.next_logits(batch.tokens(), &mut Trace::default());
        common::assert_close("logits", &[&logits[8 * 37..9 * 37], &logits[17 * 37..]].concat(), &expected);
        assert_ne!(bits(states[0].clone()), bits(states[1].clone()));
    }
}

#[test]
fn impossible_forms_are_refused() {
    let config = |options: Options, change: &dyn Fn(&mut MemoryConfig)| {
        let mut config = options.config();
        change(config.memory.as_mut().unwrap());
        config.validate().unwrap_err().to_string()
    };
    let form = |form| Options { memory: Some(form), ..PAPER };
    let error = config(form(MemoryForm::Added), &|memory| memory.row_width = 8);
    assert!(error.starts_with("`model.memory.row_width`: is 8"), "{error}");
    let error = config(form(MemoryForm::OverEncoding), &|memory| memory.layers = vec![1]);
    assert!(error.starts_with("`model.memory.layers`: names another"), "{error}");
    let error = config(form(MemoryForm::AttentionValues), &|memory| memory.gate = Gate::Shared);
    assert!(error.starts_with("`model.memory.gate`: chooses"), "{error}");
    let error = config(form(MemoryForm::Added), &|memory| memory.convolution = Some(true));
    assert!(error.starts_with("`model.memory.convolution`: is true"), "{error}");
}

#[test]
fn heads_that_share_keys_are_heads_with_the_same_keys() {
    let options = Options { grouped: true, ..PLAIN };
    let (grouped, config) = (options.model(11), options.config());
    let attention = AttentionConfig::Plain(PlainConfig { rotary_base: 100.0, ..PlainConfig::new(4, 6) });
    let own = ModelConfig { attention, ..config.clone() };
    let batch = Batch::random(&config, 2, 9, 4);
    let logits = |model: &LanguageModel| model.next_logits(batch.tokens(), &mut Trace::default());
    // The weights of the grouped model, with those of its two key heads in the given order for the four heads.
    let with = |order: [usize; 4]| {
        let mut model = LanguageModel::new(&own, &device(), 0, Precision::F32).unwrap();
        for (name, weight) in weights(&grouped, |weight| weight.values) {
            let shared = name.ends_with("key.weight") || name.ends_with("value.weight");
            let repeated =
                weight.chunks(2 * 6).flat_map(|row| order.map(|head| &row[head * 6..][..6])).flatten();
            let weight = if shared { repeated.copied().collect() } else { weight.clone() };
            model = changed(model, &name, &|values| values.copy_from_slice(&weight));
        }
        logits(&model)
    };
    common::assert_close("logits", &logits(&grouped), &with([0, 0, 1, 1]));
    let interleaved = with([0, 1, 0, 1]);
    assert!(logits(&grouped).iter().zip(interleaved).any(|(one, other)| (one - other).abs() > 1e-3));
}

#[test]
fn key_heads_divide_the_heads_and_are_written_only_where_they_are_fewer() {
    let refused = |key_heads: usize| {
        let attention = AttentionConfig::Plain(PlainConfig {
            key_heads: Some(key_heads),
            rotary_base: 100.0,
            ..PlainConfig::new(4, 6)
        });
        ModelConfig { attention, ..PLAIN.config() }.validate().unwrap_err().to_string()
    };
    assert!(refused(3).starts_with("`model.attention.key_heads`: is 3, which does not divide the 4 heads"));
    assert!(refused(8).starts_with("`model.attention.key_heads`: is 8"));
    assert!(refused(0).starts_with("`model.attention.key_heads`: is 0"));
    assert!(!toml::to_string(&PLAIN.config()).unwrap().contains("key_heads"));
    let grouped = Options { grouped: true, ..PLAIN }.config();
    let text = toml::to_string(&grouped).unwrap();
    assert!(text.contains("key_heads = 2"), "{text}");
    assert_eq!(toml::from_str::<ModelConfig>(&text).unwrap(), grouped);
}

#[test]
fn departures_from_the_published_forms_are_named() {
    let departs = |options: Options| options.config().memory.unwrap().departs();
    let form = |form| Options { memory: Some(form), ..PAPER };
    assert_eq!(departs(PAPER), None);
    assert_eq!(departs(form(MemoryForm::V41)), None);
    assert_eq!(departs(form(MemoryForm::Added)), Some("model.memory.form"));
    assert_eq!(departs(Options { gate: Gate::None, ..PAPER }), Some("model.memory.gate"));
    assert_eq!(departs(Options { convolution: Some(false), ..PAPER }), Some("model.memory.convolution"));
    assert_eq!(departs(Options { convolution: Some(false), ..form(MemoryForm::V41) }), None);
    let permuted = MemoryConfig { lookup: Lookup::Permuted, ..PAPER.config().memory.unwrap() };
    assert_eq!(permuted.departs(), Some("model.memory.lookup"));
}

#[test]
fn impossible_gates_are_refused() {
    let refused = |options: Options| options.config().validate().unwrap_err().to_string();
    let error = refused(Options { gate: Gate::Shared, streams: 1, ..PAPER });
    assert!(error.starts_with("`model.memory.gate`: is \"shared\""), "{error}");
    let error = refused(Options { convolution: Some(true), memory: Some(MemoryForm::V41), ..PAPER });
    assert!(error.starts_with("`model.memory.convolution`: is true"), "{error}");
}

fn bits(tensor: Tensor<2>) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

#[test]
fn accounts_are_what_models_hold() {
    for options in combinations() {
        let config = options.config();
        let table_rows = [29, 31];
        let layers = config.memory.as_ref().map_or(0, |memory| memory.layers.len());
        let account = Account::of(&config, &table_rows[..layers]);
        let sizes = weights(&options.model(0), |weight| weight.values.len() as u64);
        assert_eq!(account.total - account.memory, sizes.values().sum::<u64>(), "{options:?}");
        let of = |part: &str| -> u64 {
            sizes.iter().filter(|(name, _)| name.contains(part)).map(|(_, size)| size).sum()
        };
        assert_eq!(account.vocabulary, of("embedding") + of("head"), "{options:?}");
        let routed = |name: &str| -> u64 {
            let blocks = (0..config.blocks).filter(|&block| config.experts_of(block).is_some());
            blocks.map(|block| of(&format!("blocks.{block}.feed_forward.{name}"))).sum()
        };
        assert_eq!(account.experts, routed("input") + routed("output"), "{options:?}");
        let rows: u64 = table_rows[..layers].iter().sum();
        let row_width = config.memory.as_ref().map_or(0, |memory| memory.row_width);
        assert_eq!(account.memory, rows * row_width as u64, "{options:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A token is not seen before it comes.
    #[test]
    fn nothing_is_seen_ahead(which in 0..combinations().len(), seed: u64, at in 1_usize..9) {
        let options = combinations()[which];
        let config = options.config();
        let model = options.model(seed);
        let batch = Batch::random(&config, 1, 9, seed);
        let mut ids = batch.ids.clone();
        ids[at] = (ids[at] + 1) % config.vocabulary as u32;
        let other = Batch::of(&config, ids, 1);
        let hidden = |batch: &Batch| {
            let hidden = values(model.hidden(batch.tokens(), &mut Trace::default()));
            hidden.chunks(config.width).map(<[f32]>::to_vec).collect::<Vec<_>>()
        };
        let (before, after) = (hidden(&batch), hidden(&other));
        for (t, (before, after)) in before.iter().zip(&after).enumerate() {
            let difference = before.iter().zip(after).map(|(b, a)| (b - a).abs()).fold(0.0, f32::max);
            if t < at {
                prop_assert!(difference < 1e-5, "token {t} sees token {at}: {difference}");
            } else if t == at {
                prop_assert!(difference > 1e-5, "token {at} does not see itself");
            }
        }
    }

    /// A sequence's losses are the same alone and beside any others.
    #[test]
    fn sequences_do_not_touch(which in 0..combinations().len(), seed: u64) {
        let options = combinations()[which];
        let config = options.config();
        let model = options.model(seed);
        let together = Batch::random(&config, 3, 8, seed);
        let losses = model.token_losses(together.tokens(), &together.targets, &mut Trace::default());
        for (ids, expected) in together.ids.chunks(8).zip(losses.chunks(8)) {
            let alone = Batch::of(&config, ids.to_vec(), 1);
            let found = model.token_losses(alone.tokens(), &alone.targets, &mut Trace::default());
            for (found, expected) in found.iter().zip(expected) {
                prop_assert!((found - expected).abs() < 1e-5, "{found} alone, {expected} beside others");
            }
        }
    }
}

/// Documents of several lengths beside each other have the logits that each has alone.
#[test]
fn sequences_of_several_lengths_do_not_touch() {
    for options in combinations() {
        let (model, config) = (options.model(3), options.config());
        let lengths = [7, 1, 4, 4];
        let together = Batch::ragged(&config, &lengths, 4);
        let logits = |batch: &Batch| {
            let hidden = model.hidden(batch.tokens(), &mut Trace::default());
            let head = match &model.head {
                Some(head) => head.val(),
                None => model.embedding.val().transpose(),
            };
            (values(hidden.matmul(head)), model.next_logits(batch.tokens(), &mut Trace::default()))
        };
        let (all, next) = logits(&together);
        let vocabulary = config.vocabulary;
        let (mut first, mut ids) = (0, &together.ids[..]);
        for (time, next) in lengths.into_iter().zip(next.chunks(vocabulary)) {
            let alone = Batch::of(&config, ids[..time].to_vec(), 1);
            let (expected, expected_next) = logits(&alone);
            let found = &all[first * vocabulary..(first + time) * vocabulary];
            common::assert_close(&format!("{options:?}: {time} tokens"), found, &expected);
            common::assert_close(&format!("{options:?}: after {time} tokens"), next, &expected_next);
            (first, ids) = (first + time, &ids[time..]);
        }
        // In one sequence they do.
        let one = Batch::of(&config, together.ids.clone(), 1);
        assert_ne!(logits(&one).0[7 * vocabulary..], all[7 * vocabulary..], "{options:?}");
    }
}

#[test]
fn dead_positions_read_no_memory() {
    let options = Options { memory: Some(MemoryForm::V41), ..PAPER };
    let (model, config) = (options.model(2), options.config());
    let mut batch = Batch::random(&config, 1, 9, 3);
    let dead: Arc<[bool]> = vec![true; 9].into();
    batch.memory.iter_mut().for_each(|memory| memory.dead = Some(dead.clone()));
    let mut without = model.clone();
    without.blocks.iter_mut().for_each(|block| block.memory = None);
    let expected = without.hidden(Tokens { memory: &[], ..batch.tokens() }, &mut Trace::default());
    assert_eq!(bits(model.hidden(batch.tokens(), &mut Trace::default())), bits(expected));
}

#[test]
fn balancing_moves_tokens_to_experts_that_rest() {
    let options = Options { experts: true, ..PLAIN };
    let config = options.config();
    let mut model = LanguageModel::new(&config, &device(), 1, Precision::F32).unwrap();
    let batch = Batch::random(&config, 6, 16, 2);
    let loads = |model: &LanguageModel| batch.loss(model).1.loads;
    let busiest = |loads: &[(usize, Vec<u64>)]| *loads[0].1.iter().max().unwrap();
    let first = loads(&model);
    model.rebalance(&first, 0.01);
    let BlockFeedForward::Experts(experts) = &model.blocks[first[0].0].feed_forward else { unreachable!() };
    let mean = first[0].1.iter().sum::<u64>() as f64 / first[0].1.len() as f64;
    for (bias, &load) in values(experts.balance.val()).into_iter().zip(&first[0].1) {
        let direction = mean - load as f64;
        assert_eq!(bias, if direction == 0.0 { 0.0 } else { 0.01 * direction.signum() as f32 });
    }
    for _ in 0..100 {
        let now = loads(&model);
        model.rebalance(&now, 0.01);
    }
    let last = loads(&model);
    assert!(
        (busiest(&last) as f64) < 0.5 * (busiest(&first) as f64 + mean),
        "loads {first:?} at first, {last:?} after balancing"
    );
}
