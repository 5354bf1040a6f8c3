//! Twenty steps of the optimiser against PyTorch's Muon and Adam, on every weight of two small models:
//! `golden/trajectories.py` says by hand which optimiser trains what, and wrote the values.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use engram_config::{ModelConfig, OptimizerConfig, Precision};
use engram_import::HostTensor;
use engram_model::{LanguageModel, composed};
use engram_train::{Gradients, Optimizer, export, global_norm, import};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    paper: Trajectory,
    heads_apart: Trajectory,
}

#[derive(Deserialize)]
struct Trajectory {
    shapes: BTreeMap<String, Vec<usize>>,
    /// Values at a few places of each weight, after each step.
    steps: Vec<BTreeMap<String, Vec<f32>>>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/trajectories.json")).unwrap()
}

/// A number in [−1, 1) for a place of a weight (or row) at a step, as the script has it.
fn unit(weight: usize, step: usize, place: usize) -> f32 {
    let sum = weight as u64 * 1_000_003 + step as u64 * 7919 + place as u64 * 104_729 + 12_345;
    let mut x = sum as u32;
    for (shift, factor) in [(16, 0x7feb_352d_u32), (15, 0x846c_a68b)] {
        x = (x ^ (x >> shift)).wrapping_mul(factor);
    }
    ((x ^ (x >> 16)) >> 16) as f32 / 32768.0 - 1.0
}

fn values(weight: usize, step: usize, shape: &[usize], scale: f32) -> Vec<f32> {
    (0..shape.iter().product()).map(|place| unit(weight, step, place) * scale).collect()
}

const PAPER: &str = r#"
    vocabulary = 11
    width = 8
    blocks = 2
    context = 4
    attention = { kind = "latent", heads = 2, query_rank = 6, latent_rank = 5, content_width = 3, rotary_width = 2, value_width = 4 }
    feed_forward = { width = 7 }
    experts = { first_block = 1, routed = 3, active = 1, width = 5, shared_width = 4 }
    hyper_connections = { streams = 2 }
    memory = { layers = [0], max_order = 3, heads = 2, row_width = 3, rows_per_head = [5, 5] }
"#;

const HEADS_APART: &str = r#"
    vocabulary = 11
    width = 8
    blocks = 1
    context = 4
    tied_head = true
    attention = { kind = "plain", heads = 4, key_heads = 2, head_width = 4 }
    feed_forward = { width = 7 }
    memory = { form = "v41", layers = [0], max_order = 3, heads = 2, row_width = 3, rows_per_head = [5, 5] }
"#;

/// Constants that the script writes out are the defaults here.
fn optimizer() -> OptimizerConfig {
    OptimizerConfig { muon_rate: 0.02, adam_rate: 0.01, ..OptimizerConfig::default() }
}

/// Steps the optimiser from the script's start by the script's gradients; gives the first value that is not PyTorch's.
fn deviation(model: &str, config: OptimizerConfig, trajectory: &Trajectory) -> Option<String> {
    let device = Device::flex().autodiff();
    let model: ModelConfig = toml::from_str(model).unwrap();
    let model = LanguageModel::new(&model, &device, 0, Precision::F32).unwrap();
    let mut weights = export(&model);
    let learning: Vec<&String> = weights.keys().filter(|name| !name.ends_with(".balance")).collect();
    assert_eq!(learning, trajectory.shapes.keys().collect::<Vec<_>>());
    for (index, (name, shape)) in trajectory.shapes.iter().enumerate() {
        let start = HostTensor { shape: shape.clone(), values: values(index, 0, shape, 0.5) };
        weights.insert(name.clone(), start);
    }
    let mut model = import(model, weights, "the start").unwrap();
    let mut optimizer = Optimizer::new(config, &device);
    for (step, expected) in (1..).zip(&trajectory.steps) {
        let scale = 2.0_f32.powi((step as i32 * 3) % 7 - 7);
        let gradient = |(index, (name, shape)): (usize, (&String, &Vec<usize>))| {
            let values = values(index, step, shape, scale);
            let data = TensorData::new(values.clone(), [values.len()]);
            (name.clone(), Tensor::from_data(data, &device.clone().inner()))
        };
        let gradients: Gradients = trajectory.shapes.iter().enumerate().map(gradient).collect();
        let norm = global_norm(&gradients);
        model = optimizer.step(model, gradients, norm, 1.0 - step as f32 / 32.0);
        let found = export(&model);
        for (name, expected) in expected {
            let (found, count) = (&found[name].values, expected.len());
            for (j, expected) in expected.iter().enumerate() {
                let place = (j * found.len() / count + step) % found.len();
                let found = found[place];
                // NaN is not near.
                let near = (found - expected).abs() < 2e-5;
                if !near {
                    return Some(format!(
                        "step {step}, `{name}`[{place}]: {found}, but PyTorch has {expected}"
                    ));
                }
            }
        }
    }
    None
}

fn apart() -> OptimizerConfig {
    OptimizerConfig { muon_heads_apart: true, adam_weight_decay: 0.1, ..optimizer() }
}

#[test]
fn every_weight_of_the_papers_model_follows_pytorch() {
    assert_eq!(deviation(PAPER, optimizer(), &golden().paper), None);
}

#[test]
fn every_weight_follows_pytorch_with_heads_apart_and_decay_by_adam() {
    assert_eq!(deviation(HEADS_APART, apart(), &golden().heads_apart), None);
}

/// The operations that a GPU runs, on the CPU.
#[test]
fn the_composed_operations_follow_pytorch() {
    composed(|| {
        assert_eq!(deviation(PAPER, optimizer(), &golden().paper), None);
        assert_eq!(deviation(HEADS_APART, apart(), &golden().heads_apart), None);
    });
}

/// The trajectories tell every setting from another.
#[test]
fn another_setting_deviates() {
    let golden = golden();
    let others: [(&str, OptimizerConfig); 9] = [
        ("momentum", OptimizerConfig { momentum: 0.9, ..optimizer() }),
        ("weight_decay", OptimizerConfig { weight_decay: 0.0, ..optimizer() }),
        ("clip", OptimizerConfig { clip: 1e9, ..optimizer() }),
        ("muon_rate", OptimizerConfig { muon_rate: 0.021, ..optimizer() }),
        ("adam_rate", OptimizerConfig { adam_rate: 0.0105, ..optimizer() }),
        ("beta1", OptimizerConfig { betas: [0.89, 0.95], ..optimizer() }),
        ("beta2", OptimizerConfig { betas: [0.9, 0.96], ..optimizer() }),
        ("epsilon", OptimizerConfig { epsilon: 1e-3, ..optimizer() }),
        ("adam_weight_decay", OptimizerConfig { adam_weight_decay: 0.1, ..optimizer() }),
    ];
    for (name, config) in others {
        assert!(deviation(PAPER, config, &golden.paper).is_some(), "{name} makes no difference");
    }
    let together = OptimizerConfig { muon_heads_apart: false, ..apart() };
    assert!(deviation(HEADS_APART, together, &golden.heads_apart).is_some(), "heads apart or not");
}
