//! Tiny models of every architecture, against what the reference implementations say of them.
//!
//! They are not part of the repository: name their folder in `ENGRAM_REFERENCE_MODELS`. Without it, these tests say that
//! they are skipped. It holds `hf/<model>/` (a folder as Hugging Face's library writes it, with `expected.json`) and
//! `gguf/<model>/` (GGUF files, with `expected.json`).
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::io::Write as _;
use std::path::{Path, PathBuf};

use engram_data::Begin;
use engram_import::Model;
use serde_json::Value;

fn reference(kind: &str) -> Vec<PathBuf> {
    let Ok(folder) = std::env::var("ENGRAM_REFERENCE_MODELS") else {
        // Written past the test harness, which hides what a passing test prints.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: ENGRAM_REFERENCE_MODELS does not name the folder of the reference models"
        );
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(Path::new(&folder).join(kind))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ggufs(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    files.sort();
    files
}

/// Tokens of a text in which names of special tokens are tokens.
fn tokens(model: &Model, text: &str, special: bool) -> Vec<u32> {
    let mut tokenizer = model.tokenizer().inner().clone();
    tokenizer.set_encode_special_tokens(false);
    let mut tokens = tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
    if let (true, Begin::Always(begin)) = (special, model.begin()) {
        tokens.insert(0, begin);
    }
    tokens
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn folders_have_the_tokens_of_the_reference() {
    for folder in reference("hf") {
        let model = Model::open(&folder).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(model.notes(), [] as [String; 0], "{}", folder.display());
        let expected = json(&folder.join("expected.json"));
        for case in expected["tokenizer"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let shown = format!("{}: {text:?}", folder.display());
            let found = tokens(&model, text, false);
            assert_eq!(found, ids(&case["ids_without_special"]), "{shown}");
            assert_eq!(tokens(&model, text, true), ids(&case["ids_with_special"]), "{shown}");
            assert_eq!(model.tokenizer().inner().decode(&found, false).unwrap(), case["decoded"], "{shown}");
            assert_eq!(model.tokenizer().decode(&found).unwrap(), case["decoded_skip_special"], "{shown}");
        }
        assert!(model.chat_template().is_some(), "{}", folder.display());
        let generation = json(&folder.join("generation_config.json"));
        let ends = match &generation["eos_token_id"] {
            Value::Array(ends) => ids(&Value::Array(ends.clone())),
            one => vec![one.as_u64().unwrap() as u32],
        };
        assert!(ends.iter().all(|end| model.generation().end_tokens.contains(end)), "{}", folder.display());
    }
}

#[test]
fn gguf_files_have_the_tokens_of_the_reference() {
    for folder in reference("gguf") {
        let expected = json(&folder.join("expected.json"));
        let Some(file) = ggufs(&folder).into_iter().next() else { panic!("{}: no file", folder.display()) };
        let model = Model::open(&file).unwrap_or_else(|error| panic!("{error}"));
        for case in expected["tokenizer_llamacpp"].as_array().unwrap() {
            // Where ggml does not normalise as the model was trained, its tokens are not the model's.
            if case["same_as_tokenizer_json"] == false {
                continue;
            }
            let text = case["text"].as_str().unwrap();
            let shown = format!("{}: {text:?}", file.display());
            assert_eq!(tokens(&model, text, false), ids(&case["ids_without_special"]), "{shown}");
            assert_eq!(tokens(&model, text, true), ids(&case["ids_with_special"]), "{shown}");
        }
    }
}

/// Files made from a folder, in formats that hold its numbers exactly, have its weights under its names, and its
/// settings.
#[test]
fn gguf_files_have_the_weights_of_their_folders() {
    for folder in reference("gguf") {
        let name = folder.file_name().unwrap().to_owned();
        let from = folder.parent().unwrap().with_file_name("hf").join(&name);
        for file in ggufs(&folder) {
            let model = Model::open(&file).unwrap_or_else(|error| panic!("{error}"));
            let exact =
                ["f32", "bf16"].iter().any(|kind| file.to_string_lossy().ends_with(&format!("-{kind}.gguf")));
            if !from.exists() || !exact {
                continue;
            }
            let hub = Model::open(&from).unwrap_or_else(|error| panic!("{error}"));
            let names =
                |model: &Model| model.weights().iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
            assert_eq!(names(&model), names(&hub), "{}", file.display());
            for (name, weight) in hub.weights().iter() {
                let found = model.weights().get(name).unwrap();
                assert_eq!(found.shape(), weight.shape(), "{}: {name}", file.display());
                assert!(found.values() == weight.values(), "{}: {name}", file.display());
            }
            let (found, expected) = (&model.config().model, &hub.config().model);
            for block in 0..expected.blocks {
                let (a, b) = (found.attention.rotary_of(block), expected.attention.rotary_of(block));
                let (Some(a), Some(b)) = (&a, &b) else {
                    assert_eq!(a, b, "{}: block {block}", file.display());
                    continue;
                };
                assert_eq!(a.width, b.width);
                assert!((a.amplitude - b.amplitude).abs() < 1e-6, "{}: block {block}", file.display());
                for (a, b) in a.frequencies.iter().zip(&b.frequencies) {
                    assert!((a / b - 1.0).abs() < 1e-6, "{}: block {block}: {a}, {b}", file.display());
                }
                assert_eq!(found.attention.window_of(block), expected.attention.window_of(block));
            }
            assert!(
                (found.attention.scale() / expected.attention.scale() - 1.0).abs() < 1e-6,
                "{}",
                file.display()
            );
            assert_eq!(found.experts, expected.experts, "{}", file.display());
            assert_eq!(found.feed_forward, expected.feed_forward, "{}", file.display());
            assert_eq!(found.norm_epsilon, expected.norm_epsilon, "{}", file.display());
            assert_eq!(found.embedding_scale, expected.embedding_scale, "{}", file.display());
        }
    }
}
