//! Steps whose loss or gradient is not finite.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::Workshop;
use engram_train::{Error, export};

/// A rate that drives the weights out of range with the first update: from then on every step is skipped.
const RUNAWAY: &str = "\n[train.optimizer]\nadam_rate = 1e38\nmuon_rate = 1e38\n";

#[test]
fn a_step_that_is_not_finite_is_skipped_and_changes_nothing_until_there_are_too_many() {
    let workshop = Workshop::new();
    let mut trainer = workshop.trainer("run", "skip_limit = 3", RUNAWAY);
    assert!(!trainer.step().unwrap().skipped);
    let weights = export(trainer.model());
    for skipped in 1..=3 {
        let report = trainer.step().unwrap();
        assert!(report.skipped && report.step == skipped + 1, "{report:?}");
        assert_eq!(trainer.skipped_steps(), skipped);
    }
    let same = export(trainer.model()).into_iter().zip(&weights).all(|((_, found), (_, before))| {
        found.values.iter().zip(&before.values).all(|(found, before)| found.to_bits() == before.to_bits())
    });
    assert!(same, "a skipped step changed a weight");
    assert!(matches!(trainer.step(), Err(Error::Diverged { step: 4 })));
}

/// A checkpoint that nothing can go on from must not push out one that can.
#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let workshop = Workshop::new();
    let mut trainer = workshop.trainer(
        "run",
        "skip_limit = 3\nkeep = 1",
        "\n[train.optimizer]\nadam_rate = 3e38\nadam_weight_decay = 1e6\n",
    );
    let good = trainer.save().unwrap();
    trainer.step().unwrap();
    let weights = export(trainer.model());
    let damaged = weights.values().flat_map(|weight| &weight.values).any(|value| !value.is_finite());
    assert!(damaged, "the rate did not drive a weight out of range");
    let error = trainer.save().unwrap_err().to_string();
    assert!(error.contains("not finite") && error.contains("model.safetensors"), "{error}");
    let folder = good.parent().unwrap();
    let names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [good.file_name().unwrap()]);
}

#[test]
fn without_a_limit_the_first_such_step_ends_the_run() {
    let workshop = Workshop::new();
    let mut trainer = workshop.trainer("run", "skip_limit = 0", RUNAWAY);
    trainer.step().unwrap();
    assert!(matches!(trainer.step(), Err(Error::Diverged { step: 1 })));
}
