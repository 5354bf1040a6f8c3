//! Adapters: a memory for a model that exists.
//!
//! An adapter is a folder:
//!
//! | file | what |
//! |---|---|
//! | `adapter.toml` | the base that it belongs to, and the memory's configuration |
//! | `memory.safetensors` | the memory's weights, f32, by the names that they have in a checkpoint |
//! | `memory.layerL.table` | rows of memory layer L; none where all rows are zero |

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use engram_address::Addressing;
use engram_config::{ConfigError, MemoryConfig, MemoryForm, ModelConfig, load_toml, locate};
use engram_kernels::BlockFormat;
use engram_store::{TableHeader, TableOrigin};
use serde::{Deserialize, Serialize};

use crate::belonging::Belonging;
use crate::checkpoint::CheckpointWriter;
use crate::error::{Error, Result};
use crate::memory_addressing::memory_addressing;
use crate::model::Model;
use crate::safetensors_folder::SafetensorsFolder;
use crate::tensor::HostTensor;
use crate::weight::Weights;

/// Version of the folder's layout.
const FORMAT: u32 = 1;
/// What the folder is about.
const ABOUT: &str = "adapter.toml";
const WEIGHTS: &str = "memory.safetensors";

/// Where an adapter's rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterRows {
    /// Nowhere: every row is zero, so that the model computes what its base does.
    Zero,
    /// In a table file for each memory layer.
    Tables,
}

/// `adapter.toml`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    format: u32,
    /// Not under the key `base`, which names a file that a TOML file is based on.
    #[serde(rename = "model")]
    base: String,
    #[serde(rename = "model_name")]
    base_name: String,
    tokenizer: String,
    addressing: String,
    rows: AdapterRows,
    memory: MemoryConfig,
}

/// A memory for a model that exists: its configuration, its weights and its tables.
#[derive(Debug)]
pub struct Adapter {
    folder: PathBuf,
    belonging: Belonging,
    rows: AdapterRows,
    memory: MemoryConfig,
    addressing: Addressing,
    weights: Weights,
    identity: String,
}

impl Adapter {
    /// Whether `path` is the folder of an adapter.
    pub fn is_at(path: &Path) -> bool {
        path.join(ABOUT).is_file()
    }

    /// Opens the adapter in `folder`, which must have been made for `base`.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the adapter was made for another model, tokenizer or addressing: both
    /// sides are named.
    pub fn open(folder: &Path, base: &Model) -> Result<Self> {
        let path = folder.join(ABOUT);
        let (text, about) = load_toml::<About>(&path)?;
        let About { format, base: identity, base_name, tokenizer, addressing, rows, memory } = about;
        if format != FORMAT {
            let problem = format!("its format is {format}, this program reads {FORMAT}");
            return Err(Error::model(&path, problem));
        }
        let belonging = Belonging { base: identity, base_name, tokenizer, addressing };
        belonging.check_base(&path, base)?;
        check_config(&memory, base).map_err(|error| locate(&text, &error))?;
        let addressing = address(&memory, base, &path)?;
        belonging.check_addressing(&path, &addressing)?;
        let file = folder.join(WEIGHTS);
        let weights = read_weights(&file, &memory)?;
        let identity = identity_of(&memory, &addressing, &file)?;
        let folder = folder.to_owned();
        let adapter = Self { folder, belonging, rows, memory, addressing, weights, identity };
        adapter.check_tables()?;
        Ok(adapter)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The memory's configuration.
    pub fn memory(&self) -> &MemoryConfig {
        &self.memory
    }

    /// The base's configuration with this memory.
    pub fn config(&self, base: &Model) -> ModelConfig {
        ModelConfig { memory: Some(self.memory.clone()), ..base.config().model.clone() }
    }

    /// The memory's weights, by the names that they have in a checkpoint.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// From tokens to rows.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// Where its rows are.
    pub fn rows(&self) -> AdapterRows {
        self.rows
    }

    /// The table file of memory layer `layer`, if its rows are in files.
    pub fn table(&self, layer: usize) -> Option<PathBuf> {
        (self.rows == AdapterRows::Tables).then(|| table_path(&self.folder, layer))
    }

    /// What tells this memory from others: the BLAKE3 hash of its configuration, its addressing and its weights. Rows
    /// do not count, which overlays name by the content of what they lie on.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    pub(crate) fn belonging(&self) -> &Belonging {
        &self.belonging
    }

    /// Copies the adapter, whose rows must be zero, to the new folder `target`.
    pub(crate) fn copy_to(&self, target: &Path) -> Result<()> {
        if self.rows != AdapterRows::Zero {
            let problem = "its rows are in tables, and an overlay brings only rows of zero with it";
            return Err(Error::model(&self.folder, problem));
        }
        fs::create_dir(target).map_err(Error::file("create", target))?;
        for name in [ABOUT, WEIGHTS] {
            let (from, to) = (self.folder.join(name), target.join(name));
            fs::copy(&from, &to).map_err(Error::file("copy", &from))?;
        }
        Ok(())
    }

    /// Refuses tables that are missing or of another memory.
    fn check_tables(&self) -> Result<()> {
        for layer in self.addressing.layers() {
            let Some(path) = self.table(layer.layer()) else { continue };
            let header = TableHeader::read(&path)?;
            let needed = TableOrigin { identity: self.addressing.identity(), layer: layer.layer() as u64 };
            let (rows, width) = (layer.rows(), self.memory.row_width);
            let problem = if header.origin != needed {
                format!("it holds rows of {}, but the adapter reads those of {needed}", header.origin)
            } else if (header.rows, header.width) != (rows, width) {
                let (found, values) = (header.rows, header.width);
                format!("it has {found} rows of {values} values, but the adapter reads {rows} of {width}")
            } else {
                continue;
            };
            return Err(Error::model(&path, problem));
        }
        Ok(())
    }
}

/// An adapter being written. One that is dropped before it stands is removed.
#[derive(Debug)]
pub struct AdapterWriter {
    writer: CheckpointWriter,
    memory: MemoryConfig,
    addressing: Addressing,
}

impl AdapterWriter {
    /// Begins the adapter `folder`, where nothing may stand: `memory` for `base`.
    ///
    /// # Errors
    /// When the memory does not fit the base, or the file system refuses.
    pub fn begin(folder: &Path, base: &Model, memory: &MemoryConfig, rows: AdapterRows) -> Result<Self> {
        let path = folder.join(ABOUT);
        check_config(memory, base).map_err(|error| Error::model(&path, error))?;
        let addressing = address(memory, base, &path)?;
        let Belonging { base, base_name, tokenizer, addressing: identity } =
            Belonging::to(base, &addressing)?;
        let about = About {
            format: FORMAT,
            base,
            base_name,
            tokenizer,
            addressing: identity,
            rows,
            memory: memory.clone(),
        };
        let text = toml::to_string(&about).map_err(|error| Error::model(&path, error))?;
        let writer = CheckpointWriter::at(folder)?;
        writer.file(ABOUT, text.as_bytes())?;
        Ok(Self { writer, memory: memory.clone(), addressing })
    }

    /// From tokens to rows.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// Writes the memory's weights, which have the names of a checkpoint.
    ///
    /// # Errors
    /// When one is not of this memory, or the file system refuses.
    pub fn weights(&self, weights: &BTreeMap<String, HostTensor>) -> Result<()> {
        self.writer.tensors(WEIGHTS, weights)?;
        read_weights(&self.writer.folder().join(WEIGHTS), &self.memory).map(|_| ())
    }

    /// Writes a file beside the weights, such as a report.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn file(&self, name: &str, contents: &[u8]) -> Result<()> {
        self.writer.file(name, contents)
    }

    /// Where the table file of memory layer `layer` is to be saved.
    pub fn table_path(&self, layer: usize) -> PathBuf {
        table_path(self.writer.folder(), layer)
    }

    /// Puts the adapter in place.
    ///
    /// # Errors
    /// When something stands there, or the file system refuses; all is then as it was.
    pub fn place(self) -> Result<PathBuf> {
        self.writer.place_bare()
    }
}

fn table_path(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("memory.layer{layer}.table"))
}

fn address(memory: &MemoryConfig, base: &Model, path: &Path) -> Result<Addressing> {
    let failed = |source| Error::Address { path: path.to_owned(), source };
    memory_addressing(memory, base.tokenizer()).map_err(failed)
}

/// Refuses a memory that `base` cannot have, by its key in `adapter.toml`.
fn check_config(memory: &MemoryConfig, base: &Model) -> std::result::Result<(), ConfigError> {
    let base = &base.config().model;
    if base.memory.is_some() {
        let reason = "is for a model without a memory, but this model has one: change its rows by an overlay";
        return Err(ConfigError::new("memory", reason));
    }
    if !matches!(memory.form, MemoryForm::Paper | MemoryForm::V41 | MemoryForm::Added) {
        let reason = "must be \"paper\", \"v41\" or \"added\": other forms change the model at every token";
        return Err(ConfigError::new("memory.form", reason));
    }
    let config = ModelConfig { memory: Some(memory.clone()), ..base.clone() };
    config.validate().map_err(|error| {
        let key = error.key.strip_prefix("model.").unwrap_or(&error.key);
        ConfigError::new(key, error.reason)
    })
}

/// The weights in `file`, which must be those of memory layers.
fn read_weights(file: &Path, memory: &MemoryConfig) -> Result<Weights> {
    let tensors = SafetensorsFolder::of_file(file)?;
    let mut weights = Weights::inputs_first();
    for name in tensors.names() {
        if !memory.layers.iter().any(|layer| name.starts_with(&format!("blocks.{layer}.memory."))) {
            let problem = format!("tensor `{name}` is not of a memory in the blocks {:?}", memory.layers);
            return Err(Error::model(file, problem));
        }
        let weight = tensors.weight(&name)?;
        if weight.format() != BlockFormat::F32 {
            let problem = format!("tensor `{name}` is {}, not F32", weight.format().name());
            return Err(Error::model(file, problem));
        }
        weights.insert(name, weight.aligned());
    }
    Ok(weights)
}

/// The hash of all that decides what a memory makes of rows.
fn identity_of(memory: &MemoryConfig, addressing: &Addressing, weights: &Path) -> Result<String> {
    let failed = |error| Error::model(weights, error);
    let config = toml::to_string(memory).map_err(failed)?;
    let bytes = fs::read(weights).map_err(Error::read(weights))?;
    let mut hasher = blake3::Hasher::new_derive_key("engram adapter 1");
    hasher.update(addressing.identity().as_bytes());
    hasher.update(&(config.len() as u64).to_le_bytes());
    hasher.update(config.as_bytes());
    hasher.update(&bytes);
    Ok(hasher.finalize().to_hex().to_string())
}
