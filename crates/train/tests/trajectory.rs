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

/// Steps the optimiser from the script's start by the script's gradients, and compares every step.
#[track_caller]
fn follow(model: &str, config: OptimizerConfig, trajectory: &Trajectory) {
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
                let difference = (found[place] - expected).abs();
                assert!(
                    difference < 2e-5,
                    "step {step}, `{name}`[{place}]: {}, but PyTorch has {expected}",
                    found[place]
                );
            }
        }
    }
}

#[test]
fn every_weight_of_the_papers_model_follows_pytorch() {
    follow(PAPER, optimizer(), &golden().paper);
}

#[test]
fn every_weight_follows_pytorch_with_heads_apart_and_decay_by_adam() {
    let config = OptimizerConfig { muon_heads_apart: true, adam_weight_decay: 0.1, ..optimizer() };
    follow(HEADS_APART, config, &golden().heads_apart);
}

/// The operations that a GPU runs, on the CPU.
#[test]
fn the_composed_operations_follow_pytorch() {
    composed(|| follow(PAPER, optimizer(), &golden().paper));
    let config = OptimizerConfig { muon_heads_apart: true, adam_weight_decay: 0.1, ..optimizer() };
    composed(|| follow(HEADS_APART, config, &golden().heads_apart));
}
