use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use engram_store::{RowFormat, TableHeader, TableTensors, export};

use crate::commands::print;
use crate::failure::refuse;
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::number::bytes;
use crate::progress::Passage;

/// Write a table as safetensors, byte for byte, in a published layout or under tensor names of your choice.
///
/// If OUT ends in .safetensors, it is one file; otherwise it is a folder with files and their index.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table export layer1.table layer1.safetensors --layout deepseek
  engram table export layer1.table published/ --layout qwen --shards 128 --file-bytes 4000000000
  engram table export layer1.table layer1.safetensors --weights memory.weight")]
pub(crate) struct Export {
    /// Table file to read.
    #[arg(value_name = "TABLE")]
    source: PathBuf,
    /// File or folder to create.
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// Published layout of tensor names. The default is the one that has the table's format.
    #[arg(long, conflicts_with = "weights")]
    layout: Option<Layout>,
    /// Number of tensors that Qwen's layout splits the rows into.
    #[arg(long, value_name = "N", default_value_t = 128)]
    shards: usize,
    /// Tensors for the values instead of a published layout's. Rows are split evenly over them.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    weights: Vec<String>,
    /// Tensor for the scales, with --weights.
    #[arg(long, value_name = "NAME", requires = "weights")]
    scale: Option<String>,
    /// Maximum size in bytes of each file in a folder. A tensor is never split.
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000)]
    file_bytes: u64,
}

/// A published layout.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Layout {
    /// DeepSeek-V4.1-Flash: fp8e4m3 values in one tensor, scales in another.
    Deepseek,
    /// Qwen3.8-Flash-Next: bf16, or fp8e4m3 with one scale, in many tensors.
    Qwen,
}

impl Export {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let header = TableHeader::read(&self.source)?;
        let tensors = self.tensors(&header)?;
        refuse_unwritable(&self.out)?;
        interrupt::listen()?;
        let row_bytes = header.format.bytes_per_row(header.width) as u64;
        let mut passage = Passage::new("exporting", header.rows, row_bytes);
        let mut write = |target: &Path| {
            let progress = &mut |at: engram_store::Progress| passage.show(at.done, at.total);
            export(&self.source, &tensors, target, self.file_bytes, progress)
        };
        if self.out.extension().is_some_and(|extension| extension == "safetensors") {
            write(&self.out)?;
        } else {
            let folder = NewFolder::create(&self.out)?;
            write(folder.path())?;
            folder.persist()?;
        }
        drop(passage);
        let (files, size) = files_and_bytes(&self.out)?;
        let (out, names) = (self.out.display(), tensors.weights.len() + usize::from(tensors.scale.is_some()));
        print(format!(
            "{out}: {} rows of {} in {names} tensors, {files} files, {}\n",
            header.rows,
            header.format,
            bytes(size)
        ))
    }

    fn tensors(&self, header: &TableHeader) -> anyhow::Result<TableTensors> {
        if self.shards == 0 {
            return refuse("--shards is 0, but must be at least 1");
        }
        if !self.weights.is_empty() {
            return Ok(TableTensors { weights: self.weights.clone(), scale: self.scale.clone() });
        }
        let layer = header.origin.layer;
        let (own, scaled) = match header.format {
            RowFormat::Fp8E4m3 => (Some(Layout::Deepseek), false),
            RowFormat::Bf16 => (Some(Layout::Qwen), false),
            RowFormat::Fp8E4m3OneScale(_) => (Some(Layout::Qwen), true),
            _ => (None, false),
        };
        match self.layout.or(own) {
            Some(Layout::Deepseek) => Ok(TableTensors::deepseek(layer)),
            Some(Layout::Qwen) => Ok(TableTensors::qwen(layer, self.shards, scaled)),
            None => refuse(format!(
                "{}: no published layout has rows of {}; name its tensor with --weights, or convert it first",
                self.source.display(),
                header.format
            )),
        }
    }
}

/// A folder under a temporary name beside its final place. Dropping it before it is renamed removes it.
struct NewFolder {
    path: PathBuf,
    temporary: tempfile::TempDir,
}

impl NewFolder {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let temporary = engram_data::new_folder(engram_data::folder_of(path), ".writing-")
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path: path.to_owned(), temporary })
    }

    fn path(&self) -> &Path {
        self.temporary.path()
    }

    fn persist(self) -> anyhow::Result<()> {
        std::fs::rename(self.temporary.path(), &self.path)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        // The folder no longer has its temporary name.
        _ = self.temporary.keep();
        Ok(())
    }
}

fn files_and_bytes(path: &Path) -> anyhow::Result<(usize, u64)> {
    let read = || format!("cannot read {}", path.display());
    if !path.is_dir() {
        return Ok((1, path.metadata().with_context(read)?.len()));
    }
    let mut sizes = Vec::new();
    for entry in path.read_dir().with_context(read)? {
        sizes.push(entry.and_then(|entry| entry.metadata()).with_context(read)?.len());
    }
    Ok((sizes.len(), sizes.iter().sum()))
}
