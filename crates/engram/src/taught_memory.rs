//! The memory that facts are taught to: the model's own, an adapter's, or a new one; and the model decoding with it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use engram_address::Addressing;
use engram_config::{Lookup, MemoryConfig, ModelConfig, TeachConfig};
use engram_import::{
    Adapter, AdapterRows, AdapterWriter, HostTensor, Model, OverlayNotes, OverlayWriter, Weights,
    memory_addressing,
};
use engram_infer::{Decoder, Dtype, EngineOptions, Offline, RowTiers, WeightSource, WeightView};
use engram_store::{
    ContentHash, Overlaid, PrefetchOptions, RowSource, Table, TableHeader, TableOrigin, TableReader, ZeroRows,
};
use engram_train::{TaughtRows, Teacher};

use crate::failure::refuse;

/// A memory that is taught.
pub(crate) struct TaughtMemory {
    pub(crate) config: MemoryConfig,
    pub(crate) addressing: Addressing,
    /// Weights that the model itself has not, by the names of a checkpoint.
    pub(crate) weights: BTreeMap<String, HostTensor>,
    layers: Vec<Layer>,
    origin: Origin,
}

/// Whose memory it is.
enum Origin {
    Base,
    Adapter(Box<Adapter>),
    New,
}

/// The rows of a memory layer as they are.
struct Layer {
    rows: Arc<dyn RowSource>,
    header: TableHeader,
    content: ContentHash,
}

impl TaughtMemory {
    /// The memory of `adapter`, or else the model's own, or else a new one as `config` describes it.
    pub(crate) fn open(model: &Model, adapter: Option<&Path>, config: &TeachConfig) -> anyhow::Result<Self> {
        if let Some(folder) = adapter {
            let adapter = Adapter::open(folder, model)?;
            let (memory, addressing) = (adapter.memory().clone(), adapter.addressing().clone());
            let tensor = |(name, weight): (&str, &engram_import::Weight)| {
                (name.to_owned(), HostTensor { shape: weight.shape().to_vec(), values: weight.values() })
            };
            let weights = adapter.weights().iter().map(tensor).collect();
            let table = |layer: usize| adapter.table(layer);
            let layers = layers(&addressing, memory.row_width, table)?;
            return Ok(Self {
                config: memory,
                addressing,
                weights,
                layers,
                origin: Origin::Adapter(Box::new(adapter)),
            });
        }
        let own = model.config().model.memory.clone();
        let is_new = own.is_none();
        let memory = own.unwrap_or_else(|| config.memory.for_base(&model.config().model, config.seed));
        if is_new {
            let all = ModelConfig { memory: Some(memory.clone()), ..model.config().model.clone() };
            all.validate().map_err(engram_train::Error::from)?;
        }
        if memory.lookup != Lookup::Own {
            let path = model.path().display();
            return refuse(format!(
                "{path}: its positions read the rows of others (`lookup`), which are not taught"
            ));
        }
        let addressing = memory_addressing(&memory, model.tokenizer())?;
        let folder = model.checkpoint().map(|checkpoint| checkpoint.folder().to_owned());
        let table = |layer: usize| -> Option<PathBuf> {
            folder
                .as_ref()
                .filter(|_| !is_new)
                .map(|folder| folder.join(format!("memory.layer{layer}.table")))
        };
        if !is_new && folder.is_none() {
            return refuse(format!("{}: its memory has no tables", model.path().display()));
        }
        let layers = layers(&addressing, memory.row_width, table)?;
        let origin = if is_new { Origin::New } else { Origin::Base };
        Ok(Self { config: memory, addressing, weights: BTreeMap::new(), layers, origin })
    }

    /// What the trainer takes.
    pub(crate) fn to_teach(&self) -> engram_train::TaughtMemory {
        engram_train::TaughtMemory {
            config: self.config.clone(),
            addressing: self.addressing.clone(),
            weights: self.weights.clone(),
            tables: self.layers.iter().map(|layer| Arc::clone(&layer.rows)).collect(),
        }
    }

    /// Begins the overlay `out` of what `teacher` has taught, with all rows in it. A new memory is first written in
    /// `work`.
    pub(crate) fn write(
        &self,
        model: &Model,
        teacher: &Teacher,
        (out, work): (&Path, &Path),
        notes: OverlayNotes,
    ) -> anyhow::Result<OverlayWriter> {
        let writer = match &self.origin {
            Origin::Base => OverlayWriter::begin(out, model, &self.addressing, notes)?,
            Origin::Adapter(adapter) => OverlayWriter::begin_for(out, adapter, notes)?,
            Origin::New => {
                let folder = work.join("adapter");
                if folder.exists() {
                    std::fs::remove_dir_all(&folder)
                        .with_context(|| format!("cannot remove {}", folder.display()))?;
                }
                let adapter = AdapterWriter::begin(&folder, model, &self.config, AdapterRows::Zero)?;
                adapter.weights(teacher.drawn())?;
                let adapter = Adapter::open(&adapter.place()?, model)?;
                let writer = OverlayWriter::begin_for(out, &adapter, notes)?;
                writer.include(&adapter)?;
                writer
            }
        };
        for ((layer, rows), &block) in self.layers.iter().zip(teacher.rows()).zip(&self.config.layers) {
            save(layer, rows, &writer.file_path(block))?;
        }
        Ok(writer)
    }

    /// The model as it is.
    pub(crate) fn base(&self, model: &Model) -> anyhow::Result<Offline> {
        match self.origin {
            Origin::New => {
                let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32)?;
                offline(decoder, None)
            }
            _ => {
                let sources = self.layers.iter().map(|layer| Arc::clone(&layer.rows)).collect();
                self.decoding(model, &self.weights, sources)
            }
        }
    }

    /// The model with what `teacher` has taught, whose rows are in the files of `writer`.
    pub(crate) fn taught(
        &self,
        model: &Model,
        teacher: &Teacher,
        writer: &OverlayWriter,
    ) -> anyhow::Result<Offline> {
        let mut sources: Vec<Arc<dyn RowSource>> = Vec::new();
        for (layer, &block) in self.layers.iter().zip(&self.config.layers) {
            let mut rows = Overlaid::new(Arc::clone(&layer.rows), &layer.header, layer.content)?;
            rows.push(writer.file_path(block))?;
            sources.push(Arc::new(rows));
        }
        let weights = if self.weights.is_empty() { teacher.drawn() } else { &self.weights };
        self.decoding(model, weights, sources)
    }

    fn decoding(
        &self,
        model: &Model,
        weights: &BTreeMap<String, HostTensor>,
        sources: Vec<Arc<dyn RowSource>>,
    ) -> anyhow::Result<Offline> {
        let config = ModelConfig { memory: Some(self.config.clone()), ..model.config().model.clone() };
        let source = WithMemory { base: model.weights(), memory: weights };
        let decoder = Decoder::new(&config, &source, Dtype::F32)?;
        let rows = RowTiers::new(self.addressing.clone(), sources, &PrefetchOptions::default())?;
        offline(decoder, Some(rows))
    }
}

/// A model that decodes, with the rows of its memory.
pub(crate) fn offline(decoder: Decoder, rows: Option<RowTiers>) -> anyhow::Result<Offline> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Offline::new(decoder, rows, EngineOptions::default().cache_bytes, threads)?)
}

/// The rows of every layer: those of its table file, or else zeros.
fn layers(
    addressing: &Addressing,
    width: usize,
    table: impl Fn(usize) -> Option<PathBuf>,
) -> anyhow::Result<Vec<Layer>> {
    let of_layer = |layer: &engram_address::LayerAddress| {
        let origin = TableOrigin { identity: addressing.identity(), layer: layer.layer() as u64 };
        match table(layer.layer()) {
            Some(path) => {
                let file = TableReader::open_for(&path, &origin)?;
                let rows = Arc::new(Table::open(&path, &origin)?);
                Ok(Layer { rows, header: file.header().clone(), content: file.content() })
            }
            None => {
                let zeros = ZeroRows::new(layer.rows(), width, origin)?;
                let (header, content) = (zeros.header().clone(), zeros.content());
                Ok(Layer { rows: Arc::new(zeros), header, content })
            }
        }
    };
    addressing.layers().iter().map(of_layer).collect()
}

/// Writes the taught rows of a layer.
fn save(layer: &Layer, rows: &TaughtRows, path: &Path) -> anyhow::Result<()> {
    let mut writer = engram_store::OverlayWriter::new(&layer.header, layer.content);
    for (id, row) in rows.rows() {
        writer.set(id, row)?;
    }
    writer.save(path)?;
    Ok(())
}

/// A model's weights and those of a memory that it has not.
struct WithMemory<'a> {
    base: &'a Weights,
    memory: &'a BTreeMap<String, HostTensor>,
}

impl WeightSource for WithMemory<'_> {
    fn names(&self) -> Vec<String> {
        let mut names = WeightSource::names(self.base);
        names.extend(self.memory.keys().cloned());
        names
    }

    fn get(&self, name: &str) -> Option<WeightView<'_>> {
        WeightSource::get(self.memory, name).or_else(|| WeightSource::get(self.base, name))
    }

    fn release(&self, name: &str) {
        WeightSource::release(self.base, name);
    }
}
