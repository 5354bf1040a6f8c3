//! Every way to read a memory, and every way its rows learn, from a configuration to a resumed run.

mod common;

use common::{CONFIG, Workshop};

/// The test's configuration with more keys in `[model.memory]` and `[train.memory]`, and others instead.
fn config(memory: &str, training: &str) -> String {
    let replaced: Vec<&str> = memory.lines().filter_map(|line| line.split('=').next()).collect();
    let mut text = String::new();
    let mut inside = false;
    for line in CONFIG.lines() {
        inside = if line.starts_with('[') { line == "[model.memory]" } else { inside };
        if inside && line.split('=').next().is_some_and(|key| !key.is_empty() && replaced.contains(&key)) {
            continue;
        }
        text += line;
        text.push('\n');
        if line == "[model.memory]" {
            text += memory;
            text.push('\n');
        }
    }
    text + "\n[train.memory]\n" + training + "\n"
}

const VARIANTS: [(&str, &str); 12] = [
    ("gate = \"shared\"", ""),
    ("gate = \"none\"", ""),
    ("convolution = false", ""),
    ("form = \"v41\"\ngate = \"shared\"", ""),
    ("form = \"added\"\nrow_width = 32", ""),
    ("form = \"over_encoding\"\nlayers = [0]\ncompression = \"none\"", ""),
    ("form = \"attention_values\"\nlayers = [0, 1]", ""),
    ("lookup = \"permuted\"", ""),
    ("row_init = 0.1", "optimizer = \"frozen\""),
    ("", "optimizer = \"adam\""),
    ("", "optimizer = \"balanced_momentum\""),
    ("max_order = 4\nrows_per_head = [300, 300, 300]\nheads = 1", ""),
];

#[test]
fn every_variant_trains_and_goes_on_as_if_nothing_had_happened() {
    let workshop = Workshop::prepared();
    let say = "data = 'corpus.jsonl'\n[generation]\nprompt = 'Ada'\nanswers = 'text'\nstop = []\ntokens = 3";
    workshop.write("say.toml", say);
    let mut losses = Vec::new();
    for (index, (memory, training)) in VARIANTS.into_iter().enumerate() {
        let file = format!("variant-{index}.toml");
        workshop.write(&file, config(memory, training));
        workshop.ok(&format!("train {file} --out whole-{index}"));
        workshop.ok(&format!("train {file} --out parts-{index}"));
        let last = workshop.path(&format!("parts-{index}/checkpoints/step-00000012"));
        std::fs::remove_dir_all(last).unwrap();
        workshop.ok(&format!("train {file} --out parts-{index} --resume"));
        let table = "checkpoints/step-00000012/memory.layer";
        let layer = if memory.contains("over_encoding") { 0 } else { 1 };
        for name in [format!("{table}{layer}.table"), "checkpoints/step-00000012/model.safetensors".into()] {
            let read = |run: &str| std::fs::read(workshop.path(&format!("{run}-{index}/{name}"))).unwrap();
            assert!(read("whole") == read("parts"), "{memory} {training}: {name}");
        }
        let loss = |more: &str| {
            let line = format!("eval loss whole-{index} data/valid --tokens 400 --json {more}");
            let loss: serde_json::Value = serde_json::from_str(&workshop.ok(&line)).unwrap();
            loss["nats_per_token"].as_f64().unwrap()
        };
        assert_ne!(loss(""), loss("--without-memory"), "{memory} {training}: its memory is heard");
        workshop.ok(&format!("eval tasks whole-{index} say.toml --max-records 1"));
        workshop.ok(&format!("eval tasks whole-{index} say.toml --max-records 1 --without-memory"));
        workshop.ok(&format!("generate whole-{index} --prompt Ada --max-tokens 5"));
        losses.push(loss(""));
    }
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), VARIANTS.len(), "each is another model: {losses:?}");
}

#[test]
fn what_cannot_be_is_refused_with_its_line() {
    let workshop = Workshop::prepared();
    let refuse = |memory: &str, training: &str, words: &[&str]| {
        workshop.write("wrong.toml", config(memory, training));
        workshop.fails("train wrong.toml --out run", 2, words);
    };
    refuse("gate = \"loud\"", "", &["wrong.toml:", "loud", "per_stream", "shared", "none"]);
    refuse("form = \"added\"", "", &["wrong.toml:", "model.memory.row_width", "is 8", "32"]);
    refuse("form = \"over_encoding\"", "", &["wrong.toml:", "model.memory.layers", "[0]"]);
    refuse("form = \"attention_values\"\ngate = \"none\"", "", &["model.memory.gate", "leave it out"]);
    refuse("form = \"v41\"\nconvolution = true", "", &["model.memory.convolution"]);
    refuse("", "optimizer = \"frozen\"", &["train.memory.optimizer", "model.memory.row_init"]);
    refuse("lookup = \"random\"", "", &["wrong.toml:", "random", "permuted"]);
    assert!(!workshop.path("run").exists());
}

#[test]
fn a_run_keeps_the_optimiser_of_its_rows() {
    let workshop = Workshop::trained();
    workshop.write("other.toml", config("", "optimizer = \"balanced_momentum\""));
    workshop.fails(
        "train other.toml --out run --resume --steps 15",
        2,
        &["train.memory.optimizer: \"row_wise_adam\", now \"balanced_momentum\""],
    );
}

#[test]
fn models_without_memory_or_gates_are_told_apart() {
    let workshop = Workshop::prepared();
    let without = CONFIG.split("[model.memory]").next().unwrap().to_owned();
    let data = CONFIG.find("[data]").unwrap();
    workshop.write("plain.toml", without + &CONFIG[data..]);
    workshop.ok("train plain.toml --out plain");
    workshop.fails("eval loss plain data/valid --without-memory", 2, &["no memory"]);
    workshop.write("open.toml", config("gate = \"none\"", ""));
    workshop.ok("train open.toml --out open");
    workshop.fails("inspect gates open Ada", 2, &["without gates"]);
    workshop.write("shared.toml", config("gate = \"shared\"", ""));
    workshop.ok("train shared.toml --out shared");
    workshop.fails("inspect gates shared Ada --stream 1", 2, &["1 gate"]);
    assert!(workshop.ok("inspect gates shared Ada").contains("layer 1"));
}

/// A configuration without the newer keys is written down as it was before they came.
#[test]
fn defaults_leave_no_trace_in_a_checkpoint() {
    let workshop = Workshop::trained();
    let written = workshop.read("run/checkpoints/step-00000012/run.toml");
    for key in ["gate", "lookup", "convolution"] {
        assert!(!written.contains(key), "{key}: {written}");
    }
}
