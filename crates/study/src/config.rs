//! A study's configuration: a run's configuration, the base of every arm, and a table `[study]`.

use std::collections::BTreeMap;
use std::path::Path;

use engram_config::{
    ConfigError, DataConfig, ModelConfig, RunConfig, TextConfig, TrainConfig, load_toml, locate,
};
use serde::{Deserialize, Serialize};

use crate::budget::Solve;
use crate::error::Result;
use crate::patch::Patch;

/// A study's file: a run's configuration, and the grids of the studies over it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyConfig {
    /// The grids.
    pub study: StudyTable,
    /// The base's model.
    pub model: ModelConfig,
    /// The tokens around the texts of every arm.
    #[serde(default, skip_serializing_if = "TextConfig::is_default")]
    pub text: TextConfig,
    /// The training and held-out data of every arm.
    pub data: DataConfig,
    /// The base's training.
    pub train: TrainConfig,
}

/// `[study]`: what all studies of a file share, and a table for each of its studies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudyTable {
    /// Seeds; every arm is trained with each.
    pub seeds: Vec<u64>,
    /// How an arm's rates are chosen. Default: every arm uses the base's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates: Option<RateRule>,
    /// Whether the last checkpoint of a finished run is kept.
    #[serde(default = "yes")]
    pub keep_checkpoints: bool,
    /// The share of experts and memory in a fixed budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<Allocation>,
    /// The size of the memory over one backbone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemorySweep>,
    /// The layers that read the memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Grid>,
    /// The memory without one of its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ablation: Option<Grid>,
    /// Other uses of the parameters, and controls that must not help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baselines: Option<Grid>,
}

/// The rule that chooses every arm's rates. For each factor, the arm has a pilot run at the base's rates times the
/// factor. The arm is then trained at the factor whose pilot had the lowest held-out loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateRule {
    /// Factors of `optimizer.muon_rate` and `optimizer.adam_rate`, and so of the rows' rate.
    pub factors: Vec<f32>,
    /// The pilots' seed, different from the study's seeds.
    pub seed: u64,
    /// The pilots' number of steps; the schedule is shortened to fit. Default: that of a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
}

/// `[study.allocation]` (paper, section 3): of the parameters of inactive routed experts in the base without memory,
/// the share ρ stays there, and 1 − ρ becomes rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allocation {
    /// Values of ρ, 0 to 1. The reference is 1, without memory.
    pub shares: Vec<f64>,
}

/// `[study.memory]` (paper, section 3): one backbone with tables of more and more rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySweep {
    /// Numbers of rows over all heads, orders and layers.
    pub slots: Vec<u64>,
    /// Other uses of as many parameters, each a change of the base whose rows are adjusted. They are fitted, too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub series: BTreeMap<String, Patch>,
}

/// Arms that are changes of the base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// The arm that the others are compared with. Default: the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// The arms.
    pub arms: Vec<GridArm>,
}

/// One arm of a [`Grid`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridArm {
    /// Its name.
    pub name: String,
    /// Its changes of the base.
    #[serde(default)]
    pub set: toml::Table,
    /// Keys of the base to leave out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
    /// Keys to adjust afterwards, in this order, until a cost equals the reference's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub solve: Vec<Solve>,
}

fn yes() -> bool {
    true
}

impl StudyConfig {
    /// Reads and validates a study's file. Relative paths in it start at the file's own folder.
    ///
    /// # Errors
    /// When the file cannot be read, or a key or value is invalid. The error names its line.
    pub fn load(path: &Path) -> Result<Self> {
        let (source, mut config) = load_toml::<Self>(path)?;
        config.data.resolve(path);
        config.validate().map_err(|error| locate(&source, &error))?;
        Ok(config)
    }

    /// The base of every arm.
    pub fn base(&self) -> RunConfig {
        let Self { model, text, data, train, .. } = self.clone();
        RunConfig { model, text, data, train }
    }

    fn validate(&self) -> std::result::Result<(), ConfigError> {
        self.base().validate()?;
        let Self { study, train, .. } = self;
        let refuse = |key: &str, reason: String| Err(ConfigError::new(format!("study.{key}"), reason));
        if study.seeds.is_empty() {
            return refuse("seeds", "is empty: name at least one".into());
        }
        if let Some(seed) = repeated(&study.seeds) {
            return refuse("seeds", format!("names {seed} twice"));
        }
        if let Some(rates) = &study.rates {
            if !rates.factors.iter().all(|&factor| factor > 0.0 && factor.is_finite()) {
                return refuse("rates.factors", "must all be above 0".into());
            }
            if rates.factors.len() < 2 || repeated(&rates.factors).is_some() {
                return refuse("rates.factors", "needs at least two different factors to choose from".into());
            }
            if study.seeds.contains(&rates.seed) {
                let reason =
                    format!("{} is one of the study's seeds: pilots need a different seed", rates.seed);
                return refuse("rates.seed", reason);
            }
            if rates.steps.is_some_and(|steps| steps == 0 || steps > train.steps) {
                return refuse("rates.steps", format!("must lie between 1 and the run's {}", train.steps));
            }
        }
        if let Some(allocation) = &study.allocation {
            let shares = &allocation.shares;
            if !shares.contains(&1.0) || shares.len() < 3 || repeated(shares).is_some() {
                let reason = "needs 1 (without memory) and at least two other shares";
                return refuse("allocation.shares", reason.into());
            }
            if let Some(share) = shares.iter().find(|share| !(0.0..=1.0).contains(*share)) {
                return refuse("allocation.shares", format!("holds {share}, but shares lie between 0 and 1"));
            }
        }
        if let Some(memory) = &study.memory
            && (memory.slots.len() < 3 || repeated(&memory.slots).is_some() || memory.slots.contains(&0))
        {
            return refuse("memory.slots", "needs at least three different numbers of rows".into());
        }
        let grids =
            [("placement", &study.placement), ("ablation", &study.ablation), ("baselines", &study.baselines)];
        for (name, grid) in grids.into_iter().filter_map(|(name, grid)| Some((name, grid.as_ref()?))) {
            grid.validate().or_else(|reason| refuse(&format!("{name}.arms"), reason))?;
        }
        Ok(())
    }
}

impl Grid {
    /// The name of the reference arm.
    pub(crate) fn reference(&self) -> &str {
        match &self.reference {
            Some(name) => name,
            None => self.arms.first().map_or("", |arm| &arm.name),
        }
    }

    fn validate(&self) -> std::result::Result<(), String> {
        if self.arms.len() < 2 {
            return Err("needs at least two arms to compare".into());
        }
        let names: Vec<_> = self.arms.iter().map(|arm| &arm.name).collect();
        if let Some(name) = repeated(&names) {
            return Err(format!("names `{name}` twice"));
        }
        if !names.iter().any(|name| *name == self.reference()) {
            return Err(format!("has no arm `{}`, but names it as the reference", self.reference()));
        }
        Ok(())
    }
}

/// A value that occurs twice in a list.
fn repeated<T: PartialEq>(values: &[T]) -> Option<&T> {
    values.iter().enumerate().find_map(|(index, value)| values[..index].contains(value).then_some(value))
}
