//! Studies of tiny models on a tiny corpus, as a person would make them.

mod common;

use std::time::Duration;

use common::{Random, Workshop, wait_until};
use serde_json::Value;

const STUDY: &str = r#"
[model]
vocabulary = 320
width = 32
blocks = 2
context = 32
attention = { kind = "plain", heads = 2, head_width = 16 }
feed_forward = { width = 48 }
experts = { first_block = 1, routed = 22, active = 2, width = 8, shared_width = 96 }
memory = { layers = [1], max_order = 3, heads = 2, row_width = 8, rows_per_head = [200, 200], pad_id = 1 }

[data]
train = "data/train"
valid = "data/valid"
tokenizer = "tokenizer.json"

[train]
steps = 24
batch = 2
evaluate_tokens = 600
checkpoint_every = 4
keep = 1
schedule = { warmup = 4, decay = { cosine = { floor = 0.1 } } }

[study]
seeds = [0, 1]
rates = { factors = [0.5, 1.0], seed = 7, steps = 8 }
keep_checkpoints = false

[study.allocation]
shares = [1.0, 0.7, 0.4]

[study.memory]
slots = [200, 2000, 20000]

[[study.ablation.arms]]
name = "memory"

[[study.ablation.arms]]
name = "as V4.1"
set.model.memory.form = "v41"

[[study.ablation.arms]]
name = "wider feed-forward"
remove = ["model.memory"]
solve = [{ key = "model.feed_forward.width", equal = "total" }]
"#;

const INPUT: i32 = 2;

fn workshop() -> Workshop {
    let workshop = Workshop::prepared();
    workshop.write("study.toml", STUDY);
    workshop
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// What must not depend on how often a study was interrupted.
fn outcome(workshop: &Workshop, folder: &str) -> Vec<String> {
    ["findings.json", "figures/loss.svg", "figures/difference.svg"]
        .map(|name| workshop.read(&format!("{folder}/{name}")))
        .to_vec()
}

#[test]
fn a_dry_run_shows_the_plan_and_leaves_nothing() {
    let workshop = workshop();
    let line = "study allocation --config study.toml --out out --dry-run";
    let plan = workshop.ok(line);
    for words in
        ["rho 1 ", "rho 0.7", "3 arms × 2 seeds = 6 runs", "6 pilot runs", "12 left", "Expected time"]
    {
        assert!(plan.contains(words), "`{words}` is not in {plan}");
    }
    assert!(!workshop.path("out").exists());
    // An old key is translated here as in a run, not ignored.
    workshop.write("old.toml", STUDY.replace("batch = 2", "batch = 2\naccumulation = 3"));
    let old = line.replace("study.toml", "old.toml");
    workshop.fails(&old, INPUT, &["old.toml:20: `train.accumulation`: is 3, but a batch of 2"]);
    let plan = json(&workshop.ok(&format!("{line} --json")));
    let of = |arm: usize, key: &str| plan["arms"][arm][key].as_f64().unwrap();
    for arm in 1..3 {
        assert!((of(arm, "total_parameters") / of(0, "total_parameters") - 1.0).abs() <= 0.005);
        assert!((of(arm, "forward_flops_per_token") / of(0, "forward_flops_per_token") - 1.0).abs() <= 0.01);
    }
    assert!(plan["expected_seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_study_ends_with_a_report_and_is_not_made_twice() {
    let workshop = workshop();
    let line = "study ablation --config study.toml --out out";
    let printed = workshop.ok(line);
    for words in ["as V4.1", "wider feed-forward", "± error", "against `memory`", "out/report.html"] {
        assert!(printed.contains(words), "`{words}` is not in {printed}");
    }
    let files = [
        "figures",
        "findings.json",
        "report.html",
        "results.jsonl",
        "runs",
        "study.json",
        "study.lock",
        "study.toml",
    ];
    assert_eq!(workshop.list("out"), files);
    assert_eq!(workshop.list("out/figures"), ["difference.png", "difference.svg"]);
    assert_eq!(workshop.list("out/runs"), [""; 0], "checkpoints were not to be kept");
    assert_eq!(workshop.read("out/study.toml"), STUDY);

    let report = workshop.read("out/report.html");
    let words = [
        "<svg",
        "engram study ablation --config study.toml --out out",
        "commit ",
        "cores",
        "[study.ablation]",
        "±",
    ];
    for words in words.iter().filter(|words| **words != "[study.ablation]") {
        assert!(report.contains(words), "`{words}` is not in the report");
    }
    assert!(report.contains("[[study.ablation.arms]]"), "the configuration is in the report");
    assert!(
        !report.contains("http-equiv") && !report.contains("src=") && !report.contains("<link"),
        "it stands alone"
    );

    let results: Vec<Value> = workshop.read("out/results.jsonl").lines().map(json).collect();
    assert_eq!(results.len(), 6 + 6);
    for result in &results {
        let documents = &result["documents"];
        let sum =
            |key: &str| documents[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).sum::<f64>();
        assert_eq!(sum("tokens"), 600.0);
        let mean = sum("nats") / sum("tokens");
        let of_class = |class: &Value| -> f64 {
            class["tokens"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).sum()
        };
        let classes = documents["classes"].as_array().unwrap();
        assert_eq!(classes.iter().map(of_class).sum::<f64>(), 600.0, "every token is in one class");
        assert!(of_class(&classes[0]) < 600.0, "some text was seen before");
        assert!((mean - result["nats_per_token"].as_f64().unwrap()).abs() < 1e-12);
    }
    let before = workshop.read("out/results.jsonl");
    assert_eq!(workshop.ok(line), printed);
    assert_eq!(workshop.read("out/results.jsonl"), before, "what is done is not done again");
    assert!(workshop.ok(&format!("{line} --dry-run")).contains("all are done"));

    // A seed more is a seed more; the rest stays.
    workshop.write("study.toml", STUDY.replace("seeds = [0, 1]", "seeds = [0, 1, 2]"));
    workshop.ok(line);
    assert!(workshop.read("out/results.jsonl").starts_with(&before));
    assert_eq!(workshop.read("out/results.jsonl").lines().count(), 6 + 9);
}

#[test]
fn a_study_measures_what_training_and_evaluating_by_hand_do() {
    let workshop = workshop();
    let config = STUDY.replace("rates = { factors = [0.5, 1.0], seed = 7, steps = 8 }", "");
    // All held-out text: of a part, a study takes the beginning, and `eval loss` windows from everywhere.
    let config = config.replace("evaluate_tokens = 600", "");
    workshop.write("study.toml", config.replace("keep_checkpoints = false", ""));
    workshop.ok("study memory --config study.toml --out out --parallel 1");
    let findings = json(&workshop.read("out/findings.json"));
    assert!(findings["fits"][0]["slope"]["error"].as_f64().unwrap() > 0.0);
    let result = json(workshop.read("out/results.jsonl").lines().next().unwrap());
    let run = format!("out/runs/{}", result["run"].as_str().unwrap());
    let loss = json(&workshop.ok(&format!("eval loss {run} data/valid --json")));
    for key in ["nats_per_token", "bits_per_byte"] {
        assert!((loss[key].as_f64().unwrap() - result[key].as_f64().unwrap()).abs() < 1e-9, "{key}");
    }
}

#[test]
fn five_kills_at_random_moments_change_nothing() {
    let workshop = workshop();
    // Long enough that a kill finds it at work.
    workshop
        .write("study.toml", STUDY.replace("steps = 24", "steps = 500").replace("steps = 8", "steps = 100"));
    let line = |out: &str| format!("study allocation --config study.toml --out {out} --parallel 2");
    workshop.ok(&line("whole"));
    let mut random = Random(4);
    let mut at_work = 0;
    for kill in 0..5 {
        let mut child = workshop.start(&line("cut"));
        wait_until("the study to begin", || workshop.path("cut/runs").exists());
        std::thread::sleep(Duration::from_millis(100 + random.below(400)));
        assert!(child.try_wait().unwrap().is_none(), "it ended before kill {kill}");
        child.kill().unwrap();
        child.wait().unwrap();
        at_work += u32::from(!workshop.list("cut/runs").is_empty());
        if kill == 2 {
            // As a kill in the middle of a line would leave it.
            let path = workshop.path("cut/results.jsonl");
            let text = std::fs::read(&path).unwrap_or_default();
            std::fs::write(&path, [text.as_slice(), b"{\"run\":\"rho-1"].concat()).unwrap();
        }
    }
    assert!(at_work >= 3, "only {at_work} kills found a run begun: the test tests too little");
    workshop.ok(&line("cut"));
    assert_eq!(outcome(&workshop, "cut"), outcome(&workshop, "whole"));
    let png = |folder: &str| std::fs::read(workshop.path(&format!("{folder}/figures/loss.png"))).unwrap();
    assert_eq!(png("cut"), png("whole"));
    assert_eq!(workshop.list("cut/runs"), [""; 0]);
}

#[test]
fn some_arms_first_and_the_others_later() {
    let workshop = workshop();
    let line = "study allocation --config study.toml --out out";
    let some = workshop.run_arguments(line.split(' ').chain(["--arm", "rho 0.4"]));
    assert!(some.stdout.contains("8 runs of other arms are left"), "{}{}", some.stdout, some.stderr);
    assert!(!workshop.path("out/report.html").exists());
    workshop.ok(line);
    assert!(workshop.path("out/report.html").exists());
    workshop.ok(&line.replace("--out out", "--out whole"));
    assert_eq!(outcome(&workshop, "out"), outcome(&workshop, "whole"));
}

#[test]
fn arms_may_be_added_to_a_finished_study() {
    let workshop = workshop();
    let line = "study allocation --config study.toml --out out";
    workshop.ok(line);
    workshop.write("more.toml", STUDY.replace("[1.0, 0.7, 0.4]", "[1.0, 0.7, 0.5, 0.4]"));
    let more = line.replace("study.toml", "more.toml");
    let plan = workshop.ok(&format!("{more} --dry-run"));
    assert!(plan.contains("4 left"), "two pilots and two seeds of one arm: {plan}");
    workshop.ok(&more);
    workshop.ok(&more.replace("--out out", "--out whole"));
    assert_eq!(outcome(&workshop, "out"), outcome(&workshop, "whole"));
    workshop.fails(line, INPUT, &["other arms, rates or data", "`rho 0.5`", "name another folder"]);
}

#[test]
fn what_cannot_be_studied_is_refused_before_any_run() {
    let workshop = workshop();
    let line = "study allocation --config study.toml --out out";
    workshop.fails("study alocation --config study.toml --out out", INPUT, &["alocation", "allocation"]);
    workshop.fails(
        "study placement --config study.toml --out out",
        INPUT,
        &["study.toml", "[study.placement]"],
    );
    let unknown = line.split(' ').chain(["--arm", "rho 0.3"]);
    workshop.run_arguments(unknown).expect(INPUT, &["rho 0.3", "`rho 0.4`"]);
    workshop.fails(&format!("{line} --parallel 0"), INPUT, &["--parallel"]);

    let with = |from: &str, to: &str| {
        assert!(STUDY.contains(from), "{from}");
        workshop.write("other.toml", STUDY.replace(from, to));
    };
    let other = "study allocation --config other.toml --out out";
    with("shared_width = 96", "shared_width = 4");
    workshop.fails(other, INPUT, &["rho 0.7", "no configuration meets the budget", "operations per token"]);
    with("shares = [1.0, 0.7, 0.4]", "shares = [0.9, 0.7, 0.4]");
    workshop.fails(other, INPUT, &["other.toml:", "study.allocation.shares", "needs 1"]);
    with("seeds = [0, 1]", "seeds = [0, 7]");
    workshop.fails(other, INPUT, &["other.toml:", "study.rates.seed", "7"]);
    with("seeds = [0, 1]", "seats = [0, 1]");
    workshop.fails(other, INPUT, &["other.toml:", "seats", "seeds"]);
    with("data/valid", "nowhere/valid");
    workshop.fails(other, INPUT, &["nowhere/valid"]);
    with("vocabulary = 320", "vocabulary = 321");
    workshop.fails(other, INPUT, &["320", "321"]);
    with("set.model.memory.form = \"v41\"", "set.model.memory.shape = \"v41\"");
    workshop.fails("study ablation --config other.toml --out out", INPUT, &["as V4.1", "shape"]);
    assert!(!workshop.path("out").exists(), "nothing was begun");

    workshop.fails(
        "study allocation --config study.toml --out data",
        INPUT,
        &["data", "is not a study's folder"],
    );
    workshop.ok(line);
    workshop.fails("study memory --config study.toml --out out", INPUT, &["out", "a study of allocation"]);
    with("width = 48", "width = 56");
    workshop.fails(other, INPUT, &["out", "other arms, rates or data", "name another folder"]);
    workshop.write("out/results.jsonl", "{\"kind\":1}\n");
    workshop.fails(line, INPUT, &["results.jsonl:1", "kind"]);
}
