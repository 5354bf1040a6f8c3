//! A model is trained on with other data, and its optimisers keep their state.

#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

mod common;

use common::{CONFIG, Workshop, wait_until};
use serde_json::Value;

/// The configuration with a constant schedule and its last checkpoints kept.
fn constant(steps: u64, train: &str) -> String {
    let (before, _) = CONFIG.split_once("[train.schedule]").unwrap();
    let before = before
        .replace("steps = 12", &format!("steps = {steps}"))
        .replace("checkpoint_every = 6", "checkpoint_every = 3\nkeep = 9");
    format!("{before}{train}\n[train.schedule]\ndecay = \"constant\"\n")
}

/// A workshop with a run of four steps in `run/`, and other data of the same tokenizer in `other/`.
fn workshop() -> Workshop {
    let workshop = Workshop::prepared();
    workshop.write("config.toml", constant(4, ""));
    workshop.ok("train config.toml --out run");
    let corpus = workshop.read("corpus.jsonl");
    let other: Vec<&str> = corpus.lines().rev().take(50).collect();
    workshop.write("other.jsonl", other.join("\n") + "\n");
    workshop.ok("data prepare other.jsonl --tokenizer tokenizer.json --hold-out 0.2 --out other");
    workshop
}

fn on_other_data(config: &str) -> String {
    config.replace("data/train", "other/train").replace("data/valid", "other/valid")
}

/// Loss, gradient norm and rate of each step.
fn steps(workshop: &Workshop, run: &str) -> Vec<[Value; 3]> {
    let metrics = workshop.metrics(run);
    let steps = metrics.iter().filter(|metric| metric["kind"] == "step");
    steps.map(|step| ["loss", "gradient_norm", "schedule"].map(|key| step[key].clone())).collect()
}

/// Weights, optimiser state and rows of a checkpoint.
fn contents(workshop: &Workshop, run: &str, step: u64) -> Vec<Vec<u8>> {
    let files = ["model.safetensors", "optimizer.safetensors", "memory.layer1.table"];
    let path = |file| workshop.path(&format!("{run}/checkpoints/step-{step:08}/{file}"));
    files.iter().map(|file| std::fs::read(path(file)).unwrap()).collect()
}

#[test]
fn training_goes_on_as_if_the_same_run_had_changed_its_data() {
    let workshop = workshop();
    // The same run, four steps old, continues with the other data.
    workshop.ok("train config.toml --out whole");
    workshop.write("whole.toml", on_other_data(&constant(10, "")));
    workshop.ok("train whole.toml --out whole --resume --change data,train.steps");

    workshop.write("new.toml", on_other_data(&constant(6, "")));
    let begun = workshop.run("train new.toml --out continued --continue run").expect(0, &[]);
    assert!(begun.stderr.contains("after step 4") && begun.stderr.contains("4 updates"), "{}", begun.stderr);
    assert!(!begun.stderr.contains("same order"), "{}", begun.stderr);
    let (whole, continued) = (steps(&workshop, "whole"), steps(&workshop, "continued"));
    assert_eq!(continued.len(), 6);
    assert_eq!(whole[4..], continued[..], "every loss and gradient");
    assert_eq!(contents(&workshop, "whole", 10), contents(&workshop, "continued", 6), "every bit");
    assert_eq!(contents(&workshop, "run", 4), contents(&workshop, "whole", 4), "the checkpoint stays");

    // Weights alone give the same first loss, and another update.
    workshop.ok("train new.toml --out tuned --from run");
    let tuned = steps(&workshop, "tuned");
    assert_eq!(tuned[0], continued[0]);
    assert_ne!(tuned[1], continued[1]);
}

#[test]
fn schedule_and_order_are_those_of_the_new_configuration() {
    let workshop = workshop();
    let warm = constant(6, "seed = 3").replace("[train.schedule]", "[train.schedule]\nwarmup = 4");
    workshop.write("new.toml", warm);
    let begun = workshop.run("train new.toml --out continued --continue run/checkpoints/step-00000003");
    assert!(begun.stderr.contains("3 updates") && !begun.stderr.contains("same order"), "{}", begun.stderr);
    let found = steps(&workshop, "continued");
    let rates: Vec<f64> = found.iter().map(|[_, _, rate]| rate.as_f64().unwrap()).collect();
    assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);

    // Without another seed the same data come in the same order, which is said.
    let again = workshop.run("train config.toml --out again --continue run").expect(0, &[]);
    assert!(again.stderr.contains("same order") && again.stderr.contains("train.seed"), "{}", again.stderr);
    // A continued run can be continued: its state counts the updates of both.
    let third = workshop.run("train config.toml --out third --continue again").expect(0, &[]);
    assert!(third.stderr.contains("after step 4") && third.stderr.contains("8 updates"), "{}", third.stderr);
}

#[test]
fn a_killed_continuation_goes_on_with_the_same_bits() {
    let workshop = workshop();
    workshop.write("new.toml", on_other_data(&constant(200, "seed = 9")));
    workshop.ok("train new.toml --out whole --continue run");
    let mut child = workshop.start("train new.toml --out half --continue run");
    let logged = || {
        std::fs::read_to_string(workshop.path("half/metrics.jsonl")).map_or(0, |text| text.lines().count())
    };
    wait_until("some of the steps", || logged() >= 20);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(logged() < 200, "it had ended before it was killed");
    workshop.ok("train new.toml --out half --resume");
    assert_eq!(workshop.metrics("half"), workshop.metrics("whole"));
    assert_eq!(contents(&workshop, "half", 200), contents(&workshop, "whole", 200));
}

#[test]
fn what_does_not_fit_the_state_is_refused_by_key() {
    let workshop = workshop();
    let refused = |from: &str, to: &str, words: &[&str]| {
        let config =
            constant(6, "[train.memory]\noptimizer = \"row_wise_adam\"\n[train.optimizer]\nclip = 1.0");
        assert!(config.contains(from), "{from}");
        workshop.write("wrong.toml", config.replacen(from, to, 1));
        workshop.fails("train wrong.toml --out other-run --continue run", 2, words);
        assert!(!workshop.path("other-run").exists(), "a refused run leaves no folder");
    };
    refused("width = 48", "width = 64", &["model.feed_forward.width: 48, now 64", "run.toml"]);
    refused("context = 32", "context = 64", &["model.context: 32, now 64"]);
    refused("pad_id = 1", "pad_id = 1\nseed = 5", &["model.memory.seed: 0, now 5"]);
    refused("\"row_wise_adam\"", "\"adam\"", &["train.memory.optimizer: \"row_wise_adam\", now \"adam\""]);
    refused("clip = 1.0", "momentum = 0.5", &["train.optimizer.momentum: 0.9", "now 0.5"]);
    refused("clip = 1.0", "betas = [0.5, 0.75]", &["train.optimizer.betas: ", "now [0.5, 0.75]"]);

    workshop.ok("tokenizer train other.jsonl --vocabulary 320 --out other.json");
    workshop.ok("data prepare other.jsonl --tokenizer other.json --hold-out 0.2 --out third");
    let third = constant(6, "").replace("tokenizer.json", "other.json").replace("data/", "third/");
    workshop.write("third.toml", third);
    let words = ["data.tokenizer: ", "now ", "other.json"];
    workshop.fails("train third.toml --out other-run --continue run", 2, &words);

    for other in ["--resume", "--from run", "--extend-context run"] {
        let line = format!("train config.toml --out other-run --continue run {other}");
        workshop.fails(&line, 2, &["--continue", other.split(' ').next().unwrap()]);
    }
    workshop.fails("train config.toml --out other-run --continue nowhere", 2, &["nowhere"]);
    workshop.fails("train config.toml --out run --continue run", 2, &["already holds a run"]);
}
