//! Training options for long contexts: recomputation, and documents that do not see each other.

mod common;

use common::{CONFIG, Workshop};

/// The common configuration with lines of its own under `[train]`, and a context that holds several documents.
fn config(lines: &str) -> String {
    CONFIG.replace("context = 32", "context = 256").replace("[train]\n", &format!("[train]\n{lines}\n"))
}

/// What a run left that does not tell its options or its time: metrics, and the files of its last checkpoint.
fn outcome(workshop: &Workshop, run: &str) -> (Vec<serde_json::Value>, Vec<Vec<u8>>) {
    let files = ["model.safetensors", "optimizer.safetensors", "memory.layer1.table"];
    let read = |name: &str| {
        let path = workshop.path(&format!("{run}/checkpoints/step-00000012/{name}"));
        std::fs::read(path).expect("a file of the checkpoint")
    };
    (workshop.metrics(run), files.into_iter().map(read).collect())
}

#[test]
fn recomputation_changes_no_bit_of_a_run() {
    let workshop = Workshop::prepared();
    for (name, lines) in [("whole", ""), ("parts", "micro_batch = 1"), ("apart", "documents_apart = true")] {
        workshop.write("kept.toml", config(lines));
        workshop.write("again.toml", config(&format!("{lines}\nrecompute = true")));
        let (kept, again) = (format!("{name}-kept"), format!("{name}-again"));
        workshop.ok(&format!("train kept.toml --out {kept}"));
        workshop.ok(&format!("train again.toml --out {again}"));
        assert!(outcome(&workshop, &kept) == outcome(&workshop, &again), "{name}: the runs differ");
    }
    // And a run may change its mind.
    workshop.ok("train again.toml --out apart-kept --resume --steps 14");
    workshop.ok("train kept.toml --out apart-again --resume --steps 14");
    assert_eq!(workshop.metrics("apart-kept"), workshop.metrics("apart-again"));
}

#[test]
fn documents_that_do_not_see_each_other() {
    let workshop = Workshop::prepared();
    for (name, lines) in [("together", ""), ("apart", "documents_apart = true")] {
        workshop.write(&format!("{name}.toml"), config(lines));
        workshop.ok(&format!("train {name}.toml --out {name}"));
    }
    let (together, apart) = (workshop.metrics("together"), workshop.metrics("apart"));
    assert_eq!(together.len(), apart.len());
    let loss = |metrics: &[serde_json::Value], at: usize| metrics[at]["loss"].as_f64().expect("a loss");
    assert_ne!(loss(&together, 0), loss(&apart, 0), "documents see each other in one run alone");
    assert!(loss(&apart, 11) < loss(&apart, 0), "it learns: {apart:?}");

    // The checkpoint is evaluated as it was trained.
    let held_out = apart.iter().rfind(|metric| metric["kind"] == "held_out").expect("a held-out loss");
    let found = workshop.ok("eval loss apart data/valid --tokens 200 --json");
    let found: serde_json::Value = serde_json::from_str(&found).expect("JSON");
    let difference = |key: &str| found[key].as_f64().unwrap() - held_out[key].as_f64().unwrap();
    assert!(difference("nats_per_token").abs() < 1e-6, "{found} instead of {held_out}");

    // And it can be extended and used like any other.
    let long = config("documents_apart = true\nrecompute = true").replace("context = 256", "context = 512");
    let yarn = "rotary_width = 4\nyarn = { original_context = 256, scale = 2.0 }";
    workshop.write("long.toml", long.replace("rotary_width = 4", yarn));
    workshop.ok("train long.toml --out long --extend-context apart");
    workshop.ok("generate long --prompt Letter --max-tokens 5");

    workshop.write("wrong.toml", config("documents_apart = \"yes\""));
    workshop.fails("train wrong.toml --out wrong", 2, &["wrong.toml:43", "boolean"]);
}
