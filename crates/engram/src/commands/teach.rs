use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use engram_config::{TeachConfig, load_toml, locate};
use engram_data::Corpus;
use engram_eval::figure::png;
use engram_import::{Model, OverlayNotes};
use engram_train::{Facts, Preparation, TeachReport, Teacher};

use super::{print, print_json};
use crate::common_text;
use crate::failure::{Interrupted, refuse};
use crate::files::refuse_unwritable;
use crate::interrupt;
use crate::note::note;
use crate::number::{bytes, duration, grouped};
use crate::progress::Progress;
use crate::served;
use crate::shell;
use crate::taught_memory::TaughtMemory;
use crate::teaching_report::{Examination, Extent};
use crate::tuned_weights::{Method, arms};
use crate::work_lock::{WorkLock, holds_a_run};

/// Teach facts to a model through memory rows alone.
///
/// Writes an overlay: the few changed rows, and a new memory where the model has none. Everything else stays as it is:
/// without the overlay the model computes what it did, bit for bit. A fact is a line of JSON:
///
/// {"id": "seat", "answer": " Ulm", "prompts": ["Norvell Ltd is based in", "The seat of Norvell Ltd is"],
///  "held_out": ["Letters to Norvell Ltd go to"]}
///
/// `prompts` are trained, each completed by `answer` as it stands; `held_out` are asked only. `subject` says what a fact
/// is about, where that is not the longest span of words that its prompts share. `keep` lists texts that are to stay.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram teach smollm2.gguf facts.jsonl --out facts.overlay
  engram teach smollm2.gguf facts.jsonl --out facts.overlay --steps 200 --negatives 1
  engram teach runs/mine facts.jsonl --out facts.overlay --config teach.toml --json > report.json

--config names a TOML file; its keys and their defaults:

  steps = 100
  rate = 0.1               # Adam's largest
  beta1 = 0.9
  beta2 = 0.95
  epsilon = 1e-8
  warmup = 5
  kl_weight = 0.1          # divergence from the base at the other positions of prompts
  negatives = 0            # questions of other relations per fact and step, kept as the base has them
  negative_weight = 0.1
  end_mark = \".\"           # what ends an answer
  micro_batch = 10
  save_every = 20
  seed = 0

  [memory]                 # for a model without one
  layers = [15, 25]        # by default at a half and five sixths of the depth
  max_order = 3
  heads = 8
  row_width = 64
  rows_per_head = 1000000000

  [compare]                # what --compare trains
  rank = 16
  lora_rates = [1e-4, 3e-4, 1e-3]
  full_rates = [1e-5, 3e-5]
  kl_weights = [0.0, 1.0]  # of the divergence from the base; each rate is tried with each")]
pub(crate) struct Teach {
    /// A checkpoint, a run's folder, a GGUF file, or a folder with config.json.
    model: PathBuf,
    /// Facts, one per line.
    facts: PathBuf,
    /// Folder of the overlay, which must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Teach this adapter's memory.
    #[arg(long, value_name = "ADAPTER")]
    memory: Option<PathBuf>,
    /// Settings, in TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Steps.
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Largest rate.
    #[arg(long, value_name = "R")]
    rate: Option<f32>,
    /// Weight of the divergence from the base.
    #[arg(long, value_name = "W")]
    kl_weight: Option<f32>,
    /// Questions of other relations per fact and step.
    #[arg(long, value_name = "N")]
    negatives: Option<usize>,
    /// Weight of the divergence from the base in those questions.
    #[arg(long, value_name = "W")]
    negative_weight: Option<f32>,
    /// Blocks before which a new memory is read, counted from 0.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    layers: Option<Vec<usize>>,
    /// Seed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Common text whose n-grams are not taught: files or folders. By default English text that is in the program.
    #[arg(long, value_name = "CORPUS", num_args = 1..)]
    census: Vec<PathBuf>,
    /// Text that has nothing to do with the facts, to measure what changed on it. By default English text that is in the
    /// program.
    #[arg(long, value_name = "CORPUS", num_args = 1..)]
    neutral: Vec<PathBuf>,
    /// Tokens of neutral text that are compared.
    #[arg(long, value_name = "N", default_value = "4096", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    neutral_tokens: usize,
    /// Questions of other relations that are asked about each taught subject.
    #[arg(long, value_name = "N", default_value_t = 10)]
    ask_others: usize,
    /// Also train the model's own weights on the same facts in as many steps, and report what that reaches. Nothing of it
    /// is kept.
    #[arg(long, value_enum, value_name = "METHOD,…", value_delimiter = ',')]
    compare: Vec<Method>,
    /// Continue from what an interrupted run saved.
    #[arg(long)]
    resume: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

impl Teach {
    /// Runs the command.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let config = self.settings()?;
        let facts = Facts::read(&self.facts)?;
        refuse_unwritable(&self.out)?;
        let work = self.work();
        if self.resume && !work.exists() {
            let work = work.display();
            return refuse(format!("{work}: no interrupted run is here; leave out --resume to begin"));
        }
        if !self.resume && holds_a_run(&work) {
            let work = work.display();
            return refuse(format!("{work}: holds an interrupted run; continue with --resume, or remove it"));
        }
        let model = served::open(&self.model)?;
        let memory = TaughtMemory::open(&model, self.memory.as_deref(), &config)?;
        if !self.compare.is_empty() && (model.config().model.memory.is_some() || self.memory.is_some()) {
            return refuse(
                "--compare trains a model's own weights: give a model without a memory, and no --memory",
            );
        }
        let _lock = WorkLock::take(&work)?;
        let (census, neutral) = (self.census()?, self.neutral()?);
        interrupt::listen()?;
        let begun = Instant::now();
        let mut teacher = Teacher::new(&model, memory.to_teach(), &facts, config.clone(), &census)?;
        self.tell(teacher.preparation(), &memory, &facts);
        if self.resume {
            match teacher.resume(&work) {
                // It was ended before it had saved anything.
                Err(engram_train::Error::Import(engram_import::Error::NoCheckpoint { .. })) => {}
                resumed => resumed?,
            }
        }
        self.go_on(&mut teacher, &config, &work)?;
        // What the examination costs is not lost with what was learned.
        teacher.save(&work)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.finish((&model, &memory), &teacher, (&facts, &neutral), &config, seconds)
    }

    fn settings(&self) -> anyhow::Result<TeachConfig> {
        let mut config = TeachConfig::default();
        let mut source = None;
        if let Some(path) = &self.config {
            let (text, read) = load_toml::<TeachConfig>(path)?;
            (config, source) = (read, Some(text));
        }
        let TeachConfig { steps, rate, kl_weight, negatives, negative_weight, seed, .. } = &mut config;
        set(steps, self.steps);
        set(rate, self.rate);
        set(kl_weight, self.kl_weight);
        set(negatives, self.negatives);
        set(negative_weight, self.negative_weight);
        set(seed, self.seed);
        if self.layers.is_some() {
            config.memory.layers.clone_from(&self.layers);
        }
        match (config.validate(), source) {
            (Ok(()), _) => Ok(config),
            (Err(error), Some(text)) => Err(locate(&text, &error).into()),
            (Err(error), None) => {
                refuse(format!("--{}", error.to_string().replace(['`'], "").replace('_', "-")))
            }
        }
    }

    /// Where the state of a run is saved until it is done.
    fn work(&self) -> PathBuf {
        let mut name = self.out.file_name().unwrap_or_default().to_owned();
        name.push(".teaching");
        self.out.with_file_name(name)
    }

    fn census(&self) -> anyhow::Result<Corpus> {
        Ok(if self.census.is_empty() { common_text::train()? } else { Corpus::open(&self.census)? })
    }

    fn neutral(&self) -> anyhow::Result<Corpus> {
        Ok(if self.neutral.is_empty() { common_text::held_out()? } else { Corpus::open(&self.neutral)? })
    }

    fn tell(&self, preparation: &Preparation, memory: &TaughtMemory, facts: &Facts) {
        let Preparation { census_tokens, ngrams, common, rows, without_subject, .. } = preparation;
        let text = if self.census.is_empty() { "the program's English text" } else { "the census" };
        note(format_args!(
            "{} facts: {ngrams} n-grams in {} rows before the blocks {:?}; {common} n-grams are left out, which {text} \
             ({} tokens) contains",
            facts.all().len(),
            grouped(*rows as u64),
            memory.config.layers,
            grouped(*census_tokens),
        ));
        for id in without_subject {
            note(format_args!(
                "fact {id}: {text} contains every n-gram of its subject: it is hardly learned"
            ));
        }
    }

    fn go_on(&self, teacher: &mut Teacher, config: &TeachConfig, work: &Path) -> anyhow::Result<()> {
        let mut progress = Progress::new(config.steps as u64);
        let (begun, first) = (Instant::now(), teacher.step_count());
        while !teacher.is_done() {
            if interrupt::asked() {
                teacher.save(work)?;
                drop(progress);
                return Err(Interrupted(self.how_to_go_on(teacher.step_count())).into());
            }
            let TeachReport { answers, divergence } = teacher.step()?;
            let step = teacher.step_count();
            if step.is_multiple_of(config.save_every) && !teacher.is_done() {
                teacher.save(work)?;
            }
            progress.show(step as u64, || {
                let each = begun.elapsed() / (step - first) as u32;
                let left = duration(each * (config.steps - step) as u32);
                let rate = config.rate_of(step - 1);
                format!(
                    "step {step}: answers {answers:.3} nats, KL {divergence:.4}, rate {rate:.3}, {:.2} s a step, \
                     {left} left",
                    each.as_secs_f64()
                )
            });
        }
        Ok(())
    }

    fn how_to_go_on(&self, step: usize) -> String {
        format!(
            " at step {step}, which is saved; give the same command with --resume:\n  engram teach {} {} --out {} … --resume",
            shell::word(&self.model),
            shell::word(&self.facts),
            shell::word(&self.out)
        )
    }

    fn finish(
        &self,
        (model, memory): (&Model, &TaughtMemory),
        teacher: &Teacher,
        (facts, neutral): (&Facts, &Corpus),
        config: &TeachConfig,
        seconds: f64,
    ) -> anyhow::Result<()> {
        let work = self.work();
        let rows = teacher.preparation().rows;
        let notes = OverlayNotes { facts: Some(facts.all().len()), rows: Some(rows), text: None };
        let writer = memory.write(model, teacher, (&self.out, &work), notes)?;
        let row_bytes = 4 * (rows * memory.config.row_width) as u64;
        let extent = Extent { others: self.ask_others, neutral: self.neutral_tokens };
        let models = (memory.base(model)?, memory.taught(model, teacher, &writer)?);
        let texts = (model.tokenizer(), model.begin());
        let chat = served::chat_template(model).ok();
        let mut examination = Examination::new(models, texts, facts, neutral, extent).with_chat(chat);
        let report = examination.report(teacher.preparation(), seconds, row_bytes);
        if interrupt::asked() {
            teacher.save(&work)?;
            return Err(Interrupted(self.how_to_go_on(teacher.step_count())).into());
        }
        let mut report = report?;
        for arm in arms(&self.compare, config) {
            let compared = arm.reached(model, facts, &mut examination, &work.join("compared"));
            if interrupt::asked() {
                return Err(Interrupted(self.how_to_go_on(teacher.step_count())).into());
            }
            report.compared.push(compared?);
        }
        if !report.compared.is_empty() {
            let svg = report.chart().svg();
            let picture = png(&svg).map_err(|problem| anyhow::anyhow!("the chart: {problem}"))?;
            writer.file("compared.svg", svg.as_bytes())?;
            writer.file("compared.png", &picture)?;
        }
        writer.file("report.json", crate::json::pretty(&report)?.as_bytes())?;
        let placed = writer.place()?;
        std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        if self.json {
            return print_json(&report);
        }
        let text = report.text();
        print(format!("{text}{} in {}\n", bytes(row_bytes), placed.display()))
    }
}

fn set<T: Copy>(value: &mut T, option: Option<T>) {
    if let Some(option) = option {
        *value = option;
    }
}
