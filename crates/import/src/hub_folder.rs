//! A model's folder as Hugging Face's library writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use engram_data::{Begin, Tokenizer};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::llama::LlamaConfig;

/// The parts of `config.json` that are used.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<RopeParameters>,
    sliding_window: Option<usize>,
    max_position_embeddings: usize,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Value>,
}

/// Where newer files have `rope_theta` and `rope_scaling`.
#[derive(Debug, Deserialize)]
struct RopeParameters {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// An older name of the same.
    #[serde(rename = "type")]
    older_type: Option<String>,
    partial_rotary_factor: Option<f64>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// A folder with its files of weights, mapped.
#[derive(Debug)]
pub(crate) struct HubFolder {
    folder: PathBuf,
    config: LlamaConfig,
    begin: Option<u32>,
    end_of_text: Option<u32>,
    files: Vec<(PathBuf, Mmap)>,
}

impl HubFolder {
    /// Whether this is such a folder.
    pub(crate) fn is_one(path: &Path) -> bool {
        path.join("config.json").is_file()
    }

    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::read(&path))?;
        let file: ConfigFile =
            serde_json::from_str(&text).map_err(|error| Error::model(&path, error.to_string()))?;
        let end_of_text = match &file.eos_token_id {
            Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
            Some(id) => id.as_u64(),
            None => None,
        };
        let begin = file.bos_token_id;
        let config = file.into_config().map_err(|problem| Error::model(&path, problem))?;
        let mut names = Vec::new();
        for entry in folder.read_dir().map_err(Error::read(folder))? {
            let path = entry.map_err(Error::read(folder))?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                names.push(path);
            }
        }
        names.sort();
        if names.is_empty() {
            return Err(Error::model(folder, "no .safetensors file"));
        }
        let files = names.into_iter().map(|path| Ok((path.clone(), map(&path)?))).collect::<Result<_>>()?;
        let end_of_text = end_of_text.map(|id| id as u32);
        Ok(Self { folder: folder.to_owned(), config, begin, end_of_text, files })
    }

    pub(crate) fn config(&self) -> &LlamaConfig {
        &self.config
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// All bytes of its weights, file by file.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.files.iter().map(|(_, map)| &map[..])
    }

    /// The tokenizer, and what stands before a text.
    pub(crate) fn tokenizer(&self) -> Result<(Tokenizer, Begin)> {
        let path = self.folder.join("tokenizer.json");
        let json = std::fs::read(&path).map_err(Error::read(&path))?;
        let origin = path.display().to_string();
        let inner: Value =
            serde_json::from_slice(&json).map_err(|error| Error::model(&path, error.to_string()))?;
        let end = self.end_of_text.and_then(|id| added_name(&inner, id));
        let tokenizer = Tokenizer::from_json(&json, &origin, end.as_deref())?;
        // The file's own rule for what surrounds a text, applied to none.
        let around = tokenizer.inner().encode_fast("", true);
        let around = around.map_err(|error| Error::model(&path, error.to_string()))?;
        let begin = match around.get_ids().first() {
            Some(&token) => Begin::Always(token),
            None => Begin::IfEmpty(self.begin.unwrap_or(tokenizer.end_of_text())),
        };
        Ok((tokenizer, begin))
    }

    /// The chat template with the names that it may use, as a `tokenizer_config.json`; none if there is none.
    pub(crate) fn chat_template(&self) -> Result<Option<String>> {
        let path = self.folder.join("tokenizer_config.json");
        let mut config: Value = match read_if_there(&path)? {
            Some(text) => {
                serde_json::from_str(&text).map_err(|error| Error::model(&path, error.to_string()))?
            }
            None => Value::Object(serde_json::Map::new()),
        };
        let Some(fields) = config.as_object_mut() else {
            return Err(Error::model(&path, "it is no table of values"));
        };
        // Newer files have the template beside them, and it counts.
        if let Some(template) = read_if_there(&self.folder.join("chat_template.jinja"))? {
            fields.insert("chat_template".into(), template.into());
        }
        let has_one = fields.get("chat_template").is_some_and(|template| !template.is_null());
        Ok(has_one.then(|| format!("{config:#}")))
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for (path, map) in &self.files {
            names.extend(parse(path, map)?.names().into_iter().map(str::to_owned));
        }
        Ok(names)
    }

    /// A tensor's shape and values.
    pub(crate) fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        for (path, map) in &self.files {
            if let Ok(view) = parse(path, map)?.tensor(name) {
                let values = numbers(view.dtype(), view.data())
                    .ok_or_else(|| Error::model(path, format!("`{name}` is {:?}", view.dtype())))?;
                return Ok((view.shape().to_vec(), values));
            }
        }
        Err(Error::model(&self.folder, format!("no tensor `{name}`")))
    }
}

impl ConfigFile {
    fn into_config(self) -> std::result::Result<LlamaConfig, String> {
        if !matches!(self.model_type.as_str(), "llama" | "mistral") {
            return Err(format!("model type `{}`; `llama` and `mistral` are known", self.model_type));
        }
        if self.rope_scaling.as_ref().is_some_and(|scaling| !scaling.is_null()) {
            return Err("`rope_scaling`: scaled rotary positions are not known".into());
        }
        let (mut rotary_base, given) = (self.rope_theta, self.rope_parameters);
        if let Some(given) = given {
            let RopeParameters { rope_theta, rope_type, older_type, partial_rotary_factor, others } = given;
            if let Some((name, _)) = others.iter().find(|(_, value)| !value.is_null()) {
                return Err(format!(
                    "`rope_parameters`: `{name}` is not known; scaled rotary positions are not"
                ));
            }
            if [rope_type, older_type].into_iter().flatten().any(|kind| kind != "default")
                || partial_rotary_factor.is_some_and(|f| f != 1.0)
            {
                return Err("`rope_parameters`: scaled or partial rotary positions are not known".into());
            }
            rotary_base = rope_theta.or(rotary_base);
        }
        if let Some(window) = self.sliding_window.filter(|&window| window < self.max_position_embeddings) {
            return Err(format!(
                "`sliding_window` of {window}: attention that does not see all is not known"
            ));
        }
        if self.attention_bias || self.mlp_bias {
            return Err("biases are not known".into());
        }
        if self.hidden_act.as_deref().is_some_and(|name| name != "silu") {
            return Err("`hidden_act` is not `silu`".into());
        }
        Ok(LlamaConfig {
            vocabulary: self.vocab_size,
            width: self.hidden_size,
            blocks: self.num_hidden_layers,
            heads: self.num_attention_heads,
            key_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_width: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1)),
            feed_forward: self.intermediate_size,
            norm_epsilon: self.rms_norm_eps,
            rotary_base: rotary_base.unwrap_or(10_000.0),
            context: self.max_position_embeddings,
        })
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::read(path)(error)),
    }
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::read(path))?;
    // SAFETY: as for a GGUF file: the map is only read, and offsets are checked against it whenever they are used.
    unsafe { Mmap::map(&file) }.map_err(Error::read(path))
}

fn parse<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|error| Error::model(path, error.to_string()))
}

/// The name of an added token.
fn added_name(tokenizer: &Value, id: u32) -> Option<String> {
    let added = tokenizer.get("added_tokens")?.as_array()?;
    let token = added.iter().find(|token| token.get("id").and_then(Value::as_u64) == Some(id.into()))?;
    token.get("content").and_then(Value::as_str).map(str::to_owned)
}

fn numbers(kind: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    let halves = || data.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
    match kind {
        Dtype::F32 => Some(bytemuck::pod_collect_to_vec(data)),
        Dtype::F16 => Some(halves().map(|bytes| f16::from_le_bytes(bytes).to_f32()).collect()),
        Dtype::BF16 => Some(halves().map(|bytes| bf16::from_le_bytes(bytes).to_f32()).collect()),
        _ => None,
    }
}
