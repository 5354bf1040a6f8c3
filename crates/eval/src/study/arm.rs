//! The arms of a study: what is trained, at what cost.

use std::path::Path;

use engram_model::{Account, ModelConfig};
use engram_train::RunConfig;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::budget::{self, Cost, Solve, table_rows};
use super::config::{Allocation, Grid, MemorySweep, StudyConfig};
use super::error::{Error, Result};

/// The studies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The share of experts and memory in a fixed budget.
    Allocation,
    /// More memory for the same backbone.
    Memory,
    /// Where the memory stands.
    Placement,
    /// What it cannot do without.
    Ablation,
    /// What else the parameters could be spent on, and negative controls.
    Baselines,
}

impl Kind {
    /// Its name, which is also that of its table below `[study]`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "allocation",
            Self::Memory => "memory",
            Self::Placement => "placement",
            Self::Ablation => "ablation",
            Self::Baselines => "baselines",
        }
    }
}

/// A change of the base's configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// What it changes; tables are merged, everything else is replaced.
    #[serde(default)]
    pub set: Table,
    /// Dotted keys that it leaves out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<String>,
}

/// One arm: a configuration that is trained with every seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arm {
    /// Its name, such as `rho 0.75`.
    pub name: String,
    /// Where it stands on the study's axis, if that has one: ρ, or slots.
    pub x: Option<f64>,
    /// The curve that it belongs to, where a study has several.
    pub series: Option<String>,
    /// What it costs.
    pub costs: Costs,
    /// What is trained; its seed and rates are set by each run.
    pub config: RunConfig,
}

/// What an arm costs; see [`Account`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Costs {
    /// All parameters, memory included.
    pub total_parameters: u64,
    /// Those that a token meets.
    pub active_parameters: u64,
    /// Those of routed experts.
    pub expert_parameters: u64,
    /// Those in memory tables.
    pub memory_parameters: u64,
    /// Rows of all memory tables.
    pub memory_rows: u64,
    /// Routed experts of a block.
    pub routed_experts: usize,
    /// Floating-point operations of a forward pass per token.
    pub forward_flops_per_token: u64,
}

impl Costs {
    fn of(model: &ModelConfig) -> std::result::Result<Self, String> {
        let rows = table_rows(model)?;
        let account = Account::of(model, &rows);
        Ok(Self {
            total_parameters: account.total,
            active_parameters: account.active,
            expert_parameters: account.experts,
            memory_parameters: account.memory,
            memory_rows: rows.iter().sum(),
            routed_experts: model.experts.as_ref().map_or(0, |experts| experts.routed),
            forward_flops_per_token: account.forward_flops,
        })
    }
}

/// The arms of the study `kind` over `config`, read from `path`, the reference first.
///
/// # Errors
/// When the file does not describe that study, or an arm is no run, or no configuration meets its budget.
pub fn arms(kind: Kind, config: &StudyConfig, path: &Path) -> Result<Vec<Arm>> {
    let base = Base::of(config.base());
    let study = &config.study;
    let missing = || {
        let problem = format!("there is no `[study.{}]`, which says what this study compares", kind.name());
        engram_train::Error::Config { path: path.to_owned(), line: 1, problem }
    };
    match kind {
        Kind::Allocation => base.allocation(study.allocation.as_ref().ok_or_else(missing)?),
        Kind::Memory => base.memory(study.memory.as_ref().ok_or_else(missing)?),
        Kind::Placement => base.grid(study.placement.as_ref().ok_or_else(missing)?),
        Kind::Ablation => base.grid(study.ablation.as_ref().ok_or_else(missing)?),
        Kind::Baselines => base.grid(study.baselines.as_ref().ok_or_else(missing)?),
    }
}

struct Base {
    run: RunConfig,
    table: Table,
}

impl Base {
    fn of(run: RunConfig) -> Self {
        let table = Table::try_from(&run).expect("a configuration is representable as TOML");
        Self { run, table }
    }

    /// The budget is the base's without memory: with ρ = 1, every resting parameter is an expert's. With less, experts
    /// go, the shared expert is narrowed until the operations of the memory module are paid for, and rows fill what
    /// is left of the parameters.
    fn allocation(&self, allocation: &Allocation) -> Result<Vec<Arm>> {
        const ALL_EXPERTS: &str = "rho 1";
        let refused = |problem: &str| Error::arm(ALL_EXPERTS, problem);
        let experts = self.run.model.experts.as_ref().ok_or_else(|| {
            refused("the base has no `[model.experts]`, whose parameters this study is about")
        })?;
        if self.run.model.memory.is_none() {
            return Err(refused("the base has no `[model.memory]`, which the other arms get"));
        }
        let resting = experts.routed - experts.active;
        let one = budget::expert_parameters(&self.run).unwrap_or(0);
        let mut shares = allocation.shares.clone();
        shares.sort_by(|a, b| b.total_cmp(a));
        let mut arms: Vec<Arm> = Vec::new();
        for share in shares {
            let kept = (share * resting as f64).round() as usize;
            let name = format!("rho {share}");
            if let Some(other) = arms.iter().find(|arm| arm.costs.routed_experts == experts.active + kept) {
                return Err(Error::arm(
                    &name,
                    format!(
                        "has as many experts as `{}`: of {resting} resting experts of {one} parameters, none lies \
                     between; take shares further apart, or more and narrower experts",
                        other.name
                    ),
                ));
            }
            let arm = match arms.first() {
                None => self.without_memory(ALL_EXPERTS)?,
                Some(reference) => self.with_share(&name, experts.active + kept, &reference.costs)?,
            };
            arms.push(Arm { x: Some(kept as f64 / resting as f64), ..arm });
        }
        Ok(arms)
    }

    fn without_memory(&self, name: &str) -> Result<Arm> {
        let patch = Patch { remove: vec!["model.memory".into()], ..Patch::default() };
        self.arm(name, &patch, |_| Ok(()))
    }

    fn with_share(&self, name: &str, routed: usize, budget: &Costs) -> Result<Arm> {
        let solve = |key: &str, equal| Solve { key: key.into(), equal };
        let arm = self.arm(name, &Patch::default(), |config| {
            if let Some(place) = lookup_mut(config, "model.experts.routed") {
                *place = Value::Integer(routed as i64);
            }
            let flops = solve("model.experts.shared_width", Cost::Flops);
            budget::meet(config, &flops, budget.forward_flops_per_token)?;
            budget::meet(config, &solve("model.memory.rows_per_head", Cost::Total), budget.total_parameters)
        })?;
        // Rows cost no operations, but that is for the account to say.
        let flops = arm.costs.forward_flops_per_token;
        budget::check(Cost::Flops, flops, budget.forward_flops_per_token)
            .map_err(|problem| Error::arm(name, problem))?;
        Ok(arm)
    }

    fn memory(&self, sweep: &MemorySweep) -> Result<Vec<Arm>> {
        let mut slots = sweep.slots.clone();
        slots.sort_unstable();
        let memory = ("memory".to_owned(), Patch::default());
        let series = std::iter::once(memory).chain(sweep.series.clone());
        let mut arms = Vec::new();
        for (series, patch) in series {
            for &slots in &slots {
                let name = format!("{series} {slots}");
                let rows = Solve { key: "model.memory.rows_per_head".into(), equal: Cost::Rows };
                let arm = self.arm(&name, &patch, |config| budget::meet(config, &rows, slots))?;
                let x = Some(arm.costs.memory_rows as f64);
                arms.push(Arm { x, series: Some(series.clone()), ..arm });
            }
        }
        Ok(arms)
    }

    fn grid(&self, grid: &Grid) -> Result<Vec<Arm>> {
        let is_reference = |name: &str| name == grid.reference();
        let (references, others): (Vec<_>, Vec<_>) =
            grid.arms.iter().partition(|arm| is_reference(&arm.name));
        let mut arms: Vec<Arm> = Vec::new();
        for arm in references.into_iter().chain(others) {
            let patch = Patch { set: arm.set.clone(), remove: arm.remove.clone() };
            let reference = arms.first().map(|arm| arm.config.model.clone());
            let made = self.arm(&arm.name, &patch, |config| {
                arm.solve.iter().try_for_each(|solve| {
                    let reference =
                        reference.as_ref().ok_or("the reference has nothing to be adjusted to")?;
                    budget::meet(config, solve, solve.equal.of(reference)?)
                })
            })?;
            arms.push(made);
        }
        Ok(arms)
    }

    /// The base, changed by `patch` and then adjusted.
    fn arm(
        &self,
        name: &str,
        patch: &Patch,
        adjust: impl FnOnce(&mut Table) -> std::result::Result<(), String>,
    ) -> Result<Arm> {
        let make = || -> std::result::Result<Arm, String> {
            check_name(name)?;
            let mut table = self.table.clone();
            patch.remove.iter().try_for_each(|key| remove(&mut table, key))?;
            merge(&mut table, &patch.set);
            adjust(&mut table)?;
            let config = parse(&table)?;
            self.check_measured_alike(&config)?;
            let costs = Costs::of(&config.model)?;
            Ok(Arm { name: name.to_owned(), x: None, series: None, costs, config })
        };
        make().map_err(|problem| Error::arm(name, problem))
    }

    /// Losses are compared document by document: all arms need the same ones, and as many tokens to learn from.
    fn check_measured_alike(&self, config: &RunConfig) -> std::result::Result<(), String> {
        let (base, arm) = (&self.run, config);
        let tokens = |run: &RunConfig| run.train.steps * (run.train.batch * run.model.context) as u64;
        let alike = [
            ("data", arm.data == base.data),
            ("train.evaluate_tokens", arm.train.evaluate_tokens == base.train.evaluate_tokens),
            ("train.seed", arm.train.seed == base.train.seed),
            ("the number of training tokens", tokens(arm) == tokens(base)),
        ];
        match alike.into_iter().find(|(_, alike)| !alike) {
            Some((what, _)) => Err(format!("changes {what}, which the arms of a study must have in common")),
            None => Ok(()),
        }
    }
}

/// Names become folders' names.
fn check_name(name: &str) -> std::result::Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || " .+-_()".contains(c);
    if name.is_empty() || !name.chars().all(fine) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(
            "a name has letters, digits, blanks and `.+-_()`, and begins with a letter or digit".into()
        );
    }
    Ok(())
}

/// The configuration that a table describes, if it is valid.
pub(crate) fn parse(table: &Table) -> std::result::Result<RunConfig, String> {
    let config: RunConfig =
        table.clone().try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}

/// The value at a dotted key.
pub(crate) fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        Some((first, rest)) => lookup(table.get(first)?.as_table()?, rest),
        None => table.get(key),
    }
}

/// The value at a dotted key, to be changed.
pub(crate) fn lookup_mut<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        Some((first, rest)) => lookup_mut(table.get_mut(first)?.as_table_mut()?, rest),
        None => table.get_mut(key),
    }
}

fn remove(table: &mut Table, key: &str) -> std::result::Result<(), String> {
    let (parent, last) = match key.rsplit_once('.') {
        Some((parent, last)) => (lookup_mut(table, parent).and_then(Value::as_table_mut), last),
        None => (Some(table), key),
    };
    match parent.and_then(|parent| parent.remove(last)) {
        Some(_) => Ok(()),
        None => Err(format!("the base has no `{key}` to be removed")),
    }
}

fn merge(table: &mut Table, changes: &Table) {
    for (key, change) in changes {
        match (table.get_mut(key), change) {
            (Some(Value::Table(inner)), Value::Table(change)) => merge(inner, change),
            _ => _ = table.insert(key.clone(), change.clone()),
        }
    }
}
