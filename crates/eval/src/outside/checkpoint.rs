//! A model from outside as a checkpoint of Engram: the same weights by the names that they have here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engram_model::{AttentionConfig, FeedForwardConfig, ModelConfig};
use engram_train::{CheckpointConfig, CheckpointWriter, HostTensor, TextConfig};

use super::error::{Error, Result};
use super::llama::{Llama, LlamaConfig};
use super::open::OutsideModel;

impl OutsideModel {
    /// The model as a configuration: plain attention with grouped heads, dense, one residual stream, no memory.
    ///
    /// # Errors
    /// When no configuration describes it, or a token around its texts has no name.
    pub fn checkpoint_config(&self) -> Result<CheckpointConfig> {
        let model = model_config(self.llama());
        model.validate().map_err(|error| Error::model(&self.path, error.to_string()))?;
        let text = TextConfig::of(self.tokenizer(), self.begin)?;
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
        attention: AttentionConfig::Plain {
            heads,
            key_heads: (key_heads != heads).then_some(key_heads),
            head_width,
            rotary_base: rotary_base as f32,
        },
        feed_forward: FeedForwardConfig { width: feed_forward },
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

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use engram_kernels::Segment;
    use engram_train::{Begin, Trained};

    use super::super::llama::LlamaState;
    use super::super::testing::{CONFIG, gguf, tiny};
    use super::*;
    use crate::tasks::{Request, Scorer};

    /// The model, its checkpoint, and the folder that this is in.
    fn imported(change: impl Fn(&mut OutsideModel)) -> (OutsideModel, Trained, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let [mut one, mut other] = [(); 2].map(|()| tiny(CONFIG.context, 3));
        change(&mut one);
        change(&mut other);
        let template = one.chat_template().map(str::to_owned);
        let path = other.save_checkpoint(&folder.path().join("model"), template.as_deref()).unwrap();
        let trained = Trained::open(&path, &Device::flex()).unwrap();
        (one, trained, folder)
    }

    fn sentence() -> Vec<u32> {
        (0..CONFIG.context as u32).map(|at| at * 37 % 256).collect()
    }

    /// Logits after every token, `[tokens, vocabulary]`.
    fn outside_logits(model: &OutsideModel, tokens: &[u32]) -> Vec<f32> {
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let whole = [Segment { seen: Vec::new(), rows: 0..tokens.len() }];
        let llama = model.llama();
        llama.logits(&llama.hidden(tokens, &positions, &whole, &mut LlamaState::default()))
    }

    fn logits(model: &Trained, tokens: &[u32]) -> Vec<f32> {
        let last = model.states(tokens).unwrap().pop().unwrap();
        model.lens(last).into_data().try_into_vec().unwrap()
    }

    fn largest_difference(one: &[f32], other: &[f32]) -> f32 {
        assert_eq!(one.len(), other.len());
        one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn the_checkpoint_computes_what_the_model_did() {
        let (outside, trained, _folder) = imported(|_| ());
        assert_eq!(trained.config().model.attention.key_heads(), CONFIG.key_heads);
        let (expected, found) = (outside_logits(&outside, &sentence()), logits(&trained, &sentence()));
        let difference = largest_difference(&found, &expected);
        assert!(difference < 1e-4, "{difference}");
        assert!(expected.iter().any(|logit| logit.abs() > 0.1));
    }

    #[test]
    fn a_head_of_its_own_comes_along() {
        let head: Vec<f32> =
            (0..CONFIG.width * CONFIG.vocabulary).map(|at| (at as f32 * 0.7).sin()).collect();
        let (outside, trained, _folder) = imported(|model| {
            model.llama.head.clone_from(&head);
            model.llama.tied_head = false;
        });
        assert!(!trained.config().model.tied_head);
        let (expected, found) = (outside_logits(&outside, &sentence()), logits(&trained, &sentence()));
        assert!(largest_difference(&found, &expected) < 1e-4);
    }

    #[test]
    fn texts_begin_and_end_as_before() {
        for begin in [Begin::Always(7), Begin::IfEmpty(7), Begin::IfEmpty(256)] {
            let (outside, trained, _folder) = imported(|model| model.begin = begin);
            assert_eq!((Scorer::begin(&outside), Scorer::begin(&trained)), (begin, begin));
            assert_eq!(trained.tokenizer().end_of_text(), outside.tokenizer().end_of_text());
            assert_eq!(trained.tokenizer().json(), outside.tokenizer().json());
            assert_eq!(outside.context(), trained.context());
        }
    }

    #[test]
    fn answers_are_the_same() {
        let (outside, trained, _folder) = imported(|_| ());
        let tokens = sentence();
        let requests: Vec<Request> = [(1, 4), (5, 6), (9, 20)]
            .map(|(from, to)| Request::new(&tokens[..from], &tokens[from..to]).unwrap())
            .into();
        let batch: Vec<&Request> = requests.iter().collect();
        let (expected, found) = (outside.score(&batch).unwrap(), trained.score(&batch).unwrap());
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found.log_probability - expected.log_probability).abs() < 1e-4);
            assert_eq!(found.likeliest, expected.likeliest);
        }
        let prompts = [&tokens[..3], &tokens[10..14]];
        let proceed = |model: &dyn Scorer| model.proceed(&prompts, 9, &mut |_, _| false).unwrap();
        assert_eq!(proceed(&trained), proceed(&outside));
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let beside = folder.path().join("step-00000001");
        for name in ["step-00000001", "step-00000002"] {
            tiny(CONFIG.context, 1).save_checkpoint(&folder.path().join(name), None).unwrap();
        }
        assert!(beside.is_dir(), "what stands beside it is not its own");
        assert!(!beside.join("tokenizer_config.json").exists());
        let error = tiny(CONFIG.context, 1).save_checkpoint(&beside, None).unwrap_err().to_string();
        assert!(error.contains("step-00000001: cannot put a checkpoint in place"), "{error}");
        assert!(Trained::open(&beside, &Device::flex()).is_ok(), "it is as it was");
        let missing = folder.path().join("missing/model");
        assert!(tiny(CONFIG.context, 1).save_checkpoint(&missing, None).is_err());
        assert_eq!(folder.path().read_dir().unwrap().count(), 2);
    }

    #[test]
    fn a_chat_template_keeps_its_names() {
        let place = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        let mut file = gguf(CONFIG.context, 1);
        file.text("tokenizer.chat_template", "{{ eos_token }}").integer("tokenizer.ggml.bos_token_id", 33);
        std::fs::write(place.path(), file.bytes()).unwrap();
        let model = OutsideModel::open(place.path()).unwrap();
        let found: serde_json::Value = serde_json::from_str(model.chat_template().unwrap()).unwrap();
        let begin = model.tokenizer().inner().id_to_token(33);
        let expected = serde_json::json!({
            "chat_template": "{{ eos_token }}", "eos_token": "<|endoftext|>", "bos_token": begin,
        });
        assert_eq!(found, expected);
        assert!(tiny(CONFIG.context, 1).chat_template().is_none());
    }
}
