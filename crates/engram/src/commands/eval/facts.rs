use std::path::PathBuf;

use clap::Args;
use engram_data::Corpus;
use engram_infer::{Dtype, EngineOptions, Offline};
use engram_train::Facts as FactFile;

use crate::commands::{print, print_json};
use crate::common_text;
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::opened_memories::MemoryOptions;
use crate::served::{self, Served};
use crate::teaching_report::{Examination, Extent};

/// Ask a model for facts, with overlays and without.
///
/// The questions are those at the end of `engram teach`: phrasings that were trained and held out, other relations of the
/// taught subjects, untaught subjects, and what changed on neutral text. Overlays can be stacked, so that several teachings
/// in sequence are measured together. The model without what the options name is the base.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval facts smollm2.gguf facts.jsonl --overlay facts.overlay
  engram eval facts smollm2.gguf facts.jsonl --memory empty.adapter --overlay first --overlay second --json")]
pub(crate) struct Facts {
    /// A checkpoint, a run's folder, a GGUF file, or a folder with config.json.
    model: PathBuf,
    /// Facts, one per line, as for `engram teach`.
    facts: PathBuf,
    #[command(flatten)]
    memory: MemoryOptions,
    /// Text that has nothing to do with the facts. By default English text that is in the program.
    #[arg(long, value_name = "CORPUS", num_args = 1..)]
    neutral: Vec<PathBuf>,
    /// Tokens of neutral text that are compared.
    #[arg(long, value_name = "N", default_value = "4096", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    neutral_tokens: usize,
    /// Questions of other relations that are asked about each subject.
    #[arg(long, value_name = "N", default_value_t = 10)]
    ask_others: usize,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Facts {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        if !self.memory.are_given() {
            return refuse("name what is asked with --overlay or --memory: the model without it is the base");
        }
        let facts = FactFile::read(&self.facts)?;
        let model = served::open(&self.model)?;
        let neutral =
            if self.neutral.is_empty() { common_text::held_out()? } else { Corpus::open(&self.neutral)? };
        interrupt::listen()?;
        let open = |options: &MemoryOptions| -> anyhow::Result<Offline> {
            let engram_infer::Model { decoder, memories, .. } =
                Served::mapped(&model, options, Dtype::F32)?.model;
            let rows = memories.into_iter().next().map(|memory| memory.rows);
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            Ok(Offline::new(decoder, rows, EngineOptions::default().cache_bytes, threads)?)
        };
        let models = (open(&MemoryOptions::default())?, open(&self.memory)?);
        let extent = Extent { others: self.ask_others, neutral: self.neutral_tokens };
        let texts = (model.tokenizer(), model.begin());
        let chat = served::chat_template(&model).ok();
        let mut examination = Examination::new(models, texts, &facts, &neutral, extent).with_chat(chat);
        let answers = examination.answers();
        if interrupt::asked() {
            return Err(Interrupted(String::new()).into());
        }
        let answers = answers?;
        if self.json { print_json(&answers) } else { print(answers.text()) }
    }
}
