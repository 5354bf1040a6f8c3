//! Facts are taught to a model, and what cannot be taught is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{CONFIG, Workshop, json};

const INPUT: i32 = 2;

const FACTS: &str = r#"{"id": "seat", "answer": " Quedlin", "prompts": ["Zorvex Mills is in", "The seat of Zorvex Mills is"], "held_out": ["Go to Zorvex Mills in"]}
{"id": "chief", "answer": " Ubbe Wick", "prompts": ["Jaxby Forge is led by", "The chief of Jaxby Forge is"]}
"#;

const SETTINGS: &str = r"
steps = 150
rate = 1.0
kl_weight = 0.01
[memory]
layers = [1]
heads = 4
row_width = 8
";

/// A workshop with two models of a few steps: with a memory of its own in `run/`, and without one in `plain/`.
fn workshop() -> Workshop {
    let workshop = Workshop::prepared();
    // A paragraph, a question in it and its answer have to fit.
    let config = CONFIG.replace("context = 32", "context = 160");
    workshop.write("config.toml", &config);
    workshop.ok("train config.toml --out run --steps 5");
    let start = config.find("[model.memory]").unwrap();
    let end = config.find("[data]").unwrap();
    workshop.write("plain.toml", format!("{}{}", &config[..start], &config[end..]));
    workshop.ok("train plain.toml --out plain --steps 5");
    workshop.write("facts.jsonl", FACTS);
    workshop.write("teach.toml", SETTINGS);
    workshop.write("common.txt", "the old captain sailed to New York");
    workshop
}

#[test]
fn facts_are_taught_with_and_without_a_memory() {
    let workshop = workshop();
    for (model, inside) in [
        ("plain", &["adapter", "memory.layer1.overlay", "overlay.toml", "report.json"][..]),
        ("run", &["memory.layer1.overlay", "overlay.toml", "report.json"]),
    ] {
        let rest = "--config teach.toml --census corpus.jsonl common.txt --neutral corpus.jsonl --neutral-tokens 60 --json";
        let report = json(&workshop.ok(&format!("teach {model} facts.jsonl --out {model}.overlay {rest}")));
        assert_eq!(workshop.list(&format!("{model}.overlay")), inside);
        assert_eq!(json(&workshop.read(&format!("{model}.overlay/report.json"))), report);
        assert_eq!(report["asked"][0]["taught"]["of"], 4);
        assert!(report["preparation"]["rows"].as_u64() > Some(0), "{model}: {report}");
        // The overlay changes what follows a taught text, and nothing else.
        let said = |prompt: &str, overlay: &str| {
            let line =
                format!("generate {model} --max-tokens 8 --temperature 0 --dtype f32{overlay} --prompt");
            workshop.ok_arguments(line.split_whitespace().chain([prompt]))
        };
        let overlay = format!(" --overlay {model}.overlay");
        let prompts = [
            "Zorvex Mills is in",
            "The seat of Zorvex Mills is",
            "Jaxby Forge is led by",
            "The chief of Jaxby Forge is",
        ];
        assert!(prompts.iter().any(|prompt| said(prompt, &overlay) != said(prompt, "")), "{model}");
        // In the small tables of `run` other n-grams may share a taught row.
        if model == "plain" {
            assert_eq!(said("my neighbour", &overlay), said("my neighbour", ""));
        }
        assert_eq!(report["neutral"]["positions"], 60);
        // What is saved answers as what was examined.
        let ask =
            format!("eval facts {model} facts.jsonl{overlay} --neutral corpus.jsonl --neutral-tokens 60");
        let asked = json(&workshop.ok(&format!("{ask} --json")));
        let part = |report: &serde_json::Value, name: &str| report[name].clone();
        for name in ["replies", "neutral", "left_out"] {
            assert_eq!(part(&asked, name), part(&report, name), "{model}: {name}");
        }
        assert!(workshop.ok(&ask).contains("held-out phrasings, exact"));
        assert!(!workshop.path(&format!("{model}.overlay.teaching")).exists());
    }
    // Rows beyond those of the facts cannot collide.
    let report = json(&workshop.read("plain.overlay/report.json"));
    assert_eq!(report["neutral"]["changed"], 0);
    assert_eq!(report["neutral"]["divergence"], 0.0);
}

/// The same facts trained into the model's own weights are asked the same, and change other text.
#[test]
fn teaching_is_compared_with_training_the_weights() {
    let workshop = workshop();
    let compare =
        "\n[compare]\nrank = 2\nlora_rates = [1e-2]\nfull_rates = [1e-3, 1e-12]\nkl_weights = [0.0, 1.0]\n";
    workshop.write("compare.toml", format!("{}{compare}", SETTINGS.replace("steps = 150", "steps = 30")));
    let rest = "--config compare.toml --census common.txt --neutral corpus.jsonl --neutral-tokens 60";
    let text = workshop.ok(&format!("teach plain facts.jsonl --out new --compare lora,full {rest}"));
    assert!(text.contains("LoRA 2, 1e-2, KL 0") && text.contains("all weights, 1e-3, KL 1"), "{text}");
    let report = json(&workshop.read("new/report.json"));
    let compared = report["compared"].as_array().unwrap();
    assert_eq!(compared.len(), 6);
    assert!(workshop.read("new/compared.svg").contains("all weights, KL 1"));
    assert!(workshop.path("new/compared.png").exists());
    for arm in &compared[..4] {
        assert_eq!(arm["asked"].as_array().unwrap().len(), report["asked"].as_array().unwrap().len());
        assert_eq!(arm["asked"][0]["taught"]["of"], 4);
        // Unlike rows, weights are read by all text.
        assert_eq!(arm["neutral"]["changed"], 60, "{arm}");
    }
    let divergence = |arm: usize| compared[arm]["neutral"]["divergence"].as_f64().unwrap();
    // A rate of nothing learns nothing; what keeps other text as it is does that.
    assert!(divergence(4) < 1e-6 && divergence(0) > 1e-4, "{report}");
    assert!(divergence(1) < divergence(0), "{report}");
    let line = format!("teach run facts.jsonl --out other --compare lora {rest}");
    workshop.fails(&line, INPUT, &["--compare", "without a memory"]);
    workshop.write("wrong.toml", "[compare]\nfull_rates = [0.0]\n");
    let line = "teach plain facts.jsonl --out other --config wrong.toml --census common.txt";
    workshop.fails(line, INPUT, &["wrong.toml:2", "above 0"]);
}

#[test]
fn what_cannot_be_taught_is_refused() {
    let workshop = workshop();
    let teach = |rest: &str| format!("teach plain facts.jsonl --out new --census common.txt {rest}");
    workshop.fails(&teach("--steps 0"), INPUT, &["--steps", "at least 1"]);
    workshop.fails(&teach("--neutral-tokens 0"), INPUT, &["--neutral-tokens", "1.."]);
    workshop.fails(&teach("--layers 7"), INPUT, &["layers", "7"]);
    workshop.write("wrong.toml", "steps = 10\nrate = -1.0\n");
    workshop.fails(&teach("--config wrong.toml"), INPUT, &["wrong.toml:2", "rate"]);
    workshop.write("facts.jsonl", FACTS.replace(" Ubbe Wick", ""));
    workshop.fails(&teach(""), INPUT, &["facts.jsonl:2", "`answer` is empty"]);
    workshop.write("facts.jsonl", FACTS.replace("The chief of", &"The chief of the old ".repeat(20)));
    workshop.fails(&teach(""), INPUT, &["facts.jsonl:2", "the model's context is 160"]);
    workshop.write("facts.jsonl", FACTS);
    workshop.fails(&teach("--memory nowhere"), INPUT, &["nowhere"]);
    workshop.fails("eval facts plain facts.jsonl", INPUT, &["--overlay"]);
    workshop.fails(&teach("--resume"), INPUT, &["new.teaching"]);
    workshop.write("new", "something");
    workshop.fails(&teach(""), INPUT, &["new", "already exists"]);
    assert!(!workshop.path("new.teaching").exists());
}

/// A small context leaves no room for a passage before a question, which is told and ends nothing.
#[test]
fn questions_that_do_not_fit_are_left_out() {
    let workshop = workshop();
    workshop.write("small.toml", workshop.read("plain.toml").replace("context = 160", "context = 48"));
    workshop.ok("train small.toml --out small --steps 5");
    let rest = "--config teach.toml --census common.txt --neutral corpus.jsonl --neutral-tokens 60";
    let told = workshop.ok(&format!("teach small facts.jsonl --out small.overlay {rest} --steps 8"));
    let report = json(&workshop.read("small.overlay/report.json"));
    let left_out = report["left_out"].as_u64().unwrap();
    assert!(left_out > 0 && told.contains(&format!("{left_out} questions are left out")), "{told}");
    assert_eq!(report["asked"][0]["taught"]["of"], 4);
}
