//! Overlays: a few changed rows of a memory.
//!
//! An overlay is a folder:
//!
//! | file | what |
//! |---|---|
//! | `overlay.toml` | the base and the memory that it belongs to, and notes for people |
//! | `memory.layerL.overlay` | the changed rows of memory layer L; none where no row of the layer is changed |
//! | `adapter/` | the memory itself, with rows of zero, where the base has none |

use std::path::{Path, PathBuf};

use engram_address::Addressing;
use engram_config::load_toml;
use serde::{Deserialize, Serialize};

use crate::adapter::Adapter;
use crate::belonging::{Belonging, short};
use crate::checkpoint::CheckpointWriter;
use crate::error::{Error, Result};
use crate::memory_addressing::memory_addressing;
use crate::model::Model;

/// Version of the folder's layout.
const FORMAT: u32 = 1;
/// What the folder is about.
const ABOUT: &str = "overlay.toml";
const ADAPTER: &str = "adapter";
/// What `memory` says of the memory that the base itself has.
const OF_BASE: &str = "base";

/// What an overlay tells people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OverlayNotes {
    /// Facts that it teaches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<usize>,
    /// Rows that it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Anything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// `overlay.toml`.
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
    memory: String,
    #[serde(default)]
    notes: OverlayNotes,
}

/// A few changed rows of one memory.
#[derive(Debug)]
pub struct Overlay {
    folder: PathBuf,
    belonging: Belonging,
    /// Of the adapter; none: the base's own memory.
    memory: Option<String>,
    notes: OverlayNotes,
    adapter: Option<Adapter>,
}

impl Overlay {
    /// Whether `path` is the folder of an overlay.
    pub fn is_at(path: &Path) -> bool {
        path.join(ABOUT).is_file()
    }

    /// Opens the overlay in `folder`, which must have been made for `base`. Its rows stay in their files.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the overlay was made for another model or tokenizer: both sides are named.
    pub fn open(folder: &Path, base: &Model) -> Result<Self> {
        let path = folder.join(ABOUT);
        let (_, about) = load_toml::<About>(&path)?;
        let About { format, base: identity, base_name, tokenizer, addressing, memory, notes } = about;
        if format != FORMAT {
            let problem = format!("its format is {format}, this program reads {FORMAT}");
            return Err(Error::model(&path, problem));
        }
        let belonging = Belonging { base: identity, base_name, tokenizer, addressing };
        belonging.check_base(&path, base)?;
        let inside = folder.join(ADAPTER);
        let adapter = Adapter::is_at(&inside).then(|| Adapter::open(&inside, base)).transpose()?;
        let memory = (memory != OF_BASE).then_some(memory);
        let overlay = Self { folder: folder.to_owned(), belonging, memory, notes, adapter };
        if let Some(adapter) = &overlay.adapter {
            overlay.check_adapter(adapter)?;
        }
        if overlay.memory.is_none() {
            let Some(memory) = &base.config().model.memory else {
                let name = base.name();
                let problem = format!(
                    "it changes rows of the model's own memory, but {name} has none: use the model that it was made for"
                );
                return Err(Error::model(&path, problem));
            };
            let failed = |source| Error::Address { path: path.clone(), source };
            let addressing = memory_addressing(memory, base.tokenizer()).map_err(failed)?;
            overlay.belonging.check_addressing(&path, &addressing)?;
        }
        Ok(overlay)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it tells people.
    pub fn notes(&self) -> &OverlayNotes {
        &self.notes
    }

    /// The memory that it belongs to, where it brings one with it.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// Gives up the memory that it brings with it.
    pub fn take_adapter(&mut self) -> Option<Adapter> {
        self.adapter.take()
    }

    /// Whether it changes rows of the memory that the base itself has.
    pub fn is_of_base(&self) -> bool {
        self.memory.is_none()
    }

    /// The changed rows of memory layer `layer`, if it changes any.
    pub fn file(&self, layer: usize) -> Option<PathBuf> {
        Some(file_path(&self.folder, layer)).filter(|path| path.is_file())
    }

    /// Refuses an adapter that is not the memory that this overlay belongs to.
    ///
    /// # Errors
    /// Both sides by name.
    pub fn check_adapter(&self, adapter: &Adapter) -> Result<()> {
        let path = self.folder.join(ABOUT);
        self.belonging.check_addressing(&path, adapter.addressing())?;
        match &self.memory {
            Some(memory) if memory == adapter.identity() => Ok(()),
            memory => {
                let made = memory.as_deref().map_or("the model's own memory".into(), |memory| {
                    format!("the memory {}", short(memory))
                });
                let (folder, found) = (adapter.folder().display(), short(adapter.identity()));
                let problem = format!(
                    "it changes rows of {made}, but {folder} is the memory {found}: use the memory that it was made for"
                );
                Err(Error::model(&path, problem))
            }
        }
    }
}

/// An overlay being written. One that is dropped before it stands is removed.
#[derive(Debug)]
pub struct OverlayWriter {
    writer: CheckpointWriter,
}

impl OverlayWriter {
    /// Begins the overlay `folder`, where nothing may stand, for the memory that `base` itself has.
    ///
    /// # Errors
    /// When the base has no memory, or the file system refuses.
    pub fn begin(folder: &Path, base: &Model, addressing: &Addressing, notes: OverlayNotes) -> Result<Self> {
        if base.config().model.memory.is_none() {
            let problem = format!("{} has no memory of its own: name the adapter to change", base.name());
            return Err(Error::model(folder, problem));
        }
        Self::write(folder, Belonging::to(base, addressing)?, OF_BASE.into(), notes)
    }

    /// Begins the overlay `folder`, where nothing may stand, for the memory `adapter`.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn begin_for(folder: &Path, adapter: &Adapter, notes: OverlayNotes) -> Result<Self> {
        Self::write(folder, adapter.belonging().clone(), adapter.identity().to_owned(), notes)
    }

    fn write(folder: &Path, belonging: Belonging, memory: String, notes: OverlayNotes) -> Result<Self> {
        let Belonging { base, base_name, tokenizer, addressing } = belonging;
        let about = About { format: FORMAT, base, base_name, tokenizer, addressing, memory, notes };
        let text = toml::to_string(&about).map_err(|error| Error::model(&folder.join(ABOUT), error))?;
        let writer = CheckpointWriter::at(folder)?;
        writer.file(ABOUT, text.as_bytes())?;
        Ok(Self { writer })
    }

    /// Where the changed rows of memory layer `layer` are to be saved.
    pub fn file_path(&self, layer: usize) -> PathBuf {
        file_path(self.writer.folder(), layer)
    }

    /// Has the overlay bring `adapter` with it, whose rows must be zero.
    ///
    /// # Errors
    /// When it has tables, or the file system refuses.
    pub fn include(&self, adapter: &Adapter) -> Result<()> {
        adapter.copy_to(&self.writer.folder().join(ADAPTER))
    }

    /// Writes a file beside the rows, such as a report.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn file(&self, name: &str, contents: &[u8]) -> Result<()> {
        self.writer.file(name, contents)
    }

    /// Puts the overlay in place.
    ///
    /// # Errors
    /// When something stands there, or the file system refuses; all is then as it was.
    pub fn place(self) -> Result<PathBuf> {
        self.writer.place_bare()
    }
}

fn file_path(folder: &Path, layer: usize) -> PathBuf {
    folder.join(format!("memory.layer{layer}.overlay"))
}
