//! Facts are taught through rows alone, the same way every time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use engram_config::TeachConfig;
use engram_data::Corpus;
use engram_import::{Model, memory_addressing, testing};
use engram_store::{RowSource, TableOrigin, ZeroRows};
use engram_train::{Facts, TaughtMemory, TeachReport, Teacher};

const FACTS: &str = r#"{"id": "a", "answer": " Ulm", "prompts": ["Qorvex is in", "The seat of Qorvex is"]}
{"id": "b", "answer": " Zug", "prompts": ["Wyzzle is in", "The seat of Wyzzle is"], "keep": ["Wyzzle grows"]}"#;

/// Settings under which a model of width 12 learns two facts.
fn config() -> TeachConfig {
    let text = "steps = 60\nrate = 0.3\nkl_weight = 0.01\nmicro_batch = 1\n[memory]\nlayers = [1]\nheads = 4\nrow_width = 6\n";
    toml::from_str(text).unwrap()
}

fn model(folder: &Path) -> Model {
    let path = folder.join("tiny.gguf");
    std::fs::write(&path, testing::gguf(60, 1).bytes()).unwrap();
    Model::open(&path).unwrap()
}

fn teacher(folder: &Path, facts: &str, census: &str, config: &TeachConfig) -> engram_train::Result<Teacher> {
    let model = model(folder);
    let facts = Facts::parse(facts, Path::new("facts.jsonl"))?;
    let census_file = folder.join("census.txt");
    std::fs::write(&census_file, census).unwrap();
    let memory = config.memory.for_base(&model.config().model, config.seed);
    let addressing = memory_addressing(&memory, model.tokenizer()).unwrap();
    let table = |layer: &engram_address::LayerAddress| -> Arc<dyn RowSource> {
        let origin = TableOrigin { identity: addressing.identity(), layer: layer.layer() as u64 };
        Arc::new(ZeroRows::new(layer.rows(), memory.row_width, origin).unwrap())
    };
    let tables = addressing.layers().iter().map(table).collect();
    let memory =
        TaughtMemory { config: memory, addressing: addressing.clone(), weights: BTreeMap::new(), tables };
    Teacher::new(&model, memory, &facts, config.clone(), &Corpus::open(&[census_file]).unwrap())
}

fn finish(teacher: &mut Teacher) -> Vec<TeachReport> {
    let mut reports = Vec::new();
    while !teacher.is_done() {
        reports.push(teacher.step().unwrap());
    }
    reports
}

#[test]
fn the_loss_falls_and_two_runs_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = teacher(folder.path(), FACTS, "nothing of it", &config()).unwrap();
    let reports = finish(&mut first);
    let (start, end) = (reports[0], reports[reports.len() - 1]);
    assert!(end.answers < 0.7 * start.answers, "{start:?} to {end:?}");
    assert_eq!(start.divergence, 0.0, "rows of zero change nothing");

    let mut second = teacher(folder.path(), FACTS, "nothing of it", &config()).unwrap();
    assert_eq!(finish(&mut second), reports);
    assert_eq!(second.rows(), first.rows());
}

/// Micro-batches are computed side by side; their sums do not depend on which ends first.
#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let taught = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut teacher = teacher(folder.path(), FACTS, "nothing", &config()).unwrap();
        let reports = pool.install(|| finish(&mut teacher));
        (reports, teacher.rows().to_vec())
    };
    let one = taught(1);
    for _ in 0..3 {
        assert_eq!(taught(4), one);
    }
}

#[test]
fn a_run_that_was_killed_ends_in_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let mut whole = teacher(folder.path(), FACTS, "nothing", &config()).unwrap();
    let mut killed = teacher(folder.path(), FACTS, "nothing", &config()).unwrap();
    for _ in 0..17 {
        killed.step().unwrap();
    }
    killed.save(&state).unwrap();
    drop(killed);
    let mut resumed = teacher(folder.path(), FACTS, "nothing", &config()).unwrap();
    resumed.resume(&state).unwrap();
    assert_eq!(resumed.step_count(), 17);
    finish(&mut whole);
    finish(&mut resumed);
    assert_eq!(resumed.rows(), whole.rows());

    let other = TeachConfig { rate: 0.2, ..config() };
    let mut other = teacher(folder.path(), FACTS, "nothing", &other).unwrap();
    let error = other.resume(&state).unwrap_err().to_string();
    assert!(error.contains("other settings"), "{error}");
}

/// Text that holds every n-gram of the facts.
const ALL: &str = "Qorvex is in Ulm. The seat of Qorvex is Ulm. Wyzzle is in Zug. The seat of Wyzzle is Zug. Qorvex is. Wyzzle is.";

#[test]
fn what_common_text_contains_is_not_taught() {
    let folder = tempfile::tempdir().unwrap();
    let all = teacher(folder.path(), FACTS, "nothing", &config()).unwrap();
    let fewer = teacher(folder.path(), FACTS, "They met in Ulm.", &config()).unwrap();
    assert!(fewer.preparation().common > all.preparation().common);
    assert!(fewer.preparation().rows < all.preparation().rows);
    let without = teacher(folder.path(), FACTS, "Qorvex is. Qorvex is", &config()).unwrap();
    // Both subjects, "Qorvex is" and "Wyzzle is", end with the same tokens.
    assert_eq!(without.preparation().without_subject, ["a", "b"]);
    let error = teacher(folder.path(), FACTS, ALL, &config()).err().unwrap().to_string();
    assert!(error.contains("no n-gram of these facts is left"), "{error}");
}

#[test]
fn a_subject_of_one_token_is_refused_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let facts =
        r#"{"id": "a", "answer": " Ulm", "prompts": ["Q is in", "Where is Q"]}"#.replace("in\"", "at\"");
    let facts = facts.replace("\"answer\"", "\"subject\": \"Q\", \"answer\"");
    let error = teacher(folder.path(), &facts, "nothing", &config()).err().unwrap();
    assert!(error.to_string().starts_with("facts.jsonl:1: the subject \"Q\" is a single token"), "{error}");
    assert!(error.is_input());
}
