//! A study's plan: every run, before the first one starts.

use std::path::Path;

use engram_config::RunConfig;
use engram_data::{TokenShards, Tokenizer};
use serde::Serialize;

use crate::arm::{Arm, Kind, arms};
use crate::config::{RateRule, StudyConfig};
use crate::error::{Error, Result};
use crate::measure::Positions;
use crate::results::RunResult;

/// A study that is ready to start: its arms are valid, and its data exist.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The study.
    pub kind: Kind,
    /// Its arms, the reference first.
    pub arms: Vec<Arm>,
    /// Seeds of every arm.
    pub seeds: Vec<u64>,
    /// How rates are chosen; none means the base's rates.
    pub rates: Option<RateRule>,
    /// Whether finished runs keep their last checkpoint.
    pub keep_checkpoints: bool,
    /// Number of held-out tokens per run.
    pub held_out_tokens: u64,
    /// For each arm, a hash of the arm, the rule for rates and the data. It identifies a folder's results.
    pub fingerprints: Vec<String>,
}

/// The factor of an arm's rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Factor {
    /// Some of its pilots are not finished.
    Open,
    /// The factor that the rule chose.
    Chosen(f32),
    /// Every pilot diverged: the arm has no runs.
    Diverged,
}

/// One run of a study.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its name, also that of its folder.
    pub id: String,
    /// Index of its arm.
    pub arm: usize,
    /// Its seed.
    pub seed: u64,
    /// Factor of the base's rates.
    pub factor: f32,
    /// Whether it is a pilot.
    pub pilot: bool,
    /// Its configuration.
    pub config: RunConfig,
}

impl Plan {
    /// The plan of the study `kind` over `config`, which was read from `path`.
    ///
    /// # Errors
    /// When an arm is invalid, no configuration meets its budget, or the data do not exist or do not fit.
    pub fn of(kind: Kind, config: &StudyConfig, path: &Path) -> Result<Self> {
        let arms = arms(kind, config, path)?;
        for (index, arm) in arms.iter().enumerate() {
            if let Some(other) = arms[..index].iter().find(|other| slug(&other.name) == slug(&arm.name)) {
                return Err(Error::arm(
                    &arm.name,
                    format!("its name is too similar to that of `{}`", other.name),
                ));
            }
        }
        let study = &config.study;
        let data = Data::open(config)?;
        let fingerprints =
            arms.iter().map(|arm| fingerprint(kind, arm, &study.rates, &data.identity)).collect();
        Ok(Self {
            kind,
            arms,
            seeds: study.seeds.clone(),
            rates: study.rates.clone(),
            keep_checkpoints: study.keep_checkpoints,
            held_out_tokens: data.held_out_tokens,
            fingerprints,
        })
    }

    /// The index of the arm called `name`.
    ///
    /// # Errors
    /// When it does not exist.
    pub fn arm(&self, name: &str) -> Result<usize> {
        self.arms.iter().position(|arm| arm.name == name).ok_or_else(|| {
            let there: Vec<_> = self.arms.iter().map(|arm| format!("`{}`", arm.name)).collect();
            Error::UnknownArm { name: name.to_owned(), there: there.join(", ") }
        })
    }

    /// The pilot runs.
    pub fn pilots(&self) -> Vec<Run> {
        let Some(rule) = &self.rates else { return Vec::new() };
        let pilot = |arm: usize, factor: f32| {
            let id = format!("{}.pilot-{factor}", slug(&self.arms[arm].name));
            let mut run = self.run(id, arm, rule.seed, factor);
            run.pilot = true;
            if let Some(steps) = rule.steps {
                // The rates follow the whole schedule in fewer steps.
                let train = &mut run.config.train;
                train.schedule.warmup = train.schedule.warmup * steps / train.steps;
                train.steps = steps;
            }
            run
        };
        (0..self.arms.len())
            .flat_map(|arm| rule.factors.iter().map(move |&factor| pilot(arm, factor)))
            .collect()
    }

    /// The compared runs, seed by seed, at the arms' `factors`; at the base's rates if a factor is open.
    pub fn runs(&self, factors: &[Factor]) -> Vec<Run> {
        let run = |seed: u64, arm: usize| {
            let factor = match factors[arm] {
                Factor::Open => 1.0,
                Factor::Chosen(factor) => factor,
                Factor::Diverged => return None,
            };
            Some(self.run(format!("{}.seed-{seed}", slug(&self.arms[arm].name)), arm, seed, factor))
        };
        let of_seed = |&seed: &u64| (0..self.arms.len()).filter_map(move |arm| run(seed, arm));
        self.seeds.iter().flat_map(of_seed).collect()
    }

    /// Every arm's factor, according to the rule.
    pub fn factors(&self, results: &[RunResult]) -> Vec<Factor> {
        let Some(rule) = &self.rates else { return vec![Factor::Chosen(1.0); self.arms.len()] };
        let factor = |arm: &Arm| {
            let pilots = results.iter().filter(|result| result.pilot && result.arm == arm.name);
            let pilots: Vec<_> = pilots.filter(|pilot| rule.factors.contains(&pilot.factor)).collect();
            if pilots.len() < rule.factors.len() {
                return Factor::Open;
            }
            let losses = pilots.iter().filter_map(|pilot| Some((pilot.nats_per_token?, pilot.factor)));
            let best = losses.min_by(|(a, _), (b, _)| a.total_cmp(b));
            best.map_or(Factor::Diverged, |(_, factor)| Factor::Chosen(factor))
        };
        self.arms.iter().map(factor).collect()
    }

    /// The held-out positions of all arms, which share their data.
    pub(crate) fn positions(&self) -> Result<Positions> {
        let config = &self.arms[0].config;
        let open = |path: &Path| TokenShards::open(path).map_err(engram_train::Error::from);
        let (train, valid) = config.data.train_and_held_out().map_err(engram_train::Error::from)?;
        let (train, valid) = (open(train)?, open(valid)?);
        Ok(Positions::of(&train, &valid, config.train.evaluate_tokens)?)
    }

    fn run(&self, id: String, arm: usize, seed: u64, factor: f32) -> Run {
        let mut config = self.arms[arm].config.clone();
        config.train.seed = seed;
        config.train.optimizer.muon_rate *= factor;
        config.train.optimizer.adam_rate *= factor;
        Run { id, arm, seed, factor, pilot: false, config }
    }
}

/// The hash of everything that the results of `arm` depend on, except the seed.
fn fingerprint(kind: Kind, arm: &Arm, rates: &Option<RateRule>, data: &[String]) -> String {
    #[derive(Serialize)]
    struct Identity<'a> {
        kind: Kind,
        arm: Arm,
        rates: &'a Option<RateRule>,
        data: &'a [String],
    }
    let mut arm = arm.clone();
    // The same data may have another path.
    arm.config.data.paths_mut().for_each(|path| path.clear());
    let identity = Identity { kind, arm, rates, data };
    let identity = serde_json::to_vec(&identity).expect("an arm is representable as JSON");
    blake3::hash(&identity).to_hex().to_string()
}

struct Data {
    identity: Vec<String>,
    held_out_tokens: u64,
}

impl Data {
    fn open(config: &StudyConfig) -> Result<Self> {
        let tokenizer = Tokenizer::load(&config.data.tokenizer).map_err(engram_train::Error::from)?;
        if tokenizer.vocabulary() != config.model.vocabulary {
            return Err(engram_train::Error::Mismatch(format!(
                "{} has {} tokens, but `model.vocabulary` is {}: make them equal",
                config.data.tokenizer.display(),
                tokenizer.vocabulary(),
                config.model.vocabulary
            ))
            .into());
        }
        let open = |path: &Path| -> std::result::Result<TokenShards, engram_data::Error> {
            let shards = TokenShards::open(path)?;
            shards.check_tokenizer(&tokenizer)?;
            Ok(shards)
        };
        let open = |path: &Path| open(path).map_err(engram_train::Error::from);
        let (train, held_out) = config.data.train_and_held_out().map_err(engram_train::Error::from)?;
        let (train, valid) = (open(train)?, open(held_out)?);
        let limit = config.train.evaluate_tokens.map_or(u64::MAX, |limit| limit as u64);
        let held_out_tokens = valid.len().saturating_sub(1).min(limit);
        if held_out_tokens == 0 {
            return Err(engram_train::Error::Mismatch(format!(
                "{} and `train.evaluate_tokens` leave no token to predict: hold out more text, or \
                 raise `train.evaluate_tokens`",
                held_out.display()
            ))
            .into());
        }
        let identity =
            vec![tokenizer.hash().to_string(), train.identity().to_string(), valid.identity().to_string()];
        Ok(Self { identity, held_out_tokens })
    }
}

fn slug(name: &str) -> String {
    name.replace(' ', "-")
}
