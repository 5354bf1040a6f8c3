use std::path::PathBuf;

use clap::{Args, ValueEnum};
use engram_config::Account;
use engram_import::Model;
use serde::Serialize;

use super::{print, print_json};
use crate::files::refuse_unwritable;
use crate::hub;
use crate::interrupt;
use crate::number::short;
use crate::table::Table;

/// Write a checkpoint in another program's format.
///
/// `hf` is the folder that Hugging Face's library reads: config.json, safetensors in f32, tokenizer.json and its
/// settings. The model becomes a Llama, Mistral, SmolLM 3, Qwen 2 or Qwen 3 model, whichever computes the same. A model
/// that none of them can express, such as one with a memory, is refused; the error names the key that prevents it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram export runs/plain --to hf --out plain-hf
  engram import plain-hf --out runs/again")]
pub(crate) struct Export {
    /// A checkpoint, a run's folder, a GGUF file, the folder of a model, or hf:org/name.
    model: PathBuf,
    /// Output format.
    #[arg(long, value_enum)]
    to: Form,
    /// Folder to create.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Form {
    /// Hugging Face's library.
    Hf,
}

/// What was written.
#[derive(Debug, Serialize)]
struct Exported {
    folder: PathBuf,
    parameters: u64,
}

impl Export {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let model = Model::open(&hub::local(&self.model)?)?;
        interrupt::listen()?;
        let Form::Hf = self.to;
        let folder = model.export_hub(&self.out, &mut |_, _| interrupt::flow())?;
        let exported = Exported { folder, parameters: Account::of(&model.config().model, &[]).total };
        if self.json {
            return print_json(&exported);
        }
        let mut table = Table::new([exported.folder.display().to_string(), String::new()]);
        table.row(["parameters".to_owned(), short(exported.parameters)]);
        print(table.to_string())
    }
}
