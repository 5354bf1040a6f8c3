use std::path::PathBuf;

use clap::Args;
use engram_eval::tasks::{Summary, summarize, use_keys};
use serde::Serialize;

use super::super::asking::{Asked, Memory, TaskArguments};
use super::super::{print, print_json};
use super::with_error;
use crate::device::DeviceKind;
use crate::interrupt;
use crate::table::Table;

/// Put tasks to a checkpoint, or to a model from outside, and count its right answers.
///
/// A task is a TOML file: configs/tasks has those of common test sets, each with the file it expects in the folder
/// of --data, or where --hub can get it. A model from outside is a GGUF file or a folder with config.json,
/// tokenizer.json and safetensors.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval tasks runs/small configs/tasks/lambada.toml --data sets
  engram eval tasks runs/small configs/tasks/*.toml --data sets --max-records 500 --out results/small
  engram eval tasks runs/small configs/tasks/arc_easy.toml --data sets --hub
  engram eval tasks SmolLM2-135M-Instruct.Q4_1.gguf configs/tasks/piqa.toml --data sets --json
  engram eval tasks runs/small my-task.toml --shots 5 --seed 1
  engram eval tasks runs/small my-task.toml --without-memory
  engram eval tasks runs/small long.toml --keys results/large/long.jsonl

--hub writes what it downloads to the folder of --data, and takes what the hub's own programs have in their cache. It
heeds HF_ENDPOINT (a mirror), HF_TOKEN (data sets with conditions), HF_HOME and HF_HUB_CACHE.

With --out every answer is kept as it comes; the same command goes on after an interruption. `engram eval compare`
sets two such folders side by side; `engram inspect sensitivity` asks with the memory on and off.")]
pub(crate) struct Tasks {
    /// A checkpoint, a run's folder, whose newest is taken, or a model from outside.
    model: PathBuf,
    #[command(flatten)]
    arguments: TaskArguments,
    /// Answers of another model to a task with [long_perplexity]: let the tokens count that it found to be key.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Switch the memory off: what the model answers without it.
    #[arg(long)]
    without_memory: bool,
    /// Folder for the answers, one file a task; one that is there is gone on with.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// What to compute on: answers take the processor.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What came of all tasks.
#[derive(Debug, Serialize)]
struct Report {
    model: PathBuf,
    /// Whether its memory was switched off.
    without_memory: bool,
    tasks: Vec<TaskReport>,
}

/// What came of one.
#[derive(Debug, Serialize)]
struct TaskReport {
    task: String,
    questions: usize,
    /// Questions whose beginning did not fit the context and was left out.
    cut: usize,
    measures: Vec<Summary>,
}

impl Tasks {
    pub(super) fn run(self) -> anyhow::Result<()> {
        // Files that cannot be used are refused before a model is loaded.
        let mut tasks = self.arguments.load()?;
        if let Some(keys) = &self.keys {
            tasks.iter_mut().try_for_each(|task| use_keys(task, keys))?;
        }
        interrupt::listen()?;
        self.arguments.fetch(&tasks)?;
        let questions = tasks.iter().map(|task| self.arguments.questions(task));
        let questions = questions.collect::<anyhow::Result<Vec<_>>>()?;
        let memory = if self.without_memory { Memory::Off } else { Memory::On };
        let model = Asked::open(&self.model, self.device, memory)?;
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
