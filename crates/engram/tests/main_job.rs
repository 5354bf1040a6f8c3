//! From a corpus to a model that is evaluated, continued and looked into, as a person would do it.

mod common;

use common::{CONFIG, Workshop};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn a_corpus_becomes_a_model_that_can_be_used() {
    let workshop = Workshop::prepared();
    let printed = workshop.ok("train config.toml --out run");
    assert!(printed.contains("12 steps done"), "{printed}");
    assert_eq!(workshop.list("run"), ["checkpoints", "metrics.jsonl", "run.lock"]);
    assert_eq!(workshop.list("run/checkpoints"), ["step-00000006", "step-00000012"]);

    let metrics = workshop.metrics("run");
    let steps: Vec<_> = metrics.iter().filter(|metric| metric["kind"] == "step").collect();
    assert_eq!(steps.len(), 12);
    assert!(steps.iter().zip(1..).all(|(metric, step)| metric["step"] == step));
    let loss = |metric: &Value| metric["loss"].as_f64().unwrap();
    assert!((loss(steps[0]) - 320_f64.ln()).abs() < 0.3, "an untrained model knows nothing: {}", steps[0]);
    assert!(loss(steps[11]) < loss(steps[0]), "it learns");
    let held_out: Vec<_> = metrics.iter().filter(|metric| metric["kind"] == "held_out").collect();
    assert_eq!(held_out.iter().map(|metric| metric["step"].as_u64().unwrap()).collect::<Vec<_>>(), [6, 12]);

    // The checkpoint gives the loss that the run reported.
    let loss = json(&workshop.ok("eval loss run data/valid --tokens 200 --json"));
    for key in ["nats_per_token", "bits_per_byte"] {
        let (found, expected) = (loss[key].as_f64().unwrap(), held_out[1][key].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-6, "{key}: {found} instead of {expected}");
    }
    let table = workshop.ok("eval loss run/checkpoints/step-00000006 data/valid");
    assert!(table.contains("bits per byte"), "{table}");
}

#[test]
fn more_steps_can_follow() {
    let workshop = Workshop::trained();
    workshop.ok("train config.toml --out run --resume --steps 15");
    assert_eq!(workshop.metrics("run").len(), 12 + 2 + 3 + 1);
    // Where there is nothing left to do, nothing is done.
    let before = workshop.read("run/metrics.jsonl");
    assert!(workshop.ok("train config.toml --out run --resume --steps 15").contains("15 steps done"));
    assert_eq!(workshop.read("run/metrics.jsonl"), before);
}

#[test]
fn a_text_is_continued_as_the_seed_says() {
    let workshop = Workshop::trained();
    let generate = |more: &[&str]| {
        let arguments = ["generate", "run", "--prompt", "Ada Café", "--max-tokens", "20"];
        workshop.ok_arguments(arguments.iter().chain(more).copied())
    };
    let one = generate(&["--seed", "1"]);
    assert!(one.starts_with("Ada Café") && one.ends_with('\n'), "{one:?}");
    assert_eq!(one, generate(&["--seed", "1"]));
    assert_ne!(one, generate(&["--seed", "2"]));
    // Without chance the seed does not matter.
    let greedy = generate(&["--temperature", "0", "--seed", "1"]);
    assert_eq!(greedy, generate(&["--temperature", "0", "--seed", "2"]));
    assert_eq!(greedy, generate(&["--top-k", "1", "--seed", "3"]));

    let whole = json(&generate(&["--seed", "1", "--json"]));
    assert_eq!(format!("Ada Café{}\n", whole["text"].as_str().unwrap()), one);
    assert!(whole["tokens"].as_array().unwrap().len() <= 20);
    assert_eq!(whole["sampling"]["seed"], 1);

    let piped =
        workshop.shell("printf 'Ada Café' | \"$ENGRAM\" generate run --prompt - --max-tokens 20 --seed 1");
    assert_eq!(piped.stdout, one);
}

#[test]
fn gates_are_shown() {
    let workshop = Workshop::trained();
    let text = "Queen Anne <b>sailed</b> to New York.";
    let arguments = ["inspect", "gates", "run", text, "--html", "gates.html"];
    let map = workshop.ok_arguments(arguments);
    assert!(map.starts_with("layer 1   gate ≤ "), "{map}");
    assert!(map.contains(text), "a pipe gets plain text: {map}");
    assert!(!map.contains('\u{1b}'), "no colours in a pipe");
    let page = workshop.read("gates.html");
    assert!(page.contains("&lt;") && !page.contains("<b>"), "text is escaped");

    let gates = json(&workshop.ok_arguments(["inspect", "gates", "run", text, "--json"]));
    let tokens = gates["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().map(|token| token.as_str().unwrap()).collect::<String>(), text);
    let layer = &gates["layers"][0];
    assert_eq!(layer["layer"], 1);
    assert_eq!(layer["gates"].as_array().unwrap().len(), tokens.len());
    for streams in layer["gates"].as_array().unwrap() {
        let streams = streams.as_array().unwrap();
        assert_eq!(streams.len(), 2);
        assert!(streams.iter().all(|gate| (0.0..=1.0).contains(&gate.as_f64().unwrap())));
    }
}

#[test]
fn params_stand_side_by_side() {
    let workshop = Workshop::with_corpus();
    workshop.write("one.toml", CONFIG);
    let dense = CONFIG.split("[model.experts]").next().unwrap();
    workshop.write("dense.toml", dense);
    let table = workshop.ok("params one.toml dense.toml");
    assert!(table.lines().next().unwrap().ends_with("one  dense"), "{table}");
    let exact = json(&workshop.ok("params one.toml dense.toml --json"));
    let number = |index: usize, key: &str| exact[index][key].as_u64().unwrap();
    for index in 0..2 {
        let sum = number(index, "active_parameters") + number(index, "sparse_parameters");
        assert_eq!(number(index, "total_parameters"), sum);
    }
    // Two layers' worth of 2 heads from 500 rows each: 503, 509; 521, 523, the primes that follow, of 8 values.
    assert_eq!(number(0, "memory_parameters"), (503 + 509 + 521 + 523) * 8);
    assert_eq!(number(0, "memory_rows_per_token"), 4);
    assert_eq!(number(1, "memory_parameters"), 0);
}

#[test]
fn rows_of_a_text_are_listed() {
    let workshop = Workshop::prepared();
    let rows = |text: &str| {
        let arguments = ["rows", "--tokenizer", "tokenizer.json", "--config", "config.toml", "--json", text];
        json(&workshop.ok_arguments(arguments))
    };
    let listing = rows("Queen Anne wrote");
    let layer = &listing["layers"][0];
    assert_eq!((layer["layer"].as_u64(), layer["rows"].as_u64()), (Some(1), Some(503 + 509 + 521 + 523)));
    assert_eq!(layer["primes"], serde_json::json!([[503, 509], [521, 523]]));
    let tokens = listing["tokens"].as_array().unwrap();
    assert_eq!(
        tokens.iter().map(|token| token["text"].as_str().unwrap()).collect::<String>(),
        "Queen Anne wrote"
    );
    for token in tokens {
        for (order, (low, high)) in [(0, (0, 1012)), (1, (1012, 2056))] {
            for row in token["rows"][0][order].as_array().unwrap() {
                assert!((low..high).contains(&row.as_u64().unwrap()), "{token}");
            }
        }
    }
    // Numbers beyond 2^53 come whole through every reader of JSON.
    let multipliers = layer["multipliers"].as_array().unwrap();
    assert!(
        multipliers.iter().all(|multiplier| multiplier.as_str().unwrap().parse::<i64>().is_ok()),
        "{layer}"
    );
    // A published addressing has a published tokenizer: another one's rows would be other words'.
    for preset in ["v41", "demo"] {
        let line = format!("rows --tokenizer tokenizer.json --preset {preset} Queen");
        workshop.fails(&line, 2, &["tokenizer.json", "129,280 tokens in 99,092 classes", "this one has"]);
    }
}

#[test]
fn quickstart_does_everything_and_does_not_do_it_twice() {
    let workshop = Workshop::with_corpus();
    let printed = workshop.ok("quickstart --steps 2 --out glance");
    for word in ["memory", "baseline", "held-out loss, bits/byte", "A sample", "layer 1", "glance/gates.html"]
    {
        assert!(printed.contains(word), "`{word}` is not in {printed}");
    }
    let files = ["baseline", "data", "gates.html", "loss.svg", "memory", "summary.json", "tokenizer.json"];
    assert_eq!(workshop.list("glance"), files);
    let summary = json(&workshop.read("glance/summary.json"));
    assert_eq!(
        (summary[0]["name"].as_str(), summary[1]["name"].as_str()),
        (Some("memory"), Some("baseline"))
    );
    let again = workshop.ok("quickstart --steps 2 --out glance");
    assert_eq!(again, printed);
    workshop.fails("quickstart --steps 2 --seed 1 --out glance", 2, &["glance", "another seed", "--out"]);
}

#[test]
fn every_command_explains_itself() {
    let workshop = Workshop::with_corpus();
    let commands = [
        "quickstart",
        "tokenizer train",
        "data prepare",
        "train",
        "params",
        "rows",
        "eval loss",
        "generate",
        "chat",
        "serve",
        "inspect gates",
        "study",
    ];
    for command in commands {
        let help = workshop.ok(&format!("{command} --help"));
        assert!(help.contains(&format!("Examples:\n  engram {command}")), "{help}");
    }
    assert!(workshop.ok("--version").starts_with(concat!("engram ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn training_begins_with_the_weights_of_a_checkpoint() {
    let workshop = Workshop::trained();
    workshop.write("tuned.toml", CONFIG.replace("checkpoint_every = 6", "checkpoint_every = 6\nkeep = 3"));
    workshop.ok("train tuned.toml --out tuned --from run");
    let loss = |run: &str| json(&workshop.ok(&format!("eval loss {run} data/valid --json")));
    assert_eq!(loss("tuned/checkpoints/step-00000000"), loss("run"));
    assert_ne!(loss("tuned"), loss("run"));

    workshop.write("wrong.toml", CONFIG.replace("width = 48", "width = 64"));
    workshop.fails("train wrong.toml --out other --from run", 2, &["only `context`"]);
    workshop.fails("train tuned.toml --out other --from nowhere", 2, &["nowhere"]);
    workshop.fails("train tuned.toml --out tuned --from run", 2, &["already holds a run"]);
    workshop.fails("train tuned.toml --out tuned --from run --resume", 2, &["--resume"]);
    workshop.fails("train tuned.toml --out other --from run --extend-context run", 2, &["--from"]);
}

#[test]
fn a_context_is_extended_from_a_checkpoint() {
    let workshop = Workshop::trained();
    let yarn = "rotary_width = 4\nyarn = { original_context = 32, scale = 4.0 }";
    let long = |context: usize| {
        let config = CONFIG.replace("context = 32", &format!("context = {context}"));
        config
            .replace("rotary_width = 4", yarn)
            .replace("checkpoint_every = 6", "checkpoint_every = 6\nkeep = 3")
    };
    workshop.write("long.toml", long(128));
    let loss = |run: &str| json(&workshop.ok(&format!("eval loss {run} data/valid --tokens 100 --json")));
    let nats = |run: &str| loss(run)["nats_per_token"].as_f64().unwrap();
    // It begins where the other ended: the checkpoint of step 0 is the trained model, seen through other positions.
    workshop.ok("train long.toml --out long --extend-context run");
    let begun = nats("long/checkpoints/step-00000000");
    assert!((begun - nats("run")).abs() < 0.2, "{begun}");
    assert!(workshop.list("long/checkpoints").contains(&"step-00000012".to_owned()));

    let fails = |config: String, words: &[&str]| {
        workshop.write("wrong.toml", config);
        workshop.fails("train wrong.toml --out other --extend-context run", 2, words);
    };
    fails(long(32), &["`model.context` is 32", "--from"]);
    fails(long(128).replace("original_context = 32", "original_context = 40"), &["was trained with 32"]);
    fails(long(128).replace("width = 48", "width = 64"), &["only `context`"]);
    workshop.fails("train long.toml --out long --extend-context run", 2, &["already holds a run"]);
    workshop.fails("train long.toml --out long --extend-context run --resume", 2, &["--resume"]);
}
