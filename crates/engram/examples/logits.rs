//! Writes the logits that the engine computes after each token, for another implementation to compare with.
//!
//! ```text
//! cargo run --release --example logits -- MODEL TOKENS.json OUT.safetensors [--memory ADAPTER] [--overlay FOLDER]…
//! ```
//!
//! MODEL is anything that `engram generate` opens, and so are adapter and overlays. `TOKENS.json` holds the token ids of
//! one text, a list. `OUT.safetensors` gets `logits`, f32 `[tokens, vocabulary]`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engram_import::{Model, StackedMemory};
use engram_infer::{BaseRows, Decoder, Dtype, EngineOptions, Offline, RowTiers};
use engram_store::{PrefetchOptions, Table, TableOrigin, TableReader};
use safetensors::tensor::TensorView;

const USAGE: &str = "usage: logits MODEL TOKENS.json OUT.safetensors [--memory ADAPTER] [--overlay FOLDER]…";

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Which files are read and written.
#[derive(Default)]
struct Options {
    files: Vec<PathBuf>,
    adapter: Option<PathBuf>,
    overlays: Vec<PathBuf>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self::default();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().map(PathBuf::from).context(USAGE);
            match argument.as_str() {
                "--memory" => options.adapter = Some(value()?),
                "--overlay" => options.overlays.push(value()?),
                _ => options.files.push(argument.into()),
            }
        }
        Ok(options)
    }
}

fn run(arguments: impl Iterator<Item = String>) -> Result<()> {
    let options = Options::parse(arguments)?;
    let [model, tokens, out] = &options.files[..] else { bail!(USAGE) };
    let tokens: Vec<u32> = serde_json::from_slice(&read(tokens)?)
        .with_context(|| format!("{} is not a list of token ids", tokens.display()))?;
    let model = Model::open(model)?;
    let mut offline = open(&model, &options)?;
    let mut logits: Vec<f32> = Vec::new();
    offline.logits(&tokens, &mut |_, part| logits.extend_from_slice(part))?;
    let vocabulary = logits.len() / tokens.len();
    let shape = vec![tokens.len(), vocabulary];
    let view = TensorView::new(safetensors::Dtype::F32, shape, bytemuck::cast_slice(&logits))?;
    safetensors::serialize_to_file([("logits", view)], None, out)
        .with_context(|| format!("cannot write {}", out.display()))
}

/// The model in f32 with the memory that the options name.
fn open(model: &Model, options: &Options) -> Result<Offline> {
    let mut decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32)?;
    let memory = StackedMemory::open(model, options.adapter.as_deref(), &options.overlays)?;
    let rows = memory.map(|memory| rows(model, &memory, &mut decoder)).transpose()?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Offline::new(decoder, rows, EngineOptions::default().cache_bytes, threads)?)
}

/// The rows of `memory`, whose weights `decoder` takes where they are an adapter's.
fn rows(model: &Model, memory: &StackedMemory, decoder: &mut Decoder) -> Result<RowTiers> {
    let layers = &memory.memory().layers;
    let files: Vec<PathBuf> = match (memory.adapter(), model.checkpoint()) {
        (Some(adapter), _) => {
            decoder.add_memory(memory.memory(), adapter.weights())?;
            layers.iter().filter_map(|&layer| adapter.table(layer)).collect()
        }
        (None, Some(checkpoint)) => layers
            .iter()
            .map(|layer| checkpoint.folder().join(format!("memory.layer{layer}.table")))
            .collect(),
        (None, None) => bail!("{}: its memory has no tables", model.path().display()),
    };
    let identity = memory.addressing().identity();
    let table = |(file, &layer): (&PathBuf, &usize)| -> Result<BaseRows> {
        let reader = TableReader::open(file)?;
        let (header, content) = (reader.header().clone(), reader.content());
        let origin = TableOrigin { identity, layer: layer as u64 };
        Ok(BaseRows { source: Arc::new(Table::open(file, &origin)?), header, content })
    };
    let tables = files.iter().zip(layers).map(table).collect::<Result<_>>()?;
    Ok(RowTiers::of_memory(memory, tables, &PrefetchOptions::default())?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
