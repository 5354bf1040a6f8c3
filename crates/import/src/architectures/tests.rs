//! What is read of the configurations of the reference models, one of each kind.

use std::path::Path;

use engram_config::{
    Activation, AttentionConfig, ExpertGroups, ExpertScore, GroupScore, ModelConfig, PlainConfig, RotaryScaling,
};

use super::{Architecture, Stored, of_hub};
use crate::settings::Settings;

fn read(name: &str) -> Architecture {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/configs/{name}.json"));
    let json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let settings = Settings::of_json(&path, json).unwrap();
    let head = settings.flag("tie_word_embeddings").unwrap() == Some(false);
    let stored = Stored { head, vocabulary: None, frequency_factors: None, keys_values_apart: false };
    of_hub(&settings, stored).unwrap_or_else(|error| panic!("{error}"))
}

fn plain(model: &ModelConfig) -> &PlainConfig {
    match &model.attention {
        AttentionConfig::Plain(plain) => plain,
        AttentionConfig::Latent(_) => panic!("plain attention"),
    }
}

#[test]
fn llama_and_its_kin() {
    let llama2 = read("llama2").model;
    assert_eq!((llama2.vocabulary, llama2.width, llama2.blocks, llama2.context), (448, 64, 2, 256));
    assert_eq!((plain(&llama2).heads, plain(&llama2).key_heads, plain(&llama2).head_width), (4, Some(2), 16));
    assert_eq!((plain(&llama2).rotary_base, llama2.norm_epsilon, llama2.tied_head), (10_000.0, 1e-5, false));
    assert_eq!(llama2.untrainable(), None);
    let llama3 = read("llama3").model;
    let scaling = RotaryScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 64 };
    assert_eq!((plain(&llama3).rotary_scaling.as_ref(), llama3.tied_head), (Some(&scaling), true));
    let mistral = read("mistral").model;
    assert_eq!((plain(&mistral).window, &plain(&mistral).local_blocks), (Some(24), &None));
    let smollm3 = read("smollm3").model;
    assert_eq!((plain(&smollm3).unrotated_blocks.clone(), plain(&smollm3).window), (vec![3], None));
    let phi3 = read("phi3");
    assert_eq!((plain(&phi3.model).window, phi3.storage.fused), (Some(40), true));
}

#[test]
fn qwen() {
    let qwen2 = read("qwen2").model;
    assert!(plain(&qwen2).bias && !plain(&qwen2).query_key_norm);
    assert_eq!(plain(&qwen2).window, None, "`use_sliding_window` is false");
    let qwen3 = read("qwen3").model;
    assert!(!plain(&qwen3).bias && plain(&qwen3).query_key_norm);
    assert_eq!((plain(&qwen3).rotary_base, plain(&qwen3).head_width), (1_000_000.0, 24));
    let mixed = read("qwen3_moe").model;
    let experts = mixed.experts.as_ref().unwrap();
    assert_eq!((experts.first_block, &experts.dense_blocks[..]), (0, &[1][..]));
    assert_eq!((experts.routed, experts.active, experts.width, experts.shared_width), (8, 3, 24, 0));
    assert_eq!((experts.score, experts.normalise, experts.groups), (ExpertScore::Softmax, true, None));
    let all = read("qwen3_moe_all").model;
    assert!(all.experts.unwrap().dense_blocks.is_empty());
}

#[test]
fn gemma() {
    let gemma = read("gemma3");
    let attention = plain(&gemma.model);
    assert_eq!((gemma.model.embedding_scale, gemma.model.post_norms), (Some(8.0), true));
    assert_eq!(gemma.model.feed_forward.activation, Activation::Geglu);
    assert_eq!((attention.window, attention.local_blocks.as_deref()), (Some(16), Some(&[0, 2][..])));
    assert_eq!((attention.rotary_base, attention.local_rotary_base), (1_000_000.0, Some(10_000.0)));
    assert_eq!(attention.rotary_scaling, Some(RotaryScaling::Linear { factor: 8.0 }));
    assert_eq!(attention.scale, Some(40_f32.sqrt().recip()));
    assert!(attention.query_key_norm && gemma.storage.norms_without_one);
    let usual = read("gemma3_p6").model;
    assert_eq!(plain(&usual).local_blocks.as_deref(), Some(&[0, 1, 2, 3, 4, 6][..]));
    assert_eq!((plain(&usual).scale, plain(&usual).rotary_scaling.clone()), (None, None));
}

#[test]
fn deepseek() {
    let third = read("deepseek_v3");
    assert_eq!((third.storage.neighbours, third.storage.extra_blocks), (true, 1));
    let experts = third.model.experts.as_ref().unwrap();
    let groups = ExpertGroups { count: 4, active: 2, score: GroupScore::TwoBest };
    assert_eq!((experts.score, experts.normalise, experts.groups), (ExpertScore::Sigmoid, true, Some(groups)));
    assert_eq!((experts.first_block, experts.scaling, experts.shared_width), (1, 2.5, 24));
    // (0.1·ln 8 + 1)²/√28: scores grow, and cosines stay as they are.
    let expected = (0.1 * 8_f32.ln() + 1.0).powi(2) / 28_f32.sqrt();
    assert!((third.model.attention.scale() - expected).abs() < 1e-6);
    assert_eq!(third.model.attention.rotary_of(0).unwrap().amplitude, 1.0);
    let second = read("deepseek_v2").model;
    let groups = ExpertGroups { count: 4, active: 2, score: GroupScore::Best };
    let experts = second.experts.as_ref().unwrap();
    assert_eq!((experts.score, experts.normalise, experts.groups), (ExpertScore::Softmax, false, Some(groups)));
    assert_eq!(experts.shared_width, 48);
    let expected = (0.0707 * 8_f32.ln() + 1.0) / (0.1 * 8_f32.ln() + 1.0);
    assert!((second.attention.rotary_of(0).unwrap().amplitude - expected).abs() < 1e-6);
    let lite = read("deepseek_v2_lite").model;
    assert!(lite.experts.unwrap().groups.is_none());
    let AttentionConfig::Latent(latent) = lite.attention else { panic!("latent attention") };
    assert_eq!((latent.query_rank, latent.latent_rank, latent.value_width), (None, 24, 20));
}
