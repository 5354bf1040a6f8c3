//! The arms of a study and their costs.

use std::path::Path;

use engram_config::{Account, ModelConfig, RunConfig};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::budget::{self, Cost, Solve};
use crate::config::{Allocation, Grid, MemorySweep, StudyConfig};
use crate::error::{Error, Result};
use crate::patch::{Patch, lookup_mut, merge, parse, remove};

/// The studies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The share of experts and memory in a fixed budget.
    Allocation,
    /// The size of the memory over one backbone.
    Memory,
    /// The layers that read the memory.
    Placement,
    /// The memory without one of its parts.
    Ablation,
    /// Other uses of the parameters, and negative controls.
    Baselines,
}

impl Kind {
    /// Its name, which is also the name of its table below `[study]`.
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

/// One arm: a configuration that is trained with every seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arm {
    /// Its name, such as `rho 0.75`.
    pub name: String,
    /// Its value on the study's axis, if there is one: ρ, or slots.
    pub x: Option<f64>,
    /// Its series, if the study has several.
    pub series: Option<String>,
    /// Its cost.
    pub costs: Costs,
    /// Its configuration. Each run sets the seed and the rates.
    pub config: RunConfig,
}

/// The cost of an arm; see [`Account`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Costs {
    /// All parameters, memory included.
    pub total_parameters: u64,
    /// Parameters that a token uses.
    pub active_parameters: u64,
    /// Parameters of routed experts.
    pub expert_parameters: u64,
    /// Parameters in memory tables.
    pub memory_parameters: u64,
    /// Rows of all memory tables.
    pub memory_rows: u64,
    /// Routed experts per block.
    pub routed_experts: usize,
    /// Floating-point operations of a forward pass per token.
    pub forward_flops_per_token: u64,
}

impl Costs {
    fn of(model: &ModelConfig) -> std::result::Result<Self, String> {
        let rows = model.table_rows().map_err(|error| error.to_string())?;
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

/// The arms of the study `kind` over `config`, read from `path`. The reference is the first.
///
/// # Errors
/// When the file does not describe that study, an arm is invalid, or no configuration meets its budget.
pub fn arms(kind: Kind, config: &StudyConfig, path: &Path) -> Result<Vec<Arm>> {
    let base = Base::of(config.base());
    let study = &config.study;
    let missing = || {
        let problem = format!("`[study.{}]` is missing; it states what this study compares", kind.name());
        engram_config::Error::Config { path: path.to_owned(), line: 1, problem }
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

    /// The budget is the base without memory: with ρ = 1, every inactive parameter is an expert's. With a smaller ρ,
    /// experts are removed, the shared expert is narrowed until the memory module's operations are paid for, and rows
    /// fill the remaining parameters.
    fn allocation(&self, allocation: &Allocation) -> Result<Vec<Arm>> {
        const ALL_EXPERTS: &str = "rho 1";
        let refused = |problem: &str| Error::arm(ALL_EXPERTS, problem);
        let experts = self.run.model.experts.as_ref().ok_or_else(|| {
            refused("the base has no `[model.experts]`, but this study divides the parameters of experts")
        })?;
        if self.run.model.memory.is_none() {
            return Err(refused("the base has no `[model.memory]` for the other arms"));
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
                        "has the same number of experts as `{}`: of {resting} inactive experts of {one} \
                         parameters, none lies between; use shares further apart, or more and narrower experts",
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
        // Rows cost no operations by themselves; the account counts what they cause.
        let flops = arm.costs.forward_flops_per_token;
        budget::check(Cost::Flops, flops, budget.forward_flops_per_token)
            .map_err(|problem| Error::arm(name, problem))?;
        Ok(arm)
    }

    fn memory(&self, sweep: &MemorySweep) -> Result<Vec<Arm>> {
        let mut slots = sweep.slots.clone();
        slots.sort_unstable();
        let rows = |equal| Solve { key: "model.memory.rows_per_head".into(), equal };
        let memory: Vec<Arm> = slots
            .iter()
            .map(|&slots| {
                let adjust = |config: &mut Table| budget::meet(config, &rows(Cost::Rows), slots);
                let arm = self.arm(&format!("memory {slots}"), &Patch::default(), adjust)?;
                Ok(Arm { x: Some(arm.costs.memory_rows as f64), series: Some("memory".into()), ..arm })
            })
            .collect::<Result<_>>()?;
        let mut arms = memory.clone();
        for (series, patch) in &sweep.series {
            for (like, slots) in memory.iter().zip(&slots) {
                let total = like.costs.total_parameters;
                let adjust = |config: &mut Table| budget::meet(config, &rows(Cost::Total), total);
                let arm = self.arm(&format!("{series} {slots}"), patch, adjust)?;
                arms.push(Arm { x: like.x, series: Some(series.clone()), ..arm });
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
                    let reference = reference.as_ref().ok_or("the reference cannot be adjusted to itself")?;
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

    /// Losses are compared document by document, so all arms need the same documents and the same number of training
    /// tokens.
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
            Some((what, _)) => Err(format!("changes {what}, which must be the same for all arms of a study")),
            None => Ok(()),
        }
    }
}

/// Names become names of folders.
fn check_name(name: &str) -> std::result::Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || " .+-_()".contains(c);
    if name.is_empty() || !name.chars().all(fine) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(
            "a name consists of letters, digits, blanks and `.+-_()`, and begins with a letter or digit"
                .into(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(study: &str) -> StudyConfig {
        let base = r#"
            [model]
            vocabulary = 512
            width = 64
            blocks = 3
            context = 64
            attention = { kind = "plain", heads = 4, head_width = 16 }
            feed_forward = { width = 128 }
            experts = { first_block = 1, routed = 66, active = 2, width = 24, shared_width = 96 }

            [model.memory]
            layers = [1]
            max_order = 3
            heads = 4
            row_width = 8
            rows_per_head = [2000, 3000]

            [data]
            train = "train"
            valid = "valid"
            tokenizer = "tokenizer.json"

            [train]
            steps = 10
            batch = 4
            schedule = { decay = "constant" }

            [study]
            seeds = [0]
        "#;
        toml::from_str(&format!("{base}\n{study}")).unwrap()
    }

    #[test]
    fn texts_end_as_the_study_says() {
        let study = config("[text]\nend = '<|im_end|>'\n[study.memory]\nslots = [1000, 2000, 4000]");
        let made = made(Kind::Memory, &study).unwrap();
        assert!(made.iter().all(|arm| arm.config.text.end.as_deref() == Some("<|im_end|>")));
    }

    fn made(kind: Kind, config: &StudyConfig) -> Result<Vec<Arm>> {
        arms(kind, config, Path::new("study.toml"))
    }

    fn refused(kind: Kind, study: &str) -> String {
        made(kind, &config(study)).unwrap_err().to_string()
    }

    #[track_caller]
    fn close(cost: Cost, found: u64, target: u64) {
        let off = (found as f64 / target as f64 - 1.0).abs();
        assert!(off <= cost.tolerance(), "{cost:?}: {found} for {target}");
    }

    #[test]
    fn shares_of_one_budget() {
        let arms =
            made(Kind::Allocation, &config("allocation = { shares = [0.25, 1.0, 0.75, 0.5, 0.0] }")).unwrap();
        let names: Vec<_> = arms.iter().map(|arm| arm.name.as_str()).collect();
        assert_eq!(names, ["rho 1", "rho 0.75", "rho 0.5", "rho 0.25", "rho 0"]);
        let routed: Vec<_> = arms.iter().map(|arm| arm.costs.routed_experts).collect();
        assert_eq!(routed, [66, 50, 34, 18, 2]);
        assert_eq!(arms[0].config.model.memory, None);
        for arm in &arms {
            // As anyone would count them, from what is trained.
            for cost in [Cost::Total, Cost::Flops] {
                let [found, target] = [arm, &arms[0]].map(|arm| cost.of(&arm.config.model).unwrap());
                close(cost, found, target);
            }
        }
        let shares: Vec<_> = arms.iter().map(|arm| arm.x.unwrap()).collect();
        assert_eq!(shares, [1.0, 0.75, 0.5, 0.25, 0.0]);
        // A quarter of 64 inactive experts in two blocks, minus the cost of the module itself.
        let freed = 16 * 2 * 3 * 64 * 24;
        let rows = arms[1].costs.memory_parameters;
        assert!((0.8..1.05).contains(&(rows as f64 / freed as f64)), "{rows} of {freed}");
        // Rows of the orders keep their proportions.
        let rows = &arms[1].config.model.memory.as_ref().unwrap().rows_per_head;
        assert!((rows[1] as f64 / rows[0] as f64 - 1.5).abs() < 0.01, "{rows:?}");
    }

    #[test]
    fn other_series_have_as_many_parameters() {
        let study =
            "memory = { slots = [60000, 6000, 600], series = { v41 = { set.model.memory.form = 'v41' } } }";
        let arms = made(Kind::Memory, &config(study)).unwrap();
        let names: Vec<_> = arms.iter().map(|arm| arm.name.as_str()).collect();
        let expected = ["memory 600", "memory 6000", "memory 60000", "v41 600", "v41 6000", "v41 60000"];
        assert_eq!(names, expected);
        for (arm, slots) in arms.iter().zip([600, 6000, 60_000]) {
            close(Cost::Rows, arm.costs.memory_rows, slots);
            assert_eq!(arm.costs.forward_flops_per_token, arms[0].costs.forward_flops_per_token);
        }
        for (memory, v41) in arms[..3].iter().zip(&arms[3..]) {
            assert_eq!(v41.config.model.memory.as_ref().unwrap().form, engram_config::MemoryForm::V41);
            close(Cost::Total, v41.costs.total_parameters, memory.costs.total_parameters);
            assert_eq!(v41.x, memory.x);
        }
    }

    #[test]
    fn changes_are_merged_removed_and_solved() {
        let study = r#"
            [[study.ablation.arms]]
            name = "v41"
            set.model.memory.form = "v41"

            [[study.ablation.arms]]
            name = "4-grams"
            set.model.memory = { max_order = 4, rows_per_head = [10, 10, 10] }
            solve = [{ key = "model.memory.rows_per_head", equal = "total" }]

            [[study.ablation.arms]]
            name = "wider"
            remove = ["model.memory"]
            solve = [{ key = "model.experts.shared_width", equal = "total" }]

            [study.ablation]
            reference = "v41"
        "#;
        // TOML wants a table before its own arrays of tables.
        let (arms_text, reference) = study.split_once("[study.ablation]").unwrap();
        let study = format!("[study.ablation]{reference}{arms_text}");
        let arms = made(Kind::Ablation, &config(&study)).unwrap();
        let memory = |arm: usize| arms[arm].config.model.memory.as_ref();
        assert_eq!(memory(0).unwrap().form, engram_config::MemoryForm::V41);
        assert_eq!(memory(0).unwrap().heads, 4, "what is not named stays");
        assert_eq!((memory(1).unwrap().max_order, memory(1).unwrap().rows_per_head.len()), (4, 3));
        assert_eq!(memory(1).unwrap().form, engram_config::MemoryForm::Paper, "a change of the base alone");
        assert_eq!(memory(2), None);
        for arm in &arms[1..] {
            close(Cost::Total, arm.costs.total_parameters, arms[0].costs.total_parameters);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let allocation =
            |shares: &str| refused(Kind::Allocation, &format!("allocation = {{ shares = {shares} }}"));
        let message = allocation("[1.0, 0.5, 0.501]");
        assert!(
            message.contains("arm `rho 0.5`: has the same number of experts as `rho 0.501`"),
            "{message}"
        );
        assert!(refused(Kind::Memory, "").contains("[study.memory]"));

        let mut narrow = config("allocation = { shares = [1.0, 0.5, 0.0] }");
        narrow.model.experts.as_mut().unwrap().shared_width = 2;
        let message = made(Kind::Allocation, &narrow).unwrap_err().to_string();
        assert!(
            message.contains(
                "arm `rho 0.5`: no configuration meets the budget: it needs 293248 operations per token"
            ),
            "{message}"
        );

        let arm = |change: &str| {
            let arms =
                format!("[[study.ablation.arms]]\nname = 'a'\n[[study.ablation.arms]]\nname = 'b'\n{change}");
            refused(Kind::Ablation, &arms)
        };
        for (change, words) in [
            ("set.model.memory.gait = false", "arm `b`: unknown field `gait`"),
            ("set.model.memory.heads = 0", "arm `b`: `model.memory.heads`: is 0"),
            ("remove = ['model.memroy']", "arm `b`: cannot remove `model.memroy`: the base does not have it"),
            (
                "solve = [{ key = 'model.heads', equal = 'total' }]",
                "arm `b`: `model.heads` cannot be adjusted",
            ),
            ("solve = [{ key = 'model.tied_head', equal = 'total' }]", "is not a whole number"),
            (
                "set.model.memory.rows_per_head = [10, 10]\nsolve = [{ key = 'train.batch', equal = 'total' }]",
                "does not raise its parameters to",
            ),
            ("set.data.valid = 'elsewhere'", "arm `b`: changes data"),
            ("set.train.steps = 11", "arm `b`: changes the number of training tokens"),
        ] {
            let message = arm(change);
            assert!(message.contains(words), "{message}");
        }
        let message = refused(Kind::Ablation, "ablation.arms = [{ name = 'a' }, { name = '../b' }]");
        assert!(message.contains("arm `../b`: a name consists"), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_arm_that_is_made_meets_the_budget(
            width in 2..12usize, blocks in 2..5usize, routed in 10..80usize, hidden in 8..40usize,
            shared in 32..200usize, heads in 1..5usize, row_width in 4..20usize,
            base in 10..5000u64, share in 0.1..0.9f64, v41: bool,
        ) {
            let mut config = config("allocation = { shares = [] }");
            config.study.allocation = Some(Allocation { shares: vec![1.0, share, 0.0] });
            config.model.width = 8 * width;
            config.model.blocks = blocks;
            let experts = config.model.experts.as_mut().unwrap();
            (experts.routed, experts.width, experts.shared_width) = (routed, hidden, shared);
            let memory = config.model.memory.as_mut().unwrap();
            (memory.heads, memory.row_width, memory.rows_per_head) = (heads, row_width, vec![base, 2 * base]);
            if v41 {
                memory.form = engram_config::MemoryForm::V41;
            }
            match made(Kind::Allocation, &config) {
                Ok(arms) => for arm in &arms[1..] {
                    for cost in [Cost::Total, Cost::Flops] {
                        let [found, target] = [arm, &arms[0]].map(|arm| cost.of(&arm.config.model).unwrap());
                        prop_assert!((found as f64 / target as f64 - 1.0).abs() <= cost.tolerance());
                    }
                    let wanted = if arm.name == "rho 0" { 0.0 } else { share };
                    prop_assert!((arm.x.unwrap() - wanted).abs() <= 0.5 / (routed - 2) as f64 + 1e-9);
                },
                Err(Error::Arm { problem, .. }) => {
                    let fine =
                        ["no configuration meets the budget", "has the same number of experts as", "does not raise"];
                    prop_assert!(fine.iter().any(|words| problem.contains(words)), "{}", problem);
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
