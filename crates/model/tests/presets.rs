//! The published models' configurations: their totals.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use engram_address::assign_primes;
use engram_config::{Account, ModelConfig, RunConfig, load_model_config};

fn model(name: &str) -> ModelConfig {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(name);
    load_model_config(&path).unwrap()
}

fn account(config: &ModelConfig) -> Account {
    let rows = config.memory.as_ref().map_or(Vec::new(), |memory| {
        let primes = assign_primes(memory.layers.len(), &memory.rows_per_head, memory.heads).unwrap();
        primes.iter().map(|layer| layer.iter().flatten().sum()).collect()
    });
    Account::of(config, &rows)
}

#[track_caller]
fn near(found: u64, billions: f64) {
    let found = found as f64 / 1e9;
    assert!((found / billions - 1.0).abs() <= 0.02, "{found} billion, published {billions}");
}

#[test]
fn totals_are_the_published_ones() {
    let published = [
        ("dense-4b.toml", 4.1, 0.0),
        ("moe-27b.toml", 26.7, 0.0),
        ("engram-27b.toml", 26.7, 5.7),
        ("engram-40b.toml", 39.5, 18.5),
    ];
    for (name, total, memory) in published {
        let account = account(&model(name));
        near(account.total, total);
        near(account.active, 3.8);
        if memory == 0.0 {
            assert_eq!((account.memory, account.rows_per_token), (0, 0), "{name}");
        } else {
            near(account.memory, memory);
            assert_eq!(account.rows_per_token, 2 * 16, "{name}");
        }
    }
}

/// Every preset is a whole run, with its bases.
#[test]
fn presets_load() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let files = std::fs::read_dir(configs).unwrap().map(|entry| entry.unwrap().path());
    let presets: Vec<_> = files.filter(|path| path.extension().is_some_and(|kind| kind == "toml")).collect();
    assert!(presets.len() >= 9, "{presets:?}");
    for path in presets {
        let config = RunConfig::load(&path).unwrap();
        assert_eq!(toml::from_str::<RunConfig>(&config.to_toml()).unwrap(), config, "{}", path.display());
    }
}

#[test]
fn presets_share_their_backbone() {
    let dense = model("dense-4b.toml");
    for name in ["moe-27b.toml", "engram-27b.toml", "engram-40b.toml"] {
        let other = model(name);
        assert_eq!(ModelConfig { experts: None, memory: None, ..other }, dense, "{name}");
    }
    let (small, large) = (model("engram-27b.toml"), model("engram-40b.toml"));
    assert_eq!(small.memory.as_ref().unwrap().width(), 1280);
    let rows_per_head = small.memory.as_ref().unwrap().rows_per_head.clone();
    let memory = large.memory.map(|memory| engram_config::MemoryConfig { rows_per_head, ..memory });
    assert_eq!(ModelConfig { memory, ..large }, small);
}

/// The small configurations of the quickstart are a fair pair.
#[test]
fn the_quickstart_models_are_of_one_size() {
    let (memory, experts) =
        (account(&model("quickstart-memory.toml")), account(&model("quickstart-baseline.toml")));
    let within = |a: u64, b: u64, share: f64| (a as f64 / b as f64 - 1.0).abs() <= share;
    assert!(within(memory.total, experts.total, 0.01), "{memory:?} and {experts:?}");
    assert!(within(memory.forward_flops, experts.forward_flops, 0.01), "{memory:?} and {experts:?}");
}
