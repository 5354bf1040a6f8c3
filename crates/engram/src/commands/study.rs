use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use engram_study::{
    Event, Findings, Kind, Plan, Provenance, Remaining, Speed, StudyConfig, StudyFolder, Watch, Workers,
};
use serde::Serialize;

use super::study_graft::study_graft;
use super::{print, print_json};
use crate::device::DeviceKind;
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::note::note;
use crate::number::{duration, short};
use crate::progress::Progress;
use crate::provenance::{self, machine, program, quoted};
use crate::table::Table;

/// Measure where memory pays: train a grid of models and compare them in pairs.
///
/// A study's file is a run's configuration, the base of every arm, with a table `[study]`. See configs/studies for
/// examples. Every arm is trained with every seed, at learning rates chosen by one rule, and measured on the same
/// held-out documents. The folder then holds `report.html` (self-contained), figures as SVG and PNG, `findings.json`,
/// and `results.jsonl` with a line per run. The same command resumes an interrupted or killed study.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram study allocation --config configs/studies/allocation-cpu.toml --out runs/allocation --dry-run
  engram study allocation --config configs/studies/allocation-cpu.toml --out runs/allocation
  engram study memory --config configs/studies/memory-cpu.toml --out runs/slots --parallel 2 --json")]
pub(crate) struct Study {
    /// The study.
    #[arg(value_enum)]
    name: Name,
    /// Its configuration: `[model]`, `[data]`, `[train]` and `[study]`. Of grafts: `[study]` with `model`, `corpus`,
    /// `seeds`, `arms` and `questions`, and `[graft]` with the keys of `engram graft`.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Output folder.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Show the plan and the expected time, then stop.
    #[arg(long)]
    dry_run: bool,
    /// Train only this arm. May be repeated.
    #[arg(long = "arm", value_name = "NAME")]
    arms: Vec<String>,
    /// Number of runs at a time; they share the cores. The default is the number of cores.
    #[arg(long, value_name = "N")]
    parallel: Option<usize>,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The studies.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Name {
    /// The share of experts and memory in a fixed budget of parameters and operations.
    Allocation,
    /// The size of the memory over one backbone.
    Memory,
    /// The layers that read the memory.
    Placement,
    /// The memory without one of its parts.
    Ablation,
    /// Other uses of the parameters, and negative controls.
    Baselines,
    /// Memories grafted onto a model, beside adapters of low rank and controls.
    Graft,
}

impl Name {
    /// The kind of a study of whole trainings; none for that of grafts.
    fn kind(self) -> Option<Kind> {
        match self {
            Self::Allocation => Some(Kind::Allocation),
            Self::Memory => Some(Kind::Memory),
            Self::Placement => Some(Kind::Placement),
            Self::Ablation => Some(Kind::Ablation),
            Self::Baselines => Some(Kind::Baselines),
            Self::Graft => None,
        }
    }
}

/// The plan, as JSON.
#[derive(Debug, Serialize)]
struct Outline<'a> {
    study: Kind,
    arms: Vec<OutlineArm<'a>>,
    seeds: &'a [u64],
    pilots: usize,
    runs: usize,
    remaining: usize,
    expected_seconds: f64,
}

/// Remaining runs of arms that were not requested, and the command that trains them.
#[derive(Debug, Serialize)]
struct Rest {
    remaining: usize,
    command: String,
}

#[derive(Debug, Serialize)]
struct OutlineArm<'a> {
    name: &'a str,
    x: Option<f64>,
    #[serde(flatten)]
    costs: engram_study::Costs,
    seconds_per_step: Option<f64>,
}

impl<'a> OutlineArm<'a> {
    fn of((arm, &seconds_per_step): (&'a engram_study::Arm, &Option<f64>)) -> Self {
        Self { name: &arm.name, x: arm.x, costs: arm.costs, seconds_per_step }
    }
}

impl Study {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let Some(kind) = self.name.kind() else { return self.graft() };
        let config = StudyConfig::load(&self.config)?;
        let plan = Plan::of(kind, &config, &self.config)?;
        let only = self.arms.iter().map(|name| plan.arm(name)).collect::<engram_study::Result<Vec<_>>>()?;
        StudyFolder::check(&self.out, &plan)?;
        let workers = self.workers()?;
        interrupt::listen()?;
        let results = engram_study::read_results(&self.out)?;
        let remaining = Remaining::of(&plan, &results, &only);
        let left = remaining.all();
        let speed = workers.measure(&plan, &left, &Measuring)?;
        self.show_plan(&plan, &remaining, &workers, &speed)?;
        if self.dry_run {
            return Ok(());
        }
        let folder = StudyFolder::open(&self.out, &plan)?;
        let configuration = std::fs::read_to_string(&self.config)
            .with_context(|| format!("cannot read {}", self.config.display()))?;
        folder.write("study.toml", configuration.as_bytes())?;
        self.conduct(&workers, &plan, &folder, &only, &speed)?;
        if let Some(rest) = self.rest(&plan, &folder)? {
            return self.show_rest(&rest);
        }
        let threads = workers.threads;
        let provenance = Provenance {
            command: self.command(),
            program: program(),
            workers: format!(
                "{} at a time, {threads} thread{} each",
                workers.parallel,
                if threads == 1 { "" } else { "s" }
            ),
            configuration,
        };
        let findings = engram_study::write_up(&plan, &folder, &provenance)?;
        self.show(&findings)
    }

    fn graft(&self) -> anyhow::Result<()> {
        if !self.arms.is_empty() || self.parallel.is_some() || matches!(self.device, DeviceKind::Cuda) {
            return refuse(
                "a study of grafts trains one run at a time on the CPU: leave out --arm, --parallel and --device, and \
                 name its arms in the file",
            );
        }
        study_graft(&self.config, &self.out, self.dry_run, self.json)
    }

    fn workers(&self) -> anyhow::Result<Workers> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let parallel = match (self.parallel, self.device) {
            (Some(0), _) => return refuse("--parallel is 0, but must be at least 1"),
            (Some(parallel), _) => parallel,
            (None, DeviceKind::Cpu) => cores,
            (None, DeviceKind::Cuda) => 1,
        };
        Ok(Workers {
            device: self.device.open()?,
            parallel,
            threads: (cores / parallel).max(1),
            origin: format!("{}; {}; {}", program(), machine(), self.device.name()),
        })
    }

    /// The command of the whole study, quoted for a shell.
    fn command(&self) -> String {
        let name = self.name.kind().map_or("graft", Kind::name);
        let [config, out] = [&self.config, &self.out].map(|path| quoted(&path.to_string_lossy()));
        let mut command = format!("engram study {name} --config {config} --out {out}");
        if let Some(parallel) = self.parallel {
            command += &format!(" --parallel {parallel}");
        }
        if let DeviceKind::Cuda = self.device {
            command += " --device cuda";
        }
        command
    }

    fn show_plan(
        &self,
        plan: &Plan,
        remaining: &Remaining,
        workers: &Workers,
        speed: &Speed,
    ) -> anyhow::Result<()> {
        let all = remaining.all();
        let time = workers.expect(plan, &all, speed);
        let runs = plan.arms.len() * plan.seeds.len();
        if self.dry_run && self.json {
            return print_json(&Outline {
                study: plan.kind,
                arms: plan.arms.iter().zip(&speed.seconds_per_step).map(OutlineArm::of).collect(),
                seeds: &plan.seeds,
                pilots: plan.pilots().len(),
                runs,
                remaining: all.len(),
                expected_seconds: time.as_secs_f64(),
            });
        }
        let header =
            ["arm", "parameters", "active", "FLOPs/token", "experts", "rows", "tokens a run", "tokens/s"];
        let mut table = Table::new(header);
        for (arm, seconds) in plan.arms.iter().zip(&speed.seconds_per_step) {
            let (costs, train) = (arm.costs, &arm.config.train);
            let a_step = (train.batch * arm.config.model.context) as u64;
            table.row([
                arm.name.clone(),
                short(costs.total_parameters),
                short(costs.active_parameters),
                short(costs.forward_flops_per_token),
                costs.routed_experts.to_string(),
                short(costs.memory_rows),
                short(train.steps * a_step),
                seconds.map_or("–".into(), |seconds| short((a_step as f64 / seconds) as u64)),
            ]);
        }
        let mut text =
            format!("{table}\n{} arms × {} seeds = {runs} runs", plan.arms.len(), plan.seeds.len());
        if let Some(rule) = &plan.rates {
            let pilots = plan.pilots().len();
            text += &format!(
                ", and {pilots} pilot runs that choose among {} factors of the rates",
                rule.factors.len()
            );
        }
        text += &match all.len() {
            0 => "; all are done.\n".to_owned(),
            left => format!(
                "; {left} left, {} at a time.\nExpected time: {}, measured with a few steps of every arm.\n",
                workers.parallel,
                duration(time)
            ),
        };
        // A dry run prints the plan as its result; otherwise the plan is progress.
        if self.dry_run {
            return print(text);
        }
        note(text.trim_end());
        Ok(())
    }

    fn conduct(
        &self,
        workers: &Workers,
        plan: &Plan,
        folder: &StudyFolder,
        only: &[usize],
        speed: &Speed,
    ) -> anyhow::Result<()> {
        let remaining = Remaining::of(plan, &engram_study::read_results(folder.path())?, only);
        let watch = Watching::new(plan, &remaining, workers.parallel, speed);
        let outcome = workers.conduct(plan, folder, only, &watch);
        drop(watch);
        match outcome {
            Err(engram_study::Error::Interrupted) => {
                Err(Interrupted(format!(", and saved; resume with\n  {}", provenance::command())).into())
            }
            outcome => Ok(outcome?),
        }
    }

    /// What is left if only some arms were trained.
    fn rest(&self, plan: &Plan, folder: &StudyFolder) -> anyhow::Result<Option<Rest>> {
        let remaining = Remaining::of(plan, &engram_study::read_results(folder.path())?, &[]).all().len();
        Ok((remaining > 0).then(|| Rest { remaining, command: self.command() }))
    }

    fn show_rest(&self, rest: &Rest) -> anyhow::Result<()> {
        if self.json {
            return print_json(rest);
        }
        let Rest { remaining, command } = rest;
        print(format!("{remaining} runs of other arms are left; resume with\n  {command}\n"))
    }

    fn show(&self, findings: &Findings) -> anyhow::Result<()> {
        if self.json {
            return print_json(findings);
        }
        let mut table =
            Table::new(["arm", "nats/token", "bits/byte", "difference", "± error", "95 %", "rates"]);
        for arm in &findings.arms {
            let [difference, error, interval] = match arm.difference {
                None => [const { String::new() }; 3],
                Some(found) => [
                    format!("{:+.4}", found.estimate.value),
                    format!("{:.4}", found.estimate.error),
                    format!("{:+.4} to {:+.4}", found.low, found.high),
                ],
            };
            table.row([
                arm.name.clone(),
                format!("{:.4}", arm.nats_per_token),
                format!("{:.4}", arm.bits_per_byte),
                difference,
                error,
                interval,
                format!("×{}", arm.factor),
            ]);
        }
        let mut text = format!("{table}\n");
        for statement in &findings.statements {
            text += &format!("* {statement}\n");
        }
        let out = self.out.display();
        text += &format!(
            "\n{out}/report.html     all of this, for a browser\n\
             {out}/figures         as SVG and PNG\n\
             {out}/findings.json   the numbers\n\
             {out}/results.jsonl   every run, with its loss on every held-out document\n"
        );
        print(text)
    }
}

/// An interruptible measurement of speed.
struct Measuring;

impl Watch for Measuring {
    fn event(&self, _: Event<'_>) {}

    fn stop(&self) -> bool {
        interrupt::asked()
    }
}

/// Progress over all runs, in expected milliseconds of one worker.
struct Watching<'a> {
    plan: &'a Plan,
    speed: &'a Speed,
    parallel: usize,
    total: u64,
    runs: usize,
    state: Mutex<Watched>,
}

struct Watched {
    progress: Progress,
    done: u64,
    /// The part that was done before this command started.
    before: u64,
    finished: usize,
    begun: Instant,
}

impl<'a> Watching<'a> {
    fn new(plan: &'a Plan, remaining: &Remaining, parallel: usize, speed: &'a Speed) -> Self {
        let all = remaining.all();
        let total = all.iter().map(|run| (1e3 * speed.seconds(plan, run)) as u64).sum();
        let progress = Progress::new(total);
        let state = Watched { progress, done: 0, before: 0, finished: 0, begun: Instant::now() };
        Self { plan, speed, parallel, total, runs: all.len(), state: Mutex::new(state) }
    }

    fn of_steps(&self, run: &engram_study::Run, steps: u64) -> u64 {
        let share = steps as f64 / run.config.train.steps as f64;
        (1e3 * share * self.speed.seconds(self.plan, run)) as u64
    }

    fn left(&self, state: &Watched) -> Duration {
        let elapsed = state.begun.elapsed().as_millis() as f64;
        let (here, left) = ((state.done - state.before) as f64, self.total.saturating_sub(state.done) as f64);
        // Use the expected speed for the first half minute, then the measured one.
        let pace = if elapsed < 3e4 || here == 0.0 { self.parallel as f64 } else { here / elapsed };
        Duration::from_secs_f64(left / pace / 1e3)
    }
}

impl Watch for Watching<'_> {
    fn event(&self, event: Event<'_>) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::Begun(run, step) => {
                let done = self.of_steps(run, step);
                state.done += done;
                state.before += done;
            }
            Event::Step(run, report) => {
                let step = report.step;
                state.done += self.of_steps(run, step) - self.of_steps(run, step - 1);
                let (done, left, finished) = (state.done, self.left(&state), state.finished);
                state.progress.show(done, || {
                    let (runs, left, id) = (self.runs, duration(left), &run.id);
                    let (steps, loss) = (run.config.train.steps, report.loss);
                    format!("{finished}/{runs} runs  {left} left  {id} step {step}/{steps} loss {loss:.3}")
                });
            }
            Event::Done(run, result) => {
                state.finished += 1;
                let outcome = match result.nats_per_token {
                    Some(loss) => format!("held-out {loss:.4} nats/token"),
                    None => format!("diverged at step {}", result.steps),
                };
                let time = duration(Duration::from_secs_f64(result.seconds));
                let line = format!("{}/{} {}: {outcome}, {time}", state.finished, self.runs, run.id);
                state.progress.line(&line);
            }
        }
    }

    fn stop(&self) -> bool {
        interrupt::asked()
    }
}
