//! A model from elsewhere and the checkpoint made from it give the same answers, with both forward passes.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::ops::ControlFlow::Continue;
use std::path::Path;

use burn::tensor::Device;
use engram_eval::tasks::{ModelScorer, Request, Scorer};
use engram_import::Model;
use engram_import::testing::{CONFIG, gguf};
use engram_infer::{Decoder, Dtype, Offline};
use engram_train::Trained;

/// The model, its checkpoint, and the folder of both.
fn imported() -> (Model, Model, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, gguf(CONFIG.context, 3).bytes()).unwrap();
    let outside = Model::open(&file).unwrap();
    let path = outside.save_checkpoint(&folder.path().join("model"), &mut |_, _| Continue(())).unwrap();
    (outside, Model::open(&path).unwrap(), folder)
}

fn scorer(model: &Model) -> ModelScorer {
    let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32).unwrap();
    let offline = Offline::new(decoder, None, 1 << 20, 2).unwrap();
    ModelScorer::new(offline, model.tokenizer().clone(), model.begin(), model.identity().unwrap())
}

fn sentence() -> Vec<u32> {
    (0..CONFIG.context as u32).map(|at| at * 37 % 256).collect()
}

/// By the differentiable forward pass.
fn differentiable(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let model = Trained::open(path, &Device::flex()).unwrap();
    let last = model.states(tokens).unwrap().pop().unwrap();
    let logits: Vec<f32> = model.lens(last).into_data().try_into_vec().unwrap();
    let rows = logits.chunks_exact(CONFIG.vocabulary).zip(&tokens[1..]);
    let log_probability = |(logits, &token): (&[f32], &u32)| {
        let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        (f64::from(logits[token as usize]) - total) as f32
    };
    rows.map(log_probability).collect()
}

#[test]
fn the_checkpoint_computes_what_the_model_did() {
    let (outside, checkpoint, _folder) = imported();
    let tokens = sentence();
    let request = Request::new(&tokens[..1], &tokens[1..]).unwrap();
    let of = |model: &Model| scorer(model).score(&[&request]).unwrap().remove(0);
    let (expected, found) = (of(&outside), of(&checkpoint));
    let third = differentiable(checkpoint.path(), &tokens);
    assert_eq!(found.len(), third.len());
    for ((found, expected), third) in found.iter().zip(&expected).zip(third) {
        assert!((found.log_probability - expected.log_probability).abs() < 1e-4);
        assert!((found.log_probability - third).abs() < 1e-4);
        assert_eq!(found.likeliest, expected.likeliest);
    }
    let prompts = [&tokens[..3], &tokens[10..14]];
    let proceed = |model: &Model| scorer(model).proceed(&prompts, 9, &mut |_, _| false).unwrap();
    assert_eq!(proceed(&checkpoint), proceed(&outside));
}

#[test]
fn texts_begin_and_end_as_before() {
    let (outside, checkpoint, _folder) = imported();
    assert_eq!(outside.begin(), checkpoint.begin());
    assert_eq!(outside.tokenizer().end_of_text(), checkpoint.tokenizer().end_of_text());
    assert_eq!(outside.tokenizer().json(), checkpoint.tokenizer().json());
    assert_eq!(scorer(&outside).context(), scorer(&checkpoint).context());
    assert_ne!(scorer(&outside).identity(), scorer(&checkpoint).identity());
}
