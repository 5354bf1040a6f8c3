//! A step in micro-batches is the step.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::Workshop;
use engram_train::{StepReport, Trainer};

fn steps(trainer: &mut Trainer, count: usize) -> Vec<StepReport> {
    (0..count).map(|_| trainer.step().unwrap()).collect()
}

/// 1, 4 and 64 micro-batches, and 7 of which the last is smaller. Sums in another order differ in their last bit, and
/// both optimisers divide by what is small: at these rates that stays far below the bound for 20 steps. The model is
/// smooth. A token whose two experts are nearly equal may change them for a last bit, and the published gate takes the root
/// of a score, whose slope at 0 has no bound.
#[test]
fn losses_do_not_depend_on_the_micro_batch() {
    let workshop = Workshop::smooth();
    let rates = "\n[train.optimizer]\nmuon_rate = 1e-3\nadam_rate = 1e-3\n";
    let whole = steps(&mut workshop.trainer("whole", "", rates), 20);
    assert!(whole[19].loss < whole[0].loss - 0.02, "it learns: {} to {}", whole[0].loss, whole[19].loss);
    for micro_batch in [64, 16, 10, 1] {
        let lines = format!("micro_batch = {micro_batch}");
        let parts = steps(&mut workshop.trainer(&format!("run-{micro_batch}"), &lines, rates), 20);
        for (parts, whole) in parts.iter().zip(&whole) {
            let difference = (parts.loss - whole.loss).abs();
            assert!(
                difference < 1e-5,
                "micro-batches of {micro_batch}, step {}: {} and {}",
                whole.step,
                parts.loss,
                whole.loss
            );
        }
    }
}

#[test]
fn the_key_of_before_is_translated_and_wrong_ones_are_refused() {
    let workshop = Workshop::new();
    for (parts, micro_batch) in [(1, None), (4, Some(16)), (5, Some(13)), (64, Some(1))] {
        let config = workshop.config(&format!("accumulation = {parts}"), "").unwrap();
        assert_eq!(config.train.micro_batch, micro_batch);
    }
    let refused = [
        ("accumulation = 0", "train.accumulation", "is 0"),
        ("accumulation = 65", "train.accumulation", "is 65, but a batch of 64"),
        ("accumulation = 4\nmicro_batch = 16", "train.accumulation", "leave it out"),
        ("micro_batch = 0", "train.micro_batch", "is 0"),
        ("micro_batch = 65", "train.micro_batch", "is more than the batch of 64"),
    ];
    for (lines, key, reason) in refused {
        let error = workshop.config(lines, "").unwrap_err().to_string();
        let text = std::fs::read_to_string(workshop.path().join("run.toml")).unwrap();
        let named = key.trim_start_matches("train.");
        let line = 1 + text.lines().position(|line| line.starts_with(named)).unwrap();
        assert!(error.contains(&format!("run.toml:{line}: `{key}`")) && error.contains(reason), "{error}");
    }
}
