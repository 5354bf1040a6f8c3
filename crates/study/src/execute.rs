//! Executes runs, several at a time.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use engram_import::Checkpoint;
use engram_train::{StepReport, Trainer};
use serde::{Deserialize, Serialize};

use crate::arm::Arm;
use crate::error::{Error, Result};
use crate::folder::StudyFolder;
use crate::measure::{Documents, Positions};
use crate::plan::{Factor, Plan, Run};
use crate::results::{ResultsLog, RunResult, read_results};

/// The means of executing runs.
#[derive(Debug, Clone)]
pub struct Workers {
    /// The device.
    pub device: Device,
    /// Number of runs at a time.
    pub parallel: usize,
    /// Number of threads per run.
    pub threads: usize,
    /// The program, machine and device, as stored in results.
    pub origin: String,
}

/// The workers' speed while all of them work: seconds per step of every arm; none if it was not measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// By arm of the plan.
    pub seconds_per_step: Vec<Option<f64>>,
}

/// Events of a study.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A run starts, or resumes, at a step.
    Begun(&'a Run, u64),
    /// A run took a step.
    Step(&'a Run, &'a StepReport),
    /// A run finished.
    Done(&'a Run, &'a RunResult),
}

/// Receives events, and decides whether to stop.
pub trait Watch: Sync {
    /// Handles an event.
    fn event(&self, event: Event<'_>);
    /// Whether to stop in an orderly way.
    fn stop(&self) -> bool;
}

impl Workers {
    /// Measures the speed with a few steps of every arm that has one of `runs`, in all workers at once. Counts of
    /// operations are not enough: an inactive expert also costs optimiser time.
    ///
    /// # Errors
    /// When the steps fail, or `watch` asked to stop.
    pub fn measure(&self, plan: &Plan, runs: &[Run], watch: &dyn Watch) -> Result<Speed> {
        let of_arm = |arm: usize| runs.iter().find(|run| run.arm == arm);
        let queue = Mutex::new((0..plan.arms.len()).filter_map(of_arm).collect::<VecDeque<_>>());
        let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
        let measured = self.each(|| {
            let mut measured = Vec::new();
            while let Some(run) = next() {
                if watch.stop() {
                    return Err(Error::Interrupted);
                }
                match self.seconds_per_step(run) {
                    Ok(seconds) => measured.push((run.arm, seconds)),
                    // Its result will report the divergence.
                    Err(Error::Run { source, .. })
                        if matches!(*source, engram_train::Error::Diverged { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(measured)
        })?;
        let mut seconds_per_step = vec![None; plan.arms.len()];
        measured.into_iter().flatten().for_each(|(arm, seconds)| seconds_per_step[arm] = Some(seconds));
        Ok(Speed { seconds_per_step })
    }

    fn seconds_per_step(&self, run: &Run) -> Result<f64> {
        const STEPS: u32 = 3;
        let scratch = tempfile::tempdir().map_err(Error::file("create", std::env::temp_dir()))?;
        let failed = |source| Error::Run { run: run.id.clone(), source: Box::new(source) };
        let mut trainer = Trainer::new(run.config.clone(), scratch.path(), &self.device).map_err(failed)?;
        // The first step also fills caches and prefetches a batch.
        trainer.step().map_err(failed)?;
        let begun = Instant::now();
        (0..STEPS).try_for_each(|_| trainer.step().map(|_| ())).map_err(failed)?;
        Ok(begun.elapsed().as_secs_f64() / f64::from(STEPS))
    }

    /// Executes `runs`, none of which has a result yet, and adds their results to `log`.
    ///
    /// # Errors
    /// When a run fails, or `watch` asked to stop. Started runs have then saved a checkpoint.
    pub fn carry_out(
        &self,
        plan: &Plan,
        positions: &Positions,
        runs: Vec<Run>,
        folder: &StudyFolder,
        log: &ResultsLog,
        watch: &dyn Watch,
    ) -> Result<()> {
        let queue = Mutex::new(VecDeque::from(runs));
        let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
        let failed = AtomicBool::new(false);
        let stop = || failed.load(Ordering::SeqCst) || watch.stop();
        self.each(|| {
            while let Some(run) = next() {
                if stop() {
                    return Err(Error::Interrupted);
                }
                let done = One {
                    plan,
                    positions,
                    run: &run,
                    origin: &self.origin,
                    device: &self.device,
                    watch,
                    stop: &stop,
                }
                .carry_out(&folder.run(&run.id))
                .and_then(|result| {
                    log.add(&result)?;
                    clear(plan, &run, &folder.run(&run.id))?;
                    watch.event(Event::Done(&run, &result));
                    Ok(())
                });
                if let Err(error) = done {
                    failed.store(true, Ordering::SeqCst);
                    return Err(error);
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Removes leftovers of finished runs, if the study was killed before it could.
    pub(crate) fn clear_finished(&self, plan: &Plan, folder: &StudyFolder) -> Result<()> {
        let results = read_results(folder.path())?;
        let done = |run: &Run| results.iter().any(|result| result.run == run.id);
        let runs = plan.pilots().into_iter().chain(plan.runs(&vec![Factor::Open; plan.arms.len()]));
        runs.filter(done).try_for_each(|run| clear(plan, &run, &folder.run(&run.id)))
    }

    /// Calls `work` in every worker at once, each with its threads. Of several errors, one that is not an interruption
    /// is returned.
    fn each<T: Send>(&self, work: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
        let one = || -> Result<T> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads).build();
            pool.map_err(|error| Error::Inconclusive(format!("cannot start threads: {error}")))?
                .install(&work)
        };
        let results: Vec<Result<T>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.parallel.max(1)).map(|_| scope.spawn(one)).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let (mut done, mut error) = (Vec::new(), None);
        for result in results {
            match result {
                Ok(value) => done.push(value),
                Err(Error::Interrupted) if error.is_some() => {}
                Err(found) if matches!(error, None | Some(Error::Interrupted)) => error = Some(found),
                Err(_) => {}
            }
        }
        error.map_or(Ok(done), Err)
    }

    /// The expected time of `runs` at `speed`.
    pub fn expect(&self, plan: &Plan, runs: &[Run], speed: &Speed) -> Duration {
        // A free worker takes the next run.
        let mut busy = vec![0.0_f64; self.parallel.max(1)];
        for run in runs {
            if let Some(first) = busy.iter_mut().min_by(|a, b| a.total_cmp(b)) {
                *first += speed.seconds(plan, run);
            }
        }
        Duration::from_secs_f64(busy.into_iter().fold(0.0, f64::max))
    }
}

impl Speed {
    /// Seconds of a run: its steps, and the evaluation, which is a forward pass, a third of a step's work.
    pub fn seconds(&self, plan: &Plan, run: &Run) -> f64 {
        let Some(step) = self.seconds_per_step[run.arm] else { return 0.0 };
        let train = &run.config.train;
        let tokens = (train.batch * run.config.model.context) as f64;
        step * (train.steps as f64 + plan.held_out_tokens as f64 / tokens / 3.0)
    }
}

struct One<'a> {
    plan: &'a Plan,
    positions: &'a Positions,
    run: &'a Run,
    origin: &'a str,
    device: &'a Device,
    watch: &'a dyn Watch,
    stop: &'a (dyn Fn() -> bool + Sync),
}

impl One<'_> {
    fn carry_out(&self, folder: &Path) -> Result<RunResult> {
        let begun = Instant::now();
        let trained = self.train(folder).and_then(|trainer| {
            let documents = self.positions.measure(&trainer, &mut || !(self.stop)())?;
            // The last update may have made the model diverge.
            match documents.is_finite() {
                true => Ok((trainer.step_count(), documents)),
                false => Err(engram_train::Error::Diverged { step: trainer.step_count() }),
            }
        });
        let (steps, documents) = match trained {
            Ok(trained) => trained,
            Err(engram_train::Error::Diverged { step }) => (step, Documents::default()),
            Err(engram_train::Error::Interrupted) => return Err(Error::Interrupted),
            Err(source) => {
                return Err(Error::Run { run: self.run.id.clone(), source: Box::new(source) });
            }
        };
        let Run { id, arm, seed, factor, pilot, config } = self.run;
        let arm: &Arm = &self.plan.arms[*arm];
        Ok(RunResult {
            run: id.clone(),
            arm: arm.name.clone(),
            seed: *seed,
            factor: *factor,
            pilot: *pilot,
            costs: arm.costs,
            steps,
            training_tokens: steps * (config.train.batch * config.model.context) as u64,
            seconds: begun.elapsed().as_secs_f64(),
            origin: self.origin.to_owned(),
            nats_per_token: documents.nats_per_token(),
            bits_per_byte: documents.bits_per_byte(),
            documents,
        })
    }

    fn train(&self, folder: &Path) -> engram_train::Result<Trainer> {
        let config = self.run.config.clone();
        let (steps, every) = (config.train.steps, config.train.checkpoint_every);
        let mut trainer = match Checkpoint::open(folder) {
            // Killed before its first checkpoint, or not started.
            Err(engram_import::Error::NoCheckpoint { .. }) => Trainer::new(config, folder, self.device)?,
            Err(error) => return Err(error.into()),
            Ok(_) => Trainer::resume(Some(config), folder, self.device)?,
        };
        self.watch.event(Event::Begun(self.run, trainer.step_count()));
        while trainer.step_count() < steps {
            if (self.stop)() {
                trainer.save()?;
                return Err(engram_train::Error::Interrupted);
            }
            let report = trainer.step()?;
            self.watch.event(Event::Step(self.run, &report));
            if report.step.is_multiple_of(every) || report.step == steps {
                trainer.save()?;
            }
        }
        Ok(trainer)
    }
}

/// Removes the files that a finished run no longer needs. If the study is killed here, some of them remain.
fn clear(plan: &Plan, run: &Run, folder: &Path) -> Result<()> {
    if plan.keep_checkpoints && !run.pilot {
        return Ok(());
    }
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("remove", folder)(error))
        }
        _ => Ok(()),
    }
}
