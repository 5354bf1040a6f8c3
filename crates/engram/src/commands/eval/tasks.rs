use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use engram_eval::outside::OutsideModel;
use engram_eval::tasks::{
    AskOptions, Error, FewShot, Header, Outcome, Question, RecordFile, Scorer, Summary, Task, ask, summarize,
};
use engram_train::Trained;
use serde::Serialize;

use super::super::{print, print_json};
use super::with_error;
use crate::device::DeviceKind;
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::progress::Passage;
use crate::table::Table;

/// Put tasks to a checkpoint, or to a model from outside, and count its right answers.
///
/// A task is a TOML file: configs/tasks has those of common test sets, each with the file it expects in the folder
/// of --data. A model from outside is a GGUF file or a folder with config.json, tokenizer.json and safetensors.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval tasks runs/small configs/tasks/lambada.toml --data sets
  engram eval tasks runs/small configs/tasks/*.toml --data sets --limit 500 --out results/small
  engram eval tasks SmolLM2-135M-Instruct.Q4_1.gguf configs/tasks/piqa.toml --data sets --json
  engram eval tasks runs/small my-task.toml --shots 5 --seed 1
  engram eval tasks runs/small long.toml --keys results/large/long.jsonl

With --out every answer is kept as it comes; the same command goes on after an interruption. `engram eval compare`
sets two such folders side by side.")]
pub(crate) struct Tasks {
    /// A checkpoint, a run's folder, whose newest is taken, or a model from outside.
    model: PathBuf,
    /// Task files.
    #[arg(required = true)]
    tasks: Vec<PathBuf>,
    /// Folder that the tasks' files of records are in; without it, that of each task file.
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Ask only the first N records of each file.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Solved examples before each question, instead of as many as the task says.
    #[arg(long, value_name = "K")]
    shots: Option<usize>,
    /// Seed of their choice.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Answers of another model to a task with [long_perplexity]: let the tokens count that it found to be key.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Cut the beginning of what is longer than the model's context, instead of refusing it.
    #[arg(long)]
    cut: bool,
    /// Tokens computed at a time.
    #[arg(long, value_name = "N", default_value_t = AskOptions::default().batch)]
    batch: usize,
    /// Folder for the answers, one file a task; one that is there is gone on with.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// What to compute on; a model from outside takes the processor.
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
        if self.batch == 0 || self.limit == Some(0) {
            return refuse("--batch and --limit must be at least 1");
        }
        // Files that cannot be used are refused before a model is loaded.
        let mut tasks = self.tasks.iter().map(|path| Task::load(path)).collect::<Result<Vec<_>, _>>()?;
        if let Some(keys) = &self.keys {
            tasks.iter_mut().try_for_each(|task| task.use_keys(keys))?;
        }
        if let Some(name) = repeated(&tasks) {
            return refuse(format!("two tasks are called {name}; name each once"));
        }
        let few_shot = FewShot { count: self.shots, seed: self.seed };
        let questions = |task: &Task| task.questions(self.data.as_deref(), few_shot, self.limit);
        let questions = tasks.iter().map(questions).collect::<Result<Vec<_>, _>>()?;
        if let Some(out) = &self.out {
            std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
        }
        let model = open(&self.model, self.device)?;
        interrupt::listen()?;
        let mut reports = Vec::new();
        for (task, questions) in tasks.iter().zip(&questions) {
            reports.push(self.put(&*model, task, questions)?);
        }
        let report = Report { model: self.model, tasks: reports };
        if self.json { print_json(&report) } else { print(report.table().to_string()) }
    }

    /// Asks what has not been answered yet.
    fn put(&self, model: &dyn Scorer, task: &Task, questions: &[Question]) -> anyhow::Result<TaskReport> {
        let options = AskOptions { batch: self.batch, cut: self.cut };
        let (mut record, mut outcomes) = match &self.out {
            Some(out) => {
                let header = Header::new(task, questions, options, (model, &self.model));
                let (record, outcomes) = RecordFile::open(&out.join(task.record_name()), &header, questions)?;
                (Some(record), outcomes)
            }
            None => (None, Vec::new()),
        };
        let pending = pending(&outcomes, questions.len());
        let mut each = |outcome: Outcome| {
            record.as_mut().map_or(Ok(()), |record| record.add(&outcome))?;
            outcomes.push(outcome);
            Ok(())
        };
        let begun = Instant::now();
        let mut passage: Option<Passage> = None;
        let mut progress = |done, total| {
            passage.get_or_insert_with(|| Passage::of_tokens(task.name(), total)).show(done, total)
        };
        let asked = ask(model, (task, questions), &pending, options, &mut each, &mut progress);
        drop(passage);
        if let Err(Error::Interrupted) = asked {
            let kept = if self.out.is_some() {
                "; the same command goes on"
            } else {
                "; --out would keep the answers"
            };
            let (done, all) = (outcomes.len(), questions.len());
            return Err(Interrupted(format!(": {} has {done} of {all} answers{kept}", task.name())).into());
        }
        let cut = asked?;
        eprintln!("{}: {} questions in {:.1} s", task.name(), pending.len(), begun.elapsed().as_secs_f64());
        outcomes.sort_by_key(|outcome| outcome.question);
        let (task, measures) = (task.name().to_owned(), summarize(&outcomes));
        Ok(TaskReport { task, questions: outcomes.len(), cut, measures })
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

/// Opens a checkpoint, or a model from outside.
pub(super) fn open(path: &Path, device: DeviceKind) -> anyhow::Result<Box<dyn Scorer>> {
    if OutsideModel::is_one(path) {
        if device != DeviceKind::Cpu {
            return refuse("a model from outside computes on the processor: leave --device out");
        }
        return Ok(Box::new(OutsideModel::open(path)?));
    }
    Ok(Box::new(Trained::open(path, &device.open()?)?))
}

/// A name that two tasks have.
fn repeated(tasks: &[Task]) -> Option<&str> {
    let mut names = std::collections::HashSet::new();
    tasks.iter().map(Task::name).find(|name| !names.insert(*name))
}

/// The questions without an outcome.
fn pending(outcomes: &[Outcome], questions: usize) -> Vec<usize> {
    let mut open = vec![true; questions];
    outcomes.iter().for_each(|outcome| open[outcome.question] = false);
    (0..questions).filter(|&question| open[question]).collect()
}
