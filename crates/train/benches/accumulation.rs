//! Seconds of a training step in 1, 4 and 64 micro-batches: `cargo bench -p engram-train --bench accumulation`.
//!
//! The quick start's model with memory, and 64 sequences of 256 tokens a step. Numbers of micro-batches take turns, so
//! that a machine with other work slows all of them alike; the medians are compared.
#![allow(clippy::unwrap_used, reason = "a bench fails by panicking")]

#[path = "../tests/common/mod.rs"]
mod common;

use burn::tensor::Device;
use common::Workshop;
use engram_config::{ModelConfig, load_model_config};
use engram_train::Trainer;

const STEPS: usize = 6;

fn main() {
    let workshop = Workshop::new();
    let preset = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/quickstart-memory.toml");
    let model = load_model_config(preset.as_ref()).unwrap();
    let mut runs: Vec<(usize, Trainer, Vec<f64>)> =
        [1, 4, 64].map(|parts| (parts, trainer(&workshop, &model, parts), Vec::new())).into();
    for step in 0..=STEPS {
        for (_, trainer, seconds) in &mut runs {
            let report = trainer.step().unwrap();
            // The first step fetches its own rows.
            if step > 0 {
                seconds.push(report.seconds);
            }
        }
    }
    let medians = runs.iter_mut().map(|(parts, _, seconds)| {
        seconds.sort_by(f64::total_cmp);
        (*parts, seconds[seconds.len() / 2])
    });
    let medians: Vec<(usize, f64)> = medians.collect();
    println!("micro-batches  seconds a step  to one");
    for (parts, seconds) in &medians {
        println!("{parts:>13}  {seconds:>14.3}  {:>6.3}", seconds / medians[0].1);
    }
}

fn trainer(workshop: &Workshop, model: &ModelConfig, parts: usize) -> Trainer {
    let mut config = workshop.config(&format!("micro_batch = {}", 64 / parts), "").unwrap();
    config.model = ModelConfig { vocabulary: config.model.vocabulary, ..model.clone() };
    Trainer::new(config, &workshop.path().join(format!("run-{parts}")), &Device::flex()).unwrap()
}
