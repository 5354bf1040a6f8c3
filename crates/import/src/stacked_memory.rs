//! A memory to decode with: an adapter or the base's own memory, and overlays on it.

use std::path::{Path, PathBuf};

use engram_address::Addressing;
use engram_config::MemoryConfig;
use engram_store::{Overlay as RowOverlay, TableReader};

use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::memory_addressing::memory_addressing;
use crate::model::Model;
use crate::overlay::Overlay;

/// One memory of a model: which weights it has, and what lies on its rows.
#[derive(Debug)]
pub struct StackedMemory {
    /// None: the base's own memory.
    adapter: Option<Adapter>,
    overlays: Vec<Overlay>,
    memory: MemoryConfig,
    addressing: Addressing,
}

impl StackedMemory {
    /// The memory of `base` with `adapter`, where one is named, and `overlays` on it, the last on top. None: the base has
    /// no memory, and nothing is named. Without an adapter the base's own memory counts, or that which the first overlay
    /// brings with it.
    ///
    /// # Errors
    /// When one of them cannot be opened, or does not belong to the model or to the memory below it.
    pub fn open(base: &Model, adapter: Option<&Path>, overlays: &[PathBuf]) -> Result<Option<Self>> {
        let mut overlays: Vec<Overlay> =
            overlays.iter().map(|folder| Overlay::open(folder, base)).collect::<Result<_>>()?;
        let adapter = match adapter {
            Some(folder) => Some(Adapter::open(folder, base)?),
            None => match overlays.first_mut() {
                Some(first) if !first.is_of_base() => Some(first.take_adapter().ok_or_else(|| {
                    let problem =
                        "it changes rows of an adapter, which it does not bring with it: name the adapter";
                    Error::model(first.folder(), problem)
                })?),
                _ => None,
            },
        };
        match &adapter {
            Some(adapter) => overlays.iter().try_for_each(|overlay| overlay.check_adapter(adapter))?,
            None => {
                if let Some(other) = overlays.iter().find(|overlay| !overlay.is_of_base()) {
                    let problem = "it changes rows of an adapter, but the overlays below it those of the model's own memory";
                    return Err(Error::model(other.folder(), problem));
                }
            }
        }
        let memory = match (&adapter, &base.config().model.memory) {
            (Some(adapter), _) => adapter.memory().clone(),
            (None, Some(memory)) => memory.clone(),
            (None, None) => return Ok(None),
        };
        let addressing = match &adapter {
            Some(adapter) => adapter.addressing().clone(),
            None => {
                let failed = |source| Error::Address { path: base.path().to_owned(), source };
                memory_addressing(&memory, base.tokenizer()).map_err(failed)?
            }
        };
        Ok(Some(Self { adapter, overlays, memory, addressing }))
    }

    /// What tells this memory from others of the same base: the BLAKE3 hash of what its adapter, tables and overlays
    /// hold.
    ///
    /// # Errors
    /// When a table or an overlay cannot be read.
    pub fn identity(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for (place, layer) in self.memory.layers.iter().enumerate() {
            hasher.update(&(place as u64).to_le_bytes());
            if let Some(adapter) = &self.adapter {
                hasher.update(adapter.identity().as_bytes());
                if let Some(table) = adapter.table(*layer) {
                    hasher.update(TableReader::open(&table)?.content().as_bytes());
                }
            }
            for file in self.overlays.iter().filter_map(|overlay| overlay.file(*layer)) {
                hasher.update(RowOverlay::read(&file)?.content().as_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The adapter; none: the base's own memory.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The overlays, the topmost last.
    pub fn overlays(&self) -> &[Overlay] {
        &self.overlays
    }

    /// The memory's configuration.
    pub fn memory(&self) -> &MemoryConfig {
        &self.memory
    }

    /// From tokens to rows.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }
}
