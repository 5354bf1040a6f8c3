use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{Args, ValueEnum};
use engram_config::{ConfigError, GraftConfig, MemoryConfig, ModelConfig, Source, load_toml, locate};
use engram_data::{Corpus, TokenShards, Tokenizer};
use engram_import::{AdapterRows, AdapterWriter, Model, memory_addressing};
use engram_train::{GraftStep, Grafter, Grafting, NgramCount};

use super::divided_corpus::divided;
use super::{print, print_json};
use crate::common_text;
use crate::corpus_options::CorpusOptions;
use crate::failure::{Interrupted, refuse};
use crate::files::refuse_unwritable;
use crate::graft_report::{Arm, Report, unused_rows};
use crate::interrupt;
use crate::neutral_text;
use crate::note::note;
use crate::number::{duration, grouped, short};
use crate::progress::Progress;
use crate::served;
use crate::shell;
use crate::work_lock::{WorkLock, holds_a_run};

/// Graft a memory onto a model that exists, and train it on a corpus.
///
/// The memory is read before chosen blocks. Its rows begin at zero, so that the model computes what it did, bit for bit.
/// Then rows and the memory's projections learn from the corpus; the model itself stays as it is. The result is an
/// adapter, a folder that commands take with --memory, and that fits this model alone.
///
/// Part of the corpus is held out. At the end a table says what the memory is worth there, and what it changed on text
/// that has nothing to do with the corpus. --resume continues an interrupted or killed run; the result is the same.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram graft smollm2.gguf manuals/ --out manuals.adapter
  engram graft smollm2.gguf manuals/ --out manuals.adapter --config graft.toml --compare lora
  engram graft smollm2.gguf manuals/ --out empty.adapter --steps 0
  engram generate smollm2.gguf --memory manuals.adapter --prompt \"To install the package,\"

--config names a TOML file; its keys and their defaults:

  steps = …                # by default as many as read the corpus `passes` times; 0: a memory that changes nothing
  passes = 1.0
  batch = 8                # windows per step
  context = 256            # tokens per window, or the model's context where that is shorter
  micro_batch = 4          # windows computed at once
  hold_out = 0.05          # share of the documents
  held_out_tokens = 16384
  neutral_tokens = 4096
  warmup = 0.05            # share of the steps
  beta1 = 0.9
  beta2 = 0.95
  epsilon = 1e-8
  clip = 1.0
  row_optimizer = \"adam\"   # or \"row_wise_adam\", \"balanced_momentum\", \"frozen\"
  save_every = 200
  seed = 0

  [rates]                  # Adam's largest
  rows = 0.01
  projections = 0.001      # of the memory's projections and gates
  lora = 0.001             # of --compare lora

  [memory]
  layers = [1, 15]         # by default the second and the middle block
  max_order = 3
  heads = 8
  row_width = 32
  rows_per_head = 100000

  [lora]
  rank = …                 # by default as many parameters as the memory has dense ones")]
pub(crate) struct Graft {
    /// A GGUF file, a folder with config.json, hf:org/name, a checkpoint or a run's folder. It has no memory.
    base: PathBuf,
    #[command(flatten)]
    corpus: CorpusOptions,
    /// Folder of the adapter, which must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Settings, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Steps.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Blocks before which the memory is read, counted from 0.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// Seed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Text that has nothing to do with the corpus, to measure what changed on it. By default English text that is in the
    /// program.
    #[arg(long, value_name = "CORPUS")]
    neutral: Vec<PathBuf>,
    /// Also train this on the same windows, and report what it reaches.
    #[arg(long, value_enum, value_name = "METHOD")]
    compare: Option<Comparison>,
    /// Continue from what an interrupted run saved.
    #[arg(long)]
    resume: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What a graft is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Comparison {
    /// An adapter of low rank on all matrices of the blocks, with as many dense parameters as the memory.
    Lora,
}

impl Graft {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let (config, source) = self.settings()?;
        refuse_unwritable(&self.out)?;
        self.check_work()?;
        let model = served::open(&self.base)?;
        let memory = self.memory(&model, &config, source.as_ref())?;
        let window = config.window(model.config().model.context).map_err(located(source.as_ref()))?;
        let corpus = self.corpus.open()?;
        let neutral = self.neutral(&model, config.neutral_tokens)?;
        interrupt::listen()?;
        let _lock = WorkLock::take(&self.work())?;
        let how = format!("{:?}, hold out {}", self.corpus, config.hold_out);
        let [train, valid] = divided(&self.work(), (&corpus, &how), model.tokenizer(), config.hold_out)?;
        let addressing = memory_addressing(&memory, model.tokenizer())?;
        let ngrams = NgramCount::of(&train, &addressing, &memory.rows_per_head)?;
        let (training_tokens, held_out_tokens) = (train.len(), valid.len());
        let steps = config.steps_for(training_tokens, window);
        if steps > 0 {
            unused_rows(&ngrams).iter().for_each(note);
        }
        let rows = addressing.layers().iter().map(engram_address::LayerAddress::rows).sum::<u64>();
        let rows = rows * memory.row_width as u64;
        let texts = Texts { held_out: (&valid, model.tokenizer()), neutral: &neutral };
        let what = Grafting::Memory { config: Box::new(memory.clone()), addressing: Box::new(addressing) };
        let grafter = self.train("memory", Grafter::new(&model, what, config.clone(), train)?, &config)?;
        let (held_out_before, arm) = self.measure("memory".into(), rows, &grafter, &texts)?;
        let dense = grafter.dense_parameters();
        let written = self.write(&model, &memory, &grafter)?;
        drop(grafter);
        let mut arms = vec![arm];
        if self.compare.is_some() {
            let what = Grafting::LowRank { parameters: dense };
            let train = TokenShards::open(&self.work().join("data/train"))?;
            let grafter = self.train("lora", Grafter::new(&model, what, config.clone(), train)?, &config)?;
            let name = format!("LoRA, rank {}", grafter.rank().unwrap_or_default());
            arms.push(self.measure(name, 0, &grafter, &texts)?.1);
        }
        let report = Report {
            base: model.name(),
            layers: memory.layers.clone(),
            training_tokens,
            held_out_tokens,
            window,
            steps,
            tokens_read: steps * (config.batch * window) as u64,
            ngrams,
            held_out_before,
            arms,
        };
        self.finish(written, &report)
    }

    fn settings(&self) -> anyhow::Result<(GraftConfig, Option<Source>)> {
        let (source, mut config) = match &self.config {
            Some(path) => {
                let (source, config) = load_toml::<GraftConfig>(path)?;
                (Some(source), config)
            }
            None => (None, GraftConfig::default()),
        };
        config.steps = self.steps.or(config.steps);
        config.seed = self.seed.unwrap_or(config.seed);
        if self.layers.is_some() {
            config.memory.layers.clone_from(&self.layers);
        }
        config.validate().map_err(located(source.as_ref()))?;
        Ok((config, source))
    }

    /// Where the state of a run is saved until it is done.
    fn work(&self) -> PathBuf {
        let mut name = self.out.file_name().unwrap_or_default().to_owned();
        name.push(".grafting");
        self.out.with_file_name(name)
    }

    fn check_work(&self) -> anyhow::Result<()> {
        let work = self.work();
        match (self.resume, work.exists()) {
            (false, true) if holds_a_run(&work) => refuse(format!(
                "{}: holds an interrupted run; continue with --resume, or remove it",
                work.display()
            )),
            (true, false) => {
                refuse(format!("{}: no interrupted run is here; leave out --resume to begin", work.display()))
            }
            _ => Ok(()),
        }
    }

    /// The new memory, which the model must be able to have.
    fn memory(
        &self,
        model: &Model,
        config: &GraftConfig,
        source: Option<&Source>,
    ) -> anyhow::Result<MemoryConfig> {
        let base = &model.config().model;
        if base.memory.is_some() {
            return refuse(format!(
                "{}: this model has a memory already: train it, or change its rows with `engram teach`",
                self.base.display()
            ));
        }
        let memory = config.memory.for_base(base, config.seed);
        let all = ModelConfig { memory: Some(memory.clone()), ..base.clone() };
        all.validate().map_err(|error| {
            let key = error.key.strip_prefix("model.").unwrap_or(&error.key).to_owned();
            located(source)(ConfigError::new(key, error.reason))
        })?;
        Ok(memory)
    }

    /// Pieces of text that has nothing to do with the corpus.
    fn neutral(&self, model: &Model, most: usize) -> anyhow::Result<Vec<Vec<u32>>> {
        let corpus =
            if self.neutral.is_empty() { common_text::held_out()? } else { Corpus::open(&self.neutral)? };
        // A loss needs a token and the next.
        neutral_text::pieces(&corpus, model.tokenizer(), model.config().model.context, most, 2)
    }

    /// Trains until all steps are taken, which are saved below `name`.
    fn train(&self, name: &str, mut grafter: Grafter, config: &GraftConfig) -> anyhow::Result<Grafter> {
        let folder = self.work().join(name);
        if self.resume {
            match grafter.resume(&folder) {
                Err(engram_train::Error::Import(engram_import::Error::NoCheckpoint { .. })) => {}
                resumed => resumed?,
            }
        }
        note(format_args!(
            "{name}: {} dense parameters learn in {} steps of {} tokens each",
            grouped(grafter.dense_parameters() as u64),
            grafter.steps(),
            grouped((config.batch * grafter.window()) as u64)
        ));
        let mut progress = Progress::new(grafter.steps());
        let (begun, first) = (Instant::now(), grafter.step_count());
        while !grafter.is_done() {
            if interrupt::asked() {
                grafter.save(&folder)?;
                drop(progress);
                return Err(self.interrupted(&format!("at step {} ({name})", grafter.step_count())));
            }
            let GraftStep { loss, schedule, .. } = grafter.step()?;
            let (step, steps) = (grafter.step_count(), grafter.steps());
            if step.is_multiple_of(config.save_every) && !grafter.is_done() {
                grafter.save(&folder)?;
            }
            progress.show(step, || {
                let each = begun.elapsed() / (step - first) as u32;
                let left = duration(each * (steps - step) as u32);
                let tokens = short(step * (config.batch * grafter.window()) as u64);
                let each = each.as_secs_f64();
                format!(
                    "{name}, step {step}: loss {loss:.4}, rates {:.0} %, {tokens} tokens, {each:.2} s a step, {left} left",
                    100.0 * schedule
                )
            });
        }
        if grafter.steps() > 0 && (first < grafter.steps()) {
            // What measuring costs is not lost with what was learned.
            grafter.save(&folder)?;
        }
        Ok(grafter)
    }

    fn interrupted(&self, place: &str) -> anyhow::Error {
        Interrupted(format!(
            " {place}, which is saved; give the same command with --resume:\n  engram graft {} … --out {} … --resume",
            shell::word(&self.base),
            shell::word(&self.out)
        ))
        .into()
    }

    /// The loss before, and what was reached.
    fn measure(
        &self,
        name: String,
        rows: u64,
        grafter: &Grafter,
        texts: &Texts<'_>,
    ) -> anyhow::Result<(engram_train::HeldOut, Arm)> {
        let go_on = || !interrupt::asked();
        let measured = grafter
            .held_out(texts.held_out, &go_on)
            .and_then(|held_out| Ok((held_out, grafter.neutral(texts.neutral, &go_on)?)));
        let ([before, held_out], neutral) = match measured {
            Err(engram_train::Error::Interrupted) => {
                return Err(self.interrupted(&format!("at step {}", grafter.step_count())));
            }
            measured => measured?,
        };
        let dense = grafter.dense_parameters();
        Ok((before, Arm { name, dense, rows, held_out, neutral, seconds: grafter.seconds() }))
    }

    fn write(
        &self,
        model: &Model,
        memory: &MemoryConfig,
        grafter: &Grafter,
    ) -> anyhow::Result<AdapterWriter> {
        let rows = if grafter.steps() == 0 { AdapterRows::Zero } else { AdapterRows::Tables };
        let writer = AdapterWriter::begin(&self.out, model, memory, rows)?;
        writer.weights(grafter.weights())?;
        if rows == AdapterRows::Tables {
            grafter.write_rows(|layer| writer.table_path(layer))?;
        }
        Ok(writer)
    }

    fn finish(&self, writer: AdapterWriter, report: &Report) -> anyhow::Result<()> {
        writer.file("report.json", crate::json::pretty(report)?.as_bytes())?;
        let placed = writer.place()?;
        let work = self.work();
        std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        if self.json {
            return print_json(report);
        }
        print(format!("{}adapter in {}\n", report.text(), placed.display()))
    }
}

/// What a graft is measured on.
struct Texts<'a> {
    held_out: (&'a TokenShards, &'a Tokenizer),
    neutral: &'a [Vec<u32>],
}

/// A refusal at its place in the file, or by the name of the option.
fn located(source: Option<&Source>) -> impl Fn(ConfigError) -> anyhow::Error + '_ {
    move |error| match source {
        Some(source) => locate(source, &error).into(),
        None => engram_train::Error::from(error).into(),
    }
}
