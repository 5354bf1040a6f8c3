use std::path::PathBuf;

use clap::Args;
use engram_config::RunConfig;
use engram_train::NewContext;

use super::print;
use crate::device::DeviceKind;
use crate::failure::Interrupted;
use crate::interrupt;
use crate::progress::Progress;
use crate::run::{Run, checkpoints, held_out_lines};
use crate::shell;

/// Train a model from a configuration file.
///
/// The run's folder holds `metrics.jsonl`, with a line per step and per held-out loss, and `checkpoints/`. --resume
/// continues an interrupted or killed run; the result is the same as without the interruption.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram train my.toml --out runs/small
  engram train my.toml --out runs/small --resume
  engram train longer.toml --out runs/small --resume --change train.steps,train.schedule
  engram train new-data.toml --out runs/small --resume --change data.train
  engram train my.toml --out runs/small-gpu --device cuda
  engram train other-data.toml --out runs/tuned --from runs/small
  engram train new-data.toml --out runs/continued --continue runs/small
  engram train long.toml --out runs/long --extend-context runs/small

--continue starts from a checkpoint's weights, memory and optimiser states, with the data, schedule and steps of the new
configuration. Its `[model]`, `[text]` and tokenizer are the checkpoint's, and so are `train.optimizer.momentum`,
`train.optimizer.betas` and the optimiser in `[train.memory]`. --resume continues such a run as any other.

--from and --extend-context begin with a checkpoint's weights and memory; steps, rates and data are those of the new
configuration, whose `[model]` is the checkpoint's. For --extend-context its `context` is larger, and usually its rotary
positions are stretched:

  [model.attention.yarn]
  original_context = 512        # the checkpoint's
  scale = 10.0")]
pub(crate) struct Train {
    /// Configuration: `[model]`, `[data]` and `[train]`.
    config: PathBuf,
    /// Folder of the run.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Continue from the newest checkpoint in the run's folder. Settings that decide what the run learns must equal the
    /// checkpoint's, unless --change names them.
    #[arg(long)]
    resume: bool,
    /// Settings in which the configuration may differ from the checkpoint, such as `train.seed` or all of
    /// `train.optimizer`. `data.train` and `data.source` start other data from its beginning.
    #[arg(long, value_name = "KEY,…", value_delimiter = ',', requires = "resume")]
    change: Vec<String>,
    /// Start with the weights and memory of a checkpoint, or of a run's newest.
    #[arg(long, value_name = "CHECKPOINT", conflicts_with_all = ["resume", "extend_context"])]
    from: Option<PathBuf>,
    /// Start with the weights and memory of a checkpoint, or of a run's newest, at a longer context.
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "resume")]
    extend_context: Option<PathBuf>,
    /// Continue the training of a checkpoint, or of a run's newest, on the configuration's data: weights, memory and the
    /// state of all optimisers are kept; steps and schedule start at 0.
    #[arg(long = "continue", value_name = "CHECKPOINT", conflicts_with_all = ["resume", "from", "extend_context"])]
    continued: Option<PathBuf>,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Number of steps of the whole run, instead of the configuration's.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
}

impl Train {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut config = RunConfig::load(&self.config)?;
        if let Some(steps) = self.steps {
            config.train.steps = steps;
            config.validate().map_err(engram_train::Error::from)?;
        }
        interrupt::listen()?;
        let device = self.device.open()?;
        let mut run = match (&self.from, &self.extend_context, &self.continued) {
            (Some(from), ..) => Run::from_checkpoint(config, from, NewContext::Any, &self.out, &device)?,
            (_, Some(from), _) => Run::from_checkpoint(config, from, NewContext::Longer, &self.out, &device)?,
            (.., Some(from)) => Run::continue_from(config, from, &self.out, &device)?,
            _ if self.resume => Run::resume(config, &self.changes(), &self.out, &device)?,
            _ => Run::begin(config, &self.out, &device)?,
        };
        self.go_on(&mut run)?;
        let checkpoints = checkpoints(&self.out);
        print(format!("{} steps done; checkpoints are in {}\n", run.step_count(), checkpoints.display()))
    }

    /// The settings that may differ; --steps on the command line allows its own.
    fn changes(&self) -> Vec<String> {
        let steps = self.steps.map(|_| "train.steps".to_owned());
        self.change.iter().cloned().chain(steps).collect()
    }

    fn go_on(&self, run: &mut Run) -> anyhow::Result<()> {
        let mut progress = Progress::new(run.steps());
        while !run.is_done() {
            if interrupt::asked() {
                run.save()?;
                drop(progress);
                return Err(Interrupted(self.how_to_go_on(run)).into());
            }
            if let Some(held_out) = run.step()? {
                held_out_lines(run.step_count(), &held_out).iter().for_each(|line| progress.line(line));
            }
            progress.show(run.step_count(), || run.status());
        }
        Ok(())
    }

    fn how_to_go_on(&self, run: &Run) -> String {
        let (step, config, out) = (run.step_count(), shell::word(&self.config), shell::word(&self.out));
        let steps = self.steps.map(|steps| format!(" --steps {steps}")).unwrap_or_default();
        format!(
            " at step {step}, which is saved; resume with\n  engram train {config} --out {out}{steps} --resume"
        )
    }
}
