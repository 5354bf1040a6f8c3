//! The memories that a model is to be read with, from options to rows in tiers.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use engram_import::{Adapter, Model, StackedMemory};
use engram_infer::{BaseRows, Decoder, MemoryTables, ModelMemory, RowTiers};
use engram_serve::MemoryFacts;
use engram_store::{ContentHash, PrefetchOptions, RowSource, TableHeader, TableReader};

use crate::commands::table::tier::{Counts, OpenTier};
use crate::failure::refuse;

/// Which memory a model is read with.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct MemoryOptions {
    /// Read this memory: the folder of an adapter that was made for the model.
    #[arg(long = "memory", value_name = "ADAPTER")]
    adapter: Option<PathBuf>,
    /// Read the changed rows in this folder, too. May be repeated: the last lies on top.
    #[arg(long = "overlay", value_name = "FOLDER")]
    overlays: Vec<PathBuf>,
}

impl MemoryOptions {
    /// Whether something is named.
    pub(crate) fn are_given(&self) -> bool {
        self.adapter.is_some() || !self.overlays.is_empty()
    }

    /// The memory that `model` is read with, if it has one.
    pub(crate) fn open(&self, model: &Model) -> anyhow::Result<Option<StackedMemory>> {
        Ok(StackedMemory::open(model, self.adapter.as_deref(), &self.overlays)?)
    }
}

/// A memory that clients choose by a name: `NAME=FOLDER[,OVERLAY…]`.
#[derive(Debug, Clone)]
pub(crate) struct NamedMemory {
    pub(crate) name: String,
    /// An adapter or an overlay, then overlays on it.
    folders: Vec<PathBuf>,
}

impl NamedMemory {
    /// Reads the option.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let form = "give NAME=FOLDER, or NAME=FOLDER,OVERLAY,… with overlays on it";
        let (name, paths) = text.split_once('=').ok_or(form)?;
        let folders: Vec<PathBuf> = paths.split(',').map(PathBuf::from).collect();
        if name.is_empty() || folders.iter().any(|path| path.as_os_str().is_empty()) {
            return Err(form.into());
        }
        Ok(Self { name: name.into(), folders })
    }

    /// The memory of `model`.
    pub(crate) fn open(&self, model: &Model) -> anyhow::Result<StackedMemory> {
        let mut overlays = self.folders.clone();
        // An overlay that brings its memory with it, or changes the model's own, stands alone.
        let adapter = Adapter::is_at(&overlays[0]).then(|| overlays.remove(0));
        if adapter.is_none() && !engram_import::Overlay::is_at(&overlays[0]) {
            let folder = overlays[0].display();
            return refuse(format!(
                "--adapter {}: {folder}: neither an adapter nor an overlay is here",
                self.name
            ));
        }
        match (MemoryOptions { adapter, overlays }).open(model)? {
            Some(memory) => Ok(memory),
            None => refuse(format!("--adapter {}: the model has no memory", self.name)),
        }
    }
}

/// How long a step waits for memory rows before its requests fail, at least.
const ROW_LIMIT: Duration = Duration::from_secs(15);

/// What opens the rows of a table file.
type OpenTable<'a> = &'a dyn Fn(&Path, &TableHeader) -> anyhow::Result<OpenTier>;

/// Opens memories for one decoder. Weights and tables that several share are opened once.
pub(crate) struct Opener<'a> {
    model: &'a Model,
    decoder: &'a mut Decoder,
    open_table: OpenTable<'a>,
    /// Tables instead of the checkpoint's.
    tables: &'a [PathBuf],
    /// The decoder's numbers of adapters, by their identities.
    numbers: HashMap<String, usize>,
    sources: HashMap<PathBuf, (Arc<dyn RowSource>, TableHeader, ContentHash)>,
    /// Caches in front of tables, each with its labels.
    counts: Vec<(String, Counts)>,
    opened: Vec<ModelMemory>,
    row_limit: Duration,
}

impl<'a> Opener<'a> {
    pub(crate) fn new(
        model: &'a Model,
        decoder: &'a mut Decoder,
        open_table: OpenTable<'a>,
        tables: &'a [PathBuf],
    ) -> Self {
        let (numbers, sources, counts, opened) = (HashMap::new(), HashMap::new(), Vec::new(), Vec::new());
        let row_limit = ROW_LIMIT;
        Self { model, decoder, open_table, tables, numbers, sources, counts, opened, row_limit }
    }

    /// Waits as long for the rows of a step as their tier does for an answer, where that is longer than usual.
    pub(crate) fn waiting(mut self, tier: Duration) -> Self {
        self.row_limit = self.row_limit.max(tier);
        self
    }

    /// Opens `memory`; says what clients see of it. `name` tells its metrics from others, where there are several.
    pub(crate) fn open(&mut self, memory: &StackedMemory, name: Option<&str>) -> anyhow::Result<MemoryFacts> {
        let weights = match memory.adapter() {
            None => 0,
            Some(adapter) => match self.numbers.get(adapter.identity()) {
                Some(&number) => number,
                None => {
                    let number = self.decoder.add_memory(memory.memory(), adapter.weights());
                    let number = number.map_err(|error| {
                        anyhow::anyhow!(error).context(adapter.folder().display().to_string())
                    })?;
                    self.numbers.insert(adapter.identity().to_owned(), number);
                    number
                }
            },
        };
        let layers = memory.memory().layers.clone();
        let files = self.files(memory)?;
        let tables = files.iter().zip(&layers).map(|(file, &layer)| self.table(file, layer, name));
        let tables = tables.collect::<anyhow::Result<Vec<_>>>()?;
        let options = PrefetchOptions::default().time_limit(self.row_limit);
        let rows = RowTiers::of_memory(memory, tables, &options)?;
        self.opened.push(ModelMemory { weights, rows });
        Ok(MemoryFacts {
            memory: self.opened.len() - 1,
            layers,
            max_order: memory.memory().max_order,
            overlays: memory.overlays().len(),
        })
    }

    /// The memories in the order in which they were opened, and what counts the hits of their caches.
    pub(crate) fn finish(self) -> (Vec<ModelMemory>, impl Fn() -> String + Send + Sync + use<>) {
        let counts = self.counts;
        (self.opened, move || row_metrics(&counts))
    }

    /// The table files of a memory; none where its rows are zero.
    fn files(&self, memory: &StackedMemory) -> anyhow::Result<Vec<PathBuf>> {
        if let Some(adapter) = memory.adapter() {
            if let Some(path) = self.tables.first() {
                let path = path.display();
                return refuse(format!(
                    "--table {path} is for the model's own memory, but an adapter is read"
                ));
            }
            return Ok(memory.memory().layers.iter().filter_map(|&layer| adapter.table(layer)).collect());
        }
        let Some(checkpoint) = self.model.checkpoint() else {
            return refuse(format!("{}: its memory has no tables", self.model.path().display()));
        };
        let tokenizer = self.model.tokenizer().inner();
        let mut tables = MemoryTables::open(memory.memory(), tokenizer, checkpoint.folder())?;
        self.tables.iter().try_for_each(|path| tables.replace(path))?;
        Ok(tables.files().to_vec())
    }

    fn table(&mut self, file: &Path, layer: usize, name: Option<&str>) -> anyhow::Result<BaseRows> {
        if let Some((source, header, content)) = self.sources.get(file) {
            return Ok(BaseRows { source: Arc::clone(source), header: header.clone(), content: *content });
        }
        let reader = TableReader::open(file)?;
        let (header, content) = (reader.header().clone(), reader.content());
        let (source, counts) = (self.open_table)(file, &header)?.into_shared();
        let of_memory = name.map_or(String::new(), |name| format!(",model={name:?}"));
        self.counts.push((format!("layer=\"{layer}\"{of_memory}"), counts));
        self.sources.insert(file.to_owned(), (Arc::clone(&source), header.clone(), content));
        Ok(BaseRows { source, header, content })
    }
}

/// Hits and misses of the caches of rows.
fn row_metrics(counts: &[(String, Counts)]) -> String {
    let mut text = String::new();
    let counts: Vec<_> = counts.iter().filter_map(|(labels, counts)| Some((labels, counts()?))).collect();
    if counts.is_empty() {
        return text;
    }
    text += "# HELP engram_rows_total Memory rows asked for, by where they were.\n# TYPE engram_rows_total counter\n";
    for (labels, counts) in counts {
        let _ = writeln!(text, "engram_rows_total{{{labels},from=\"cache\"}} {}", counts.hits);
        let _ = writeln!(text, "engram_rows_total{{{labels},from=\"tier\"}} {}", counts.misses);
    }
    text
}
