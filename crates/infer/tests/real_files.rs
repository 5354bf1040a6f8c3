//! Two files that others have published, against the likeliest tokens of the reference implementations.
//!
//! They are not part of the repository. `ENGRAM_REFERENCE_MODELS` names the folder with `smollm2.json` and `gemma.json`,
//! `ENGRAM_SMOLLM2` and `ENGRAM_GEMMA` the files. Without them, these tests say that they are skipped.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::io::Write as _;
use std::path::Path;

use engram_import::Model;
use engram_infer::{Cache, Chunk, Decoder, Dtype, Root};
use serde_json::Value;

/// Logits after the last token.
fn last_logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(decoder.cache_layout(16), tokens.len().div_ceil(16) + 1);
    let mut sequence = cache.begin(Root::Memory(0), tokens);
    cache.reserve(&mut sequence, tokens.len()).unwrap();
    let chunk = Chunk { sequence: &sequence, tokens, memory: None, logits: 1, targets: &[] };
    decoder.step(&mut cache, &[chunk], &mut []).unwrap().logits
}

fn check(name: &str, file: &str) {
    let found = (std::env::var("ENGRAM_REFERENCE_MODELS"), std::env::var(file));
    let (Ok(folder), Ok(file)) = found else {
        // Written past the test harness, which hides what a passing test prints.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: ENGRAM_REFERENCE_MODELS and {file} do not name the reference and the file"
        );
        return;
    };
    let expected = std::fs::read_to_string(Path::new(&folder).join(format!("{name}.json"))).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let model = Model::open(Path::new(&file)).unwrap_or_else(|error| panic!("{error}"));
    for (dtype, must) in [(Dtype::F32, true), (Dtype::File, false)] {
        let decoder = Decoder::new(&model.config().model, model.weights(), dtype).unwrap();
        let prompts = expected["prompts"].as_array().unwrap();
        let (mut same, mut worst) = (0, 0.0_f64);
        for prompt in prompts {
            let tokens: Vec<u32> = prompt["token_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_u64().unwrap() as u32)
                .collect();
            let logits = last_logits(&decoder, &tokens);
            let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
            let top = prompt["transformers_f32"]["top5"].as_array().unwrap();
            let of = |place: usize| {
                (top[place]["id"].as_u64().unwrap() as usize, top[place]["logprob"].as_f64().unwrap())
            };
            for place in 0..top.len() {
                let (token, logprob) = of(place);
                worst = worst.max((f64::from(logits[token]) - total - logprob).abs());
            }
            let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            let tie = of(0).1 - of(1).1 < 1e-3 && likeliest == of(1).0;
            same += usize::from(likeliest == of(0).0 || tie);
            assert!(!must || likeliest == of(0).0 || tie, "{name}: {prompt}");
        }
        println!(
            "{name}, {dtype:?}: {same} of {} likeliest; five log-probabilities within {worst:.5}",
            prompts.len()
        );
        assert!(!must || worst < 1e-3, "{worst}");
    }
}

#[test]
fn smollm2_has_the_likeliest_tokens_of_the_reference() {
    check("smollm2", "ENGRAM_SMOLLM2");
}

#[test]
fn gemma_has_the_likeliest_tokens_of_the_reference() {
    check("gemma", "ENGRAM_GEMMA");
}
