//! A model on disk, whoever made it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use engram_config::{CheckpointConfig, ModelConfig};
use engram_data::{Begin, Tokenizer};

use crate::architectures::{self, Architecture, Stored};
use crate::assembly::{Dialect, Tensors, assemble};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::generation::GenerationSettings;
use crate::gguf::Gguf;
use crate::mapped_file::MappedFile;
use crate::safetensors_folder::{SafetensorsFolder, json_if_there};
use crate::settings::Settings;
use crate::weight::{Weight, Weights};
use crate::{gguf_tokenizer, hub_tokenizer, own_weights};

/// A model: a checkpoint of ours, a GGUF file, or a folder of safetensors. Its weights stay where they lie.
#[derive(Debug)]
pub struct Model {
    config: CheckpointConfig,
    weights: Weights,
    tokenizer: Tokenizer,
    begin: Begin,
    generation: GenerationSettings,
    chat_template: Option<String>,
    path: PathBuf,
    source: Source,
    notes: Vec<String>,
    /// Its files' hash, once somebody has asked for it.
    identity: OnceLock<String>,
}

/// Where a model comes from.
#[derive(Debug)]
enum Source {
    Checkpoint(Checkpoint),
    /// The files of its weights.
    Outside(Vec<MappedFile>),
}

impl Model {
    /// Whether `path` looks like a model that others have made: a GGUF file, or a folder with `config.json`.
    pub fn is_outside(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
            || path.join("config.json").is_file()
    }

    /// Opens a checkpoint of ours (or the newest of a run), a GGUF file, or a folder with `config.json`,
    /// `tokenizer.json` and safetensors.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of a kind that is not known: it is named, and what is not known about it.
    pub fn open(path: &Path) -> Result<Self> {
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if path.is_file() || is_gguf {
            Self::from_gguf(path)
        } else if path.join("config.json").is_file() {
            Self::from_folder(path)
        } else if looks_like_weights(path) {
            Err(Error::model(&path.join("config.json"), "the file is missing; download it"))
        } else {
            Self::from_checkpoint(path)
        }
    }

    /// The model's shape, and what stands around its texts.
    pub fn config(&self) -> &CheckpointConfig {
        &self.config
    }

    /// Its weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What stands before a text.
    pub fn begin(&self) -> Begin {
        self.begin
    }

    /// What ends an answer, and how it is meant to be sampled.
    pub fn generation(&self) -> &GenerationSettings {
        &self.generation
    }

    /// How a conversation becomes a text, in the form of a `tokenizer_config.json`, if the model says so.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// What the user should know of it.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checkpoint, if it is one of ours; memory tables lie in its folder.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.source {
            Source::Checkpoint(checkpoint) => Some(checkpoint),
            Source::Outside(_) => None,
        }
    }

    /// What people call it: the last part of its path.
    pub fn name(&self) -> String {
        let path = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
    }

    /// What tells this model from others: the BLAKE3 hash of its files, all of which are read for it the first time.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn identity(&self) -> Result<String> {
        if let Some(identity) = self.identity.get() {
            return Ok(identity.clone());
        }
        let identity = match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.identity()?,
            Source::Outside(files) => {
                let mut hasher = blake3::Hasher::new();
                files.iter().try_for_each(|file| file.hash(&mut hasher))?;
                hasher.finalize().to_hex().to_string()
            }
        };
        Ok(self.identity.get_or_init(|| identity).clone())
    }

    fn from_checkpoint(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let folder = checkpoint.folder().to_owned();
        let config = CheckpointConfig::load(&folder.join("run.toml"))?;
        let tokenizer = Tokenizer::load_ending(&folder.join("tokenizer.json"), config.text.end.as_deref())?;
        let begin = Begin::of(&config.text, &tokenizer)?;
        let weights = own_weights::read(&folder.join("model.safetensors"), &config.model)?;
        let mut generation = GenerationSettings::of_folder(&folder, None)?;
        if !generation.end_tokens.contains(&tokenizer.end_of_text()) {
            generation.end_tokens.insert(0, tokenizer.end_of_text());
        }
        let mut notes = notes(&config.model, &tokenizer);
        let chat_template = hub_tokenizer::chat_template(&folder, &mut notes);
        let source = Source::Checkpoint(checkpoint);
        let (path, identity) = (folder, OnceLock::new());
        Ok(Self {
            config,
            weights,
            tokenizer,
            begin,
            generation,
            chat_template,
            path,
            source,
            notes,
            identity,
        })
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let architecture = gguf.text("general.architecture")?.to_owned();
        let settings = Settings::of_gguf(&gguf, &architecture);
        architectures::check_gguf(&settings, &architecture)?;
        if gguf.value("split.count").is_some_and(|count| !count.is_neutral())
            && gguf.integer("split.count")? > 1
        {
            let parts = gguf.integer("split.count")?;
            return Err(gguf
                .error(format!("one of {parts} parts: put them together with `llama-gguf-split --merge`")));
        }
        gguf.check_length()?;
        let factors = frequency_factors(&gguf)?;
        let stored = Stored {
            head: gguf.has("output.weight"),
            vocabulary: gguf.shape("token_embd.weight").map(|shape| shape[0]),
            frequency_factors: factors.as_deref(),
            keys_values_apart: gguf.names().iter().any(|name| name.ends_with(".attn_k_b.weight")),
        };
        let mut architecture = architectures::of_gguf(&settings, &architecture, stored)?;
        let weights = assemble(&gguf, Dialect::Gguf, &architecture.model, architecture.storage)?;
        let (tokenizer, begin) = gguf_tokenizer::read(&gguf)?;
        let generation = GenerationSettings::of_gguf(&gguf)?;
        let chat_template = gguf_tokenizer::chat_template(&gguf, &mut architecture.notes);
        let files = vec![gguf.file().clone()];
        let texts = (tokenizer, begin, generation, chat_template);
        Self::outside(path, architecture, weights, texts, files)
    }

    fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let json =
            json_if_there(&path)?.ok_or_else(|| Error::model(&path, "the file is missing; download it"))?;
        let (begin, ends) = (json.get("bos_token_id").cloned(), json.get("eos_token_id").cloned());
        let settings = Settings::of_json(&path, json)?;
        // The architecture first: files of another may be stored in any way.
        architectures::check_hub(&settings)?;
        let tensors = SafetensorsFolder::open(folder)?;
        let stored = Stored {
            head: tensors.shape("lm_head.weight").is_some(),
            vocabulary: tensors.shape("model.embed_tokens.weight").and_then(|shape| shape.first().copied()),
            frequency_factors: None,
            keys_values_apart: false,
        };
        let mut architecture = architectures::of_hub(&settings, stored)?;
        let weights = assemble(&tensors, Dialect::Hub, &architecture.model, architecture.storage)?;
        let generation = GenerationSettings::of_folder(folder, ends.as_ref())?;
        let begin = begin.and_then(|id| id.as_u64()).and_then(|id| u32::try_from(id).ok());
        // The end of a text as `config.json` has it; its first, where it has several.
        let end = ends.as_ref().and_then(|ends| ends.as_u64().or_else(|| ends.get(0)?.as_u64()));
        let end = end.and_then(|id| u32::try_from(id).ok()).or(generation.end_tokens.first().copied());
        let (tokenizer, begin) = hub_tokenizer::read(folder, begin, end)?;
        let chat_template = hub_tokenizer::chat_template(folder, &mut architecture.notes);
        let texts = (tokenizer, begin, generation, chat_template);
        Self::outside(folder, architecture, weights, texts, tensors.files().to_vec())
    }

    fn outside(
        path: &Path,
        architecture: Architecture,
        weights: Weights,
        (tokenizer, begin, mut generation, chat_template): (
            Tokenizer,
            Begin,
            GenerationSettings,
            Option<String>,
        ),
        files: Vec<MappedFile>,
    ) -> Result<Self> {
        let Architecture { model, notes: mut all, .. } = architecture;
        let text = begin.config(&tokenizer)?;
        if !generation.end_tokens.contains(&tokenizer.end_of_text()) {
            generation.end_tokens.insert(0, tokenizer.end_of_text());
        }
        all.extend(notes(&model, &tokenizer));
        let config = CheckpointConfig { model, text, data: None, train: None };
        let (path, source, notes) = (path.to_owned(), Source::Outside(files), all);
        let identity = OnceLock::new();
        Ok(Self {
            config,
            weights,
            tokenizer,
            begin,
            generation,
            chat_template,
            path,
            source,
            notes,
            identity,
        })
    }
}

/// What the user should know of a tokenizer with more tokens than the model has rows for.
fn notes(model: &ModelConfig, tokenizer: &Tokenizer) -> Vec<String> {
    let (tokens, rows) = (tokenizer.vocabulary(), model.vocabulary);
    let more = (tokens > rows).then(|| {
        format!("the tokenizer has {tokens} tokens, the model {rows}: texts that use the others are refused")
    });
    more.into_iter().collect()
}

/// A folder from the hub whose configuration is missing.
fn looks_like_weights(path: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| path.join(name).is_file())
        && !path.join("run.toml").exists()
}

/// Factors that rotary frequencies are divided by: for texts of the original length, where there are two sets.
fn frequency_factors(gguf: &Gguf) -> Result<Option<Vec<f32>>> {
    let name = ["rope_freqs.weight", "rope_factors_short.weight"].into_iter().find(|name| gguf.has(name));
    name.map(|name| Ok(gguf.tensor(name)?.1)).transpose()
}

impl Tensors for Gguf {
    fn path(&self) -> &Path {
        Gguf::path(self)
    }

    fn names(&self) -> BTreeSet<String> {
        Gguf::names(self).into_iter().map(str::to_owned).collect()
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        Gguf::weight(self, name)
    }
}

impl Tensors for SafetensorsFolder {
    fn path(&self) -> &Path {
        SafetensorsFolder::path(self)
    }

    fn names(&self) -> BTreeSet<String> {
        SafetensorsFolder::names(self)
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        SafetensorsFolder::weight(self, name)
    }
}
