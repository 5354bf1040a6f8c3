//! Tasks as arguments, and how they are put to a model: what all commands that ask have in common.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use engram_eval::tasks::{
    AskOptions, Error, FewShot, Header, ModelScorer, Outcome, Question, RecordFile, Scorer, Task, ask,
};
use engram_import::Hub;
use engram_infer::{Dtype, EngineOptions, Offline};

use crate::device::DeviceKind;
use crate::failure::{Interrupted, refuse};
use crate::hub;
use crate::interrupt;
use crate::note::note;
use crate::opened_memories::MemoryOptions;
use crate::progress::Passage;
use crate::served::{self, Served};

/// Tasks, and how they are asked.
#[derive(Debug, Args)]
pub(super) struct TaskArguments {
    /// Task files.
    #[arg(required = true)]
    tasks: Vec<PathBuf>,
    /// Folder that the tasks' files of records are in; without it, that of each task file.
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Download files that are not there from the Hugging Face hub, where a task says where they are ([hub]).
    #[arg(long)]
    hub: bool,
    /// Ask only the first N records of each file.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Solved examples before each question, instead of as many as the task says.
    #[arg(long, value_name = "K")]
    shots: Option<usize>,
    /// Seed of their choice.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Cut the beginning of what is longer than the model's context, instead of refusing it.
    #[arg(long)]
    cut: bool,
    /// Tokens computed at a time.
    #[arg(long, value_name = "N", default_value_t = AskOptions::default().batch)]
    batch: usize,
}

impl TaskArguments {
    /// The tasks, each of a name of its own.
    pub(super) fn load(&self) -> anyhow::Result<Vec<Task>> {
        if self.batch == 0 || self.limit == Some(0) {
            return refuse("--batch and --limit must be at least 1");
        }
        let tasks = self.tasks.iter().map(|path| Task::load(path)).collect::<Result<Vec<_>, _>>()?;
        let mut names = HashSet::new();
        match tasks.iter().map(Task::name).find(|name| !names.insert(*name)) {
            Some(name) => refuse(format!("two tasks are called {name}; name each once")),
            None => Ok(tasks),
        }
    }

    /// Sees to it that their data are there: downloads what is missing, if that was asked for.
    pub(super) fn fetch(&self, tasks: &[Task]) -> anyhow::Result<()> {
        let mut reached = None;
        for task in tasks {
            let path = task.data_path(self.data.as_deref());
            if path.exists() {
                continue;
            }
            let (name, shown) = (task.name(), path.display());
            match task.hub() {
                Some(data) if self.hub => {
                    hub::fetch(reached.get_or_insert_with(Hub::of_environment), data, &path)?;
                }
                Some(data) => {
                    return refuse(format!(
                        "{name}: {shown} is not there; --hub would make it from {} of the data set {} on the Hugging Face hub",
                        data.file(),
                        data.repository()
                    ));
                }
                None if self.hub => {
                    return refuse(format!(
                        "{name}: {shown} is not there, and the task does not say where on the hub it is ([hub]): put it there"
                    ));
                }
                // Whoever reads it says so.
                None => {}
            }
        }
        Ok(())
    }

    /// The questions of one of them.
    pub(super) fn questions(&self, task: &Task) -> anyhow::Result<Vec<Question>> {
        let few_shot = FewShot { count: self.shots, seed: self.seed };
        Ok(task.questions(self.data.as_deref(), few_shot, self.limit)?)
    }

    fn options(&self) -> AskOptions {
        AskOptions { batch: self.batch, cut: self.cut }
    }
}

/// Whether a model reads its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    On,
    Off,
}

/// A model that is asked.
pub(super) struct Asked {
    pub(super) scorer: Box<dyn Scorer>,
    path: PathBuf,
    memory: Memory,
}

impl Asked {
    /// Opens a checkpoint, or a model from elsewhere, with the memory that `options` name.
    pub(super) fn open(
        path: &Path,
        options: &MemoryOptions,
        device: DeviceKind,
        memory: Memory,
    ) -> anyhow::Result<Self> {
        let (scorer, path) = (open(path, options, device, memory)?, path.to_owned());
        Ok(Self { scorer, path, memory })
    }

    /// What people call it: the path it was opened by, and whether its memory was off.
    fn name(&self) -> String {
        let path = self.path.display();
        match self.memory {
            Memory::On => path.to_string(),
            Memory::Off => format!("{path}, memory off"),
        }
    }

    /// Asks what has no answer yet in the record in the folder `out`. Gives all outcomes in the order of the questions,
    /// and how many of all questions have their beginning cut.
    pub(super) fn put(
        &self,
        (task, questions): (&Task, &[Question]),
        arguments: &TaskArguments,
        out: Option<&Path>,
    ) -> anyhow::Result<(Vec<Outcome>, usize)> {
        let (scorer, options) = (&*self.scorer, arguments.options());
        let (mut record, mut outcomes) = match out {
            Some(out) => {
                std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
                let header = Header::new(task, questions, options, (scorer, &self.name()));
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
        let name = match self.memory {
            Memory::On => task.name().to_owned(),
            Memory::Off => format!("{}, memory off", task.name()),
        };
        let begun = Instant::now();
        let mut passage: Option<Passage> = None;
        let mut progress =
            |done, total| passage.get_or_insert_with(|| Passage::of_tokens(&name, total)).show(done, total);
        let asked = ask(scorer, (task, questions), &pending, options, &mut each, &mut progress);
        drop(passage);
        if let Err(Error::Interrupted) = asked {
            let kept =
                if out.is_some() { "; the same command goes on" } else { "; --out would keep the answers" };
            let (done, all) = (outcomes.len(), questions.len());
            return Err(Interrupted(format!(": {name} has {done} of {all} answers{kept}")).into());
        }
        let cut = asked?;
        let seconds = begun.elapsed().as_secs_f64();
        let all = questions.len();
        let without =
            if cut > 0 { format!("; of all {all}, {cut} without their beginning") } else { String::new() };
        note(format_args!("{name}: {} questions in {seconds:.1} s{without}", pending.len()));
        outcomes.sort_by_key(|outcome| outcome.question);
        Ok((outcomes, cut))
    }
}

fn open(
    path: &Path,
    options: &MemoryOptions,
    device: DeviceKind,
    memory: Memory,
) -> anyhow::Result<Box<dyn Scorer>> {
    if device != DeviceKind::Cpu {
        return refuse("answers are computed on the processor: leave --device out");
    }
    if memory == Memory::Off && !options.are_given() && engram_import::Model::is_outside(path) {
        let path = path.display();
        return refuse(format!(
            "{path}: a model from outside has no memory that could be switched off; name a checkpoint of Engram"
        ));
    }
    let model = served::open(path)?;
    let mut identity = model.identity()?;
    if memory == Memory::Off && !options.are_given() && model.config().model.memory.is_none() {
        let path = path.display();
        return refuse(format!("{path}: this model has no memory that could be switched off; name another"));
    }
    if let Some(memory) = options.open(&model)?.filter(|_| options.are_given()) {
        identity += &format!(", memory {}", memory.identity()?);
    }
    let engram_infer::Model { decoder, memories, .. } = Served::mapped(&model, options, Dtype::F32)?.model;
    let rows = memories.into_iter().next().map(|memory| memory.rows);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut offline = Offline::new(decoder, rows, EngineOptions::default().cache_bytes, threads)?;
    if memory == Memory::Off {
        offline = offline.without_memory();
        identity += ", memory off";
    }
    let scorer = ModelScorer::new(offline, model.tokenizer().clone(), model.begin(), identity);
    Ok(Box::new(scorer.until(interrupt::asked)))
}

/// The questions without an outcome.
fn pending(outcomes: &[Outcome], questions: usize) -> Vec<usize> {
    let mut open = vec![true; questions];
    outcomes.iter().for_each(|outcome| open[outcome.question] = false);
    (0..questions).filter(|&question| open[question]).collect()
}
