use std::path::{Path, PathBuf};

use clap::Args;
use engram_eval::sensitivity::{Change, Estimate, FIGURES, Findings, OnOff, Quantity, TaskFinding, figures};
use engram_eval::tasks::{Outcome, Question, Task, TaskKind};
use serde::Serialize;

use crate::commands::asking::{Asked, Memory, TaskArguments};
use crate::commands::{print, print_json};
use crate::device::DeviceKind;
use crate::failure::refuse;
use crate::files::{remove_figure, write_figure, write_file};
use crate::interrupt;
use crate::note::note;
use crate::opened_memories::MemoryOptions;
use crate::provenance::{command, machine, program};
use crate::table::Table;

/// Measure how much a checkpoint's answers lose when its memory is switched off, task by task.
///
/// Asks the same questions with the memory on and off. The paper's measure is the share of the score that is retained
/// (arXiv 2601.07372, section 6.3). The log-probability of the right answer shows more for models too small to be
/// right. Tasks with `kind = "facts"` are compared with tasks with `kind = "reading"`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram inspect sensitivity runs/small configs/tasks/{triviaqa,qa_wikidata,lama,boolq,lambada}.toml --data sets --cut
  engram inspect sensitivity runs/small configs/tasks/*.toml --data sets --max-records 500 --out sensitivity/small
  engram inspect sensitivity runs/small my-facts.toml my-passages.toml --json

--out keeps every answer as it comes, in `on` and `off`; the same command resumes after an interruption.
findings.json and the figures (SVG and PNG) are written at the end.")]
pub(crate) struct Sensitivity {
    /// A checkpoint with memory, or a run's folder (its newest checkpoint is used).
    checkpoint: PathBuf,
    #[command(flatten)]
    arguments: TaskArguments,
    /// Folder for answers, findings and figures.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A task and its questions; for a task with generated answers, also questions for the right answers' likelihood.
struct Sheet {
    task: Task,
    questions: Vec<Question>,
    answers: Option<(Task, Vec<Question>)>,
}

/// Outcomes of a sheet's questions.
struct Outcomes {
    asked: Vec<Outcome>,
    /// Questions whose beginning was truncated.
    cut: usize,
    answers: Option<Vec<Outcome>>,
}

#[derive(Debug, Serialize)]
struct Report {
    /// The path, as far as it is Unicode.
    checkpoint: String,
    command: String,
    program: String,
    machine: String,
    #[serde(flatten)]
    findings: Findings,
}

impl Sensitivity {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let tasks = self.arguments.load()?;
        interrupt::listen()?;
        self.arguments.fetch(&tasks)?;
        let sheets = tasks.into_iter().map(|task| Sheet::of(task, &self.arguments));
        let sheets = sheets.collect::<anyhow::Result<Vec<_>>>()?;
        // Refuse a model without memory before asking anything.
        let off = self.put(&sheets, Memory::Off)?;
        let on = self.put(&sheets, Memory::On)?;
        let finding = |((sheet, on), off): ((&Sheet, &Outcomes), &Outcomes)| {
            let answers = on.answers.as_deref().zip(off.answers.as_deref());
            TaskFinding::of(
                (sheet.task.name(), sheet.task.kind()),
                on.cut,
                OnOff { on: &on.asked, off: &off.asked },
                answers.map(|(on, off)| OnOff { on, off }),
            )
        };
        let found = sheets.iter().zip(&on).zip(&off).map(finding).collect::<Result<Vec<_>, _>>()?;
        let report = Report {
            checkpoint: self.checkpoint.display().to_string(),
            command: command(),
            program: program(),
            machine: machine(),
            findings: Findings::of(found),
        };
        if let Some(out) = &self.out {
            report.write(out)?;
        }
        if self.json { print_json(&report) } else { print(report.text()) }
    }

    fn put(&self, sheets: &[Sheet], memory: Memory) -> anyhow::Result<Vec<Outcomes>> {
        let model = Asked::open(
            &self.checkpoint,
            &MemoryOptions::default(),
            (self.device, self.arguments.dtype),
            memory,
        )?;
        let folder = if memory == Memory::On { "on" } else { "off" };
        let out = self.out.as_ref().map(|out| out.join(folder));
        let put = |task: &Task, questions: &[Question]| {
            model.put((task, questions), &self.arguments, out.as_deref())
        };
        let of_sheet = |sheet: &Sheet| {
            let (asked, cut) = put(&sheet.task, &sheet.questions)?;
            let answers = sheet.answers.as_ref().map(|(task, questions)| put(task, questions)).transpose()?;
            Ok(Outcomes { asked, cut, answers: answers.map(|(outcomes, _)| outcomes) })
        };
        sheets.iter().map(of_sheet).collect()
    }
}

impl Sheet {
    fn of(task: Task, arguments: &TaskArguments) -> anyhow::Result<Self> {
        let questions = arguments.questions(&task)?;
        if questions.len() < 2 {
            let name = task.name();
            return refuse(format!(
                "{name}: a single question has no error; ask at least two (--max-records, or more data)"
            ));
        }
        let answers = match task.answers() {
            Some(task) => Some((arguments.questions(&task)?, task)),
            None => None,
        };
        Ok(Self { task, questions, answers: answers.map(|(questions, task)| (task, questions)) })
    }
}

impl Report {
    fn write(&self, out: &Path) -> anyhow::Result<()> {
        let folder = out.join("figures");
        let drawn = figures(&self.findings);
        // Remove figures of earlier findings.
        for name in FIGURES.into_iter().filter(|name| drawn.iter().all(|(drawn, _)| drawn != name)) {
            remove_figure(&folder, name)?;
        }
        for (name, figure) in drawn {
            write_figure(&folder, name, &figure.svg())?;
        }
        let path = out.join("findings.json");
        write_file(&path, &(serde_json::to_string_pretty(self)? + "\n"))?;
        note(format_args!("wrote {}", path.display()));
        Ok(())
    }

    fn text(&self) -> String {
        let likelihoods = self.changes(Quantity::Likelihood, |task| task.likelihood);
        let mut text = format!("Log-probability of the right answer, nats per token\n{likelihoods}");
        let is_any = |of: fn(&TaskFinding) -> bool| self.findings.tasks.iter().any(of);
        if is_any(|task| task.among_choices.is_some()) {
            let choices = self.changes(Quantity::AmongChoices, |task| task.among_choices);
            text += &format!(
                "\nLog-probability of the right one among the choices, nats per question\n{choices}"
            );
        }
        if is_any(|task| task.score.is_some()) {
            text += &format!("\nScores\n{}", self.scores());
        }
        text.push('\n');
        for statement in &self.findings.statements {
            text += &format!("* {statement}\n");
        }
        text
    }

    /// The tasks that have the quantity, and the kinds with several tasks.
    fn changes(&self, quantity: Quantity, of: fn(&TaskFinding) -> Option<Change>) -> Table {
        let header = ["task", "kind", "questions", "memory on", "memory off", "off minus on", "± error"];
        let mut table = Table::new(header);
        let pair = |found: Estimate| [format!("{:+.4}", found.value), format!("{:.4}", found.error)];
        for task in &self.findings.tasks {
            let Some(Change { on, off, difference }) = of(task) else { continue };
            let first = [task.task.clone(), kind(task), task.questions.to_string()];
            let values = [format!("{on:.4}"), format!("{off:.4}")];
            table.row(first.into_iter().chain(values).chain(pair(difference)));
        }
        for (name, kind, mean) in self.means(quantity) {
            table.row([name, kind].into_iter().chain([const { String::new() }; 3]).chain(pair(mean)));
        }
        table
    }

    fn scores(&self) -> Table {
        let mut table = Table::new([
            "task",
            "kind",
            "guess",
            "memory on",
            "memory off",
            "off minus on",
            "± error",
            "retained",
            "± error",
        ]);
        let percent = |value: f64| format!("{:.2} %", 100.0 * value);
        let pair = |found: Option<Estimate>| match found {
            Some(found) => [percent(found.value), percent(found.error)],
            None => ["–".to_owned(), String::new()],
        };
        for task in &self.findings.tasks {
            let Some(score) = &task.score else { continue };
            let first = [task.task.clone(), kind(task), percent(score.guess)];
            let change = score.change;
            let scores = [percent(change.on), percent(change.off)];
            let [difference, retained] = [pair(Some(change.difference)), pair(score.retained)];
            table.row(first.into_iter().chain(scores).chain(difference).chain(retained));
        }
        let retained: Vec<_> = self.means(Quantity::Retained).collect();
        for (name, kind, difference) in self.means(Quantity::Score) {
            let mean = retained.iter().find(|(_, of, _)| *of == kind).map(|(.., mean)| *mean);
            let blanks = [const { String::new() }; 3];
            table.row([name, kind].into_iter().chain(blanks).chain(pair(Some(difference))).chain(pair(mean)));
        }
        table
    }

    /// For every kind with several tasks: a name, the kind, and the mean.
    fn means(&self, quantity: Quantity) -> impl Iterator<Item = (String, String, Estimate)> {
        self.findings.groups.iter().filter_map(move |group| {
            let mean = group.means.iter().find(|mean| mean.quantity == quantity)?;
            let name = format!("mean of {}", mean.tasks);
            (mean.tasks > 1).then(|| (name, group.kind.name().to_owned(), mean.mean))
        })
    }
}

fn kind(task: &TaskFinding) -> String {
    task.kind.map_or("–", TaskKind::name).to_owned()
}
