use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use engram_data::Corpus;
use engram_study::{GraftFindings, GraftMaterial, GraftResult, GraftStudy, GraftWatch};
use engram_train::GraftStep;

use super::divided_corpus::divided;
use super::{print, print_json};
use crate::common_text;
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::neutral_text;
use crate::note::note;
use crate::number::{duration, short};
use crate::progress::Progress;
use crate::provenance::{self, machine, program};
use crate::served;
use crate::table::Table;
use crate::work_lock::WorkLock;

/// Carries out or resumes the study of grafts that the file `config` describes, in the folder `out`.
pub(crate) fn study_graft(config: &Path, out: &Path, dry_run: bool, json: bool) -> anyhow::Result<()> {
    let study = GraftStudy::load(config)?;
    GraftStudy::check(out)?;
    let model = served::open(&study.study.model)?;
    if model.config().model.memory.is_some() {
        return refuse(format!(
            "{}: this model has a memory already: name one without",
            study.study.model.display()
        ));
    }
    let questions = study.questions(&model)?;
    let corpus = Corpus::open(&study.study.corpus)?;
    let context = model.config().model.context;
    let neutral = common_text::held_out()?;
    let neutral = neutral_text::pieces(&neutral, model.tokenizer(), context, study.graft.neutral_tokens, 2)?;
    let remaining = study.remaining(out)?;
    let runs = study.study.arms.len() * study.study.seeds.len();
    let plan = format!(
        "{} arms and the base × {} seeds; {} of {runs} runs left; {} questions",
        study.study.arms.len(),
        study.study.seeds.len(),
        remaining.len(),
        questions.len()
    );
    if dry_run {
        return print(plan + "\n");
    }
    note(&plan);
    interrupt::listen()?;
    let how = format!("{:?}, hold out {}", study.study.corpus, study.graft.hold_out);
    let _lock = WorkLock::take(out)?;
    let [train, valid] = divided(out, (&corpus, &how), model.tokenizer(), study.graft.hold_out)?;
    study.label(out, &model, (&train, &valid))?;
    let origin = format!("{}; {}", program(), machine());
    let material = GraftMaterial {
        model: &model,
        train: &out.join("data/train"),
        valid: &valid,
        neutral: &neutral,
        questions: &questions,
        origin: &origin,
    };
    let watch = Watching::new(runs, runs - remaining.len());
    let outcome = study.conduct(out, &material, &watch);
    drop(watch);
    match outcome {
        Err(engram_study::Error::Interrupted) => {
            return Err(Interrupted(format!(", and saved; resume with\n  {}", provenance::command())).into());
        }
        outcome => outcome?,
    }
    let findings = study.write_up(out)?;
    if json {
        return print_json(&findings);
    }
    print(text(&findings, out))
}

fn text(findings: &GraftFindings, out: &Path) -> String {
    let mut table = Table::new([
        "arm",
        "dense",
        "nats/token",
        "difference",
        "± error",
        "to memory",
        "neutral",
        "KL",
        "answered",
        "answers, nats",
        "time",
    ]);
    for arm in &findings.arms {
        let or_none = |value: Option<String>| value.unwrap_or_default();
        table.row([
            arm.name.clone(),
            short(arm.dense as u64),
            format!("{:.4}", arm.nats_per_token),
            or_none(arm.difference.map(|found| format!("{:+.4}", found.value))),
            or_none(arm.difference.map(|found| format!("{:.4}", found.error))),
            or_none(arm.to_memory.map(|found| format!("{:+.4}", found.value))),
            format!("{:.4}", arm.neutral),
            format!("{:.5}", arm.divergence),
            or_none(arm.answered.map(|share| format!("{:.1} %", 100.0 * share))),
            or_none(arm.answer_nats.map(|nats| format!("{nats:.3}"))),
            duration(std::time::Duration::from_secs_f64(arm.seconds)),
        ]);
    }
    let mut text = format!(
        "{} training tokens a run, {} seeds, {} held-out tokens of {} documents, {} questions\n{table}\n",
        short(findings.training_tokens),
        findings.seeds.len(),
        short(findings.tokens),
        findings.documents,
        findings.questions
    );
    for statement in &findings.statements {
        text += &format!("* {statement}\n");
    }
    let out = out.display();
    text += &format!(
        "\n{out}/findings.json   the numbers\n\
         {out}/figures         differences, as SVG and PNG\n\
         {out}/results.jsonl   every run, with its loss on every held-out document\n"
    );
    text
}

/// Progress over all runs.
struct Watching {
    runs: usize,
    state: Mutex<(Progress, usize)>,
    begun: Instant,
}

impl Watching {
    fn new(runs: usize, done: usize) -> Self {
        Self { runs, state: Mutex::new((Progress::new(1000 * runs as u64), done)), begun: Instant::now() }
    }
}

impl GraftWatch for Watching {
    fn step(&self, run: &str, step: u64, steps: u64, report: &GraftStep) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let done = state.1;
        let share = 1000 * done as u64 + 1000 * step / steps.max(1);
        let (runs, elapsed) = (self.runs, duration(self.begun.elapsed()));
        state.0.show(share, || {
            format!("{done}/{runs} runs  {run} step {step}/{steps} loss {:.4}  {elapsed}", report.loss)
        });
    }

    fn done(&self, result: &GraftResult) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.1 += 1;
        let tokens: u64 = result.documents.iter().map(|document| document.tokens).sum();
        let nats: f64 = result.documents.iter().map(|document| document.nats).sum();
        let outcome = match result.diverged {
            true => "diverged".to_owned(),
            false => format!("held-out {:.4} nats/token", nats / tokens.max(1) as f64),
        };
        let line = format!("{}/{} {}: {outcome}", state.1, self.runs, result.run);
        state.0.line(&line);
    }

    fn stop(&self) -> bool {
        interrupt::asked()
    }
}
