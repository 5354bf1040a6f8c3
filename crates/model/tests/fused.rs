//! Fused operations against the same model composed of Burn's primitives: results and every gradient.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::Tensor;
use common::{Batch, Options, PAPER, PLAIN, assert_close, changed, combinations, normal, values, weights};
use engram_config::{Gate, MemoryForm, Precision, YarnConfig, YarnRamp};
use engram_model::{
    Attention, Block, BlockFeedForward, BlockMemory, LanguageModel, MemoryRows, Rotary, Sequences, Trace,
    composed, cross_entropy, embed,
};

const TOKENS: usize = 14;

/// One sequence, some of one length, and some of several.
fn divisions() -> [Sequences; 4] {
    let equal = |count| Sequences::equal(count, TOKENS / count);
    [equal(1), equal(2), equal(7), Sequences::of_lengths([3, 3, 1, 6, 1])]
}

/// The result of an operation, and the gradients of its inputs and weights for a random upstream gradient.
fn run<M: Module>(
    module: &M,
    inputs: &[Tensor<2>],
    operation: &dyn Fn(&M, &[Tensor<2>]) -> Tensor<2>,
) -> BTreeMap<String, Vec<f32>> {
    let inputs: Vec<Tensor<2>> = inputs.iter().map(|input| input.clone().detach().require_grad()).collect();
    let output = operation(module, &inputs);
    let upstream = normal(output.dims(), 99);
    let gradients = (output.clone() * upstream).sum().backward();
    let mut all = weights(module, |weight| weight.gradient(&gradients));
    for (index, input) in inputs.iter().enumerate() {
        all.insert(format!("input {index}"), values(input.grad(&gradients).unwrap()));
    }
    all.insert("result".to_owned(), values(output));
    all
}

/// Both ways agree, and they are two ways. Gives the fused results.
#[track_caller]
fn agree<M: Module>(
    module: &M,
    inputs: &[Tensor<2>],
    operation: impl Fn(&M, &[Tensor<2>]) -> Tensor<2>,
) -> BTreeMap<String, Vec<f32>> {
    let fused = run(module, inputs, &operation);
    let expected = composed(|| run(module, inputs, &operation));
    let mut largest = 0.0_f32;
    for (name, found) in &fused {
        largest = largest.max(assert_close(name, found, &expected[name]));
    }
    assert!(largest > 0.0, "not one bit differs: composed() did not change the operations");
    fused
}

fn block(options: Options) -> Block {
    options.model(5).blocks.pop().unwrap()
}

fn hidden(seed: u64) -> Tensor<2> {
    normal([TOKENS, 16], seed)
}

#[test]
fn rms_norm() {
    agree(&block(PLAIN).attention_norm, &[hidden(1)], |norm, x| norm.forward(x[0].clone()));
}

#[test]
fn swiglu() {
    let BlockFeedForward::Dense(dense) = block(PLAIN).feed_forward else { unreachable!() };
    agree(&dense, &[hidden(1)], |dense, x| dense.forward(x[0].clone()));
}

#[test]
fn latent_attention() {
    for query_rank in [true, false] {
        let attention = block(Options { query_rank, ..PAPER }).attention;
        let yarn = YarnConfig {
            scale: 4.0,
            original_context: 8,
            alpha: 0.1,
            beta: 1.0,
            factor: 0.707,
            ramp: YarnRamp::Turns,
        };
        for rotary in [Rotary::new(4, 100.0, TOKENS), Rotary::stretched(4, 100.0, TOKENS, &yarn)] {
            for sequences in divisions() {
                let forward = |attention: &Attention, x: &[Tensor<2>]| {
                    attention.forward(x[0].clone(), &sequences, Some(&rotary))
                };
                agree(&attention, &[hidden(2)], forward);
            }
        }
    }
}

#[test]
fn plain_attention() {
    let rotary = Rotary::new(6, 100.0, TOKENS);
    for grouped in [false, true] {
        for sequences in divisions() {
            agree(&block(Options { grouped, ..PLAIN }).attention, &[hidden(3)], |attention, x| {
                attention.forward(x[0].clone(), &sequences, Some(&rotary))
            });
        }
    }
}

#[test]
fn experts_and_the_gates_of_their_router() {
    for shared in [true, false] {
        let BlockFeedForward::Experts(experts) = block(Options { shared, ..PAPER }).feed_forward else {
            unreachable!()
        };
        agree(&experts, &[hidden(4)], |experts, x| experts.forward(x[0].clone()).0);
    }
}

#[test]
fn experts_of_which_some_see_no_token() {
    let BlockFeedForward::Experts(experts) = block(PAPER).feed_forward else { unreachable!() };
    let experts =
        changed(experts, "balance", &|balance| balance.copy_from_slice(&[9.0, -9.0, 8.0, -9.0, -9.0]));
    let (_, choice) = experts.forward(hidden(4));
    assert_eq!(choice.loads(), [TOKENS as u64, 0, TOKENS as u64, 0, 0]);
    let found = agree(&experts, &[hidden(4)], |experts, x| experts.forward(x[0].clone()).0);
    for name in ["input", "output"] {
        let gradient = &found[name];
        let of_expert = gradient.chunks(gradient.len() / 5).map(|part| part.iter().any(|&g| g != 0.0));
        assert_eq!(of_expert.collect::<Vec<_>>()[..], [true, false, true, false, false], "{name}");
    }
}

#[test]
fn hyper_connections() {
    for streams in [2, 3, 4] {
        let connection = block(Options { streams, ..PAPER }).attention_streams.unwrap();
        let x = normal([TOKENS, streams * 16], 6);
        agree(&connection, std::slice::from_ref(&x), |connection, x| {
            let coefficients = connection.coefficients(x[0].clone());
            connection.read(x[0].clone(), &coefficients)
        });
        agree(&connection, &[x, hidden(7)], |connection, x| {
            let coefficients = connection.coefficients(x[0].clone());
            connection.write(x[0].clone(), x[1].clone(), &coefficients)
        });
    }
}

#[test]
fn memory_gate_and_short_convolution() {
    for form in [MemoryForm::Paper, MemoryForm::V41] {
        for streams in [1, 4] {
            let [one, two, seven, several] = divisions();
            for (sequences, dead, gate) in [
                (one, false, Gate::PerStream),
                (two.clone(), true, Gate::PerStream),
                (seven, false, Gate::PerStream),
                (two, true, if streams > 1 { Gate::Shared } else { Gate::PerStream }),
                (several, true, Gate::PerStream),
            ] {
                let block = block(Options { memory: Some(form), gate, streams, ..PAPER });
                let Some(BlockMemory::Gated(memory)) = block.memory else { panic!("a gated form") };
                let x = [normal([TOKENS, streams * 16], 8), normal([9, 3], 9)];
                let index: Arc<[u32]> = (0..TOKENS as u32 * 4).map(|slot| slot * 5 % 9).collect();
                let dead: Option<Arc<[bool]>> = dead.then(|| (0..TOKENS).map(|t| t % 3 == 1).collect());
                agree(&memory, &x, |memory, x| {
                    let rows = MemoryRows { rows: x[1].clone(), index: index.clone(), dead: dead.clone() };
                    memory.forward(x[0].clone(), &sequences, &rows)
                });
            }
        }
    }
}

#[test]
fn embedding() {
    let ids: Arc<[u32]> = [3, 0, 3, 8, 3, 1].into();
    let x = [normal([9, 16], 10)];
    let operation = |x: &[Tensor<2>]| embed(x[0].clone(), ids.clone());
    let found = run(&block(PLAIN).attention_norm, &x, &|_, x| operation(x));
    let expected = composed(|| run(&block(PLAIN).attention_norm, &x, &|_, x| operation(x)));
    assert_eq!(found["result"], expected["result"]);
    assert_close("gradient", &found["input 0"], &expected["input 0"]);
    assert!(found["input 0"].chunks(16).nth(2).unwrap().iter().all(|&g| g == 0.0), "row 2 was not read");
}

#[test]
fn cross_entropy_with_its_head() {
    let targets: Arc<[u32]> = (0..TOKENS as u32).map(|t| t * 11 % 37).collect();
    agree(&block(PLAIN).attention_norm, &[hidden(11), normal([16, 37], 12)], |_, x| {
        cross_entropy(x[0].clone(), x[1].clone(), targets.clone(), false).reshape([1, 1])
    });
}

#[test]
fn whole_models() {
    for options in combinations() {
        whole_model(options, &Batch::random(&options.config(), 2, 9, 4));
        whole_model(options, &Batch::ragged(&options.config(), &[7, 1, 4, 4], 4));
    }
}

#[track_caller]
fn whole_model(options: Options, batch: &Batch) {
    let model = options.model(3);
    let everything = |model: &LanguageModel| results(model, batch);
    let fused = everything(&model);
    let expected = composed(|| everything(&model));
    for (name, found) in &fused {
        assert_close(&format!("{options:?}: {name}"), found, &expected[name]);
        assert!(found.iter().any(|&value| value != 0.0), "{options:?}: {name} is zero");
    }
}

/// Losses, logits and every gradient of a model.
fn results(model: &LanguageModel, batch: &Batch) -> BTreeMap<String, Vec<f32>> {
    let loss = model.loss(batch.tokens(), batch.targets.clone(), &mut Trace::default());
    let gradients = loss.backward();
    let mut all = weights(model, |weight| weight.gradient(&gradients));
    for (layer, memory) in batch.memory.iter().enumerate() {
        all.insert(format!("rows {layer}"), values(memory.rows.grad(&gradients).unwrap()));
    }
    all.insert("loss".to_owned(), values(loss));
    all.insert(
        "losses".to_owned(),
        model.token_losses(batch.tokens(), &batch.targets, &mut Trace::default()),
    );
    all.insert("logits".to_owned(), model.next_logits(batch.tokens(), &mut Trace::default()));
    all
}

/// Operands in bf16 have eight bits: results are near those of f32, and not the same. Models with experts are left out,
/// because rounding can send a token to another expert.
#[test]
fn products_in_bf16_are_near_those_in_f32() {
    for options in combinations().into_iter().filter(|options| !options.experts) {
        let batch = Batch::random(&options.config(), 2, 9, 4);
        let of = |precision| {
            let model = LanguageModel::new(&options.config(), &common::device(), 3, precision).unwrap();
            let model = common::shaken(model, 3);
            [results(&model, &batch), composed(|| results(&model, &batch))]
        };
        for (exact, rounded) in of(Precision::F32).into_iter().zip(of(Precision::Bf16)) {
            assert_ne!(exact["logits"], rounded["logits"], "{options:?}: bf16 changes nothing");
            let loss = (exact["loss"][0] - rounded["loss"][0]).abs();
            assert!(loss < 0.02 * exact["loss"][0], "{options:?}: a loss moves by {loss}");
            let gradients = |all: &BTreeMap<String, Vec<f32>>| {
                let of_weights =
                    all.iter().filter(|(name, _)| !["loss", "losses", "logits"].contains(&&name[..]));
                of_weights.flat_map(|(_, values)| values.clone()).collect::<Vec<_>>()
            };
            let pairs = [
                ("logits", exact["logits"].clone(), rounded["logits"].clone()),
                ("losses", exact["losses"].clone(), rounded["losses"].clone()),
                ("gradients", gradients(&exact), gradients(&rounded)),
            ];
            for (name, exact, rounded) in pairs {
                let (off, length) = (distance(&exact, &rounded), distance(&exact, &vec![0.0; exact.len()]));
                assert!(off < 0.05 * length, "{options:?}: {name} are off by {off} of {length}");
            }
        }
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
}
