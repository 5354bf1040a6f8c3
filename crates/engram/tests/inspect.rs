//! What is inside of trained models: how deep their layers are, and where their memory opens.

mod common;

use common::{CONFIG, Workshop};

#[test]
fn depth_is_measured_for_one_model_and_compared_between_two() {
    let workshop = Workshop::trained();
    let without = CONFIG.split("[model.memory]").next().unwrap().to_owned();
    let data = CONFIG.find("[data]").unwrap();
    workshop.write("plain.toml", without.replace("blocks = 2", "blocks = 3") + &CONFIG[data..]);
    workshop.ok("train plain.toml --out plain");

    let table = workshop.ok("inspect depth run --shards data/valid --lens-tokens 100");
    assert!(table.contains("KL, A") && !table.contains("CKA"), "{table}");

    let line = "inspect depth run plain --shards data/valid --samples 64 --batch 16 --figures figures --json";
    let findings: serde_json::Value = serde_json::from_str(&workshop.ok(line)).unwrap();
    let divergences = findings["models"][0]["divergences"].as_array().unwrap();
    assert_eq!(divergences.len(), 2);
    assert!(divergences[0]["nats"].as_f64().unwrap() > 0.0);
    assert_eq!(divergences[1]["nats"].as_f64(), Some(0.0), "the last layer is what the model says");
    let alignment = &findings["alignment"];
    assert_eq!(alignment["tokens"], 64);
    for row in alignment["cka"].as_array().unwrap() {
        let row = row.as_array().unwrap();
        assert_eq!(row.len(), 3);
        assert!(row.iter().all(|cka| cka.as_f64().unwrap() <= 1.0 + 1e-9));
    }
    for aligned in alignment["soft"].as_array().unwrap() {
        assert!((1.0..=3.0).contains(&aligned["aligned"].as_f64().unwrap()));
        assert!(aligned["error"].as_f64().unwrap() >= 0.0);
    }
    assert_eq!(workshop.list("figures"), ["cka.png", "cka.svg", "lens.png", "lens.svg"]);
    for picture in ["figures/cka.png", "figures/lens.png"] {
        assert!(std::fs::read(workshop.path(picture)).unwrap().starts_with(b"\x89PNG\r\n"), "{picture}");
    }

    // A model is like itself, layer by layer.
    let line = "inspect depth run run --shards data/valid --samples 64 --batch 16 --neighbours 1 --json";
    let findings: serde_json::Value = serde_json::from_str(&workshop.ok(line)).unwrap();
    for (layer, aligned) in findings["alignment"]["soft"].as_array().unwrap().iter().enumerate() {
        assert_eq!(aligned["aligned"].as_f64(), Some(layer as f64 + 1.0));
        let itself = findings["alignment"]["cka"][layer][layer].as_f64().unwrap();
        assert!((itself - 1.0).abs() < 1e-9, "{itself}");
    }

    workshop.fails("inspect depth run --shards data/valid --batch 3", 2, &["--batch 3", "4"]);
    workshop.fails("inspect depth run run --shards data/valid --samples 9", 2, &["--samples 9", "128"]);
    let too_many = "inspect depth run run --shards data/valid --samples 90000 --batch 90000";
    workshop.fails(too_many, 2, &["names", "--positions all"]);
    let neighbours = "inspect depth run run --shards data/valid --samples 64 --batch 16 --neighbours 3";
    workshop.fails(neighbours, 2, &["--neighbours 3", "1 to 2"]);
    workshop.fails("inspect depth run nowhere --shards data/valid", 2, &["nowhere"]);
}

/// Set phrases of the corpus: their ends are facts that n-grams tell.
const PHRASES: [(&str, &str); 8] = [
    ("Ada", "Lovelace"),
    ("the old", "captain"),
    ("Queen", "Anne"),
    ("my", "neighbour"),
    ("Isaac", "Newton"),
    ("the Milky", "Way"),
    ("the long", "winter"),
    ("the Café", "Royal"),
];

/// A run that has learnt to read its memory, with tasks of three forms.
fn remembering() -> Workshop {
    let workshop = Workshop::prepared();
    let config = CONFIG.replace("steps = 12", "steps = 250").replace("batch = 2", "batch = 8");
    let config = config.replace("evaluate_every = 6", "evaluate_every = 250");
    workshop.write("remembering.toml", config.replace("checkpoint_every = 6", "checkpoint_every = 250"));
    workshop.ok("train remembering.toml --out run");
    let record =
        |(start, end): &(&str, &str)| format!("{}\n", serde_json::json!({ "start": start, "end": end }));
    workshop.write("phrases.jsonl", PHRASES.iter().map(record).collect::<String>());
    let data = "data = 'phrases.jsonl'";
    let cloze = "[cloze]\nprompt = 'Letter 7. {{ start }}'\ntarget = '{{ end }}'";
    workshop.write("phrases.toml", format!("kind = 'facts'\n{data}\n{cloze}"));
    let say = "[generation]\nprompt = '{{ start }}'\nanswers = '[end, start]'\nstop = ['.']\ntokens = 6";
    workshop.write("say.toml", format!("kind = 'facts'\n{data}\n{say}"));
    let choice = "[multiple_choice]\nprompt = '{{ start }} {{ end }} and {{ start }}'\n\
                  choices = 'all | map(attribute=\"end\")'\nanswer = 'end'";
    workshop.write("again.toml", format!("kind = 'reading'\n{data}\n{choice}"));
    workshop
}

#[test]
fn facts_are_forgotten_when_the_memory_is_off() {
    let workshop = remembering();
    let line = "inspect sensitivity run phrases.toml say.toml again.toml --out found --json";
    let text = workshop.ok(line);
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    let task = |index: usize| &found["tasks"][index];
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    assert_eq!(
        (&task(0)["task"], &task(0)["kind"], &task(0)["questions"]),
        (&"phrases".into(), &"facts".into(), &8.into())
    );
    let lost = &task(0)["likelihood"]["difference"];
    assert!(number(&lost["value"]) < -3.0 * number(&lost["error"]), "the memory matters: {lost}");
    assert!(number(&lost["error"]) > 0.0, "{lost}");

    // On and off are what the tasks say of the model with and without its memory.
    for (without, options) in [(false, "--out on"), (true, "--out off --without-memory")] {
        let report = workshop.ok(&format!("eval tasks run phrases.toml --json {options}"));
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["without_memory"], without);
    }
    let compared: serde_json::Value =
        serde_json::from_str(&workshop.ok("eval compare on off --json")).unwrap();
    assert_eq!((&compared[0]["first"], &compared[0]["second"]), (&"run".into(), &"run, memory off".into()));
    workshop.fails("eval tasks run phrases.toml --out off", 2, &["another model, `run, memory off`"]);
    let mut means = Vec::new();
    for memory in ["on", "off"] {
        let record = workshop.read(&format!("{memory}/phrases.jsonl"));
        assert_eq!(workshop.read(&format!("found/{memory}/phrases.jsonl")), record);
        let outcomes =
            record.lines().skip(1).map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let (mut nats, mut tokens, mut squares) = (0.0, 0.0, 0.0);
        for outcome in outcomes {
            nats += number(&outcome["cloze"]["log_probability"]);
            tokens += number(&outcome["cloze"]["tokens"]);
            squares += number(&outcome["cloze"]["tokens"]).powi(2);
        }
        means.push(nats / tokens);
        // Eight answers of unequal length have the precision of tokens²/squares equal ones.
        assert!((number(&lost["degrees"]) - (tokens * tokens / squares - 1.0)).abs() < 1e-9, "{lost}");
        assert!((number(&task(0)["likelihood"][memory]) - nats / tokens).abs() < 1e-9);
    }
    assert!((number(&lost["value"]) - (means[1] - means[0])).abs() < 1e-9);
    // What is generated is scored, and how likely the right answer is comes from questions of its own.
    assert!(task(1)["score"].is_object() && task(1)["likelihood"].is_object(), "{}", task(1));
    assert_eq!(
        workshop.list("found/off"),
        ["again.jsonl", "phrases.jsonl", "say.answers.jsonl", "say.jsonl"]
    );
    assert_eq!(task(2)["score"]["guess"], 0.125);
    let compared = &found["facts_less_reading"][0];
    assert_eq!(
        (&compared["quantity"], &compared["tasks"]),
        (&"likelihood".into(), &serde_json::json!([2, 1]))
    );
    // The sentence has the numbers of the table.
    let statement = found["statements"][0].as_str().unwrap();
    let written =
        |of: &serde_json::Value| format!("{:+.4} ± {:.4}", number(&of["value"]), number(&of["error"]));
    let contrast = written(&compared["over_questions"]);
    let expected = format!("Facts minus reading: over the questions of these tasks, {contrast} (95 %: ");
    assert!(statement.contains(&expected), "{expected} in {statement}");
    for (group, tasks) in [(0, "2 tasks"), (1, "1 task")] {
        let group = &found["groups"][group];
        let mean = written(&group["means"][0]["mean"]);
        let expected = format!("{} {mean} ({tasks})", group["kind"].as_str().unwrap());
        assert!(statement.contains(&expected), "{expected} in {statement}");
    }
    // Eight questions are too few for a share, however many are right.
    for index in 0..3 {
        assert!(task(index)["score"].is_object() && task(index)["score"]["retained"].is_null());
        assert_eq!(task(index)["cut"], 0);
    }
    let last = found["statements"].as_array().unwrap().last().unwrap().as_str().unwrap();
    assert!(last.ends_with("These scores are left out: phrases, say, again."), "{last}");

    assert_eq!(workshop.list("found"), ["figures", "findings.json", "off", "on"]);
    let figures = ["choices.png", "choices.svg", "likelihood.png", "likelihood.svg"];
    assert_eq!(workshop.list("found/figures"), figures);
    assert_eq!(workshop.read("found/findings.json"), text);

    // What was lost is asked again, and nothing else changes; a figure of other findings does not stay.
    let record = workshop.read("found/off/phrases.jsonl");
    let kept: String = record.lines().take(4).map(|line| format!("{line}\n")).collect();
    workshop.write("found/off/phrases.jsonl", &kept);
    workshop.write("found/figures/retained.svg", "<svg/>");
    let again = workshop.run(line).expect(0, &["phrases, memory off: 5 questions", "again: 0 questions"]);
    let again: serde_json::Value = serde_json::from_str(&again.stdout).unwrap();
    assert!((number(&again["tasks"][0]["likelihood"]["off"]) - means[1]).abs() < 1e-6);
    let completed = workshop.read("found/off/phrases.jsonl");
    assert!(completed.starts_with(&kept) && completed.lines().count() == 9, "{completed}");
    assert_eq!(workshop.list("found/figures"), figures);

    let table = workshop.ok("inspect sensitivity run phrases.toml again.toml");
    for words in
        ["nats per token", "nats per question", "phrases", "memory off", "retained", "* Log-probability"]
    {
        assert!(table.contains(words), "{words} in {table}");
    }
}

#[test]
fn what_has_no_memory_or_no_questions_is_not_sensitive() {
    let workshop = Workshop::trained();
    let cloze = "data = 'a.jsonl'\n[cloze]\nprompt = '{{ a }}'\ntarget = 'x'";
    workshop.write("a.jsonl", "{\"a\": \"Ada\"}\n{\"a\": \"New\"}\n");
    workshop.write("a.toml", cloze);
    let text = workshop.ok("inspect sensitivity run a.toml");
    assert!(text.contains("no task of kind facts and reading") && text.contains("no `kind`: a."), "{text}");

    let without = CONFIG.split("[model.memory]").next().unwrap().to_owned();
    let data = CONFIG.find("[data]").unwrap();
    workshop.write("plain.toml", without + &CONFIG[data..]);
    workshop.ok("train plain.toml --out plain");
    workshop.fails(
        "inspect sensitivity plain a.toml",
        2,
        &["plain: ", "no memory that could be switched off"],
    );
    workshop.fails("eval tasks plain a.toml --without-memory", 2, &["no memory that could be switched off"]);
    workshop.write("model.gguf", "GGUF");
    workshop.fails("inspect sensitivity model.gguf a.toml", 2, &["model.gguf", "from outside"]);
    workshop.fails("inspect sensitivity run a.toml --max-records 1", 2, &["a: a single question"]);
    workshop.write("b.toml", format!("kind = 'fact'\n{cloze}"));
    workshop.fails("inspect sensitivity run b.toml", 2, &["b.toml:1: unknown variant `fact`", "`facts`"]);
    workshop.fails("inspect sensitivity run a.toml a.toml", 2, &["two tasks are called a"]);

    // The command is kept as a shell takes it, whatever its words.
    let kept = workshop.shell("$ENGRAM inspect sensitivity run a.toml --json --out \"$(printf 'a \\377')\"");
    let kept: serde_json::Value = serde_json::from_str(&kept.expect(0, &[]).stdout).unwrap();
    assert_eq!(kept["command"], "engram inspect sensitivity run a.toml --json --out 'a \u{fffd}'");

    // A folder of another model's answers is not resumed.
    workshop.ok("inspect sensitivity run a.toml --out found");
    let other = "inspect sensitivity run/checkpoints/step-00000006 a.toml --out found";
    workshop.fails(other, 2, &["a.jsonl:1: ", "another model"]);
}

#[test]
fn the_n_grams_at_which_the_memory_opens_most_are_listed() {
    let workshop = Workshop::trained();
    let line = "inspect gates run --shards data/valid --top 7 --least 3 --json";
    let layers: serde_json::Value = serde_json::from_str(&workshop.ok(line)).unwrap();
    assert_eq!(layers[0]["layer"], 1);
    let ngrams = layers[0]["ngrams"].as_array().unwrap();
    assert_eq!(ngrams.len(), 7);
    let gates: Vec<f64> = ngrams.iter().map(|ngram| ngram["gate"].as_f64().unwrap()).collect();
    assert!(gates.is_sorted_by(|a, b| a >= b) && gates[0] > layers[0]["mean_gate"].as_f64().unwrap());
    assert!(ngrams.iter().all(|ngram| ngram["occurrences"].as_u64().unwrap() >= 3));
    let table = workshop.ok("inspect gates run --shards data/valid --tokens 500");
    assert!(table.starts_with("layer 1, mean gate 0."), "{table}");
    workshop.fails("inspect gates run Ada --shards data/valid", 2, &["--shards"]);
}
