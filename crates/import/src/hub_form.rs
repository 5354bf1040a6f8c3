//! A model as a folder that Hugging Face's library reads: `config.json`, safetensors, tokenizer.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engram_config::{AttentionConfig, ModelConfig, PlainConfig, RotaryScaling};
use engram_data::Begin;
use serde_json::{Value, json};

use crate::checkpoint::CheckpointWriter;
use crate::error::{Error, Result};
use crate::generation;
use crate::model::Model;
use crate::safetensors_writer::{self, Written};
use crate::weight::{Weight, Weights};

impl Model {
    /// Writes the model as the folder `folder`, where nothing may stand; it appears whole or not at all. It is a model
    /// of the Llama, Mistral, SmolLM 3, Qwen 2 or Qwen 3 type, whichever computes the same. `progress` hears how many
    /// of all tensors are written, and may end it.
    ///
    /// # Errors
    /// A model that none of these types describes: the key of its configuration is named. When something stands there,
    /// the file system refuses, or `progress` breaks.
    pub fn export_hub(
        &self,
        folder: &Path,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<PathBuf> {
        let model = &self.config().model;
        let refused = |key: &str| {
            let problem = format!("`{key}` has no place in the models that Hugging Face's library knows");
            Error::model(self.path(), problem)
        };
        let plain = describable(model).map_err(refused)?;
        let mut config = config(model, plain).map_err(refused)?;
        let ends = &self.generation().end_tokens;
        config["eos_token_id"] = if let [one] = ends[..] { json!(one) } else { json!(ends) };
        let (Begin::Always(begin) | Begin::IfEmpty(begin)) = self.begin();
        config["bos_token_id"] = begin.into();
        let writer = CheckpointWriter::at(folder)?;
        writer.file("config.json", format!("{config:#}\n").as_bytes())?;
        writer.file(generation::FILE, self.generation().to_json().as_bytes())?;
        writer.file("tokenizer.json", self.tokenizer().json())?;
        writer.file("tokenizer_config.json", self.tokenizer_config()?.as_bytes())?;
        let tensors = tensors(self.weights(), model, plain);
        safetensors_writer::write(&writer.folder().join("model.safetensors"), &tensors, progress)?;
        Ok(writer.place_bare()?)
    }

    /// What stands around texts, by the names of tokens, and the chat template.
    fn tokenizer_config(&self) -> Result<String> {
        let template = self.chat_template().unwrap_or("{}");
        let mut config: Value =
            serde_json::from_str(template).map_err(|error| Error::model(self.path(), error))?;
        let name = |id: u32| self.tokenizer().inner().id_to_token(id);
        let (Begin::Always(begin) | Begin::IfEmpty(begin)) = self.begin();
        config["bos_token"] = json!(name(begin));
        config["eos_token"] = json!(name(self.tokenizer().end_of_text()));
        config["add_bos_token"] = matches!(self.begin(), Begin::Always(_)).into();
        config["tokenizer_class"] = "PreTrainedTokenizerFast".into();
        Ok(format!("{config:#}\n"))
    }
}

/// Plain attention of a dense model without memory; otherwise the key that is in the way.
fn describable(model: &ModelConfig) -> std::result::Result<&PlainConfig, &'static str> {
    let AttentionConfig::Plain(plain) = &model.attention else { return Err("model.attention") };
    let in_the_way = [
        (model.memory.is_some(), "model.memory"),
        (model.hyper_connections.is_some(), "model.hyper_connections"),
        (model.experts.is_some(), "model.experts"),
        (model.post_norms, "model.post_norms"),
        (model.embedding_scale.is_some(), "model.embedding_scale"),
        (model.feed_forward.activation != engram_config::Activation::Swiglu, "model.feed_forward.activation"),
        (plain.output_bias, "model.attention.output_bias"),
        (plain.scale.is_some(), "model.attention.scale"),
        (plain.local_rotary_base.is_some(), "model.attention.local_rotary_base"),
        (plain.local_blocks.is_some(), "model.attention.local_blocks"),
        (plain.rotary_width.is_some(), "model.attention.rotary_width"),
        (plain.bias && plain.query_key_norm, "model.attention.bias"),
    ];
    match in_the_way.iter().find(|(is_there, _)| *is_there) {
        Some((_, key)) => Err(key),
        None => Ok(plain),
    }
}

/// `config.json`, or the key that is in the way.
fn config(model: &ModelConfig, plain: &PlainConfig) -> std::result::Result<Value, &'static str> {
    let features = [
        (plain.bias, "qwen2", "Qwen2ForCausalLM", "model.attention.bias"),
        (plain.query_key_norm, "qwen3", "Qwen3ForCausalLM", "model.attention.query_key_norm"),
        (
            !plain.unrotated_blocks.is_empty(),
            "smollm3",
            "SmolLM3ForCausalLM",
            "model.attention.unrotated_blocks",
        ),
        (plain.window.is_some(), "mistral", "MistralForCausalLM", "model.attention.window"),
    ];
    let mut there = features.iter().filter(|(is_there, ..)| *is_there);
    let (kind, class) =
        there.next().map_or(("llama", "LlamaForCausalLM"), |(_, kind, class, _)| (kind, class));
    // No type has two of them.
    if let Some((_, _, _, key)) = there.next() {
        return Err(key);
    }
    let scaling = plain.rotary_scaling.as_ref().map(scaling).transpose()?;
    let mut config = json!({
        "architectures": [class],
        "model_type": kind,
        "torch_dtype": "float32",
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.feed_forward.width,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": plain.heads,
        "num_key_value_heads": plain.key_heads.unwrap_or(plain.heads),
        "head_dim": plain.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.context,
        "rms_norm_eps": shortest(model.norm_epsilon),
        "rope_theta": shortest(plain.rotary_base),
        "rope_scaling": scaling,
        "tie_word_embeddings": model.tied_head,
        "attention_bias": false,
    });
    match kind {
        "mistral" => config["sliding_window"] = json!(plain.window),
        "smollm3" => {
            let rotated = (0..model.blocks).map(|block| u8::from(!plain.unrotated_blocks.contains(&block)));
            config["no_rope_layers"] = rotated.collect::<Vec<_>>().into();
            config["use_sliding_window"] = false.into();
        }
        "qwen2" | "qwen3" => config["use_sliding_window"] = false.into(),
        "llama" => config["mlp_bias"] = false.into(),
        _ => {}
    }
    Ok(config)
}

/// `rope_scaling`.
fn scaling(scaling: &RotaryScaling) -> std::result::Result<Value, &'static str> {
    Ok(match *scaling {
        RotaryScaling::Linear { factor } => json!({"rope_type": "linear", "factor": shortest(factor)}),
        RotaryScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3", "factor": shortest(factor), "low_freq_factor": shortest(low),
            "high_freq_factor": shortest(high), "original_max_position_embeddings": original_context,
        }),
        RotaryScaling::Yarn { factor, original_context, fast, slow, truncate, amplitude } => json!({
            "rope_type": "yarn", "factor": shortest(factor), "original_max_position_embeddings": original_context,
            "beta_fast": shortest(fast), "beta_slow": shortest(slow), "truncate": truncate,
            "attention_factor": shortest(amplitude),
        }),
        RotaryScaling::Factors { .. } => return Err("model.attention.rotary_scaling"),
    })
}

/// The shortest number that is this f32.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The tensors, by the names of Hugging Face's library.
fn tensors<'a>(weights: &'a Weights, model: &ModelConfig, plain: &PlainConfig) -> Vec<Written<'a>> {
    let mut all = Vec::new();
    let mut put = |name: String, weight: Option<&'a Weight>, part: Part| {
        if let Some(weight) = weight {
            all.push(written(name, weight, part, weights.is_inputs_first()));
        }
    };
    put("model.embed_tokens.weight".into(), weights.get("embedding"), Part::AsItIs);
    put("model.norm.weight".into(), weights.get("norm.weight"), Part::AsItIs);
    put("lm_head.weight".into(), weights.get("head"), Part::Whole);
    for block in 0..model.blocks {
        let get = |part: &str| weights.get(&format!("blocks.{block}.{part}"));
        let name = |part: &str| format!("model.layers.{block}.{part}");
        put(name("input_layernorm.weight"), get("attention_norm.weight"), Part::AsItIs);
        put(name("post_attention_layernorm.weight"), get("feed_forward_norm.weight"), Part::AsItIs);
        for (ours, theirs) in
            [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")]
        {
            put(
                name(&format!("self_attn.{theirs}.weight")),
                get(&format!("attention.{ours}.weight")),
                Part::Whole,
            );
            put(
                name(&format!("self_attn.{theirs}.bias")),
                get(&format!("attention.{ours}.bias")),
                Part::AsItIs,
            );
        }
        if plain.query_key_norm {
            put(name("self_attn.q_norm.weight"), get("attention.query_norm.weight"), Part::AsItIs);
            put(name("self_attn.k_norm.weight"), get("attention.key_norm.weight"), Part::AsItIs);
        }
        let joint = get("feed_forward.input.weight");
        put(
            name("mlp.gate_proj.weight"),
            joint.or(get("feed_forward.gate.weight")),
            joint.map_or(Part::Whole, |_| Part::First),
        );
        put(
            name("mlp.up_proj.weight"),
            joint.or(get("feed_forward.up.weight")),
            joint.map_or(Part::Whole, |_| Part::Second),
        );
        put(name("mlp.down_proj.weight"), get("feed_forward.output.weight"), Part::Whole);
    }
    all
}

/// What of a tensor is written.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// A vector, or a matrix that lies the same way everywhere.
    AsItIs,
    /// A matrix, output after output.
    Whole,
    /// The first half of its outputs.
    First,
    /// The second half of its outputs.
    Second,
}

fn written(name: String, weight: &Weight, part: Part, is_inputs_first: bool) -> Written<'_> {
    let shape = weight.shape();
    let (&[inputs, outputs], true, false) = (shape, is_inputs_first, matches!(part, Part::AsItIs)) else {
        return Written { name, shape: shape.to_vec(), values: Box::new(move || weight.values()) };
    };
    let (first, count) = match part {
        Part::AsItIs | Part::Whole => (0, outputs),
        Part::First => (0, outputs / 2),
        Part::Second => (outputs / 2, outputs / 2),
    };
    let values = move || {
        let all = weight.values();
        (first..first + count)
            .flat_map(|output| (0..inputs).map(move |input| (output, input)))
            .map(|(output, input)| all[input * outputs + output])
            .collect()
    };
    Written { name, shape: vec![count, inputs], values: Box::new(values) }
}
