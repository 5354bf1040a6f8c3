//! A study of grafts: memories and controls trained for one model on one corpus, with equal tokens and several seeds.
//!
//! Every arm reads the same windows in the order of its seed. Losses are paired over held-out documents, as in the other
//! studies. A run is saved as it goes, and its result is a line of `results.jsonl`; a killed study continues from there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use engram_config::{
    Account, GraftConfig, Lookup, MemoryConfig, ModelConfig, RowOptimizerKind, Source, load_toml, locate,
};
use engram_data::TokenShards;
use engram_eval::figure::{Axis, Bar, Figure, Point, Scale, Series, png};
use engram_eval::statistics::{Estimate, Panel};
use engram_import::{Model, memory_addressing};
use engram_train::{AnswerLoss, DocumentLosses, GraftStep, Grafter, Grafting, NeutralChange};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::results::{ResultsLog, read_lines};

/// Deviation of the rows that stay as they were drawn.
const RANDOM_ROWS: f32 = 0.05;
/// Every order needs at least these; heads then have different primes from there on.
const FEWEST_ROWS: u64 = 2;
/// Probability that any of the intervals misses the true value.
const RISK: f64 = 0.05;
/// The arm that all are compared with.
const BASE: &str = "base";

/// What the folder of a study holds, and of which.
const LABEL: &str = "study.json";
const STUDY: &str = "graft";

/// The study whose results a folder holds.
#[derive(Debug, Serialize, Deserialize)]
struct Label {
    study: String,
    fingerprint: String,
}

/// A study of grafts, as described in its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraftStudy {
    /// What is studied.
    pub study: GraftTable,
    /// How every arm is trained. Its seed is replaced by the study's.
    #[serde(default)]
    pub graft: GraftConfig,
}

/// What is studied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraftTable {
    /// The model that is grafted onto.
    pub model: PathBuf,
    /// Files or folders of text.
    pub corpus: Vec<PathBuf>,
    /// Seeds of every arm.
    #[serde(default = "three_seeds")]
    pub seeds: Vec<u64>,
    /// The arms. The base is one without being named.
    #[serde(default = "GraftArm::all")]
    pub arms: Vec<GraftArm>,
    /// Questions about the corpus: lines of JSON, each with `prompt` and `answer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub questions: Option<PathBuf>,
}

/// A way of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GraftArm {
    /// A memory.
    Memory,
    /// An adapter of low rank, of about as many parameters as the memory has dense ones.
    Lora,
    /// Both.
    MemoryAndLora,
    /// A memory that reads the rows of another position's n-grams: they say nothing about the token.
    ShuffledKeys,
    /// A memory whose rows stay as they were drawn; projections and gates learn.
    RandomRows,
    /// A memory of the fewest rows that addressing allows: a few dozen per head at most, each shared by many n-grams.
    FewestRows,
}

fn three_seeds() -> Vec<u64> {
    vec![0, 1, 2]
}

impl GraftArm {
    /// Every arm.
    pub fn all() -> Vec<Self> {
        use GraftArm::{FewestRows, Lora, Memory, MemoryAndLora, RandomRows, ShuffledKeys};
        vec![Memory, Lora, MemoryAndLora, ShuffledKeys, RandomRows, FewestRows]
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Lora => "lora",
            Self::MemoryAndLora => "memory_and_lora",
            Self::ShuffledKeys => "shuffled_keys",
            Self::RandomRows => "random_rows",
            Self::FewestRows => "fewest_rows",
        }
    }

    /// What is trained for `base`, and how.
    fn grafting(self, model: &Model, mut config: GraftConfig) -> Result<(Grafting, GraftConfig)> {
        let base = &model.config().model;
        let mut memory = config.memory.for_base(base, config.seed);
        match self {
            Self::ShuffledKeys => memory.lookup = Lookup::Permuted,
            Self::RandomRows => {
                (memory.row_init, config.row_optimizer) = (RANDOM_ROWS, RowOptimizerKind::Frozen);
            }
            Self::FewestRows => memory.rows_per_head.fill(FEWEST_ROWS),
            Self::Memory | Self::Lora | Self::MemoryAndLora => {}
        }
        let all = ModelConfig { memory: Some(memory.clone()), ..base.clone() };
        all.validate().map_err(|error| Error::arm(self.name(), error))?;
        if self == Self::Lora {
            return Ok((Grafting::LowRank { parameters: dense_parameters(&all)? }, config));
        }
        let addressing = memory_addressing(&memory, model.tokenizer()).map_err(engram_train::Error::from)?;
        let (memory, addressing): (Box<MemoryConfig>, _) = (Box::new(memory), Box::new(addressing));
        let grafting = match self {
            Self::MemoryAndLora => Grafting::Both { config: memory, addressing },
            _ => Grafting::Memory { config: memory, addressing },
        };
        Ok((grafting, config))
    }
}

/// Parameters of the memory of `config` apart from its rows.
fn dense_parameters(config: &ModelConfig) -> Result<usize> {
    let rows = config.table_rows().map_err(|error| Error::arm("lora", error))?;
    let with = Account::of(config, &rows);
    let without = Account::of(&ModelConfig { memory: None, ..config.clone() }, &[]);
    Ok((with.total - with.memory - without.total) as usize)
}

/// A question: tokens to continue, and the tokens that should follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenQuestion {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// Those of its answer.
    pub answer: Vec<u32>,
}

/// A line of the file of questions.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QuestionLine {
    prompt: String,
    answer: String,
}

/// The result of a run, or of the base for a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraftResult {
    /// The run's name.
    pub run: String,
    /// Its arm.
    pub arm: String,
    /// Its seed.
    pub seed: u64,
    /// Parameters that learned, rows left out.
    pub dense: usize,
    /// Training tokens.
    pub training_tokens: u64,
    /// Seconds in steps.
    pub seconds: f64,
    /// The program and machine.
    pub origin: String,
    /// Whether its loss stopped being a number; then nothing below is measured.
    pub diverged: bool,
    /// The held-out documents, in order.
    pub documents: Vec<DocumentLosses>,
    /// What changed on neutral text.
    pub neutral: NeutralChange,
    /// Losses of the answers to the questions, in order.
    pub answers: Vec<AnswerLoss>,
}

/// What the runs are made of and measured on.
pub struct GraftMaterial<'a> {
    /// The base.
    pub model: &'a Model,
    /// The corpus, prepared: its training part.
    pub train: &'a Path,
    /// Its held-out part.
    pub valid: &'a TokenShards,
    /// Text that has nothing to do with the corpus.
    pub neutral: &'a [Vec<u32>],
    /// Questions about the corpus.
    pub questions: &'a [TokenQuestion],
    /// The program and machine.
    pub origin: &'a str,
}

/// What a study of grafts tells as it goes, and whether it is to stop.
pub trait GraftWatch {
    /// A run took a step, of so many.
    fn step(&self, run: &str, step: u64, steps: u64, report: &GraftStep);
    /// A run is done.
    fn done(&self, result: &GraftResult);
    /// Whether to stop in an orderly way.
    fn stop(&self) -> bool;
}

/// The findings of a study of grafts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraftFindings {
    /// Seeds with which every arm finished.
    pub seeds: Vec<u64>,
    /// Held-out documents that losses are paired over.
    pub documents: usize,
    /// The number of documents of equal length that would give the same precision.
    pub equal_documents: f64,
    /// Held-out tokens predicted.
    pub tokens: u64,
    /// Training tokens of every run.
    pub training_tokens: u64,
    /// Questions.
    pub questions: usize,
    /// The base, then the arms.
    pub arms: Vec<GraftArmFinding>,
    /// Statements that claim no more than the numbers allow.
    pub statements: Vec<String>,
}

/// The findings of one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraftArmFinding {
    /// Its name.
    pub name: String,
    /// Parameters that learned, rows left out.
    pub dense: usize,
    /// Held-out loss in nats per token, by seed.
    pub by_seed: Vec<f64>,
    /// Their mean.
    pub nats_per_token: f64,
    /// Its loss minus the base's, in nats per token; none for the base.
    pub difference: Option<Estimate>,
    /// Its loss minus the memory's; none for the memory itself and without one.
    pub to_memory: Option<Estimate>,
    /// Mean loss on neutral text, in nats per token.
    pub neutral: f64,
    /// Mean divergence from the base there, in nats.
    pub divergence: f64,
    /// Share of the questions whose answer is the likeliest continuation, token by token; none without questions.
    pub answered: Option<f64>,
    /// Mean loss of the answers, in nats per token; none without questions.
    pub answer_nats: Option<f64>,
    /// Mean seconds in steps.
    pub seconds: f64,
}

impl GraftStudy {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read, or a value is impossible, with its place.
    pub fn load(path: &Path) -> Result<Self> {
        let (source, study): (Source, Self) = load_toml(path)?;
        let refuse = |key: &str, reason: &str| -> Result<()> {
            let error = engram_config::ConfigError::new(key, reason);
            Err(locate(&source, &error).into())
        };
        if study.study.seeds.is_empty() {
            refuse("study.seeds", "is empty: name at least one")?;
        }
        if study.study.arms.is_empty() {
            refuse("study.arms", "is empty: name at least one, or leave the key out for all")?;
        }
        if study.study.corpus.is_empty() {
            refuse("study.corpus", "is empty: name files or folders of text")?;
        }
        if has_twins(&study.study.seeds) {
            refuse("study.seeds", "has the same seed twice")?;
        }
        if has_twins(&study.study.arms) {
            refuse("study.arms", "has the same arm twice")?;
        }
        if let Err(error) = study.graft.validate() {
            refuse(&format!("graft.{}", error.key), &error.reason)?;
        }
        Ok(study)
    }

    /// The questions, as tokens of `model`.
    ///
    /// # Errors
    /// When the file cannot be read, a line is no question, or one does not fit the model's context.
    pub fn questions(&self, model: &Model) -> Result<Vec<TokenQuestion>> {
        let Some(path) = &self.study.questions else { return Ok(Vec::new()) };
        let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
        let refuse = |line: usize, problem: String| -> Error {
            engram_train::Error::Line { path: path.clone(), line, problem }.into()
        };
        let mut questions = Vec::new();
        for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
            let QuestionLine { prompt, answer } =
                serde_json::from_str(text).map_err(|error| refuse(line, error.to_string()))?;
            let encode = |text: &str| model.tokenizer().encode(text).map_err(engram_train::Error::from);
            let mut tokens = match model.begin() {
                engram_data::Begin::Always(token) => vec![token],
                engram_data::Begin::IfEmpty(_) => Vec::new(),
            };
            tokens.extend(encode(&prompt)?);
            let answer = encode(&answer)?;
            let context = model.config().model.context;
            if tokens.is_empty() || answer.is_empty() {
                return Err(refuse(line, "`prompt` or `answer` is empty: write both".into()));
            }
            if tokens.len() + answer.len() > context {
                let length = tokens.len() + answer.len();
                let problem =
                    format!("has {length} tokens, but the model's context is {context}: shorten it");
                return Err(refuse(line, problem));
            }
            questions.push(TokenQuestion { prompt: tokens, answer });
        }
        Ok(questions)
    }

    /// Runs without a result in `folder`: arm and seed, seed by seed.
    ///
    /// # Errors
    /// When the results cannot be read.
    pub fn remaining(&self, folder: &Path) -> Result<Vec<(GraftArm, u64)>> {
        let results: Vec<GraftResult> = read_lines(folder)?;
        let done =
            |arm: GraftArm, seed: u64| results.iter().any(|result| result.run == run_id(arm.name(), seed));
        let pairs =
            self.study.seeds.iter().flat_map(|&seed| self.study.arms.iter().map(move |&arm| (arm, seed)));
        Ok(pairs.filter(|&(arm, seed)| !done(arm, seed)).collect())
    }

    /// Refuses a folder that holds another kind of study.
    ///
    /// # Errors
    /// When it does.
    pub fn check(folder: &Path) -> Result<()> {
        let Ok(text) = fs::read_to_string(folder.join(LABEL)) else { return Ok(()) };
        match serde_json::from_str::<Label>(&text) {
            Ok(label) if label.study == STUDY => Ok(()),
            _ => Err(Error::Folder { path: folder.to_owned(), problem: "holds another study".into() }),
        }
    }

    /// Makes `folder` that of this study, if it is of none yet.
    ///
    /// # Errors
    /// When it holds a study of something else, or the file system fails.
    pub fn label(
        &self,
        folder: &Path,
        model: &Model,
        (train, valid): (&TokenShards, &TokenShards),
    ) -> Result<()> {
        Self::check(folder)?;
        let path = folder.join(LABEL);
        let own = Label { study: STUDY.into(), fingerprint: self.fingerprint(model, train, valid)? };
        let told = serde_json::to_string_pretty(&own).expect("a label is representable as JSON");
        match fs::read_to_string(&path) {
            Ok(found) if found == told => Ok(()),
            Ok(_) => {
                let problem = "holds a study of another base, another corpus or other settings (seeds and arms may be \
                               added)";
                Err(Error::Folder { path: folder.to_owned(), problem: problem.into() })
            }
            Err(_) => fs::write(&path, told).map_err(Error::file("write", &path)),
        }
    }

    /// What every result depends on, its arm and seed left out.
    fn fingerprint(&self, model: &Model, train: &TokenShards, valid: &TokenShards) -> Result<String> {
        let config = GraftConfig { seed: 0, save_every: 1, ..self.graft.clone() };
        let config = serde_json::to_string(&config).expect("a configuration is representable as JSON");
        let questions = match &self.study.questions {
            Some(path) => fs::read(path).map_err(Error::file("read", path))?,
            None => Vec::new(),
        };
        let identity = model.identity().map_err(engram_train::Error::from)?;
        let mut hasher = blake3::Hasher::new();
        for part in [identity, config, train.identity().to_string(), valid.identity().to_string()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        Ok(hasher.update(&questions).finalize().to_hex().to_string())
    }

    /// Carries out the remaining runs in `folder`.
    ///
    /// # Errors
    /// When a run fails, or `watch` asks to stop; what a run had learned is then saved.
    pub fn conduct(&self, folder: &Path, material: &GraftMaterial<'_>, watch: &dyn GraftWatch) -> Result<()> {
        let log = ResultsLog::open(folder)?;
        for (arm, seed) in self.remaining(folder)? {
            let id = run_id(arm.name(), seed);
            let work = folder.join("runs").join(&id);
            let failed = |source: engram_train::Error| match source {
                engram_train::Error::Interrupted => Error::Interrupted,
                source => Error::Run { run: id.clone(), source: Box::new(source) },
            };
            let config = GraftConfig { seed, ..self.graft.clone() };
            let (what, config) = arm.grafting(material.model, config)?;
            let train =
                TokenShards::open(material.train).map_err(engram_train::Error::from).map_err(failed)?;
            let mut grafter = Grafter::new(material.model, what, config, train).map_err(failed)?;
            match grafter.resume(&work) {
                Err(engram_train::Error::Import(engram_import::Error::NoCheckpoint { .. })) => {}
                resumed => resumed.map_err(failed)?,
            }
            let diverged = match self.train(&id, &mut grafter, &work, watch) {
                Ok(()) => false,
                Err(engram_train::Error::Diverged { .. }) => true,
                Err(error) => return Err(failed(error)),
            };
            let [base, own] =
                self.measure(arm, seed, &grafter, material, (diverged, watch)).map_err(failed)?;
            drop(grafter);
            let known: Vec<GraftResult> = read_lines(folder)?;
            if !known.iter().any(|result| result.run == base.run) {
                log.add(&base)?;
            }
            log.add(&own)?;
            if work.exists() {
                fs::remove_dir_all(&work).map_err(Error::file("remove", &work))?;
            }
            watch.done(&own);
        }
        Ok(())
    }

    fn train(
        &self,
        id: &str,
        grafter: &mut Grafter,
        work: &Path,
        watch: &dyn GraftWatch,
    ) -> engram_train::Result<()> {
        while !grafter.is_done() {
            if watch.stop() {
                grafter.save(work)?;
                return Err(engram_train::Error::Interrupted);
            }
            let report = grafter.step()?;
            if grafter.step_count().is_multiple_of(self.graft.save_every) {
                grafter.save(work)?;
            }
            watch.step(id, grafter.step_count(), grafter.steps(), &report);
        }
        // What measuring costs is not lost with what was learned.
        grafter.save(work)
    }

    /// The base's result and the run's.
    fn measure(
        &self,
        arm: GraftArm,
        seed: u64,
        grafter: &Grafter,
        material: &GraftMaterial<'_>,
        (diverged, watch): (bool, &dyn GraftWatch),
    ) -> engram_train::Result<[GraftResult; 2]> {
        let result = |arm: &str| GraftResult {
            run: run_id(arm, seed),
            arm: arm.to_owned(),
            seed,
            dense: 0,
            training_tokens: 0,
            seconds: 0.0,
            origin: material.origin.to_owned(),
            diverged: false,
            documents: Vec::new(),
            neutral: NeutralChange::default(),
            answers: Vec::new(),
        };
        let (mut base, mut own) = (result(BASE), result(arm.name()));
        let go_on = || !watch.stop();
        own.dense = grafter.dense_parameters();
        own.training_tokens = grafter.step_count() * (self.graft.batch * grafter.window()) as u64;
        own.seconds = grafter.seconds();
        own.diverged = diverged;
        let [of_base, of_own] = grafter.documents((material.valid, material.model.tokenizer()), &go_on)?;
        let neutral = grafter.neutral(material.neutral, &go_on)?;
        let questions: Vec<(&[u32], &[u32])> =
            material.questions.iter().map(|one| (&one.prompt[..], &one.answer[..])).collect();
        let [base_answers, own_answers] = grafter.answers(&questions, &go_on)?;
        let (positions, base_loss) = (neutral.positions, neutral.base_loss);
        base.neutral = NeutralChange { positions, base_loss, loss: base_loss, ..NeutralChange::default() };
        (base.documents, base.answers) = (of_base, base_answers);
        if !diverged {
            (own.documents, own.answers, own.neutral) = (of_own, own_answers, neutral);
        }
        Ok([base, own])
    }

    /// The findings of the results in `folder`; also written there as `findings.json`, and as a figure.
    ///
    /// # Errors
    /// When no seed is finished by every arm, or the file system fails.
    pub fn write_up(&self, folder: &Path) -> Result<GraftFindings> {
        let findings = self.findings(&read_lines(folder)?)?;
        let svg = figure(&findings).svg();
        let picture = png(&svg).map_err(|problem| Error::Inconclusive(format!("figure: {problem}")))?;
        let figures = folder.join("figures");
        fs::create_dir_all(&figures).map_err(Error::file("create", &figures))?;
        let mut json = serde_json::to_string_pretty(&findings).expect("findings are representable as JSON");
        json.push('\n');
        for (path, bytes) in [
            (figures.join("difference.svg"), svg.as_bytes()),
            (figures.join("difference.png"), &picture),
            (folder.join("findings.json"), json.as_bytes()),
        ] {
            fs::write(&path, bytes).map_err(Error::file("write", &path))?;
        }
        Ok(findings)
    }

    fn findings(&self, results: &[GraftResult]) -> Result<GraftFindings> {
        let by_run: BTreeMap<&str, &GraftResult> =
            results.iter().map(|result| (result.run.as_str(), result)).collect();
        let of = |arm: &str, seed: u64| by_run.get(run_id(arm, seed).as_str()).copied();
        let mut statements = Vec::new();
        let names: Vec<&str> =
            std::iter::once(BASE).chain(self.study.arms.iter().map(|arm| arm.name())).collect();
        let has_diverged = |name: &&str| {
            self.study.seeds.iter().any(|&seed| of(name, seed).is_some_and(|found| found.diverged))
        };
        let (lost, names): (Vec<&str>, Vec<&str>) = names.into_iter().partition(has_diverged);
        statements
            .extend(lost.iter().map(|name| format!("`{name}` diverged with at least one seed: left out.")));
        let finished = |seed: &u64| names.iter().all(|name| of(name, *seed).is_some());
        let seeds: Vec<u64> = self.study.seeds.iter().copied().filter(finished).collect();
        let Some(&first) = seeds.first() else {
            return Err(Error::Inconclusive("no seed is finished by every arm yet".into()));
        };
        let runs =
            |name: &str| -> Vec<&GraftResult> { seeds.iter().filter_map(|&seed| of(name, seed)).collect() };
        let Some(base) = of(BASE, first) else {
            return Err(Error::Inconclusive("the base has no result".into()));
        };
        let tokens: Vec<f64> = base.documents.iter().map(|document| document.tokens as f64).collect();
        let nats = |result: &&GraftResult| result.documents.iter().map(|document| document.nats).collect();
        let losses = names.iter().map(|name| runs(name).iter().map(nats).collect()).collect();
        let panel = Panel::new(losses, tokens).ok_or_else(|| {
            Error::Inconclusive(
                "results of other held-out text are among them: begin in another folder".into(),
            )
        })?;
        let memory = names.iter().position(|name| *name == GraftArm::Memory.name());
        let arms: Vec<GraftArmFinding> = names
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let runs = runs(name);
                let mean = |of: &dyn Fn(&GraftResult) -> f64| {
                    runs.iter().map(|result| of(result)).sum::<f64>() / runs.len() as f64
                };
                let asked = !base.answers.is_empty();
                let of_answers =
                    |of: &dyn Fn(&[AnswerLoss]) -> f64| asked.then(|| mean(&|result| of(&result.answers)));
                GraftArmFinding {
                    name: (*name).to_owned(),
                    dense: runs.first().map_or(0, |result| result.dense),
                    by_seed: panel.by_seed(index),
                    nats_per_token: panel.mean(index),
                    difference: (index > 0).then(|| panel.difference(index, 0)).flatten(),
                    to_memory: memory
                        .filter(|&memory| memory != index)
                        .and_then(|memory| panel.difference(index, memory)),
                    neutral: mean(&|result| result.neutral.loss),
                    divergence: mean(&|result| result.neutral.divergence),
                    answered: of_answers(&|answers| {
                        answers.iter().filter(|answer| answer.likeliest).count() as f64 / answers.len() as f64
                    }),
                    answer_nats: of_answers(&|answers| {
                        let tokens: usize = answers.iter().map(|answer| answer.tokens).sum();
                        answers.iter().map(|answer| answer.nats).sum::<f64>() / tokens as f64
                    }),
                    seconds: mean(&|result| result.seconds),
                }
            })
            .collect();
        statements.extend(stated(&arms));
        Ok(GraftFindings {
            documents: base.documents.len(),
            equal_documents: panel.equal_documents(),
            tokens: base.documents.iter().map(|document| document.tokens).sum(),
            training_tokens: runs(names[names.len() - 1]).first().map_or(0, |result| result.training_tokens),
            questions: base.answers.len(),
            seeds,
            arms,
            statements,
        })
    }
}

/// What can be said of each arm against the base, and against the memory.
fn stated(arms: &[GraftArmFinding]) -> Vec<String> {
    let mut statements = Vec::new();
    let count = arms.len().saturating_sub(1).max(1);
    let risk = RISK / count as f64;
    let mut say = |name: &str, other: &str, estimate: &Estimate| {
        let (low, high) = estimate.interval(risk);
        let numbers =
            format!("{:+.4} ± {:.4} nats (95 %: {low:+.4} to {high:+.4})", estimate.value, estimate.error);
        statements.push(match (low > 0.0, high < 0.0) {
            (true, _) => format!("`{name}` is worse than `{other}` beyond the noise: {numbers}."),
            (_, true) => format!("`{name}` is better than `{other}` beyond the noise: {numbers}."),
            _ => format!("`{name}` and `{other}` are not distinguished: {numbers}."),
        });
    };
    for arm in arms {
        if let Some(estimate) = &arm.difference {
            say(&arm.name, BASE, estimate);
        }
    }
    for arm in arms.iter().filter(|arm| arm.name != BASE) {
        if let Some(estimate) = &arm.to_memory {
            say(&arm.name, GraftArm::Memory.name(), estimate);
        }
    }
    statements
}

/// Differences to the base, with their intervals.
fn figure(findings: &GraftFindings) -> Figure {
    let arms = findings.arms.iter().filter(|arm| arm.difference.is_some());
    let risk = RISK / findings.arms.len().saturating_sub(1).max(1) as f64;
    let (mut names, mut points) = (Vec::new(), Vec::new());
    for arm in arms {
        let Some(estimate) = arm.difference else { continue };
        let (low, high) = estimate.interval(risk);
        let bar = Bar::Horizontal(low, high);
        points.push(Point { x: estimate.value, y: names.len() as f64, bar });
        names.push(arm.name.clone());
    }
    let seeds = findings.seeds.len();
    Figure {
        title: format!("Held-out loss after grafting, minus the base's; {seeds} seeds, 95 %"),
        x: Axis { label: "difference, nats per token".into(), scale: Scale::Linear },
        y: Axis { label: String::new(), scale: Scale::Names(names) },
        series: vec![Series { points, bars: true, ..Series::default() }],
    }
}

fn run_id(arm: &str, seed: u64) -> String {
    format!("{arm}.seed-{seed}")
}

fn has_twins<T: Ord>(all: &[T]) -> bool {
    let mut all: Vec<&T> = all.iter().collect();
    all.sort();
    all.windows(2).any(|pair| pair[0] == pair[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn study(arms: &[GraftArm]) -> GraftStudy {
        GraftStudy {
            study: GraftTable {
                model: "base".into(),
                corpus: vec!["corpus".into()],
                seeds: vec![0, 1, 2],
                arms: arms.to_vec(),
                questions: None,
            },
            graft: GraftConfig::default(),
        }
    }

    fn result(arm: &str, seed: u64, loss: f64) -> GraftResult {
        let document = |index: u32| DocumentLosses {
            tokens: 100,
            bytes: 400,
            nats: 100.0 * loss + f64::from(index % 3),
        };
        GraftResult {
            run: run_id(arm, seed),
            arm: arm.into(),
            seed,
            dense: 7,
            training_tokens: 1000,
            seconds: 1.0,
            origin: String::new(),
            diverged: false,
            documents: (0..30).map(document).collect(),
            neutral: NeutralChange::default(),
            answers: vec![AnswerLoss { tokens: 2, nats: loss, likeliest: loss < 2.0 }],
        }
    }

    #[test]
    fn arms_are_compared_with_the_base_and_the_memory() {
        let mut results = Vec::new();
        for seed in 0..3 {
            let noise = 0.001 * seed as f64;
            for (arm, loss) in [("base", 3.0), ("memory", 1.9 + noise), ("lora", 2.5 - noise)] {
                results.push(result(arm, seed, loss));
            }
        }
        let study = study(&[GraftArm::Memory, GraftArm::Lora]);
        let found = study.findings(&results).unwrap();
        assert_eq!((found.seeds.len(), found.documents, found.questions), (3, 30, 1));
        let difference = found.arms[1].difference.unwrap();
        assert!((difference.value + 1.099).abs() < 1e-9, "{difference:?}");
        assert_eq!(found.arms[1].answered, Some(1.0));
        assert_eq!(found.arms[2].answered, Some(0.0));
        assert!(found.statements[0].starts_with("`memory` is better than `base` beyond the noise: -1.0990"));
        assert!(found.statements.iter().any(|text| text.starts_with("`lora` is worse than `memory`")));
        assert!(figure(&found).svg().contains("memory"));
        // A seed that an arm lacks is left out; an arm that diverged, too.
        results.retain(|result| result.run != "lora.seed-2");
        assert_eq!(study.findings(&results).unwrap().seeds, [0, 1]);
        results.iter_mut().filter(|result| result.arm == "lora").for_each(|result| result.diverged = true);
        let found = study.findings(&results).unwrap();
        assert_eq!((found.arms.len(), found.seeds.len()), (2, 3));
        assert!(found.statements[0].contains("`lora` diverged"));
        results.retain(|result| result.arm != "memory");
        assert!(study.findings(&results).is_err());
    }

    #[test]
    fn what_cannot_be_studied_is_refused_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.toml");
        for (text, part) in [
            ("[study]\nmodel = \"a\"\ncorpus = []", "study.corpus"),
            ("[study]\nmodel = \"a\"\ncorpus = [\"b\"]\nseeds = [1, 1]", "study.seeds"),
            ("[study]\nmodel = \"a\"\ncorpus = [\"b\"]\narms = []", "study.arms"),
            ("[study]\nmodel = \"a\"\ncorpus = [\"b\"]\narms = [\"memroy\"]", "memroy"),
            ("[study]\nmodel = \"a\"\ncorpus = [\"b\"]\n[graft]\nbatch = 0", "graft.batch"),
        ] {
            fs::write(&path, text).unwrap();
            let error = GraftStudy::load(&path).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        fs::write(&path, "[study]\nmodel = \"a\"\ncorpus = [\"b\"]").unwrap();
        assert_eq!(GraftStudy::load(&path).unwrap().study.arms.len(), 6);
    }
}
