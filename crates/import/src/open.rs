//! From a file to a model that can be asked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use engram_data::{Begin, Tokenizer};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::hub_folder::HubFolder;
use crate::llama::{Llama, LlamaBlock, LlamaConfig};

/// A model from outside, with its tokenizer.
#[derive(Debug)]
pub struct OutsideModel {
    pub(crate) llama: Llama,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) begin: Begin,
    pub(crate) identity: String,
    pub(crate) path: PathBuf,
    /// In the form of a `tokenizer_config.json`.
    pub(crate) chat_template: Option<String>,
}

impl OutsideModel {
    /// Whether `path` looks like a model that [`open`](Self::open) reads, and not like a checkpoint of Engram.
    pub fn is_one(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension == "gguf") || HubFolder::is_one(path)
    }

    /// Opens a GGUF file, or a folder with `config.json`, `tokenizer.json` and safetensors.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or is of another kind: what exactly is not known.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            Self::from_folder(&HubFolder::open(path)?)
        } else {
            Self::from_gguf(&Gguf::open(path)?)
        }
    }

    /// The model.
    pub fn llama(&self) -> &Llama {
        &self.llama
    }

    /// What stands before a text.
    pub fn begin(&self) -> Begin {
        self.begin
    }

    /// What tells this model from others: the BLAKE3 hash of its files.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How a conversation becomes a text, in the form of a `tokenizer_config.json`, if the model says so.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let (tokenizer, begin) = crate::gguf_tokenizer::read(gguf)?;
        let config = gguf_config(gguf)?;
        let (heads, key_heads) = (config.heads, config.key_heads);
        let get = |name: &str| {
            let (shape, values) = gguf.tensor(&gguf_name(name))?;
            // Rotary pairs lie side by side in this format, half a head apart in ours.
            Ok(match name.rsplit('.').nth(1) {
                Some("q_proj") => (shape.clone(), pairs_apart(&values, &shape, heads)),
                Some("k_proj") => (shape.clone(), pairs_apart(&values, &shape, key_heads)),
                _ => (shape, values),
            })
        };
        let tied = !gguf.has("output.weight");
        let there = gguf.names().into_iter().map(str::to_owned).collect();
        let source = Source { path: gguf.path(), get: &get, rename: gguf_name, there, tied };
        let identity = blake3::hash(gguf.bytes()).to_hex().to_string();
        let chat_template = crate::gguf_tokenizer::chat_template(gguf)?;
        Self::of(source, config, (tokenizer, begin), identity, chat_template)
    }

    fn from_folder(folder: &HubFolder) -> Result<Self> {
        let get = |name: &str| folder.tensor(name);
        let there = folder.names()?;
        let tied = !there.contains("lm_head.weight");
        let source = Source { path: folder.path(), get: &get, rename: str::to_owned, there, tied };
        let mut hash = blake3::Hasher::new();
        folder.bytes().for_each(|bytes| {
            hash.update(bytes);
        });
        let identity = hash.finalize().to_hex().to_string();
        let config = folder.config().clone();
        Self::of(source, config, folder.tokenizer()?, identity, folder.chat_template()?)
    }

    fn of(
        source: Source<'_>,
        config: LlamaConfig,
        (tokenizer, begin): (Tokenizer, Begin),
        identity: String,
        chat_template: Option<String>,
    ) -> Result<Self> {
        config.validate().map_err(|problem| Error::model(source.path, problem))?;
        if tokenizer.vocabulary() > config.vocabulary {
            let (tokens, rows) = (tokenizer.vocabulary(), config.vocabulary);
            let problem = format!("the tokenizer has {tokens} tokens, the embedding {rows} rows");
            return Err(Error::model(source.path, problem));
        }
        let path = source.path.to_owned();
        Ok(Self { llama: source.llama(config)?, tokenizer, begin, identity, path, chat_template })
    }
}

/// A tensor's shape and values, by the name that Hugging Face's library gives it.
type Get<'a> = &'a dyn Fn(&str) -> Result<(Vec<usize>, Vec<f32>)>;

/// Where weights come from.
struct Source<'a> {
    path: &'a Path,
    get: Get<'a>,
    /// What the file calls a tensor.
    rename: fn(&str) -> String,
    /// Names in the file.
    there: BTreeSet<String>,
    /// Whether the head is the embedding.
    tied: bool,
}

impl Source<'_> {
    fn llama(mut self, config: LlamaConfig) -> Result<Llama> {
        let (width, vocabulary) = (config.width, config.vocabulary);
        let embedding = self.take("model.embed_tokens.weight", &[vocabulary, width])?;
        let head = if self.tied {
            transpose(&[(&embedding, vocabulary)], width)
        } else {
            let head = self.take("lm_head.weight", &[vocabulary, width])?;
            transpose(&[(&head, vocabulary)], width)
        };
        let norm = self.take("model.norm.weight", &[width])?;
        let blocks = (0..config.blocks).map(|index| self.block(index, &config)).collect::<Result<_>>()?;
        // A tensor without a place would be a part of the model left out.
        if let Some(name) = self.there.first() {
            let problem =
                format!("tensor `{name}` has no place in a model of the Llama type as it is known here");
            return Err(Error::model(self.path, problem));
        }
        Ok(Llama { config, embedding, blocks, norm, head, tied_head: self.tied })
    }

    fn block(&mut self, index: usize, config: &LlamaConfig) -> Result<LlamaBlock> {
        let &LlamaConfig { width, heads, key_heads, head_width, feed_forward, .. } = config;
        let (query, key) = (heads * head_width, key_heads * head_width);
        let mut take =
            |part: &str, shape: &[usize]| self.take(&format!("model.layers.{index}.{part}.weight"), shape);
        let q = take("self_attn.q_proj", &[query, width])?;
        let k = take("self_attn.k_proj", &[key, width])?;
        let v = take("self_attn.v_proj", &[key, width])?;
        let gate = take("mlp.gate_proj", &[feed_forward, width])?;
        let up = take("mlp.up_proj", &[feed_forward, width])?;
        Ok(LlamaBlock {
            attention_norm: take("input_layernorm", &[width])?,
            qkv: transpose(&[(&q, query), (&k, key), (&v, key)], width),
            output: transpose(&[(&take("self_attn.o_proj", &[width, query])?, width)], query),
            feed_forward_norm: take("post_attention_layernorm", &[width])?,
            gate_up: transpose(&[(&gate, feed_forward), (&up, feed_forward)], width),
            down: transpose(&[(&take("mlp.down_proj", &[width, feed_forward])?, width)], feed_forward),
        })
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (found, values) = (self.get)(name)?;
        if found != shape {
            let name = (self.rename)(name);
            return Err(Error::model(self.path, format!("tensor `{name}` is {found:?}, not {shape:?}")));
        }
        self.there.remove(&(self.rename)(name));
        Ok(values)
    }
}

/// Matrices `[outputs, inputs]` of common inputs as one `[inputs, all outputs]`.
fn transpose(matrices: &[(&[f32], usize)], inputs: usize) -> Vec<f32> {
    let outputs: usize = matrices.iter().map(|(_, outputs)| outputs).sum();
    let mut transposed = vec![0.0; inputs * outputs];
    let mut first = 0;
    for (matrix, count) in matrices {
        // Sixteen inputs at a time, so that the rows that are written stay in cache.
        for start in (0..inputs).step_by(16) {
            let end = inputs.min(start + 16);
            for (output, row) in matrix.chunks_exact(inputs).enumerate() {
                for input in start..end {
                    transposed[input * outputs + first + output] = row[input];
                }
            }
        }
        first += count;
    }
    transposed
}

/// Rows `[heads, pairs, 2]` of a matrix as `[heads, 2, pairs]`.
fn pairs_apart(values: &[f32], shape: &[usize], heads: usize) -> Vec<f32> {
    let [rows, inputs] = *shape else { return values.to_vec() };
    let width = rows / heads.max(1);
    let half = width / 2;
    let source = |row: usize| {
        let (head, at) = (row / width, row % width);
        head * width + 2 * (at % half) + at / half
    };
    let regular = half > 0 && rows == heads * width && width.is_multiple_of(2);
    // What is not heads of pairs is refused where its shape is checked.
    let source = |row: usize| if regular { source(row) } else { row };
    (0..rows).flat_map(|row| &values[source(row) * inputs..][..inputs]).copied().collect()
}

/// ggml's name of a tensor.
pub(crate) fn gguf_name(name: &str) -> String {
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
        _ => "unknown",
    };
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".into(),
        "model.norm.weight" => "output_norm.weight".into(),
        "lm_head.weight" => "output.weight".into(),
        _ => {
            let inner = name.trim_start_matches("model.layers.").trim_end_matches(".weight");
            let (index, inner) = inner.split_once('.').unwrap_or(("", inner));
            format!("blk.{index}.{}.weight", part(inner))
        }
    }
}

fn gguf_config(gguf: &Gguf) -> Result<LlamaConfig> {
    let architecture = gguf.text("general.architecture")?;
    if architecture != "llama" {
        return Err(gguf.error(format!("architecture `{architecture}`; `llama` is known")));
    }
    if gguf.value("llama.rope.scaling.type").is_some() || gguf.has("rope_freqs.weight") {
        return Err(gguf.error("scaled rotary positions are not known"));
    }
    if gguf.value("llama.expert_count").is_some() {
        return Err(gguf.error("experts are not known"));
    }
    let integer = |key: &str| gguf.integer(&format!("llama.{key}"));
    let or = |key: &str, other: usize| {
        if gguf.value(&format!("llama.{key}")).is_some() { integer(key) } else { Ok(other) }
    };
    let (width, heads) = (integer("embedding_length")?, integer("attention.head_count")?);
    let head_width = or("attention.key_length", width / heads.max(1))?;
    let turned = or("rope.dimension_count", head_width)?;
    if turned != head_width {
        return Err(
            gguf.error(format!("only {turned} of a head's {head_width} values are turned: not known"))
        );
    }
    let base = "llama.rope.freq_base";
    Ok(LlamaConfig {
        vocabulary: gguf.texts("tokenizer.ggml.tokens")?.len(),
        width,
        blocks: integer("block_count")?,
        heads,
        key_heads: or("attention.head_count_kv", heads)?,
        head_width,
        feed_forward: integer("feed_forward_length")?,
        norm_epsilon: gguf.float("llama.attention.layer_norm_rms_epsilon")? as f32,
        rotary_base: if gguf.value(base).is_some() { gguf.float(base)? } else { 10_000.0 },
        context: integer("context_length")?,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use engram_kernels::Segment;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use serde_json::json;

    use super::*;
    use crate::llama::LlamaState;
    use crate::testing::{CONFIG, gguf, tensors, tokenizer_json};

    fn logits(model: &OutsideModel, tokens: &[u32]) -> Vec<f32> {
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let whole = [Segment { seen: Vec::new(), rows: 0..tokens.len() }];
        let llama = model.llama();
        llama.logits(&llama.hidden(tokens, &positions, &whole, &mut LlamaState::default()))
    }

    /// Writes the weights of `testing::tensors` as Hugging Face's library does.
    fn folder(change: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut config = json!({
            "model_type": "llama", "vocab_size": CONFIG.vocabulary, "hidden_size": CONFIG.width,
            "num_hidden_layers": CONFIG.blocks, "num_attention_heads": CONFIG.heads,
            "num_key_value_heads": CONFIG.key_heads, "head_dim": CONFIG.head_width,
            "intermediate_size": CONFIG.feed_forward, "rms_norm_eps": CONFIG.norm_epsilon,
            "rope_theta": CONFIG.rotary_base, "max_position_embeddings": CONFIG.context, "eos_token_id": 256,
        });
        change(&mut config);
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer_json()).unwrap();
        let tensors = tensors(1);
        let bytes: BTreeMap<&String, (Vec<usize>, Vec<u8>)> = (tensors.iter())
            .map(|(name, (shape, values))| (name, (shape.clone(), bytemuck::cast_slice(values).to_vec())))
            .collect();
        let views: BTreeMap<&String, TensorView<'_>> = (bytes.iter())
            .map(|(name, (shape, data))| (*name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()))
            .collect();
        let path = folder.path().join("model.safetensors");
        safetensors::serialize_to_file(views, None, &path).unwrap();
        folder
    }

    #[test]
    fn both_formats_hold_one_model() {
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        std::fs::write(file.path(), gguf(CONFIG.context, 1).bytes()).unwrap();
        let folder = folder(|_| ());
        assert!(OutsideModel::is_one(file.path()) && OutsideModel::is_one(folder.path()));
        let (one, other) =
            (OutsideModel::open(file.path()).unwrap(), OutsideModel::open(folder.path()).unwrap());
        assert_eq!(one.llama().config(), other.llama().config());
        let tokens = one.tokenizer().encode("the sea").unwrap();
        assert_eq!(tokens, other.tokenizer().encode("the sea").unwrap());
        assert_eq!(logits(&one, &tokens), logits(&other, &tokens));
        assert_ne!(one.identity, other.identity);
    }

    #[test]
    fn newer_folders_have_the_rotary_base_and_the_chat_template_elsewhere() {
        let change = |config: &mut serde_json::Value| {
            config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 500_000.0});
            config["sliding_window"] = CONFIG.context.into();
        };
        let folder = folder(change);
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<|endoftext|>"}"#)
            .unwrap();
        let open = || OutsideModel::open(folder.path()).unwrap();
        assert_eq!(open().llama().config().rotary_base, 500_000.0);
        assert!(open().chat_template().is_none());
        std::fs::write(folder.path().join("chat_template.jinja"), "{{ eos_token }}").unwrap();
        let template: serde_json::Value = serde_json::from_str(open().chat_template().unwrap()).unwrap();
        assert_eq!(template, json!({"eos_token": "<|endoftext|>", "chat_template": "{{ eos_token }}"}));
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 11] = [
            (|config| config["model_type"] = "gemma".into(), "model type `gemma`"),
            (|config| config["rope_scaling"] = json!({"type": "yarn"}), "`rope_scaling`"),
            (|config| config["rope_parameters"] = json!({"rope_type": "llama3"}), "`rope_parameters`"),
            (|config| config["rope_parameters"] = json!({"partial_rotary_factor": 0.5}), "`rope_parameters`"),
            (|config| config["rope_parameters"] = json!({"type": "linear"}), "`rope_parameters`"),
            (|config| config["rope_parameters"] = json!({"factor": 4.0}), "`rope_parameters`: `factor`"),
            (|config| config["sliding_window"] = 32.into(), "`sliding_window` of 32"),
            (|config| config["attention_bias"] = true.into(), "biases"),
            (|config| config["num_hidden_layers"] = 1.into(), "tensor `model.layers.1."),
            (|config| config["num_key_value_heads"] = 3.into(), "not whole groups"),
            (|config| config["vocab_size"] = 100.into(), "the tokenizer has 257 tokens"),
        ];
        for (change, message) in cases {
            let error = OutsideModel::open(folder(change).path()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let mut file = gguf(60, 1);
        file.tensor("blk.0.attn_q.bias", &[16], 0, &[0; 64]);
        let path = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        std::fs::write(path.path(), file.bytes()).unwrap();
        let error = OutsideModel::open(path.path()).unwrap_err().to_string();
        assert!(error.contains("tensor `blk.0.attn_q.bias` has no place"), "{error}");
    }

    #[test]
    fn matrices_are_transposed_side_by_side() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0]);
        assert_eq!(transpose(&[(&a, 2), (&b, 1)], 2), [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
    }

    #[test]
    fn rotary_pairs_move_half_a_head_apart() {
        let values: Vec<f32> = (0..8).map(|row| row as f32).collect();
        assert_eq!(pairs_apart(&values, &[8, 1], 2), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}
