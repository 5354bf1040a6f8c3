use std::path::PathBuf;

use clap::Args;
use engram_store::{Checkpoint, TableTensors, import};

use super::info::TableInfo;
use super::origin::OriginOptions;
use crate::failure::refuse;
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::progress::Passage;

/// Copy a table out of a published model's safetensors files, byte for byte. Memory use does not depend on the
/// table's size.
///
/// The tables of DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next are found by their names; for others, use --weights. Only
/// the files that hold the table are needed.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table import DeepSeek-V4.1-Flash/ layer1.table --preset v41 --tokenizer tokenizer.json --layer 1
  engram table import embeddings.safetensors layer0.table --weights embed.weight \\
    --identity $(printf %064d 7) --layer 0")]
pub(crate) struct Import {
    /// A .safetensors file, an index of several, or their folder.
    #[arg(value_name = "CHECKPOINT")]
    source: PathBuf,
    /// Table file to create.
    #[arg(value_name = "TABLE")]
    out: PathBuf,
    #[command(flatten)]
    origin: OriginOptions,
    /// Tensors with the values, in the order of their rows, for a table without a published layout.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    weights: Vec<String>,
    /// Tensor with the scales, with --weights.
    #[arg(long, value_name = "NAME", requires = "weights")]
    scale: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Import {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let origin = self.origin.load()?;
        let mut checkpoint = Checkpoint::open(&self.source)?;
        let tensors = match self.weights.is_empty() {
            true => TableTensors::find(&checkpoint, origin.origin.layer)?,
            false => TableTensors { weights: self.weights, scale: self.scale },
        };
        let header = tensors.header(&mut checkpoint, origin.origin)?;
        if let Some(rows) = origin.rows.filter(|&rows| rows != header.rows) {
            return refuse(format!(
                "{}: the table has {} rows, but the addressing has {rows} in layer {}: another tokenizer or \
                 configuration placed them",
                self.source.display(),
                header.rows,
                origin.origin.layer
            ));
        }
        interrupt::listen()?;
        let row_bytes = header.format.bytes_per_row(header.width) as u64;
        let mut passage = Passage::new("importing", header.rows, row_bytes);
        import(&mut checkpoint, &tensors, origin.origin, &self.out, &mut |at| {
            passage.show(at.done, at.total)
        })?;
        drop(passage);
        TableInfo::read(&self.out)?.print(self.json)
    }
}
