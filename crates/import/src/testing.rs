//! A small model with random weights and a tokenizer of bytes, for tests.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engram_config::{Compression, Gate, Lookup, MemoryConfig, MemoryForm};
use engram_store::{OverlayWriter as StoreOverlayWriter, RowSource, TableOrigin, ZeroRows};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::adapter::{Adapter, AdapterRows, AdapterWriter};
use crate::gguf_writer::Writer;
use crate::model::Model;
use crate::overlay::{OverlayNotes, OverlayWriter};
use crate::tensor::HostTensor;

/// Sizes of a model of the Llama type.
#[derive(Debug, Clone, Copy)]
pub struct TinyConfig {
    /// Tokens.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Blocks.
    pub blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub key_heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Width of the feed-forward layer.
    pub feed_forward: usize,
    /// Added to the mean square in every norm.
    pub norm_epsilon: f32,
    /// Base of the rotary angles.
    pub rotary_base: f64,
    /// Most tokens of a text.
    pub context: usize,
}

/// Its sizes; heads in two groups.
pub const CONFIG: TinyConfig = TinyConfig {
    vocabulary: 257,
    width: 12,
    blocks: 2,
    heads: 4,
    key_heads: 2,
    head_width: 4,
    feed_forward: 20,
    norm_epsilon: 1e-5,
    rotary_base: 10_000.0,
    context: 60,
};

/// Weights by the names that Hugging Face's library gives them; the head is the embedding.
pub fn tensors(seed: u64) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let TinyConfig { vocabulary, width, blocks, heads, key_heads, head_width, feed_forward, .. } = CONFIG;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let count = shape.iter().product();
        let values = (0..count)
            .map(|_| random.random::<f32>() - 0.5)
            .map(|v| if shape.len() == 1 { v + 1.0 } else { v });
        tensors.insert(format!("{name}.weight"), (shape.to_vec(), values.collect()));
    };
    add("model.embed_tokens".into(), &[vocabulary, width]);
    add("model.norm".into(), &[width]);
    for block in 0..blocks {
        let mut part = |part: &str, shape: &[usize]| add(format!("model.layers.{block}.{part}"), shape);
        part("input_layernorm", &[width]);
        part("post_attention_layernorm", &[width]);
        part("self_attn.q_proj", &[heads * head_width, width]);
        part("self_attn.k_proj", &[key_heads * head_width, width]);
        part("self_attn.v_proj", &[key_heads * head_width, width]);
        part("self_attn.o_proj", &[width, heads * head_width]);
        part("mlp.gate_proj", &[feed_forward, width]);
        part("mlp.up_proj", &[feed_forward, width]);
        part("mlp.down_proj", &[width, feed_forward]);
    }
    tensors
}

/// Byte-level names of all bytes, as GPT-2 has them, and the end of text.
pub fn names() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u32> = (0..256).filter(|&byte| !printable(byte)).collect();
    let name = |byte: u32| match others.iter().position(|&other| other == byte) {
        Some(at) => 256 + at as u32,
        None => byte,
    };
    let bytes = (0..256).filter_map(|byte| char::from_u32(name(byte))).map(String::from);
    bytes.chain(["<|endoftext|>".to_owned()]).collect()
}

/// Rows `[heads, 2, pairs]` as `[heads, pairs, 2]`: what GGUF files hold.
fn pairs_together(values: &[f32], inputs: usize) -> Vec<f32> {
    let half = CONFIG.head_width / 2;
    let row = |head: &[f32], at: usize| head[(at % 2 * half + at / 2) * inputs..][..inputs].to_vec();
    let heads = values.chunks(CONFIG.head_width * inputs);
    heads.flat_map(|head| (0..CONFIG.head_width).flat_map(move |at| row(head, at))).collect()
}

/// The model as a GGUF file in f32.
pub fn gguf(context: usize, seed: u64) -> Writer {
    let mut file = Writer::default();
    let integers = [
        ("block_count", CONFIG.blocks),
        ("context_length", context),
        ("embedding_length", CONFIG.width),
        ("feed_forward_length", CONFIG.feed_forward),
        ("attention.head_count", CONFIG.heads),
        ("attention.head_count_kv", CONFIG.key_heads),
        ("attention.key_length", CONFIG.head_width),
        ("rope.dimension_count", CONFIG.head_width),
    ];
    file.text("general.architecture", "llama").text("tokenizer.ggml.model", "gpt2");
    for (key, value) in integers {
        file.integer(&format!("llama.{key}"), value as u32);
    }
    file.float("llama.attention.layer_norm_rms_epsilon", CONFIG.norm_epsilon);
    file.text("tokenizer.ggml.pre", "smollm").texts("tokenizer.ggml.tokens", &names());
    let types: Vec<i32> = (0..257).map(|id| if id == 256 { 3 } else { 1 }).collect();
    file.integers("tokenizer.ggml.token_type", &types).texts("tokenizer.ggml.merges", &[]);
    file.integer("tokenizer.ggml.eos_token_id", 256).bool("tokenizer.ggml.add_bos_token", false);
    for (name, (shape, values)) in tensors(seed) {
        let turned = name.contains("q_proj") || name.contains("k_proj");
        let values = if turned { pairs_together(&values, CONFIG.width) } else { values };
        file.tensor(&gguf_name(&name), &shape, 0, bytemuck::cast_slice(&values));
    }
    file
}

/// Its tokenizer as a file of its own.
pub fn tokenizer_json() -> String {
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        names().into_iter().enumerate().map(|(id, name)| (name, id.into())).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{
            "id": 256, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
    .to_string()
}

/// ggml's name of a tensor.
fn gguf_name(name: &str) -> String {
    let part = |part: &str| match part {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        other => panic!("{other} has no name"),
    };
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".into(),
        "model.norm.weight" => "output_norm.weight".into(),
        _ => {
            let inner = name.trim_start_matches("model.layers.").trim_end_matches(".weight");
            let (index, inner) = inner.split_once('.').unwrap();
            format!("blk.{index}.{}.weight", part(inner))
        }
    }
}

/// The model as the file `folder/base.gguf`.
pub fn write_gguf(folder: &Path, seed: u64) -> PathBuf {
    let path = folder.join("base.gguf");
    std::fs::write(&path, gguf(CONFIG.context, seed).bytes()).unwrap();
    path
}

/// A small memory before the last block, in the form `form`.
pub fn memory(form: MemoryForm) -> MemoryConfig {
    let row_width = if form == MemoryForm::Added { CONFIG.width } else { 4 };
    MemoryConfig {
        form,
        gate: Gate::PerStream,
        gate_form: engram_config::GateForm::SignedRoot,
        convolution: None,
        layers: vec![1],
        max_order: 3,
        heads: 2,
        row_width,
        rows_per_head: vec![500_000, 600_000],
        compression: Compression::Normalised,
        lookup: Lookup::Own,
        seed: 7,
        pad_id: 256,
        kernel: 3,
        row_init: 0.0,
    }
}

/// Random weights for `memory` in a model of one stream of `width`. Nothing is added where all rows are zero: the
/// value has no bias.
pub fn memory_weights(memory: &MemoryConfig, width: usize, seed: u64) -> BTreeMap<String, HostTensor> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut all = BTreeMap::new();
    let inputs = memory.width();
    for layer in &memory.layers {
        let mut add = |name: &str, shape: &[usize]| {
            let values = (0..shape.iter().product()).map(|_| random.random::<f32>() - 0.5).collect();
            all.insert(format!("blocks.{layer}.memory.{name}"), HostTensor { shape: shape.to_vec(), values });
        };
        match memory.form {
            MemoryForm::Paper => {
                add("projection.key", &[inputs, width]);
                add("projection.key_bias", &[width]);
                add("projection.value", &[inputs, width]);
                add("norms.query", &[1, width]);
                add("norms.key", &[1, width]);
                add("convolution.norm", &[1, width]);
                add("convolution.weight", &[1, width, memory.kernel]);
                let bias = HostTensor { shape: vec![width], values: vec![0.0; width] };
                all.insert(format!("blocks.{layer}.memory.projection.value_bias"), bias);
            }
            MemoryForm::V41 => {
                add("projection", &[inputs, 2 * width]);
                add("norms.query", &[1, width]);
            }
            _ => {}
        }
    }
    all
}

/// The adapter `folder` with random weights and rows of zero.
pub fn write_adapter(folder: &Path, base: &Model, memory: &MemoryConfig, seed: u64) -> PathBuf {
    let writer = AdapterWriter::begin(folder, base, memory, AdapterRows::Zero).unwrap();
    writer.weights(&memory_weights(memory, base.config().model.width, seed)).unwrap();
    writer.place().unwrap()
}

/// The overlay `folder`, which brings `adapter` with it and changes the rows that `text` reads in every layer.
pub fn write_overlay(folder: &Path, base: &Model, adapter: &Adapter, text: &str, seed: u64) -> PathBuf {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let writer = OverlayWriter::begin_for(folder, adapter, OverlayNotes::default()).unwrap();
    writer.include(adapter).unwrap();
    let tokens = base.tokenizer().encode(text).unwrap();
    let addressing = adapter.addressing();
    for (place, layer) in addressing.layers().iter().enumerate() {
        let origin = TableOrigin { identity: addressing.identity(), layer: layer.layer() as u64 };
        let zeros = ZeroRows::new(layer.rows(), adapter.memory().row_width, origin).unwrap();
        let mut rows = StoreOverlayWriter::new(zeros.header(), zeros.content());
        let mut ids = Vec::new();
        let history = &mut addressing.history();
        history.extend(&tokens).unwrap().row_ids(place, &mut ids).unwrap();
        for id in ids {
            let values: Vec<f32> = (0..zeros.width()).map(|_| random.random::<f32>() - 0.5).collect();
            rows.set(id, &values).unwrap();
        }
        rows.save(writer.file_path(layer.layer())).unwrap();
    }
    writer.place().unwrap()
}
