use std::path::PathBuf;

use clap::Args;
use engram_eval::tasks::{Summary, summarize, use_keys};
use serde::Serialize;

use super::super::asking::{Asked, Memory, TaskArguments};
use super::super::{print, print_json};
use super::with_error;
use crate::device::DeviceKind;
use crate::interrupt;
use crate::opened_memories::MemoryOptions;
use crate::table::Table;

/// Evaluate a checkpoint, or a model from outside, on tasks.
///
/// A task is a TOML file. configs/tasks has those of common test sets; each names the data file that it expects in
/// the folder of --data, or that --hub downloads. A model from outside is a GGUF file, or a folder with config.json,
/// tokenizer.json and safetensors.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval tasks runs/small configs/tasks/lambada.toml --data sets
  engram eval tasks runs/small configs/tasks/*.toml --data sets --max-records 500 --out results/small
  engram eval tasks runs/small configs/tasks/arc_easy.toml --data sets --hub
  engram eval tasks SmolLM2-135M-Instruct.Q4_1.gguf configs/tasks/piqa.toml --data sets --json
  engram eval tasks SmolLM2-135M-Instruct.Q4_1.gguf configs/tasks/gsm8k.toml --data sets --dtype file
  engram eval tasks runs/small my-task.toml --shots 5 --seed 1
  engram eval tasks runs/small my-task.toml --without-memory
  engram eval tasks runs/small long.toml --keys results/large/long.jsonl

--hub downloads into the folder of --data, and uses the cache of the hub's own programs. It reads HF_ENDPOINT (a
mirror), HF_TOKEN (for data sets with conditions), HF_HOME and HF_HUB_CACHE.

--out keeps every answer as it comes; the same command resumes after an interruption. `engram eval compare` compares
two such folders. `engram inspect sensitivity` asks with the memory on and off.")]
pub(crate) struct Tasks {
    /// A checkpoint, a run's folder (its newest checkpoint is used), or a model from outside.
    model: PathBuf,
    #[command(flatten)]
    arguments: TaskArguments,
    /// Answers of another model to a task with [long_perplexity]. Only tokens that it found to be key count.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    #[command(flatten)]
    memory: MemoryOptions,
    /// Switch the memory off.
    #[arg(long)]
    without_memory: bool,
    /// Folder for the answers, one file per task. Existing files are resumed.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Device to compute on; answers need the CPU.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The results of all tasks.
#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    /// Whether its memory was switched off.
    without_memory: bool,
    tasks: Vec<TaskReport>,
}

/// The result of one task.
#[derive(Debug, Serialize)]
struct TaskReport {
    task: String,
    questions: usize,
    /// Questions whose beginning was truncated to fit the context.
    cut: usize,
    measures: Vec<Summary>,
}

impl Tasks {
    pub(super) fn run(self) -> anyhow::Result<()> {
        // Check the files before loading a model.
        let mut tasks = self.arguments.load()?;
        if let Some(keys) = &self.keys {
            tasks.iter_mut().try_for_each(|task| use_keys(task, keys))?;
        }
        interrupt::listen()?;
        self.arguments.fetch(&tasks)?;
        let questions = tasks.iter().map(|task| self.arguments.questions(task));
        let questions = questions.collect::<anyhow::Result<Vec<_>>>()?;
        let memory = if self.without_memory { Memory::Off } else { Memory::On };
        let model = Asked::open(&self.model, &self.memory, (self.device, self.arguments.dtype), memory)?;
        let mut reports = Vec::new();
        for (task, questions) in tasks.iter().zip(&questions) {
            let (outcomes, cut) = model.put((task, questions), &self.arguments, self.out.as_deref())?;
            let (task, measures) = (task.name().to_owned(), summarize(&outcomes));
            reports.push(TaskReport { task, questions: outcomes.len(), cut, measures });
        }
        let report = Report { model: self.model, without_memory: self.without_memory, tasks: reports };
        if self.json { print_json(&report) } else { print(report.table().to_string()) }
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new(["task", "measure", "value", "± error", "questions"]);
        for task in &self.tasks {
            for Summary { measure, value, standard_error, questions } in &task.measures {
                let (value, error) = with_error(*measure, *value, *standard_error);
                table.row([task.task.clone(), measure.name().into(), value, error, questions.to_string()]);
            }
        }
        table
    }
}
