//! Tiny models of every architecture, against the logits of the reference implementations.
//!
//! They are not part of the repository: name their folder in `ENGRAM_REFERENCE_MODELS`. Without it, these tests say that
//! they are skipped. It holds `hf/<model>/` and `gguf/<model>/`, each with `expected.safetensors`.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::io::Write as _;
use std::path::{Path, PathBuf};

use engram_import::Model;
use engram_infer::{Cache, Chunk, Decoder, Dtype, Offline, Root, ScoredText};
use safetensors::SafeTensors;

/// The reference models of one kind.
fn reference(kind: &str) -> Vec<PathBuf> {
    let Ok(folder) = std::env::var("ENGRAM_REFERENCE_MODELS") else {
        // Written past the test harness, which hides what a passing test prints.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: ENGRAM_REFERENCE_MODELS does not name the folder of the reference models"
        );
        return Vec::new();
    };
    let folders = std::fs::read_dir(Path::new(&folder).join(kind)).unwrap();
    let mut found: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

/// Tokens, and the logits after each, `[tokens, vocabulary]`.
type Case = (Vec<u32>, Vec<f32>);

/// The cases of a folder; of `kind`, where it holds files of several types.
fn cases(folder: &Path, kind: &str) -> Vec<Case> {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let prefix = format!("logits.{kind}");
    let names = tensors.names().into_iter().filter_map(|name| name.strip_prefix(&prefix));
    let case = |count: &str| {
        let ids = tensors.tensor(&format!("input_ids.{count}")).unwrap();
        let ids = ids.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as u32);
        let logits = tensors.tensor(&format!("{prefix}{count}")).unwrap();
        let logits = logits.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        (ids.collect(), logits.collect())
    };
    let cases: Vec<Case> = names.map(case).collect();
    assert!(!cases.is_empty(), "{}", folder.display());
    cases
}

/// Logits after every token, computed in chunks of these sizes and then one chunk of what is left.
fn logits(decoder: &Decoder, tokens: &[u32], page: usize, chunks: &[usize]) -> Vec<f32> {
    let mut cache = Cache::new(decoder.cache_layout(page), tokens.len().div_ceil(page) + 1);
    let mut sequence = cache.begin(Root::Memory(0), &[]);
    let mut logits = Vec::new();
    for &chunk in chunks.iter().chain([&tokens.len()]) {
        let first = sequence.len();
        let chunk = chunk.min(tokens.len() - first);
        if chunk == 0 {
            continue;
        }
        cache.reserve(&mut sequence, chunk).unwrap();
        let of_chunk = Chunk {
            sequence: &sequence,
            tokens: &tokens[first..first + chunk],
            memory: None,
            logits: chunk,
            targets: &[],
        };
        logits.extend(decoder.step(&mut cache, &[of_chunk], &mut []).unwrap().logits);
        cache.commit(&mut sequence, first + chunk, tokens);
    }
    logits
}

/// The largest difference, as a multiple of what is allowed.
fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let share = |(found, expected): (&f32, &f32)| (found - expected).abs() / (1e-4 + 1e-4 * expected.abs());
    // NaN is not lost.
    found.iter().zip(expected).map(share).fold(0.0, |worst, share| if share <= worst { worst } else { share })
}

#[test]
fn folders_have_the_logits_of_the_reference_in_any_chunks() {
    for folder in reference("hf") {
        let model = Model::open(&folder).unwrap_or_else(|error| panic!("{error}"));
        let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32).unwrap();
        for (tokens, expected) in cases(&folder, "") {
            let whole = logits(&decoder, &tokens, 16, &[]);
            let worst = worst(&whole, &expected);
            println!("{}, {} tokens: {worst:.3} of the tolerance", folder.display(), tokens.len());
            assert!(worst <= 1.0, "{}, {} tokens: {worst}", folder.display(), tokens.len());
            for (page, chunks) in [(1, &[1; 96][..]), (7, &[5, 1, 30, 2, 2]), (96, &[50])] {
                let other = logits(&decoder, &tokens, page, chunks);
                assert!(other == whole, "{}: chunks {chunks:?}", folder.display());
            }
        }
    }
}

#[test]
fn folders_have_the_log_probabilities_of_the_reference() {
    for folder in reference("hf") {
        let model = Model::open(&folder).unwrap_or_else(|error| panic!("{error}"));
        let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32).unwrap();
        let vocabulary = decoder.config().vocabulary;
        let mut offline = Offline::new(decoder, None, 1 << 20, 2).unwrap();
        for (tokens, expected) in cases(&folder, "").into_iter().filter(|(tokens, _)| tokens.len() > 1) {
            let scores = offline.score(&[ScoredText { tokens: &tokens, first: 1 }]).unwrap();
            let rows = expected.chunks_exact(vocabulary).zip(&tokens[1..]);
            for ((logits, &token), found) in rows.zip(&scores[0]) {
                let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
                let expected = f64::from(logits[token as usize]) - total;
                let difference = (f64::from(found.logprob) - expected).abs();
                assert!(difference <= 2e-4 + 2e-4 * expected.abs(), "{}: {difference}", folder.display());
            }
        }
    }
}

/// With exact activations as the dequantised file; with rounded ones, near it.
#[test]
fn gguf_files_have_the_logits_of_the_reference() {
    for folder in reference("gguf") {
        let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        for file in files.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")) {
            let model = Model::open(&file).unwrap_or_else(|error| panic!("{error}"));
            let open = |dtype| Decoder::new(&model.config().model, model.weights(), dtype).unwrap();
            let (exact, rounded) = (open(Dtype::F32), open(Dtype::File));
            let name = file.file_stem().unwrap().to_string_lossy().into_owned();
            let kind = name.rsplit('-').next().unwrap();
            for (tokens, expected) in cases(&folder, &format!("{kind}.")) {
                let found = logits(&exact, &tokens, 16, &[]);
                let in_file = logits(&rounded, &tokens, 16, &[]);
                let size = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
                let errors: Vec<f32> = in_file.iter().zip(&found).map(|(a, b)| a - b).collect();
                let (worst, by_rounding) = (worst(&found, &expected), size(&errors) / size(&found));
                println!(
                    "{name}, {} tokens: {worst:.3} of the tolerance; rounded {by_rounding:.4}",
                    tokens.len()
                );
                assert!(worst <= 1.0, "{name}, {} tokens: {worst}", tokens.len());
                assert!(by_rounding < 0.05, "{name}: {by_rounding}");
                assert!(logits(&rounded, &tokens, 3, &[1, 2, 40]) == in_file, "{name}");
            }
        }
    }
}
