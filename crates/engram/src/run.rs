//! A training run in its folder: steps, held-out losses, metrics and checkpoints.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use burn::tensor::Device;
use engram_config::RunConfig;
use engram_train::{
    Continuation, Evaluation, HeldOut, NewContext, Pace, Repetition, Resumption, StepReport, Trainer,
};

use crate::metrics::{Metric, MetricsLog};
use crate::note::note;
use crate::number::{duration, short};

/// A run that advances step by step.
#[derive(Debug)]
pub(crate) struct Run {
    trainer: Trainer,
    metrics: MetricsLog,
    pace: Pace,
    /// The last few steps.
    recent: VecDeque<StepReport>,
    held_out: Option<HeldOut>,
    /// Step of the newest checkpoint.
    saved: u64,
}

/// Number of steps that the displayed speed and loss are averaged over.
const RECENT: usize = 20;

impl Run {
    /// Starts a run in `folder` and saves a checkpoint of step 0.
    pub(crate) fn begin(config: RunConfig, folder: &Path, device: &Device) -> anyhow::Result<Self> {
        Self::begun(Trainer::new(config, folder, device)?, folder)
    }

    /// Starts a run in `folder` with the weights and memory of another run's checkpoint.
    pub(crate) fn from_checkpoint(
        config: RunConfig,
        from: &Path,
        context: NewContext,
        folder: &Path,
        device: &Device,
    ) -> anyhow::Result<Self> {
        Self::begun(Trainer::from_checkpoint(config, from, context, folder, device)?, folder)
    }

    /// Starts a run in `folder` with the weights, memory and optimisers of another run's checkpoint.
    pub(crate) fn continue_from(
        config: RunConfig,
        from: &Path,
        folder: &Path,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let (trainer, Continuation { steps, updates, repeats }) =
            Trainer::continue_from(config, from, folder, device)?;
        note(format_args!(
            "continues after step {steps}: the optimisers keep the state of {updates} updates"
        ));
        if repeats {
            note(
                "the data are those of the checkpoint's run and come in the same order; another `train.seed` draws \
                 another order",
            );
        }
        Self::begun(trainer, folder)
    }

    /// Continues from the newest checkpoint in `folder`. Settings named in `changes` may differ from the checkpoint's.
    pub(crate) fn resume(
        config: RunConfig,
        changes: &[String],
        folder: &Path,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let (trainer, resumption) = Trainer::resume_changing(Some(config), changes, folder, device)?;
        tell(&resumption, trainer.step_count());
        Self::of(trainer, folder)
    }

    /// A run before its first step, with a checkpoint of step 0.
    fn begun(trainer: Trainer, folder: &Path) -> anyhow::Result<Self> {
        let run = Self::of(trainer, folder)?;
        run.trainer.save()?;
        Ok(run)
    }

    fn of(trainer: Trainer, folder: &Path) -> anyhow::Result<Self> {
        let step = trainer.step_count();
        let metrics = MetricsLog::open(folder, step)?;
        let pace = Pace::new(step);
        for Repetition { path, seen, there } in trainer.repetitions() {
            let times = seen as f64 / there as f64;
            note(format_args!(
                "the data repeats: {} steps read {} tokens, {times:.1} times the {} of {}",
                trainer.config().train.steps,
                short(seen),
                short(there),
                path.display()
            ));
        }
        tell_unmeasured(&trainer);
        Ok(Self { trainer, metrics, pace, recent: VecDeque::new(), held_out: None, saved: step })
    }

    /// Steps taken.
    pub(crate) fn step_count(&self) -> u64 {
        self.trainer.step_count()
    }

    /// Steps of the whole run.
    pub(crate) fn steps(&self) -> u64 {
        self.trainer.config().train.steps
    }

    /// Whether the run is finished.
    pub(crate) fn is_done(&self) -> bool {
        self.step_count() >= self.steps()
    }

    /// Takes one step and does what is due after it. Returns the held-out loss if it was measured.
    pub(crate) fn step(&mut self) -> anyhow::Result<Option<Evaluation>> {
        let report = self.trainer.step()?;
        self.metrics.add(Metric::Step(report))?;
        if !report.skipped {
            self.recent.push_back(report);
        }
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        let (train, step) = (&self.trainer.config().train, report.step);
        let due = |every: u64| step.is_multiple_of(every) || step == train.steps;
        let (evaluate, save) = (due(train.evaluate_every), due(train.checkpoint_every));
        let mut held_out = None;
        if evaluate && let Some(evaluation) = self.trainer.evaluate()? {
            for (source, loss) in &evaluation.sources {
                self.metrics.add(Metric::SourceHeldOut { step, source: source.clone(), loss: *loss })?;
            }
            self.metrics.add(Metric::HeldOut { step, loss: evaluation.loss })?;
            self.held_out = Some(evaluation.loss);
            held_out = Some(evaluation);
        }
        // Where steps are skipped the weights may be beyond use: what was saved before must not make room for them.
        if save && (!report.skipped || step == train.steps) {
            self.save()?;
        }
        Ok(held_out)
    }

    /// Writes a checkpoint of this step if there is none.
    pub(crate) fn save(&mut self) -> anyhow::Result<()> {
        let step = self.step_count();
        if self.saved < step {
            // Everything up to the checkpoint must be in the log.
            self.metrics.flush()?;
            self.trainer.save().with_context(|| format!("step {step}: no checkpoint was written"))?;
            self.saved = step;
        }
        Ok(())
    }

    /// The mean loss of the last steps, in nats per token; none before the first.
    pub(crate) fn recent_loss(&self) -> Option<f64> {
        self.mean(|report| f64::from(report.loss))
    }

    /// Remaining time at the current speed; none before the first step.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        self.pace.left(self.step_count(), self.steps())
    }

    /// The state of the run in one line.
    pub(crate) fn status(&self) -> String {
        let mut status = format!("step {}/{}", self.step_count(), self.steps());
        if let Some(left) = self.time_left() {
            status += &format!("  {} left", duration(left));
        }
        if let (Some(loss), Some(seconds)) = (self.recent_loss(), self.mean(|report| report.seconds)) {
            let config = self.trainer.config();
            let speed = (config.train.batch * config.model.context) as f64 / seconds;
            status += &format!("  loss {loss:.3}  {} tokens/s", short(speed as u64));
        }
        match self.trainer.skipped_steps() {
            0 => {}
            skipped => status += &format!("  {skipped} skipped"),
        }
        if let Some(report) = self.recent.back()
            && report.epoch > 1.0
        {
            status += &format!("  epoch {:.1}", report.epoch);
        }
        if let Some(held_out) = &self.held_out {
            status += &format!("  held-out {:.3} bits/byte", held_out.bits_per_byte);
        }
        status
    }

    fn mean(&self, value: impl Fn(&StepReport) -> f64) -> Option<f64> {
        let sum: f64 = self.recent.iter().map(value).sum();
        (!self.recent.is_empty()).then(|| sum / self.recent.len() as f64)
    }
}

/// Names the sources whose held-out losses are not measured.
fn tell_unmeasured(trainer: &Trainer) {
    let data = &trainer.config().data;
    if data.sources().iter().all(|source| source.valid.is_none()) {
        let key = if data.source.is_empty() { "`data.valid`" } else { "`valid` in `[[data.source]]`" };
        note(format_args!("no held-out losses, because {key} is not set"));
    }
    for source in trainer.sources_without_held_out() {
        note(format_args!("the source {source:?} has no held-out loss, because its `valid` is not set"));
    }
}

/// Reports what a resumed run does differently.
fn tell(resumption: &Resumption, step: u64) {
    for change in &resumption.changes {
        note(format_args!("resumed with another setting: {change}"));
    }
    let [before, after] = resumption.schedule;
    if before != after {
        note(format_args!(
            "the schedule's rate at step {step} is {after:.3} of the peak; without the change it would be {before:.3}"
        ));
    }
    if resumption.new_data {
        note("resumed with other training data, from their beginning");
    }
}

/// Held-out losses, a line each: those of named sources, then the mean.
pub(crate) fn held_out_lines(step: u64, evaluation: &Evaluation) -> Vec<String> {
    let line = |what: &str, loss: &HeldOut| {
        let HeldOut { nats_per_token, bits_per_byte, .. } = loss;
        format!("step {step}: {what} {nats_per_token:.4} nats/token, {bits_per_byte:.4} bits/byte")
    };
    let sources = evaluation.sources.iter().map(|(name, loss)| line(&format!("held-out {name}"), loss));
    let all = if evaluation.sources.is_empty() { "held-out" } else { "held-out, mean by weight" };
    sources.chain([line(all, &evaluation.loss)]).collect()
}

/// The folder of a run's checkpoints.
pub(crate) fn checkpoints(folder: &Path) -> PathBuf {
    folder.join("checkpoints")
}
