use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use burn::tensor::Device;
use clap::Args;
use engram_config::{Account, DataConfig, RunConfig};
use engram_data::{Corpus, Tokenizer, TokenizerTraining};
use engram_infer::{Dtype, PromptOptions, Request, Sampling};
use engram_train::{HeldOut, Trained};
use serde::Serialize;

use super::{data, generate, inspect, print, tokenizer};
use crate::common_text;
use crate::device::DeviceKind;
use crate::failure::{Interrupted, refuse};
use crate::files::write_file;
use crate::gate_map::{self, Canvas};
use crate::gate_page;
use crate::interrupt;
use crate::loss_chart::{self, Curve};
use crate::metrics::{self, Metric};
use crate::note::note;
use crate::number::{duration, short};
use crate::opened_memories::MemoryOptions;
use crate::progress::Progress;
use crate::run::Run;
use crate::served::{self, Served};
use crate::table::Table;

/// The two models: one with memory, and a baseline of the same size and cost with more experts.
const CONFIGS: [(&str, &str); 2] = [
    ("memory", include_str!("../../../../configs/quickstart-memory.toml")),
    ("baseline", include_str!("../../../../configs/quickstart-baseline.toml")),
];

/// Held-out passages. Their names and set phrases occur in the training text; the sentences do not.
const PASSAGES: [&str; 6] = [
    "After World War I and the dissolution of the Ottoman Empire, the League of Nations awarded Britain the mandate \
     to govern much of the Middle East.",
    "After World War II, Bosnia and Herzegovina joined the Socialist Federal Republic of Yugoslavia (SFRY).",
    "The following year, the European Coal and Steel Community (ECSC) was set up when six members -- Belgium, \
     France, West Germany, Italy, Luxembourg, and the Netherlands -- signed the Treaty of Paris.",
    "With regard to one of its items, the increase in the efficiency of the Interstate Commerce Commission, the \
     House of Representatives has already acted;",
    "The Vladivostok negotiations with the Soviet Union represent a major step in moderating strategic arms \
     competition.",
    "As both steel and curse sank to the socket, as if sucked into a morass, Moby Dick sideways writhed;",
];

/// The beginning of the sample.
const PROMPT: &str = "The President of the United States";

/// Train a small model with memory and its baseline, and show what the memory does.
///
/// The corpus is part of the program: speeches, plays, a novel and an almanac, all in the public domain. Both models
/// have the same number of parameters, the same number active per token, and see the same tokens in the same order.
/// The same command resumes an interrupted run.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram quickstart
  engram quickstart --seed 1 --out runs/quickstart-1
  engram quickstart --steps 50 --out runs/glance")]
pub(crate) struct Quickstart {
    /// Output folder.
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    out: PathBuf,
    /// Seed of both models and of the order of the data.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Train for only N steps. The schedule is shortened to fit.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Device to compute on.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
}

/// The results of one of the two models.
#[derive(Debug, Serialize)]
struct Outcome {
    name: &'static str,
    total_parameters: u64,
    active_parameters: u64,
    memory_parameters: u64,
    training_flops_per_token: u64,
    steps: u64,
    tokens: u64,
    /// Seconds spent in training steps.
    seconds: f64,
    /// Mean over the last twentieth of the steps, in nats per token.
    training_loss: f64,
    held_out: HeldOut,
}

impl Quickstart {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let begun = Instant::now();
        interrupt::listen()?;
        let device = self.device.open()?;
        let data = self.prepare()?;
        let configs = CONFIGS
            .iter()
            .map(|(name, text)| self.config(text, &data).with_context(|| format!("the {name} configuration")))
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.train(&configs, &device)?;
        self.show(&configs, &device)?;
        note(format_args!("done in {}", duration(begun.elapsed())));
        Ok(())
    }

    /// Makes the tokenizer and the shards if they are missing.
    fn prepare(&self) -> anyhow::Result<DataConfig> {
        let out = &self.out;
        std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        let (train, valid) = (common_text::train()?, common_text::held_out()?);
        let path = out.join("tokenizer.json");
        let tokenizer = if path.exists() {
            Tokenizer::load(&path)?
        } else {
            let vocabulary = parse(CONFIGS[0].1)?.model.vocabulary;
            let options = TokenizerTraining { vocabulary, ..TokenizerTraining::default() };
            let tokenizer = tokenizer::train(&train, &options)?;
            tokenizer.save(&path)?;
            tokenizer
        };
        let shards = |corpus: &Corpus, name: &str| -> anyhow::Result<PathBuf> {
            let folder = out.join("data").join(name);
            if !folder.exists() {
                data::prepare(corpus, &tokenizer, &folder, 0.0)?;
            }
            Ok(folder.join("train"))
        };
        Ok(DataConfig::one(shards(&train, "train")?, Some(shards(&valid, "held-out")?), path))
    }

    /// An embedded configuration over the prepared data.
    fn config(&self, text: &str, data: &DataConfig) -> anyhow::Result<RunConfig> {
        let mut config = parse(text)?;
        config.data = data.clone();
        config.train.seed = self.seed;
        if let Some(steps) = self.steps {
            // The rates follow the whole schedule in fewer steps.
            let train = &mut config.train;
            train.schedule.warmup = train.schedule.warmup * steps / train.steps;
            train.steps = steps;
        }
        config.validate().map_err(engram_train::Error::from)?;
        Ok(config)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// Trains both models in turn, one step each. Both see the same machine load, and the time left is that of both.
    fn train(&self, configs: &[RunConfig], device: &Device) -> anyhow::Result<()> {
        let mut runs = Vec::new();
        for ((name, _), config) in CONFIGS.iter().zip(configs) {
            runs.push(self.begin_or_go_on(config, &self.folder(name), device)?);
        }
        let total: u64 = runs.iter().map(Run::steps).sum();
        let done = |runs: &[Run]| runs.iter().map(Run::step_count).sum::<u64>();
        let mut progress = Progress::new(total);
        while let Some(behind) =
            runs.iter_mut().filter(|run| !run.is_done()).min_by_key(|run| run.step_count())
        {
            if interrupt::asked() {
                runs.iter_mut().try_for_each(Run::save)?;
                drop(progress);
                return Err(Interrupted(" and saved; run the same command to resume".to_owned()).into());
            }
            behind.step()?;
            progress.show(done(&runs), || status(&runs));
        }
        Ok(())
    }

    /// Refuses a `folder` of another configuration: a table must not compare runs of different configurations.
    fn begin_or_go_on(&self, config: &RunConfig, folder: &Path, device: &Device) -> anyhow::Result<Run> {
        let newest = match engram_import::Checkpoint::open(folder) {
            Ok(checkpoint) => checkpoint,
            Err(engram_import::Error::NoCheckpoint { .. }) => {
                return Run::begin(config.clone(), folder, device);
            }
            Err(error) => return Err(error.into()),
        };
        let found = RunConfig::load(&newest.folder().join("run.toml"))?;
        if (&found.model, &found.train) != (&config.model, &config.train) {
            return refuse(format!(
                "{}: holds a quickstart of another seed, length or version; name another folder with --out",
                self.out.display()
            ));
        }
        Run::resume(config.clone(), &[], folder, device)
    }

    fn show(&self, configs: &[RunConfig], device: &Device) -> anyhow::Result<()> {
        let outcomes = CONFIGS
            .iter()
            .zip(configs)
            .map(|((name, _), config)| Outcome::of(name, config, &metrics::read(&self.folder(name))?))
            .collect::<anyhow::Result<Vec<_>>>()?;
        print(format!("\n{}\n{}\n", table(&outcomes), verdict(&outcomes)))?;

        let memory = &Trained::open(&self.folder("memory"), device)?;
        print(format!("A sample of the memory model:\n\n{PROMPT}"))?;
        let sampling = Sampling { temperature: 0.7, top_p: 0.9, seed: self.seed, ..Sampling::default() };
        let request = Request { sampling, ..Request::new(Vec::new(), 0) };
        let served =
            Served::mapped(&served::open(&self.folder("memory"))?, &MemoryOptions::default(), Dtype::F32)?;
        let (engine, codec) = served.for_one()?;
        generate::proceed(
            (&engine, &codec),
            (PROMPT, PromptOptions::default()),
            Some(80),
            request,
            &mut |text| print(text),
        )?;

        print("\n\nWhere the memory opens, in sentences that neither model has seen:\n\n")?;
        let gates =
            PASSAGES.iter().map(|text| inspect::gates(memory, text)).collect::<anyhow::Result<Vec<_>>>()?;
        print(gate_map::draw(&gates, None, Canvas::of_stdout()))?;

        let page = gate_page::page("Where the memory opens", &lead(&outcomes), &gates);
        write_file(&self.out.join("gates.html"), &page)?;
        write_file(&self.out.join("loss.svg"), &self.chart()?)?;
        let mut summary = serde_json::to_string_pretty(&outcomes)?;
        summary.push('\n');
        write_file(&self.out.join("summary.json"), &summary)?;
        let out = self.out.display();
        print(format!(
            "{out}/gates.html    the gates of every layer and stream, for a browser\n\
             {out}/loss.svg      both loss curves\n\
             {out}/summary.json  the table above\n\
             {out}/memory, {out}/baseline    checkpoints and metrics\n\n\
             Try: engram generate {out}/memory --prompt 'The Atlantic Ocean'\n"
        ))
    }

    fn chart(&self) -> anyhow::Result<String> {
        let curve = |name: &str| -> anyhow::Result<Curve> {
            let mut curve = Curve { name: name.to_owned(), ..Curve::default() };
            for metric in metrics::read(&self.folder(name))? {
                match metric {
                    Metric::Step(report) => curve.training.push((report.step, f64::from(report.loss))),
                    Metric::HeldOut { step, loss } => curve.held_out.push((step, loss.nats_per_token)),
                    Metric::SourceHeldOut { .. } => {}
                }
            }
            Ok(curve)
        };
        let curves = CONFIGS.iter().map(|(name, _)| curve(name)).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(loss_chart::figure(&curves).svg())
    }
}

impl Outcome {
    /// Results of a finished run, from its metrics.
    fn of(name: &'static str, config: &RunConfig, metrics: &[Metric]) -> anyhow::Result<Self> {
        let account = Account::of(&config.model, &config.model.table_rows()?);
        let (mut reports, mut held_out) = (Vec::new(), None);
        for metric in metrics {
            match metric {
                Metric::Step(report) => reports.push(*report),
                Metric::HeldOut { loss, .. } => held_out = Some(*loss),
                Metric::SourceHeldOut { .. } => {}
            }
        }
        let last = &reports[reports.len() - reports.len().div_ceil(20)..];
        Ok(Self {
            name,
            total_parameters: account.total,
            active_parameters: account.active,
            memory_parameters: account.memory,
            training_flops_per_token: account.training_flops(),
            steps: reports.len() as u64,
            tokens: last.last().map_or(0, |report| report.tokens),
            seconds: reports.iter().map(|report| report.seconds).sum(),
            training_loss: last.iter().map(|report| f64::from(report.loss)).sum::<f64>() / last.len() as f64,
            held_out: held_out.context("a finished run has no held-out loss")?,
        })
    }
}

fn parse(text: &str) -> anyhow::Result<RunConfig> {
    toml::from_str(text).context("an embedded configuration")
}

fn status(runs: &[Run]) -> String {
    let mut status = format!("step {}/{}", runs[0].step_count(), runs[0].steps());
    if let Some(left) = runs.iter().filter_map(Run::time_left).max() {
        status += &format!("  {} left", duration(left));
    }
    for ((name, _), run) in CONFIGS.iter().zip(runs) {
        if let Some(loss) = run.recent_loss() {
            status += &format!("  {name} {loss:.3}");
        }
    }
    status
}

fn table(outcomes: &[Outcome]) -> Table {
    let names = outcomes.iter().map(|outcome| outcome.name);
    let mut table = Table::new(std::iter::once("").chain(names));
    let mut row = |label: &str, value: &dyn Fn(&Outcome) -> String| {
        table.row(std::iter::once(label.to_owned()).chain(outcomes.iter().map(value)));
    };
    row("parameters", &|outcome| short(outcome.total_parameters));
    row("  in memory tables", &|outcome| short(outcome.memory_parameters));
    row("  active per token", &|outcome| short(outcome.active_parameters));
    row("training FLOPs per token", &|outcome| short(outcome.training_flops_per_token));
    row("steps", &|outcome| outcome.steps.to_string());
    row("tokens seen", &|outcome| short(outcome.tokens));
    row("seconds of training", &|outcome| format!("{:.0}", outcome.seconds));
    row("training loss at the end, nats/token", &|outcome| format!("{:.4}", outcome.training_loss));
    row("held-out loss, nats/token", &|outcome| format!("{:.4}", outcome.held_out.nats_per_token));
    row("held-out loss, bits/byte", &|outcome| format!("{:.4}", outcome.held_out.bits_per_byte));
    table
}

/// The difference in a sentence.
fn verdict(outcomes: &[Outcome]) -> String {
    let [memory, baseline] = [0, 1].map(|index| outcomes[index].held_out.bits_per_byte);
    let percent = (memory / baseline - 1.0).abs() * 100.0;
    let relation = if memory < baseline { "less" } else { "more" };
    let difference = (memory - baseline).abs();
    format!(
        "On held-out text the memory model needs {difference:.4} bits per byte {relation} ({percent:.2} %).\n"
    )
}

/// The sentence above the heat map.
fn lead(outcomes: &[Outcome]) -> String {
    let [memory, baseline] = [0, 1].map(|index| outcomes[index].held_out.bits_per_byte);
    format!(
        "Held-out sentences; the stronger the colour, the further the gate opens. Held-out loss: {memory:.4} bits per \
         byte with memory, {baseline:.4} without, at equal size and cost."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_are_held_out() {
        let texts = |corpus: Result<Corpus, engram_data::Error>| -> Vec<String> {
            corpus.unwrap().documents().map(Result::unwrap).collect()
        };
        let (train, valid) = (texts(common_text::train()), texts(common_text::held_out()));
        for passage in PASSAGES {
            assert!(valid.iter().any(|text| text.contains(passage)), "not held out: {passage}");
            assert!(!train.iter().any(|text| text.contains(passage)), "trained on: {passage}");
        }
    }

    #[test]
    fn the_two_are_of_equal_size_and_cost() {
        let [memory, baseline] = CONFIGS.map(|(_, text)| {
            let model = parse(text).unwrap().model;
            model.validate().unwrap();
            Account::of(&model, &model.table_rows().unwrap())
        });
        let close = |a: u64, b: u64, what| {
            assert!((a as f64 / b as f64 - 1.0).abs() < 0.02, "{what}: {a} and {b}");
        };
        close(memory.total, baseline.total, "parameters");
        close(memory.active, baseline.active, "active parameters");
        close(memory.forward_flops, baseline.forward_flops, "operations");
    }

    #[test]
    fn the_last_held_out_loss_is_that_of_all_tokens() {
        for (name, text) in CONFIGS {
            assert_eq!(parse(text).unwrap().train.evaluate_tokens, None, "{name}");
        }
    }

    #[test]
    fn the_verdict_says_who_won() {
        let outcome = |name, bits_per_byte| Outcome {
            name,
            total_parameters: 1,
            active_parameters: 1,
            memory_parameters: 0,
            training_flops_per_token: 1,
            steps: 1,
            tokens: 1,
            seconds: 1.0,
            training_loss: 1.0,
            held_out: HeldOut { nats_per_token: 1.0, bits_per_byte, tokens: 1, bytes: 1 },
        };
        let won = verdict(&[outcome("memory", 1.98), outcome("baseline", 2.0)]);
        assert_eq!(won, "On held-out text the memory model needs 0.0200 bits per byte less (1.00 %).\n");
        assert!(verdict(&[outcome("memory", 2.0), outcome("baseline", 1.98)]).contains("more"));
    }
}
