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
    assert_eq!(workshop.list("figures"), ["cka.svg", "lens.svg"]);

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
    workshop.fails(neighbours, 2, &["--neighbours 3", "2 layers"]);
    workshop.fails("inspect depth run nowhere --shards data/valid", 2, &["nowhere"]);
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
