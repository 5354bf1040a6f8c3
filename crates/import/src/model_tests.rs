//! Models from outside as they really lie about: what is taken, and what is refused by which message.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::gguf_writer::Writer;
use crate::model::Model;
use crate::testing::{CONFIG, gguf, tensors, tokenizer_json};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 538090408\n";

/// A folder being made.
struct Folder {
    place: tempfile::TempDir,
    config: Value,
    tokenizer: Value,
    tensors: Tensors,
}

impl Folder {
    fn new() -> Self {
        let config = json!({
            "model_type": "llama", "vocab_size": CONFIG.vocabulary, "hidden_size": CONFIG.width,
            "num_hidden_layers": CONFIG.blocks, "num_attention_heads": CONFIG.heads,
            "num_key_value_heads": CONFIG.key_heads, "head_dim": CONFIG.head_width,
            "intermediate_size": CONFIG.feed_forward, "rms_norm_eps": CONFIG.norm_epsilon,
            "rope_theta": CONFIG.rotary_base, "max_position_embeddings": CONFIG.context, "eos_token_id": 256,
            "hidden_act": "silu", "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"],
        });
        Self {
            place: tempfile::tempdir().unwrap(),
            config,
            tokenizer: serde_json::from_str(&tokenizer_json()).unwrap(),
            tensors: tensors(1),
        }
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    fn path(&self) -> &Path {
        self.place.path()
    }

    fn file(&self, name: &str, tensors: &Tensors) {
        let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = (tensors.iter())
            .map(|(name, (shape, values))| (name, shape, bytemuck::cast_slice(values).to_vec()))
            .collect();
        let views = bytes.iter().map(|(name, shape, data)| {
            (name.as_str(), TensorView::new(Dtype::F32, (*shape).clone(), data).unwrap())
        });
        safetensors::serialize_to_file(views, None, &self.path().join(name)).unwrap();
    }

    fn settings(&self) {
        std::fs::write(self.path().join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(self.path().join("tokenizer.json"), self.tokenizer.to_string()).unwrap();
    }

    /// Three files with an index.
    fn sharded(self) -> Self {
        self.settings();
        let file = |name: &str| {
            let number = if name.contains("layers.0.") {
                2
            } else if name.contains("layers.1.") {
                3
            } else {
                1
            };
            format!("model-0000{number}-of-00003.safetensors")
        };
        let mut by_file: BTreeMap<String, Tensors> = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            by_file.entry(file(name)).or_default().insert(name.clone(), tensor.clone());
        }
        by_file.iter().for_each(|(name, tensors)| self.file(name, tensors));
        let map: BTreeMap<&String, String> = self.tensors.keys().map(|name| (name, file(name))).collect();
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(self.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        self
    }

    fn single(self) -> Self {
        self.settings();
        self.file("model.safetensors", &self.tensors);
        self
    }

    fn open(&self) -> Model {
        Model::open(self.path()).unwrap_or_else(|error| panic!("{error}"))
    }

    fn refused(&self) -> String {
        Model::open(self.path()).unwrap_err().to_string()
    }
}

fn gguf_file(writer: &Writer) -> tempfile::TempPath {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap().into_temp_path();
    std::fs::write(&file, writer.bytes()).unwrap();
    file
}

fn refused_gguf(writer: &Writer) -> String {
    Model::open(&gguf_file(writer)).unwrap_err().to_string()
}

fn same_weights(one: &Model, other: &Model) {
    assert_eq!(one.config(), other.config());
    for (name, weight) in one.weights().iter() {
        assert!(weight.values() == other.weights().get(name).unwrap().values(), "{name}");
    }
    assert_eq!(one.weights().iter().count(), other.weights().iter().count());
}

#[test]
fn a_folder_a_sharded_folder_and_a_file_are_the_same_model() {
    let single = Folder::new().single().open();
    same_weights(&single, &Folder::new().sharded().open());
    same_weights(&single, &Model::open(&gguf_file(&gguf(CONFIG.context, 1))).unwrap());
    let query = single.weights().get("blocks.0.attention.query.weight").unwrap();
    assert_eq!(query.values(), tensors(1)["model.layers.0.self_attn.q_proj.weight"].1);
    assert!(!single.weights().is_inputs_first());
    assert_eq!(single.generation().end_tokens, [256]);
}

#[test]
fn the_index_decides_which_files_count() {
    let folder = Folder::new().sharded();
    let zeros = folder
        .tensors
        .iter()
        .map(|(name, (shape, values))| (name.clone(), (shape.clone(), vec![0.0; values.len()])));
    folder.file("consolidated.safetensors", &zeros.collect());
    folder.file("model-extra.safetensors", &BTreeMap::from([("x".into(), (vec![1], vec![0.0]))]));
    same_weights(&folder.open(), &Folder::new().single().open());
    let outside = json!({"weight_map": {"x": "../model.safetensors"}});
    std::fs::write(folder.path().join("model.safetensors.index.json"), outside.to_string()).unwrap();
    assert!(folder.refused().contains("`../model.safetensors` is not the name of a file"));
}

/// Some editors put a byte-order mark in front of a text file.
#[test]
fn a_byte_order_mark_before_any_text_of_a_folder_changes_nothing() {
    let folder = Folder::new().sharded();
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [256, 7]}"#).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let plain = folder.open();
    let mut marked = 0;
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "json" || ending == "jinja") {
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, format!("\u{feff}{text}")).unwrap();
            marked += 1;
            let found = folder.open();
            same_weights(&found, &plain);
            assert_eq!(found.tokenizer().hash(), plain.tokenizer().hash(), "{}", path.display());
            assert_eq!(found.generation().end_tokens, plain.generation().end_tokens, "{}", path.display());
            assert_eq!(found.chat_template(), plain.chat_template(), "{}", path.display());
        }
    }
    assert_eq!(marked, 6);
}

#[test]
fn missing_files_are_named() {
    let folder = Folder::new().sharded();
    std::fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).unwrap();
    let error = folder.refused();
    assert!(error.contains("model-00002-of-00003.safetensors: the file is missing"), "{error}");
    // Without an index too: the others say how many there are.
    std::fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    let error = folder.refused();
    assert!(error.contains("model-00002-of-00003.safetensors: the file is missing"), "{error}");

    let folder = Folder::new();
    folder.settings();
    std::fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    let error = folder.refused();
    assert!(error.contains("no model.safetensors here; pytorch_model.bin is not read"), "{error}");
    let folder = Folder::new().single();
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    let error = folder.refused();
    assert!(error.contains("config.json: the file is missing"), "{error}");
    let folder = Folder::new().single();
    std::fs::rename(folder.path().join("tokenizer.json"), folder.path().join("tokenizer.model")).unwrap();
    let error = folder.refused();
    assert!(
        error.contains("tokenizer.json: the file is missing; tokenizer.model alone is not read"),
        "{error}"
    );
}

#[test]
fn damaged_files_are_refused_with_their_bytes() {
    let folder = Folder::new().single();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [whole.len() - 1, whole.len() / 2, 100, 9, 8, 3] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = folder.refused();
        assert!(error.contains(&format!("it has {length} bytes")), "{error}");
        if length > whole.len() / 3 {
            assert!(error.contains(&format!("needs {}", whole.len())), "{error}");
        }
    }
    std::fs::write(&path, [&whole[..], b"12345678"].concat()).unwrap();
    assert!(folder.refused().contains("8 bytes lie behind the last tensor"));
    std::fs::write(&path, b"PK\x03\x04 a zip archive, as torch.save writes it").unwrap();
    assert!(folder.refused().contains("not a safetensors file"));
    std::fs::write(&path, "").unwrap();
    assert!(folder.refused().contains("the file is empty"));
    std::fs::write(&path, POINTER).unwrap();
    assert!(folder.refused().contains("Git LFS pointer"));
    std::fs::write(folder.path().join("tokenizer.json"), POINTER).unwrap();
    std::fs::write(&path, &whole).unwrap();
    let error = folder.refused();
    assert!(error.contains("tokenizer.json: this is a Git LFS pointer"), "{error}");

    let whole = gguf(CONFIG.context, 1).bytes();
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap().into_temp_path();
    std::fs::write(&file, &whole[..whole.len() - 1000]).unwrap();
    let error = Model::open(&file).unwrap_err().to_string();
    assert!(error.contains("are missing, from tensor `"), "{error}");
    std::fs::write(&file, POINTER).unwrap();
    assert!(Model::open(&file).unwrap_err().to_string().contains("Git LFS pointer"));
}

#[test]
fn what_changes_nothing_is_taken() {
    for (key, value) in [
        ("rope_scaling", json!({"type": "default"})),
        ("rope_scaling", json!({"rope_type": "default", "factor": 1.0})),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 1.0})),
        ("rope_scaling", Value::Null),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 10000.0})),
        ("attention_bias", json!(false)),
        ("unheard_of", json!(false)),
        ("unheard_of", json!([])),
        ("_anything", json!("x")),
        ("pretraining_tp", json!(1)),
        ("partial_rotary_factor", json!(1.0)),
        ("tie_word_embeddings", json!(true)),
    ] {
        let folder = Folder::new().set(key, value.clone()).single();
        let model = Model::open(folder.path()).unwrap_or_else(|error| panic!("{key} {value}: {error}"));
        same_weights(&model, &Folder::new().single().open());
    }
    let mut folder = Folder::new();
    for block in 0..CONFIG.blocks {
        let name = format!("model.layers.{block}.self_attn.rotary_emb.inv_freq");
        folder.tensors.insert(name, (vec![2], vec![1.0, 0.1]));
    }
    same_weights(&folder.single().open(), &Folder::new().single().open());
    let neutral = |change: &dyn Fn(&mut Writer)| {
        let mut file = gguf(CONFIG.context, 1);
        change(&mut file);
        same_weights(&Model::open(&gguf_file(&file)).unwrap(), &Folder::new().single().open());
    };
    neutral(&|file| {
        file.text("llama.rope.scaling.type", "none");
    });
    neutral(&|file| {
        file.integer("llama.expert_count", 0).integer("llama.expert_used_count", 0);
    });
    neutral(&|file| {
        file.float("llama.rope.scaling.factor", 1.0).integer("llama.vocab_size", 257);
    });
}

#[test]
fn a_head_in_the_files_counts() {
    let mut folder = Folder::new().set("tie_word_embeddings", json!(true));
    let head = vec![0.5; CONFIG.vocabulary * CONFIG.width];
    folder.tensors.insert("lm_head.weight".into(), (vec![CONFIG.vocabulary, CONFIG.width], head.clone()));
    let model = folder.single().open();
    assert!(!model.config().model.tied_head);
    assert_eq!(model.weights().get("head").unwrap().values(), head);
    let error = Folder::new().set("tie_word_embeddings", json!(false)).single().refused();
    assert!(error.contains("`tie_word_embeddings` is false, but the files have no head"), "{error}");
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    for (key, value, message) in [
        ("model_type", json!("falcon"), "`model_type`: architecture `falcon` is not known"),
        ("model_type", Value::Null, "`model_type` is missing"),
        ("hidden_size", Value::Null, "`hidden_size` is missing"),
        ("hidden_size", json!("12"), "`hidden_size` is not a whole number"),
        ("hidden_act", json!("gelu"), "`hidden_act` is `gelu`; known is `silu`"),
        ("attention_bias", json!(true), "`attention_bias` is true"),
        ("mlp_bias", json!(true), "`mlp_bias` is true"),
        ("residual_multiplier", json!(0.22), "`residual_multiplier` is 0.22, which is not known"),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "`quantization_config` is {\"quant_method\"",
        ),
        ("sliding_window", json!(8), "`sliding_window` is 8, which is not known"),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "`rope_scaling.type` is `dynamic`"),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 2.0}),
            "`rope_scaling.low_freq_factor` is missing",
        ),
        (
            "rope_scaling",
            json!({"type": "default", "mrope_section": [1, 1]}),
            "`rope_scaling.mrope_section` is",
        ),
        ("num_attention_heads", json!(3), "3"),
        ("num_key_value_heads", json!(3), "`model.attention.key_heads`"),
        ("num_hidden_layers", json!(1_000_000), "at most"),
        (
            "vocab_size",
            json!(300),
            "tensor `model.embed_tokens.weight` is [257, 12]; the settings say [300, 12]",
        ),
    ] {
        let error = Folder::new().set(key, value.clone()).single().refused();
        assert!(error.contains(message), "{key} {value}: {error}");
    }
    let mut folder = Folder::new();
    folder.tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), (vec![16], vec![0.0; 16]));
    let error = folder.single().refused();
    assert!(error.contains("tensor `model.layers.0.self_attn.q_proj.bias` has no place"), "{error}");
    let mut folder = Folder::new();
    folder.tensors.remove("model.layers.1.mlp.up_proj.weight");
    let error = folder.single().refused();
    assert!(error.contains("no tensor `model.layers.1.mlp.up_proj.weight`"), "{error}");
}

#[test]
fn what_is_not_known_of_a_file_is_refused_by_name() {
    let with = |change: &dyn Fn(&mut Writer)| {
        let mut file = gguf(CONFIG.context, 1);
        change(&mut file);
        refused_gguf(&file)
    };
    // The architecture first, whatever else is wrong.
    let error = with(&|file| {
        file.text("general.architecture", "falcon").tensor("strange", &[256], 16, &[0; 66]);
    });
    assert!(error.contains("architecture `falcon` is not known"), "{error}");
    let error = with(&|file| {
        file.integer("llama.expert_count", 8);
    });
    assert!(error.contains("`llama.expert_count` is 8, which is not known"), "{error}");
    let error = with(&|file| {
        file.float("llama.attention.clamp_kqv", 8.0);
    });
    assert!(error.contains("`llama.attention.clamp_kqv` is 8.0"), "{error}");
    let error = with(&|file| {
        file.text("llama.rope.scaling.type", "su");
    });
    assert!(error.contains("`llama.rope.scaling.type` is `su`"), "{error}");
    let error = with(&|file| {
        file.tensor("blk.0.attn_q.bias", &[16], 0, &[0; 64]);
    });
    assert!(error.contains("tensor `blk.0.attn_q.bias` has no place"), "{error}");
    let error = with(&|file| {
        file.integer("split.count", 3);
    });
    assert!(error.contains("one of 3 parts"), "{error}");
    let mut without = Writer::default();
    without.text("general.architecture", "llama");
    let error = refused_gguf(&without);
    assert!(error.contains("`llama.embedding_length` is missing"), "{error}");
    let error = refused_gguf(&Writer::default());
    assert!(error.contains("metadata `general.architecture` is missing"), "{error}");
}

#[test]
fn tokens_beyond_the_embedding_do_not_refuse_a_model() {
    let mut folder = Folder::new();
    let more = json!({
        "id": 257, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    });
    folder.tokenizer["added_tokens"].as_array_mut().unwrap().push(more);
    let model = folder.single().open();
    assert_eq!(model.config().model.vocabulary, 257);
    assert_eq!(model.tokenizer().vocabulary(), 258);
    assert!(model.notes()[0].contains("the tokenizer has 258 tokens, the model 257"), "{:?}", model.notes());
}

#[test]
fn a_byte_level_tokenizer_gets_the_decoder_that_its_file_leaves_out() {
    let mut folder = Folder::new();
    folder.tokenizer["decoder"] = Value::Null;
    let model = folder.single().open();
    let text = "é 🌌";
    assert_eq!(model.tokenizer().decode(&model.tokenizer().encode(text).unwrap()).unwrap(), text);
}

#[test]
fn all_ends_and_the_way_to_sample_are_found() {
    let folder = Folder::new().set("eos_token_id", json!([256, 10])).single();
    let generation = json!({"eos_token_id": [11, 256], "temperature": 0.6, "top_k": 20, "do_sample": true});
    std::fs::write(folder.path().join("generation_config.json"), generation.to_string()).unwrap();
    let model = folder.open();
    let found = model.generation();
    assert_eq!(found.end_tokens, [11, 256, 10]);
    assert_eq!((found.temperature, found.top_k, found.top_p), (Some(0.6), Some(20), None));
    assert_eq!(model.tokenizer().end_of_text(), 256);
    // Written and read back, they are the same.
    std::fs::write(folder.path().join("generation_config.json"), found.to_json()).unwrap();
    assert_eq!(folder.open().generation(), found);
}

#[test]
fn templates_are_found_wherever_they_lie() {
    let folder = Folder::new().single();
    assert_eq!(folder.open().chat_template(), None);
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let template = || -> Value { serde_json::from_str(folder.open().chat_template().unwrap()).unwrap() };
    write("special_tokens_map.json", r#"{"eos_token": {"content": "<|endoftext|>"}}"#);
    write("chat_template.json", r#"{"chat_template": "json"}"#);
    assert_eq!(template()["chat_template"], "json");
    assert_eq!(template()["eos_token"], "<|endoftext|>");
    write("tokenizer_config.json", r#"{"chat_template": "config", "eos_token": "<|endoftext|>"}"#);
    std::fs::remove_file(folder.path().join("chat_template.json")).unwrap();
    assert_eq!(template()["chat_template"], "config");
    write("chat_template.jinja", "jinja");
    assert_eq!(template()["chat_template"], "jinja");
}

/// Written as a checkpoint, and as a folder for Hugging Face's library, a model is read back as it was.
#[test]
fn a_model_is_read_back_from_a_checkpoint_and_from_an_export() {
    let scaled = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16});
    let folder = Folder::new().set("rope_scaling", scaled).single();
    let model = folder.open();
    let place = tempfile::tempdir().unwrap();
    let go_on =
        &mut |_: usize, _: usize| -> std::ops::ControlFlow<()> { std::ops::ControlFlow::Continue(()) };
    let checkpoint = Model::open(&model.save_checkpoint(&place.path().join("own"), go_on).unwrap()).unwrap();
    assert!(checkpoint.weights().is_inputs_first());
    assert_eq!(checkpoint.config(), model.config());
    assert_eq!(checkpoint.generation().end_tokens, model.generation().end_tokens);
    for from in [&model, &checkpoint] {
        let out = place.path().join(format!("hub-{}", from.weights().is_inputs_first()));
        same_weights(&Model::open(&from.export_hub(&out, go_on).unwrap()).unwrap(), &model);
        // Nothing is overwritten.
        assert!(from.export_hub(&out, go_on).unwrap_err().to_string().contains("hub-"));
    }
    let stop = &mut |done: usize, _: usize| -> std::ops::ControlFlow<()> {
        if done == 3 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
    };
    let out = place.path().join("interrupted");
    assert!(matches!(model.save_checkpoint(&out, stop).unwrap_err(), crate::Error::Interrupted));
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 3, "nothing unfinished is left");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Whatever one value of a `config.json` is, the model opens or is refused: no panic.
    #[test]
    fn any_setting_is_read_or_refused(key in 0_usize..12, number in proptest::prelude::any::<i64>(), kind in 0..6) {
        let keys = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "eos_token_id",
            "rope_scaling"];
        let value = match kind {
            0 => json!(number),
            1 => json!(number as f64 / 7.0),
            2 => json!(number.unsigned_abs() % 9),
            3 => json!("x"),
            4 => json!({"type": "yarn", "factor": number, "original_max_position_embeddings": number % 5}),
            _ => json!([number]),
        };
        let folder = Folder::new().set(keys[key], value).single();
        let _ = Model::open(folder.path());
    }
}
