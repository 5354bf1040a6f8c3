//! Tiny models of every architecture: their logits at every position are those of the reference implementations.
//!
//! The models are not part of the repository: name their folder in `ENGRAM_REFERENCE_MODELS`. Without it, these tests say
//! that they are skipped.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::path::{Path, PathBuf};

use engram_import::Model;
use engram_infer::{Cache, Chunk, Decoder, Dtype, Root};
use safetensors::SafeTensors;

fn reference(kind: &str) -> Vec<PathBuf> {
    let Ok(folder) = std::env::var("ENGRAM_REFERENCE_MODELS") else {
        eprintln!("SKIPPED: ENGRAM_REFERENCE_MODELS does not name the folder of the reference models");
        return Vec::new();
    };
    let entries = std::fs::read_dir(Path::new(&folder).join(kind)).unwrap();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// Logits of every position, computed in chunks of these sizes, over and over.
fn logits(decoder: &Decoder, tokens: &[u32], sizes: &[usize]) -> Vec<f32> {
    let mut cache = Cache::new(decoder.cache_layout(16), 64);
    let mut sequence = cache.begin(Root::NoMemory, tokens);
    let (mut at, mut all) = (0, Vec::new());
    for &size in sizes.iter().cycle() {
        let count = size.min(tokens.len() - at);
        if count == 0 {
            break;
        }
        cache.reserve(&mut sequence, count).unwrap();
        let next = &tokens[at..at + count];
        let chunk = Chunk { sequence: &sequence, tokens: next, memory: false, logits: count, targets: &[] };
        all.extend(decoder.step(&mut cache, &[chunk], &mut []).unwrap().logits);
        at += count;
        cache.commit(&mut sequence, at, tokens);
    }
    all
}

fn check(name: &str, path: &Path, expected: &SafeTensors<'_>, prefix: &str, tolerance: f32) {
    let model = Model::open(path).unwrap_or_else(|error| panic!("{error}"));
    let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32);
    let decoder = decoder.unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut compared = 0;
    for length in [1, 17, 96] {
        let Ok(wanted) = expected.tensor(&format!("{prefix}{length}")) else { continue };
        let wanted: Vec<f32> = bytemuck::pod_collect_to_vec(wanted.data());
        let ids: Vec<i64> = bytemuck::pod_collect_to_vec(expected.tensor(&format!("input_ids.{length}")).unwrap().data());
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        for sizes in [&[length][..], &[1], &[5, 11]] {
            let found = logits(&decoder, &ids, sizes);
            assert_eq!(found.len(), wanted.len(), "{name}");
            for (at, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                let position = at / model.config().model.vocabulary;
                let limit = tolerance + tolerance * wanted.abs();
                assert!((found - wanted).abs() <= limit, "{name}, {length} tokens, position {position}: {found}, not {wanted}");
            }
        }
        compared += 1;
    }
    assert!(compared > 0, "{name}: nothing to compare with");
}

#[test]
fn folders() {
    for folder in reference("hf") {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        check(&name, &folder, &SafeTensors::deserialize(&bytes).unwrap(), "logits.", 1e-4);
    }
}

#[test]
fn gguf_files() {
    for folder in reference("gguf") {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for file in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|extension| extension == "gguf") {
                let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
                let kind = stem.strip_prefix(&format!("{name}-")).unwrap();
                check(&stem, &file, &expected, &format!("logits.{kind}."), 1e-4);
            }
        }
    }
}
