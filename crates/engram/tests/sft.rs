//! Supervised fine-tuning: a model learns answers, and only those.

#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

mod common;

use common::{CONFIG, Workshop, json};
use serde_json::{Value, json};

const INPUT: i32 = 2;

const ANSWERS: [(&str, &str); 6] = [
    ("Who sailed to New York?", " Queen Anne"),
    ("Who wrote to the captain?", " Isaac Newton"),
    ("Who painted numbers?", " Ada Lovelace"),
    ("What did Anne dream?", " the long winter"),
    ("What is naïve?", " an idea"),
    ("Where is the Café?", " on the islands"),
];

/// Two turns of names, and a token of the tokenizer that ends each.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";

fn lines(values: impl IntoIterator<Item = Value>) -> String {
    values.into_iter().map(|value| value.to_string() + "\n").collect()
}

/// A model without experts, which may route a last bit elsewhere, in windows of 64 tokens.
fn config(train: &str) -> String {
    let (before, experts) = CONFIG.split_once("[model.experts]").unwrap();
    let (_, after) = experts.split_once("[model.hyper_connections]").unwrap();
    let (after, _) = after.split_once("[train.schedule]").unwrap();
    let text =
        format!("{before}[model.hyper_connections]{after}{train}\n[train.schedule]\ndecay = \"constant\"\n");
    text.replace("context = 32", "context = 64")
        .replace("valid = \"data/valid\"\n", "")
        .replace("data/train", "chats/train")
        .replace("batch = 2\n", "batch = 3\ndocuments_apart = true\n")
}

fn workshop() -> Workshop {
    let workshop = Workshop::with_corpus();
    workshop.ok("tokenizer train corpus.jsonl --vocabulary 320 --out tokenizer.json");
    let answers = ANSWERS.map(|(prompt, answer)| json!({"prompt": prompt, "answer": answer}));
    workshop.write("answers.jsonl", lines(answers));
    workshop
}

fn losses(workshop: &Workshop, run: &str) -> Vec<f64> {
    let steps = workshop.metrics(run).into_iter().filter(|metric| metric["kind"] == "step");
    steps.map(|step| step["loss"].as_f64().unwrap()).collect()
}

#[test]
fn the_loss_falls_and_the_model_answers() {
    let workshop = workshop();
    let made = workshop
        .ok("data sft answers.jsonl --tokenizer tokenizer.json --context 64 --hold-out 0 --out chats");
    assert!(made.contains("conversations") && made.contains("in the loss"), "{made}");
    assert_eq!(workshop.list("chats/train"), ["00000.mask", "00000.tokens"]);
    workshop.write("sft.toml", config("").replace("steps = 12", "steps = 150"));
    workshop.ok("train sft.toml --out run");
    let losses = losses(&workshop, "run");
    assert!(losses[149] < 0.2 * losses[0], "{} to {}", losses[0], losses[149]);
    for (prompt, answer) in ANSWERS {
        let arguments =
            ["generate", "run", "--prompt", prompt, "--temperature", "0", "--json", "--max-tokens", "20"];
        assert_eq!(json(&workshop.ok_arguments(arguments))["text"], answer, "{prompt}");
    }
}

#[test]
fn parts_of_a_batch_weigh_by_the_tokens_that_count() {
    let workshop = workshop();
    workshop.ok("data sft answers.jsonl --tokenizer tokenizer.json --context 64 --hold-out 0.5 --out chats");
    let held_out = |text: String| text.replace("chats/train\"", "chats/train\"\nvalid = \"chats/valid\"");
    for (name, train) in [("whole", ""), ("parts", "micro_batch = 1"), ("again", "recompute = true")] {
        let text = held_out(config(train))
            .replace("[train.schedule]", "[train.optimizer]\nmuon_rate = 1e-3\n\n[train.schedule]");
        workshop.write("sft.toml", text);
        workshop.ok(&format!("train sft.toml --out {name}"));
    }
    let whole = losses(&workshop, "whole");
    for name in ["parts", "again"] {
        for (found, expected) in losses(&workshop, name).iter().zip(&whole) {
            assert!((found - expected).abs() < 1e-4, "{name}: {found} and {expected}");
        }
    }
    // Held-out losses are those of answers, too.
    let metrics = workshop.metrics("whole");
    let held_out = metrics.iter().find(|metric| metric["kind"] == "held_out").unwrap();
    assert!(held_out["tokens"].as_u64().unwrap() < 40, "{held_out}");
}

#[test]
fn a_chat_template_makes_the_text() {
    let workshop = workshop();
    let turns = |turns: &[(&str, &str)]| {
        let turns: Vec<_> =
            turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        json!({ "messages": turns })
    };
    let chat = [("user", "Hi"), ("assistant", "Hello"), ("user", "Anne?"), ("assistant", "Queen")];
    workshop.write("chat.jsonl", lines([turns(&chat), turns(&chat[..2])]));
    let prepare = "data sft chat.jsonl --tokenizer tokenizer.json --context 64 --hold-out 0 --out chats";
    workshop.fails(prepare, INPUT, &["chat.jsonl:1", "--chat-template"]);
    workshop.write("tokenizer_config.json", json!({"chat_template": TEMPLATE}).to_string());
    workshop.run(prepare).expect(0, &["chat template: tokenizer_config.json"]);
    workshop.write("sft.toml", config(""));
    workshop.ok("train sft.toml --out run");
    assert!(losses(&workshop, "run").iter().all(|loss| loss.is_finite()));
    // Another end of the text than the model's is refused, as for any data.
    workshop.ok("data sft answers.jsonl --plain --end <|pad|> --tokenizer tokenizer.json --context 64 --hold-out 0 --out pad");
    workshop.write("pad.toml", config("").replace("chats/", "pad/"));
    workshop.fails("train pad.toml --out other", INPUT, &["<|pad|>", "text.end"]);
}

#[test]
fn what_cannot_be_learnt_is_refused_by_line() {
    let workshop = workshop();
    let prepare = "data sft bad.jsonl --tokenizer tokenizer.json --context 64 --out chats";
    let good = json!({"prompt": "a", "answer": "b"}).to_string();
    for (line, words) in [
        (json!({"prompt": "a", "answer": ""}), "empty answer"),
        (json!({"messages": [{"role": "user", "content": "a"}]}), "no turn of the assistant"),
        (json!({"messages": [{"role": "bot", "content": "a"}]}), "\"bot\""),
        (json!({"text": "a"}), "neither `messages` nor"),
        (json!({"prompt": "a ".repeat(200), "answer": "b"}), "more than the context of 64"),
    ] {
        workshop.write("bad.jsonl", format!("{good}\n{line}\n"));
        workshop.fails(prepare, INPUT, &["bad.jsonl:2: ", words]);
        assert!(!workshop.path("chats").exists(), "nothing was made");
    }
    // Long conversations can be left out; they are counted and named.
    let skipped = workshop.run(&format!("{prepare} --skip-long --hold-out 0"));
    skipped.expect(0, &["longer than the context: 1", "bad.jsonl:2: "]);
    workshop.write("bad.jsonl", "not JSON\n");
    workshop.fails(&format!("{prepare}2"), INPUT, &["bad.jsonl:1: malformed JSON"]);
    workshop.fails(
        "data sft corpus.jsonl --tokenizer tokenizer.json --context 0 --out c",
        INPUT,
        &["corpus.jsonl:1"],
    );
    // Packed for one context, the data are not for another.
    workshop.write("sft.toml", config("").replace("context = 64", "context = 32"));
    let words = ["chats/train", "a context of 64", "`model.context` is 32", "--context 32"];
    workshop.fails("train sft.toml --out run", INPUT, &words);
}
