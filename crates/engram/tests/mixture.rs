//! Several sources of data are mixed by weight.

#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

mod common;

use common::{CONFIG, Workshop, json};
use serde_json::Value;

const INPUT: i32 = 2;

const ONE: &str = "train = \"data/train\"\nvalid = \"data/valid\"\ntokenizer = \"tokenizer.json\"\n";
const TWO: &str = r#"tokenizer = "tokenizer.json"

[[data.source]]
name = "letters"
train = "data/train"
valid = "data/valid"
weight = 3.0

[[data.source]]
name = "notes"
train = "notes/train"
valid = "notes/valid"
weight = 1.0
"#;

/// The configuration over two sources, in files at a constant rate.
fn mixed() -> String {
    let (before, _) = CONFIG.split_once("[train.schedule]").unwrap();
    assert!(before.contains(ONE));
    before.replace(ONE, TWO) + "[train.schedule]\ndecay = \"constant\"\n"
}

/// A workshop with a second source in `notes/`.
fn workshop() -> Workshop {
    let workshop = Workshop::prepared();
    let corpus = workshop.read("corpus.jsonl");
    let notes: Vec<_> = corpus.lines().rev().take(30).map(|line| line.replace("Letter", "Note")).collect();
    workshop.write("notes.jsonl", notes.join("\n") + "\n");
    workshop.ok("data prepare notes.jsonl --tokenizer tokenizer.json --hold-out 0.2 --out notes");
    workshop.write("mixed.toml", mixed());
    workshop
}

fn state(workshop: &Workshop, run: &str, step: u64) -> Value {
    json(&workshop.read(&format!("{run}/checkpoints/step-{step:08}/state.json")))
}

#[test]
fn sources_are_drawn_by_weight_and_evaluated_by_name() {
    let workshop = workshop();
    let run = workshop.run("train mixed.toml --out run").expect(0, &[]);
    for line in ["held-out letters ", "held-out notes ", "held-out, mean by weight "] {
        assert!(run.stderr.contains(line), "{line}: {}", run.stderr);
    }
    // 12 steps of 2 windows each, 3 to 1.
    let state = state(&workshop, "run", 12);
    let sources = state["sampler"].as_array().unwrap();
    let drawn: Vec<_> =
        sources.iter().map(|source| [&source["name"], &source["sampler"]["position"]]).collect();
    assert_eq!(
        drawn,
        [[&Value::from("letters"), &Value::from(18)], [&Value::from("notes"), &Value::from(6)]]
    );
    assert!(sources.iter().all(|source| source["identity"].as_str().unwrap().len() == 64), "{state}");
    assert!(state.get("data").is_none(), "{state}");

    let metrics = workshop.metrics("run");
    let nats = |kind: &str, source: Option<&str>| {
        let of = |metric: &&Value| {
            metric["kind"] == kind && metric.get("source").and_then(Value::as_str) == source
        };
        metrics.iter().rfind(of).unwrap()["nats_per_token"].as_f64().unwrap()
    };
    let mean =
        0.75 * nats("source_held_out", Some("letters")) + 0.25 * nats("source_held_out", Some("notes"));
    assert!((nats("held_out", None) - mean).abs() < 1e-9, "{mean}");
}

#[test]
fn a_resumed_mixture_is_an_uninterrupted_one() {
    let workshop = workshop();
    workshop.ok("train mixed.toml --out whole");
    // An odd number of windows: the next source is not the first.
    workshop.write("part.toml", mixed().replace("steps = 12", "steps = 7"));
    workshop.ok("train part.toml --out run");
    workshop.ok("train mixed.toml --out run --resume --change train.steps");
    let steps = |run: &str| -> Vec<Value> {
        workshop.metrics(run).into_iter().filter(|metric| metric["kind"] == "step").collect()
    };
    assert_eq!(steps("whole"), steps("run"));
    assert_eq!(state(&workshop, "whole", 12), state(&workshop, "run", 12));
    // It can also be continued, and is then drawn from the beginning.
    workshop.run("train mixed.toml --out more --continue run").expect(0, &["come in the same order"]);
    let twice = mixed().replace("weight = 3.0", "weight = 6").replace("weight = 1.0", "weight = 2");
    workshop.write("twice.toml", twice);
    workshop.ok("train twice.toml --out run --resume --steps 13");
}

#[test]
fn a_single_source_in_the_list_is_the_same_run() {
    let workshop = workshop();
    let (list, _) = TWO.rsplit_once("[[data.source]]").unwrap();
    workshop.write("list.toml", mixed().replace(TWO, list));
    workshop.write("one.toml", mixed().replace(TWO, ONE));
    workshop.ok("train list.toml --out list");
    workshop.ok("train one.toml --out one");
    let named = |metric: &Value| metric["kind"] != "source_held_out";
    let list: Vec<_> = workshop.metrics("list").into_iter().filter(named).collect();
    assert_eq!(list, workshop.metrics("one"));
    // The form of a checkpoint over one source stays.
    let state = state(&workshop, "one", 12);
    assert_eq!(state["sampler"].as_object().unwrap().len(), 2, "{state}");
    assert!(state["data"].is_string() && state["held_out"].is_string(), "{state}");
}

#[test]
fn other_sources_are_refused_by_name_and_key_unless_they_are_to_change() {
    let workshop = workshop();
    workshop.ok("train mixed.toml --out run");
    let resume = "train other.toml --out run --resume --steps 13";
    let without_notes = TWO.rsplit_once("[[data.source]]").unwrap().0;
    for (other, words) in [
        (TWO.replace("name = \"notes\"", "name = \"memos\""), &["data.source", "memos", "notes"][..]),
        (
            TWO.replace("weight = 1.0", "weight = 2.0"),
            &["data.source[0].weight", "letters", "0.75", "now 0.6"],
        ),
        (TWO.replace("notes/train", "notes/valid"), &["data.source[1].train", "\"notes\"", "notes/valid"]),
        (TWO.replace("notes/valid", "data/valid"), &["data.source[1].valid", "\"notes\"", "data/valid"]),
        (without_notes.to_owned(), &["data.source", "letters", "notes"]),
        (ONE.to_owned(), &["data.train", "letters", "notes"]),
    ] {
        workshop.write("other.toml", mixed().replace(TWO, &other));
        workshop.fails(resume, INPUT, &[words, &["--change data."]].concat());
    }
    workshop.write("other.toml", mixed().replace("weight = 1.0", "weight = 2.0"));
    workshop.run(&format!("{resume} --change data.source")).expect(0, &["from their beginning"]);
    assert_eq!(state(&workshop, "run", 13)["sampler"][0]["sampler"]["position"], 1);

    workshop.write("one.toml", mixed().replace(TWO, ONE));
    workshop.ok("train one.toml --out one");
    workshop.fails(
        "train mixed.toml --out one --resume",
        INPUT,
        &["data.source", "data.train", "--change data.source"],
    );
}

#[test]
fn what_cannot_be_mixed_is_refused_by_name_and_key() {
    let workshop = workshop();
    workshop.ok("tokenizer train notes.jsonl --vocabulary 320 --out other.json");
    workshop.ok("data prepare notes.jsonl --tokenizer other.json --out other");
    workshop.write("short.jsonl", "{\"text\": \"Hi.\"}\n");
    workshop.ok("data prepare short.jsonl --tokenizer tokenizer.json --out short");
    for (from, to, words) in [
        ("weight = 1.0", "weight = 0.0", &["data.source[1].weight", "\"notes\"", "mixed.toml:"][..]),
        ("weight = 1.0", "weight = -2.0", &["data.source[1].weight", "\"notes\""]),
        ("weight = 1.0", "weight = nan", &["data.source[1].weight", "\"notes\""]),
        ("name = \"notes\"", "name = \"letters\"", &["data.source[1].name", "\"letters\""]),
        ("tokenizer =", "train = \"data/train\"\ntokenizer =", &["data.train", "[[data.source]]"]),
        ("tokenizer =", "valid = \"data/valid\"\ntokenizer =", &["data.valid", "[[data.source]]"]),
        ("notes/train", "other/train", &["data.source[1].train", "\"notes\"", "tokenizer"]),
        ("notes/train", "short/train", &["data.source[1].train", "\"notes\"", "tokens"]),
        ("notes/train", "nowhere", &["data.source[1].train", "\"notes\"", "nowhere"]),
        ("notes/valid", "nowhere", &["data.source[1].valid", "\"notes\"", "nowhere"]),
    ] {
        workshop.write("mixed.toml", mixed().replacen(TWO, &TWO.replacen(from, to, 1), 1));
        workshop.fails("train mixed.toml --out run", INPUT, words);
        assert!(!workshop.path("run").exists(), "nothing was made");
    }
}
