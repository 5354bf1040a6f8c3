//! Task arguments, and how commands put tasks to a model.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use engram_eval::tasks::{
    AskOptions, Error, FewShot, Header, ModelScorer, Outcome, Question, RecordFile, Scorer, Task, ask,
};
use engram_import::Hub;
use engram_infer::{EngineOptions, Offline};

use crate::device::DeviceKind;
use crate::failure::{Interrupted, refuse};
use crate::hub;
use crate::interrupt;
use crate::note::note;
use crate::opened_memories::MemoryOptions;
use crate::progress::Passage;
use crate::served::{self, Numbers, Served};

/// Tasks, and how to ask them.
#[derive(Debug, Args)]
pub(super) struct TaskArguments {
    /// Task files.
    #[arg(required = true)]
    tasks: Vec<PathBuf>,
    /// Folder of the tasks' data files. The default is each task file's own folder.
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Download missing data files from the Hugging Face hub, for tasks that name a source ([hub]).
    #[arg(long)]
    hub: bool,
    /// Ask only the first N records of each data file.
    #[arg(long, value_name = "N")]
    max_records: Option<usize>,
    /// Number of solved examples before each question. The default is the task's own.
    #[arg(long, value_name = "K")]
    shots: Option<usize>,
    /// Seed for choosing the examples.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Truncate prompts longer than the model's context at their beginning. Without it, they are refused.
    #[arg(long)]
    cut: bool,
    /// Tokens computed at once.
    #[arg(long, value_name = "N", default_value_t = AskOptions::default().batch)]
    batch: usize,
    /// Precision of the weights. Answers of different precisions are kept in different folders.
    #[arg(long, value_enum, default_value = "f32")]
    pub(super) dtype: Numbers,
}

impl TaskArguments {
    /// The tasks; each needs a different name.
    pub(super) fn load(&self) -> anyhow::Result<Vec<Task>> {
        if self.batch == 0 || self.max_records == Some(0) {
            return refuse("--batch and --max-records must be at least 1");
        }
        let tasks = self.tasks.iter().map(|path| Task::load(path)).collect::<Result<Vec<_>, _>>()?;
        let mut names = HashSet::new();
        match tasks.iter().map(Task::name).find(|name| !names.insert(*name)) {
            Some(name) => refuse(format!("two tasks are called {name}; give each a different name")),
            None => Ok(tasks),
        }
    }

    /// Checks that the data files exist; downloads missing ones if the options allow it.
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
                        "{name}: cannot find {shown}; --hub downloads it from {} of the data set {} on the Hugging \
                         Face hub",
                        data.file(),
                        data.repository()
                    ));
                }
                None if self.hub => {
                    return refuse(format!(
                        "{name}: cannot find {shown}, and the task names no source on the hub ([hub]); put the file \
                         there"
                    ));
                }
                // Reading it reports the problem.
                None => {}
            }
        }
        Ok(())
    }

    /// The questions of a task.
    pub(super) fn questions(&self, task: &Task) -> anyhow::Result<Vec<Question>> {
        let few_shot = FewShot { count: self.shots, seed: self.seed };
        Ok(task.questions(self.data.as_deref(), few_shot, self.max_records)?)
    }

    fn options(&self) -> AskOptions {
        AskOptions { batch: self.batch, cut: self.cut }
    }
}

/// Whether the model reads its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    On,
    Off,
}

/// The model that is asked.
pub(super) struct Asked {
    pub(super) scorer: Box<dyn Scorer>,
    path: PathBuf,
    dtype: Numbers,
    memory: Memory,
}

impl Asked {
    /// Opens a checkpoint, or a model from outside, with the memory that `options` name.
    pub(super) fn open(
        path: &Path,
        options: &MemoryOptions,
        (device, dtype): (DeviceKind, Numbers),
        memory: Memory,
    ) -> anyhow::Result<Self> {
        let (scorer, path) = (open(path, options, (device, dtype), memory)?, path.to_owned());
        Ok(Self { scorer, path, dtype, memory })
    }

    /// The name shown to the user: the path it was opened by, its precision if not f32, and whether its memory is off.
    fn name(&self) -> String {
        let mut name = self.path.display().to_string();
        if self.dtype != Numbers::F32 {
            name += &format!(", dtype {}", self.dtype);
        }
        if self.memory == Memory::Off {
            name += ", memory off";
        }
        name
    }

    /// Asks the questions that have no answer yet in the record in the folder `out`. Returns all outcomes in the order
    /// of the questions, and the number of questions whose beginning was truncated.
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
            let kept = if out.is_some() {
                "; run the same command to resume"
            } else {
                "; use --out to keep answers"
            };
            let (done, all) = (outcomes.len(), questions.len());
            return Err(Interrupted(format!(": {name} has {done} of {all} answers{kept}")).into());
        }
        let cut = asked?;
        let seconds = begun.elapsed().as_secs_f64();
        let all = questions.len();
        let without = if cut > 0 {
            format!("; {cut} of all {all} truncated at their beginning")
        } else {
            String::new()
        };
        note(format_args!("{name}: {} questions in {seconds:.1} s{without}", pending.len()));
        outcomes.sort_by_key(|outcome| outcome.question);
        Ok((outcomes, cut))
    }
}

fn open(
    path: &Path,
    options: &MemoryOptions,
    (device, dtype): (DeviceKind, Numbers),
    memory: Memory,
) -> anyhow::Result<Box<dyn Scorer>> {
    if device != DeviceKind::Cpu {
        return refuse("answers are computed on the CPU: leave out --device");
    }
    let path = &hub::local(path)?;
    if memory == Memory::Off && !options.are_given() && engram_import::Model::is_outside(path) {
        let path = path.display();
        return refuse(format!(
            "{path}: a model from outside has no memory that could be switched off; name a checkpoint of Engram"
        ));
    }
    let model = served::open(path)?;
    let mut identity = model.identity()?;
    let path = &hub::local(path)?;
    if memory == Memory::Off && !options.are_given() && model.config().model.memory.is_none() {
        let path = path.display();
        return refuse(format!("{path}: this model has no memory that could be switched off; name another"));
    }
    if let Some(memory) = options.open(&model)?.filter(|_| options.are_given()) {
        identity += &format!(", memory {}", memory.identity()?);
    }
    let engram_infer::Model { decoder, memories, .. } = Served::mapped(&model, options, dtype.dtype())?.model;
    if dtype != Numbers::F32 {
        identity += &format!(", dtype {dtype}");
    }
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
