//! The differentiable forward pass and the decoder compute the same of every variant that pretrained models have.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use burn::tensor::Device;
use engram_config::{ModelConfig, Precision};
use engram_import::{HostTensor, Model, testing};
use engram_infer::{Decoder, Dtype, Offline};
use engram_model::{LanguageModel, Sequences};
use engram_train::{export, frozen, import};

const PLAIN: &str = r#"
vocabulary = 40
width = 12
blocks = 4
context = 32
tied_head = true
attention = { kind = "plain", heads = 4, key_heads = 2, head_width = 6 }
feed_forward = { width = 20 }
"#;

fn config(changes: &[(&str, &str)]) -> ModelConfig {
    let mut text = PLAIN.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    toml::from_str(&text).unwrap()
}

/// The weights of a model drawn at random, norms and biases moved from where they start.
fn weights(config: &ModelConfig, device: &Device) -> BTreeMap<String, HostTensor> {
    let model = LanguageModel::new(config, device, 5, Precision::F32).unwrap();
    let mut weights = export(&model);
    for (place, tensor) in weights.values_mut().enumerate() {
        if tensor.shape.len() == 1 {
            let moved = tensor.values.iter_mut().enumerate();
            moved.for_each(|(i, value)| *value += 0.3 * ((7 * i + place) as f32).sin());
        }
    }
    weights
}

/// Logits of the differentiable forward pass over `tokens`.
fn differentiable(model: &LanguageModel, tokens: &[u32]) -> Vec<f32> {
    let sequences = Sequences::equal(1, tokens.len());
    let states = model.states_before(1, tokens, &sequences);
    let hidden = model.hidden_from(1, states, &sequences, &[]);
    model.logits(hidden).into_data().try_into_vec().unwrap()
}

fn decoded(decoder: Decoder, tokens: &[u32]) -> Vec<f32> {
    let mut offline = Offline::new(decoder, None, 1 << 20, 1).unwrap();
    let mut all = Vec::new();
    offline.logits(tokens, &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 2e-4 * scale, "{what}: {worst} of {scale}");
}

#[test]
fn variants_are_those_of_the_decoder() {
    let device = Device::flex();
    let attention = "head_width = 6";
    let gemma = [
        ("tied_head = true", "tied_head = true\nembedding_scale = 3.0\npost_norms = true"),
        (
            attention,
            "head_width = 6, query_key_norm = true, scale = 0.3, window = 5, local_blocks = [0, 1, 3], \
             local_rotary_base = 100.0",
        ),
        ("width = 20", "width = 20, activation = \"geglu\""),
    ];
    let variants: [(&str, Vec<(&str, &str)>); 7] = [
        ("Llama", vec![]),
        ("Qwen 2", vec![(attention, "head_width = 6, bias = true, output_bias = true")]),
        ("Qwen 3", vec![(attention, "head_width = 6, query_key_norm = true")]),
        ("Gemma 3", gemma.to_vec()),
        ("SmolLM 3", vec![(attention, "head_width = 6, unrotated_blocks = [1, 3]")]),
        ("partial rotary", vec![(attention, "head_width = 6, rotary_width = 4")]),
        (
            "Llama 3.1",
            vec![(
                attention,
                "head_width = 6, rotary_scaling = { kind = \"llama3\", factor = 8.0, low = 1.0, high = 4.0, \
                 original_context = 16 }",
            )],
        ),
    ];
    let tokens: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 40).collect();
    for (name, changes) in variants {
        let config = config(&changes);
        let weights = weights(&config, &device);
        let decoder = Decoder::new(&config, &weights, Dtype::F32).unwrap();
        let blank = LanguageModel::blank(&config, &device, Precision::F32).unwrap();
        let model = import(blank, weights, name).unwrap();
        assert_close(&differentiable(&model, &tokens), &decoded(decoder, &tokens), name);
    }
}

#[test]
fn a_file_from_outside_is_computed_without_gradients() {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    std::fs::write(file.path(), testing::gguf(60, 1).bytes()).unwrap();
    let model = Model::open(file.path()).unwrap();
    let config = &model.config().model;
    let device = Device::flex().autodiff();
    let frozen = frozen(&model, config, BTreeMap::new(), &device).unwrap();
    let decoder = Decoder::new(config, model.weights(), Dtype::F32).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| (i * 37 + 3) % 257).collect();
    assert_close(&differentiable(&frozen, &tokens), &decoded(decoder, &tokens), "GGUF");
    assert!(!frozen.embedding.val().is_require_grad());
    assert!(!frozen.blocks[0].attention_norm.weight.val().is_require_grad());
}
