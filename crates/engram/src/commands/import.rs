use std::path::PathBuf;

use clap::Args;
use engram_config::{Account, BeginConfig, CheckpointConfig};
use engram_import::Model;
use serde::Serialize;

use super::{print, print_json};
use crate::failure::refuse;
use crate::files::refuse_unwritable;
use crate::hub;
use crate::interrupt;
use crate::note::note;
use crate::number::short;
use crate::served::chat_template;
use crate::table::Table;

/// Make a checkpoint from a pretrained model.
///
/// Accepts a GGUF file, or a folder with config.json, tokenizer.json and safetensors, of the types Llama, Mistral,
/// SmolLM, Qwen 2 and 3, Gemma 3, Phi 3, DeepSeek V2 and V3. Weights are converted to f32. Every command that takes a
/// checkpoint takes the result. An unknown architecture, setting or tensor is refused by name.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram import SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smol
  engram import SmolLM2-135M/ --out runs/smol --json
  engram import hf:HuggingFaceTB/SmolLM2-135M --out runs/smol
  engram chat runs/smol
  engram eval tasks runs/smol configs/tasks/piqa.toml --data sets")]
pub(crate) struct Import {
    /// A GGUF file, the folder of a model, or hf:org/name.
    model: PathBuf,
    /// Checkpoint folder to create.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A checkpoint that was made.
#[derive(Debug, Serialize)]
struct Imported {
    checkpoint: PathBuf,
    parameters: u64,
    /// Whether the model has a chat template.
    chat_template: bool,
    #[serde(flatten)]
    config: CheckpointConfig,
}

impl Import {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        refuse_unwritable(&self.out)?;
        let path = hub::local(&self.model)?;
        if !Model::is_outside(&path) && !path.is_file() {
            return refuse(format!(
                "{}: neither a GGUF file nor a folder with config.json",
                self.model.display()
            ));
        }
        note(format_args!("reading {}", self.model.display()));
        let model = Model::open(&path)?;
        for text in model.notes() {
            note(format_args!("{}: {text}", self.model.display()));
        }
        let template = chat_template(&model);
        if let (Some(_), Err(reason)) = (model.chat_template(), &template) {
            note(format_args!(
                "{}: {reason}; the checkpoint continues texts, and converses with another --chat-template",
                self.model.display()
            ));
        }
        let config = model.config().clone();
        note(format_args!("writing {}", self.out.display()));
        interrupt::listen()?;
        let checkpoint = model.save_checkpoint(&self.out, &mut |_, _| interrupt::flow())?;
        let parameters = Account::of(&config.model, &[]).total;
        let imported = Imported { checkpoint, parameters, chat_template: template.is_ok(), config };
        if self.json { print_json(&imported) } else { print(imported.table().to_string()) }
    }
}

impl Imported {
    fn table(&self) -> Table {
        let CheckpointConfig { model, text, .. } = &self.config;
        let mut table = Table::new([self.checkpoint.display().to_string(), String::new()]);
        let mut row = |label: &str, value: String| table.row([label.to_owned(), value]);
        row("parameters", short(self.parameters));
        row("blocks", model.blocks.to_string());
        row("width", model.width.to_string());
        row("heads", model.attention.heads().to_string());
        row("heads of keys and values", model.attention.key_heads().to_string());
        row("tokens in the vocabulary", model.vocabulary.to_string());
        row("context, tokens", model.context.to_string());
        match &text.begin {
            Some(BeginConfig::Always(name)) => row("before every text", name.clone()),
            Some(BeginConfig::IfEmpty(name)) => row("before a text without a beginning", name.clone()),
            None => {}
        }
        row("end of a text", text.end.clone().unwrap_or_default());
        row("chat template", if self.chat_template { "yes" } else { "no" }.to_owned());
        table
    }
}
