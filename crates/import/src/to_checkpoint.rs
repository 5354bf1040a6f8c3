//! A model from outside as a checkpoint of Engram: the same weights by the names that they have here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engram_config::{
    Activation, AttentionConfig, CheckpointConfig, FeedForwardConfig, InitConfig, ModelConfig, PlainConfig,
};

use crate::checkpoint::CheckpointWriter;
use crate::error::{Error, Result};
use crate::llama::{Llama, LlamaConfig};
use crate::open::OutsideModel;
use crate::tensor::HostTensor;

impl OutsideModel {
    /// The model as a configuration: plain attention with grouped heads, dense, one residual stream, no memory.
    ///
    /// # Errors
    /// When no configuration describes it, or a token around its texts has no name.
    pub fn checkpoint_config(&self) -> Result<CheckpointConfig> {
        let model = model_config(self.llama());
        model.validate().map_err(|error| Error::model(&self.path, error.to_string()))?;
        let text = self.begin.config(self.tokenizer())?;
        Ok(CheckpointConfig { model, text, data: None, train: None })
    }

    /// Writes the model as the checkpoint `folder`, where nothing may stand; it appears whole or not at all. `chat_template`, a
    /// `tokenizer_config.json`, goes with it.
    ///
    /// # Errors
    /// As [`checkpoint_config`](Self::checkpoint_config), when something stands there, or when the file system refuses.
    pub fn save_checkpoint(self, folder: &Path, chat_template: Option<&str>) -> Result<PathBuf> {
        let config = self.checkpoint_config()?;
        let writer = CheckpointWriter::at(folder)?;
        let name = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned();
        let origin = format!("# Made from {name:?}, blake3 {}.\n\n", self.identity);
        writer.file("run.toml", (origin + &config.to_toml()).as_bytes())?;
        writer.file("tokenizer.json", self.tokenizer.json())?;
        if let Some(template) = chat_template {
            writer.file("tokenizer_config.json", template.as_bytes())?;
        }
        writer.tensors("model.safetensors", &weights(self.llama))?;
        Ok(writer.place()?)
    }
}

fn model_config(llama: &Llama) -> ModelConfig {
    let &LlamaConfig {
        vocabulary,
        width,
        blocks,
        heads,
        key_heads,
        head_width,
        feed_forward,
        norm_epsilon,
        rotary_base,
        context,
    } = llama.config();
    ModelConfig {
        vocabulary,
        width,
        blocks,
        context,
        norm_epsilon,
        tied_head: llama.tied_head,
        embedding_scale: None,
        post_norms: false,
        init: InitConfig::default(),
        attention: AttentionConfig::Plain(PlainConfig {
            key_heads: (key_heads != heads).then_some(key_heads),
            rotary_base: rotary_base as f32,
            ..PlainConfig::new(heads, head_width)
        }),
        feed_forward: FeedForwardConfig { width: feed_forward, activation: Activation::Swiglu },
        experts: None,
        hyper_connections: None,
        memory: None,
    }
}

/// The weights of `LanguageModel`, by name; each is `[inputs, outputs]` in both, and rotary pairs lie half a head apart.
fn weights(llama: Llama) -> BTreeMap<String, HostTensor> {
    let LlamaConfig { vocabulary, width, heads, key_heads, head_width, feed_forward, .. } = llama.config;
    let (query, key) = (heads * head_width, key_heads * head_width);
    let mut weights = BTreeMap::new();
    let mut put = |name: String, shape: &[usize], values: Vec<f32>| {
        weights.insert(name, HostTensor { shape: shape.to_vec(), values });
    };
    put("embedding".into(), &[vocabulary, width], llama.embedding);
    put("norm.weight".into(), &[width], llama.norm);
    if !llama.tied_head {
        put("head".into(), &[width, vocabulary], llama.head);
    }
    for (index, block) in llama.blocks.into_iter().enumerate() {
        let mut put = |part: &str, shape: &[usize], values: Vec<f32>| {
            put(format!("blocks.{index}.{part}.weight"), shape, values);
        };
        let columns = |first: usize, count: usize| {
            let rows = block.qkv.chunks_exact(query + 2 * key);
            rows.flat_map(|row| &row[first..first + count]).copied().collect()
        };
        put("attention_norm", &[width], block.attention_norm);
        put("attention.query", &[width, query], columns(0, query));
        put("attention.key", &[width, key], columns(query, key));
        put("attention.value", &[width, key], columns(query + key, key));
        put("attention.output", &[query, width], block.output);
        put("feed_forward_norm", &[width], block.feed_forward_norm);
        put("feed_forward.input", &[width, 2 * feed_forward], block.gate_up);
        put("feed_forward.output", &[feed_forward, width], block.down);
    }
    weights
}
