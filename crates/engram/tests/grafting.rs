//! A memory is grafted onto a model, killed and resumed, and what cannot be grafted is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Random, Workshop, json};
use engram_import::testing::write_gguf;
use serde_json::Value;

const INPUT: i32 = 2;

const SETTINGS: &str = r"
steps = 40
batch = 4
micro_batch = 2
context = 48
hold_out = 0.2
held_out_tokens = 2000
neutral_tokens = 300
save_every = 3
[rates]
rows = 0.05
projections = 0.005
[memory]
heads = 2
row_width = 8
rows_per_head = 3000
";

/// `base.gguf`, `other/base.gguf`, `corpus.jsonl` and `graft.toml`.
fn workshop() -> Workshop {
    let workshop = Workshop::with_corpus();
    write_gguf(&workshop.path(""), 1);
    std::fs::create_dir(workshop.path("other")).unwrap();
    write_gguf(&workshop.path("other"), 2);
    workshop.write("graft.toml", SETTINGS);
    workshop
}

/// What the command says after a prompt, greedily, with its options.
fn said(workshop: &Workshop, options: &str) -> Value {
    let line = format!("generate base.gguf {options} --temperature 0 --max-tokens 20 --json --prompt");
    json(&workshop.ok_arguments(line.split_whitespace().chain(["Letter 7. Queen"])))["tokens"].clone()
}

#[test]
fn a_fresh_graft_is_the_base_bit_for_bit() {
    let workshop = workshop();
    let report =
        json(&workshop.ok("graft base.gguf corpus.jsonl --out fresh --config graft.toml --steps 0 --json"));
    assert_eq!(workshop.list("fresh"), ["adapter.toml", "memory.safetensors", "report.json"]);
    let arm = &report["arms"][0];
    assert!(arm["neutral"]["positions"].as_u64() > Some(200), "{report}");
    assert_eq!((&arm["neutral"]["changed"], &arm["neutral"]["divergence"]), (&0.into(), &0.0.into()));
    assert_eq!(arm["held_out"], report["held_out_before"]);
    assert_eq!(said(&workshop, "--memory fresh"), said(&workshop, ""));
    // By default the second and the middle block: in a model of two, the same.
    assert_eq!(report["layers"], serde_json::json!([1]));
}

#[test]
fn a_graft_learns_its_corpus_and_is_used_by_every_command() {
    let workshop = workshop();
    let line = "graft base.gguf corpus.jsonl --out adapter --config graft.toml --compare lora";
    let outcome = workshop.run(line);
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    // The corpus has few letters, so that it has few pairs of them.
    assert!(outcome.stderr.contains("different 2-grams for 3,000 rows of a head"), "{}", outcome.stderr);
    assert!(
        outcome.stdout.contains("LoRA, rank") && outcome.stdout.contains("adapter in"),
        "{}",
        outcome.stdout
    );
    assert_eq!(
        workshop.list("adapter"),
        ["adapter.toml", "memory.layer1.table", "memory.safetensors", "report.json"]
    );
    assert!(!workshop.path("adapter.grafting").exists());
    let report = json(&workshop.read("adapter/report.json"));
    let loss = |place: &Value| place["nats_per_token"].as_f64().unwrap();
    let before = loss(&report["held_out_before"]);
    for arm in report["arms"].as_array().unwrap() {
        assert!(loss(&arm["held_out"]) < before - 0.05, "{arm}");
        assert!(arm["neutral"]["changed"].as_u64() > Some(0));
    }
    let [memory, lora] = [0, 1].map(|arm| report["arms"][arm]["dense"].as_u64().unwrap());
    // Ranks are whole.
    assert!(lora > memory / 3 && lora < memory * 3, "{report}");
    // What is saved is what was measured: another run on the adapter continues in its manner.
    assert_ne!(said(&workshop, "--memory adapter"), said(&workshop, ""));
    workshop.fails(
        "generate other/base.gguf --memory adapter --prompt x",
        INPUT,
        &["was made for base.gguf"],
    );
    // Facts on top of a graft with tables: taken away, the graft is back.
    workshop.write(
        "facts.jsonl",
        r#"{"id": "a", "answer": " Ulm", "prompts": ["Zorvex is in", "Now Zorvex stands in"]}"#,
    );
    let teach = "teach base.gguf facts.jsonl --memory adapter --out fact --steps 6 --census corpus.jsonl";
    workshop.ok(&format!("{teach} --neutral corpus.jsonl --neutral-tokens 60"));
    assert_eq!(workshop.list("fact"), ["memory.layer1.overlay", "overlay.toml", "report.json"]);
    workshop.ok("generate base.gguf --memory adapter --overlay fact --prompt Zorvex --max-tokens 3");
    workshop.fails("generate base.gguf --overlay fact --prompt x", INPUT, &["fact", "name the adapter"]);
}

/// Starts `line` ten times and kills it at a random moment, then lets it end. `work` is the folder of its state.
fn kill_and_finish(workshop: &Workshop, line: &str, [out, work]: [&str; 2], whole: Duration) {
    let mut random = Random(2026);
    let (mut kills, mut resumed) = (0, 0);
    let with = |line: &str| match workshop.path(work).exists() {
        true => (format!("{line} --resume"), 1),
        false => (line.to_owned(), 0),
    };
    for _ in 0..10 {
        let (line, again) = with(line);
        let mut child = workshop.start(&line);
        std::thread::sleep(Duration::from_micros(random.below(whole.as_micros() as u64 / 4)));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(ended.is_none_or(|status| status.success()), "it failed by itself: {line}");
        if workshop.path(out).exists() {
            break;
        }
        kills += 1;
        resumed += again;
    }
    assert!(kills >= 5 && resumed > 0, "{kills} kills, {resumed} of resumed runs: the test tests too little");
    if !workshop.path(out).exists() {
        workshop.ok(&with(line).0);
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// A report without what time decides.
fn timeless(mut report: Value) -> Value {
    match &mut report {
        Value::Object(fields) => {
            fields.retain(|name, _| !name.starts_with("seconds"));
            fields.values_mut().for_each(|field| *field = timeless(field.take()));
        }
        Value::Array(all) => all.iter_mut().for_each(|one| *one = timeless(one.take())),
        _ => {}
    }
    report
}

#[test]
fn a_graft_killed_at_random_ends_in_the_same_bits() {
    let workshop = workshop();
    let rest = "--config graft.toml --compare lora";
    let begun = Instant::now();
    workshop.ok(&format!("graft base.gguf corpus.jsonl --out whole {rest}"));
    let whole = begun.elapsed();
    let line = format!("graft base.gguf corpus.jsonl --out killed {rest}");
    kill_and_finish(&workshop, &line, ["killed", "killed.grafting"], whole);
    assert_eq!(workshop.list("killed"), workshop.list("whole"));
    for name in ["adapter.toml", "memory.layer1.table", "memory.safetensors"] {
        let read = |folder: &str| bytes(&workshop.path(folder).join(name));
        assert!(read("killed") == read("whole"), "{name} is another");
    }
    let report = |folder: &str| timeless(json(&workshop.read(&format!("{folder}/report.json"))));
    assert_eq!(report("killed"), report("whole"));
}

#[test]
fn a_teaching_killed_at_random_ends_in_the_same_bits() {
    let workshop = workshop();
    workshop.write(
        "facts.jsonl",
        r#"{"id": "a", "answer": " Ulm", "prompts": ["Zorvex is in", "Now Zorvex stands in"]}
{"id": "b", "answer": " Bo", "prompts": ["Quill is led by", "The chief of Quill is"], "keep": ["Quill is in"]}"#,
    );
    workshop.write(
        "teach.toml",
        "steps = 60\nsave_every = 2\n[memory]\nlayers = [1]\nheads = 2\nrow_width = 8\n",
    );
    let rest = "--config teach.toml --census corpus.jsonl --neutral corpus.jsonl --neutral-tokens 60";
    let begun = Instant::now();
    workshop.ok(&format!("teach base.gguf facts.jsonl --out whole {rest}"));
    let whole = begun.elapsed();
    let line = format!("teach base.gguf facts.jsonl --out killed {rest}");
    kill_and_finish(&workshop, &line, ["killed", "killed.teaching"], whole);
    assert_eq!(workshop.list("killed"), workshop.list("whole"));
    for name in ["overlay.toml", "memory.layer1.overlay", "adapter/memory.safetensors"] {
        let read = |folder: &str| bytes(&workshop.path(folder).join(name));
        assert!(read("killed") == read("whole"), "{name} is another");
    }
    let report = |folder: &str| timeless(json(&workshop.read(&format!("{folder}/report.json"))));
    assert_eq!(report("killed"), report("whole"));
}

#[test]
fn what_cannot_be_grafted_is_refused() {
    let workshop = workshop();
    let graft = |rest: &str| format!("graft base.gguf corpus.jsonl --out new {rest}");
    workshop.fails(&graft("--layers 7"), INPUT, &["memory.layers", "block 7", "2 blocks"]);
    workshop.fails(&graft("--resume"), INPUT, &["new.grafting", "leave out --resume"]);
    workshop.fails("graft missing.gguf corpus.jsonl --out new", INPUT, &["missing.gguf"]);
    workshop.fails("graft base.gguf missing.jsonl --out new", INPUT, &["missing.jsonl"]);
    for (text, words) in [
        ("batch = 0", ["wrong.toml:1", "batch"]),
        ("seed = 1\n[rates]\nrows = 0.0", ["wrong.toml:3", "must be above 0"]),
        ("context = 61", ["wrong.toml:1", "the model's context is 60"]),
        ("[memory]\nlayers = [0, 2]", ["wrong.toml:2", "block 2"]),
        ("[memory]\nlayer = [0]", ["wrong.toml:2", "layer"]),
    ] {
        workshop.write("wrong.toml", text);
        workshop.fails(&graft("--config wrong.toml"), INPUT, &words);
    }
    assert!(!workshop.path("new.grafting").exists());
    workshop.write("one.txt", "A single document.");
    workshop.fails("graft base.gguf one.txt --out new", INPUT, &["too few documents"]);
    assert!(!workshop.path("new.grafting").exists());
    workshop.write("new", "something");
    workshop.fails(&graft(""), INPUT, &["new", "already exists"]);
    // More rows than any machine has memory for, with the numbers.
    workshop.write("wrong.toml", "[memory]\nrows_per_head = 2000000000\n");
    let large = graft("--config wrong.toml").replace("--out new", "--out large");
    workshop.fails(&large, INPUT, &["GiB of memory", "GiB of memory tables", "memory.rows_per_head"]);
}

const STUDY: &str = r#"
[study]
model = "base.gguf"
corpus = ["corpus.jsonl"]
seeds = [0, 1]
questions = "questions.jsonl"
"#;

/// `study.toml` with every arm, and questions.
fn with_study(workshop: &Workshop) {
    let graft = SETTINGS.replace("steps = 40", "steps = 12").replace("[rates]", "[graft.rates]");
    let graft =
        graft.replace("[memory]", "[graft.memory]").replace("neutral_tokens = 300", "neutral_tokens = 60");
    workshop.write("study.toml", format!("{STUDY}[graft]{graft}"));
    workshop.write(
        "questions.jsonl",
        "{\"prompt\": \"Letter 7.\", \"answer\": \" Queen\"}\n{\"prompt\": \"x\", \"answer\": \" y\"}\n",
    );
}

#[test]
fn a_study_of_grafts_compares_every_arm() {
    let workshop = workshop();
    with_study(&workshop);
    let plan = workshop.ok("study graft --config study.toml --out study --dry-run");
    assert!(plan.contains("12 of 12 runs left; 2 questions"), "{plan}");
    assert!(!workshop.path("study").exists());
    let text = workshop.ok("study graft --config study.toml --out study");
    assert!(text.contains("fewest_rows") && text.contains("2 seeds"), "{text}");
    let findings = json(&workshop.read("study/findings.json"));
    let arms = findings["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|arm| arm["name"].as_str().unwrap()).collect();
    let expected =
        ["base", "memory", "lora", "memory_and_lora", "shuffled_keys", "random_rows", "fewest_rows"];
    assert_eq!(names, expected);
    for arm in &arms[1..] {
        assert_eq!(arm["by_seed"].as_array().unwrap().len(), 2);
        assert!(arm["difference"]["value"].as_f64() < Some(0.0), "{arm}");
        assert!(arm["difference"]["error"].as_f64() > Some(0.0), "{arm}");
        assert!(arm["answer_nats"].as_f64() > Some(0.0));
    }
    let dense = |arm: usize| arms[arm]["dense"].as_u64().unwrap();
    // Both together have the parameters of each.
    assert_eq!(dense(3), dense(1) + dense(2));
    assert!(arms[0]["difference"].is_null() && arms[0]["divergence"] == 0.0);
    assert!(workshop.path("study/figures/difference.png").exists());
    // Once more: everything is there.
    let lines = workshop.read("study/results.jsonl");
    assert_eq!(lines.lines().count(), 14);
    assert_eq!(json(&workshop.ok("study graft --config study.toml --out study --json")), findings);
    assert_eq!(workshop.read("study/results.jsonl"), lines);

    let other = workshop.read("study.toml").replace("steps = 12", "steps = 13");
    workshop.write("study.toml", other);
    workshop.fails("study graft --config study.toml --out study", INPUT, &["study", "other settings"]);
    workshop.fails("study graft --config study.toml --out study --arm memory", INPUT, &["leave out --arm"]);
    workshop.write("questions.jsonl", "{\"prompt\": \"x\", \"answer\": \"\"}\n");
    workshop.fails("study graft --config study.toml --out new", INPUT, &["questions.jsonl:1", "is empty"]);
}

#[test]
fn a_study_of_grafts_killed_at_random_ends_with_the_same_findings() {
    let workshop = workshop();
    with_study(&workshop);
    workshop.write("study.toml", workshop.read("study.toml").replace("seeds = [0, 1]", "seeds = [3]"));
    let begun = Instant::now();
    workshop.ok("study graft --config study.toml --out whole");
    let whole = begun.elapsed();
    let mut random = Random(7);
    for _ in 0..6 {
        let mut child = workshop.start("study graft --config study.toml --out killed");
        std::thread::sleep(Duration::from_micros(random.below(whole.as_micros() as u64 / 3)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    workshop.ok("study graft --config study.toml --out killed");
    let findings = |folder: &str| timeless(json(&workshop.read(&format!("{folder}/findings.json"))));
    assert_eq!(findings("killed"), findings("whole"));
}

#[test]
fn a_run_is_continued_with_its_own_corpus_and_settings_alone() {
    let workshop = workshop();
    let line = "graft base.gguf corpus.jsonl --out new --config graft.toml --steps 4000";
    let mut child = workshop.start(line);
    common::wait_until("a saved state", || workshop.path("new.grafting/memory").exists());
    common::wait_until("a saved state", || {
        workshop.list("new.grafting/memory").iter().any(|name| name.starts_with("step-"))
    });
    // Two at once would write into each other's state.
    workshop.fails(&format!("{line} --resume"), INPUT, &["new.grafting", "process", "trains here"]);
    child.kill().unwrap();
    child.wait().unwrap();
    workshop.fails(line, INPUT, &["new.grafting", "--resume"]);
    let resume = format!("{line} --resume");
    workshop.fails(&format!("{resume} --seed 9"), INPUT, &["other settings"]);
    workshop.fails(&resume.replace("base.gguf", "other/base.gguf"), INPUT, &["another model"]);
    let mut corpus = workshop.read("corpus.jsonl");
    corpus += "{\"text\": \"One more.\"}\n";
    workshop.write("corpus.jsonl", corpus);
    workshop.fails(&resume, INPUT, &["new.grafting", "another corpus"]);
}

#[test]
fn a_model_with_a_memory_is_refused() {
    let workshop = Workshop::trained();
    workshop.fails("graft run corpus.jsonl --out new", INPUT, &["run", "has a memory already"]);
}
