//! The findings of a study: arms, differences with their errors, and statements that claim no more than these allow.

use serde::{Deserialize, Serialize};

use crate::arm::{Costs, Kind};
use crate::error::{Error, Result};
use crate::measure::Class;
use crate::plan::{Factor, Plan};
use crate::results::RunResult;
use engram_eval::statistics::{Estimate, Panel, curvature_weights, slope_weights};

/// Probability that any of a study's intervals of one kind misses the true value.
const RISK: f64 = 0.05;

/// The result of a study.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    /// The study.
    pub study: Kind,
    /// Seeds with which every compared arm finished.
    pub seeds: Vec<u64>,
    /// Programs, machines and devices of the runs.
    pub origins: Vec<String>,
    /// Number of training tokens per run, including repeats of the data.
    pub training_tokens: u64,
    /// Held-out documents that losses are paired over.
    pub documents: usize,
    /// The number of documents of equal length that would give the same precision.
    pub equal_documents: f64,
    /// Held-out tokens predicted.
    pub tokens: u64,
    /// The finished arms, the reference first.
    pub arms: Vec<ArmFinding>,
    /// Lines through arms, where the study has an axis for them.
    pub fits: Vec<Fit>,
    /// The statements.
    pub statements: Vec<String>,
}

/// The result of one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmFinding {
    /// Its name.
    pub name: String,
    /// Its value on the study's axis.
    pub x: Option<f64>,
    /// Its series.
    pub series: Option<String>,
    /// Its cost.
    pub costs: Costs,
    /// The factor of the base's rates that the rule chose.
    pub factor: f32,
    /// Held-out loss in nats per token, by seed.
    pub by_seed: Vec<f64>,
    /// Their mean.
    pub nats_per_token: f64,
    /// The mean in bits per byte.
    pub bits_per_byte: f64,
    /// Its loss minus the reference's; none for the reference itself.
    pub difference: Option<Interval>,
    /// Losses by frequency of the preceding text.
    pub by_occurrences: Vec<ClassFinding>,
}

/// An arm's losses on tokens whose preceding three tokens occur this often in the training text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassFinding {
    /// Minimum and maximum number of occurrences; the last class has no maximum.
    pub occurrences: (u64, Option<u64>),
    /// Held-out tokens of the class.
    pub tokens: u64,
    /// Mean loss over the seeds, in nats per token.
    pub nats_per_token: f64,
    /// The difference to the reference.
    pub difference: Option<Interval>,
}

/// An estimate and its confidence interval, in nats per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate and its standard error.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A linear fit of losses over the logarithm of slots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The arms' series.
    pub series: String,
    /// Change of the loss for ten times as many slots.
    pub slope: Interval,
    /// Loss at 10⁰ slots.
    pub intercept: f64,
    /// Share of the variance of the arms' means that the line explains.
    pub explained: f64,
    /// Coefficient of the squared decimal logarithm: the curvature of a parabola.
    pub bend: Interval,
}

impl Interval {
    /// The interval of an estimate that is one of `count` of its kind. Together they hold with probability 95 %.
    fn of(estimate: Estimate, count: usize) -> Self {
        let (low, high) = estimate.interval(RISK / count.max(1) as f64);
        Self { estimate, low, high }
    }

    /// Whether zero lies outside.
    pub fn is_beyond_noise(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

impl std::fmt::Display for Interval {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { estimate, low, high } = self;
        write!(out, "{:+.4} ± {:.4} (joint 95 %: {low:+.4} to {high:+.4})", estimate.value, estimate.error)
    }
}

impl Findings {
    /// The findings of `results` for `plan`.
    ///
    /// # Errors
    /// When there are too few results.
    pub fn of(plan: &Plan, results: &[RunResult]) -> Result<Self> {
        let table = Table::of(plan, results)?;
        let panel = table.panel(plan)?;
        let arms = table.arms(plan, &panel)?;
        let mut findings = Self {
            study: plan.kind,
            seeds: table.seeds.clone(),
            origins: origins(results),
            training_tokens: table.training_tokens,
            documents: table.tokens.len(),
            equal_documents: panel.equal_documents(),
            tokens: table.tokens.iter().sum(),
            arms,
            fits: Vec::new(),
            statements: table.caveats.clone(),
        };
        findings.statements.extend(findings.about_documents());
        findings.statements.extend(findings.about_origins());
        findings.statements.extend(findings.about_costs());
        findings.statements.extend(findings.about_rates(plan));
        let statements = match plan.kind {
            Kind::Allocation => findings.about_allocation(&panel)?,
            Kind::Memory => {
                findings.fits = findings.fits(&panel)?;
                findings.about_slots(&panel)?
            }
            Kind::Placement | Kind::Ablation | Kind::Baselines => findings.about_arms(),
        };
        findings.statements.splice(0..0, statements);
        Ok(findings)
    }

    /// A warning if held-out documents are so few or so unequal that results hardly generalise.
    fn about_documents(&self) -> Option<String> {
        const FEW: f64 = 10.0;
        (self.documents > 1 && self.equal_documents < FEW).then(|| {
            format!(
                "The {} held-out documents give the precision of {:.1} equal ones, so intervals are wide. Hold \
                 out more, and cut long ones into passages of one length.",
                self.documents, self.equal_documents
            )
        })
    }

    /// A warning if the runs come from different programs or machines.
    fn about_origins(&self) -> Option<String> {
        let origins = || list(self.origins.iter());
        (self.origins.len() > 1)
            .then(|| format!("The runs come from different programs or machines: {}.", origins()))
    }

    /// A warning about arms whose cost differs from the reference's, if the study does not vary costs.
    fn about_costs(&self) -> Option<String> {
        if matches!(self.study, Kind::Allocation | Kind::Memory) {
            return None;
        }
        let reference = self.arms[0].costs;
        let other = |arm: &ArmFinding| {
            let costs = [
                ("parameters", arm.costs.total_parameters, reference.total_parameters, 0.005),
                (
                    "operations per token",
                    arm.costs.forward_flops_per_token,
                    reference.forward_flops_per_token,
                    0.01,
                ),
            ];
            let change = |(name, found, expected, tolerance): (&str, u64, u64, f64)| {
                let change = found as f64 / expected as f64 - 1.0;
                (change.abs() > tolerance).then(|| format!("{:+.1} % {name}", 100.0 * change))
            };
            let changes: Vec<String> = costs.into_iter().filter_map(change).collect();
            (!changes.is_empty()).then(|| format!("`{}` ({})", arm.name, changes.join(", ")))
        };
        let others: Vec<String> = self.arms.iter().filter_map(other).collect();
        (!others.is_empty()).then(|| {
            let (others, reference) = (list(others.iter()), &self.arms[0].name);
            format!(
                "Not at the budget of `{reference}`, so differences are not due to the form alone: {others}."
            )
        })
    }

    fn about_rates(&self, plan: &Plan) -> Vec<String> {
        let Some(rule) = &plan.rates else {
            return vec!["Every arm was trained at the configuration's rates.".into()];
        };
        let steps = rule.steps.map_or("all".to_owned(), |steps| steps.to_string());
        let mut lines = vec![format!(
            "Rates: each arm was trained at the factor, of {}, whose pilot run ({steps} steps, seed {}) had the lowest \
             held-out loss; the rule is the same for every arm.",
            list(rule.factors.iter()),
            rule.seed
        )];
        let ends = [f32::min, f32::max].map(|end| rule.factors.iter().copied().reduce(end));
        let at_the_edge: Vec<_> =
            self.arms.iter().filter(|arm| ends.contains(&Some(arm.factor))).map(|arm| &arm.name).collect();
        if !at_the_edge.is_empty() {
            lines.push(format!(
                "The chosen factor lies at the edge of those tried for {}: better rates may exist for them.",
                list(at_the_edge.into_iter())
            ));
        }
        lines
    }

    fn about_allocation(&self, panel: &Panel) -> Result<Vec<String>> {
        let best = (0..self.arms.len())
            .min_by(|&a, &b| panel.mean(a).total_cmp(&panel.mean(b)))
            .ok_or_else(|| inconclusive("no arm finished"))?;
        let last = self.arms.len() - 1;
        let share = |arm: usize| self.arms[arm].x.unwrap_or_default();
        let mut lines = vec![format!(
            "Of {} shares from {:.3} to {:.3}, ρ = {:.3} has the lowest mean loss: {:.4} nats per token.",
            self.arms.len(),
            share(last),
            share(0),
            share(best),
            self.arms[best].nats_per_token
        )];
        // Any arm could have been the best, and is compared with either end.
        let comparisons = 2 * last;
        let against = |end: usize| -> Result<Interval> {
            Ok(Interval::of(panel.difference(best, end).ok_or_else(no_error)?, comparisons))
        };
        let mut undecided = Vec::new();
        for end in [0, last].into_iter().filter(|&end| end != best) {
            let interval = against(end)?;
            let verdict = if interval.is_beyond_noise() { "beyond the noise" } else { "within the noise" };
            lines.push(format!("Against ρ = {:.3}: {interval} nats per token, {verdict}.", share(end)));
            if !interval.is_beyond_noise() {
                undecided.push(share(end));
            }
        }
        lines.push(match (best == 0 || best == last, undecided.as_slice()) {
            (true, _) => format!(
                "The lowest loss lies at the edge of the range, at ρ = {:.3}: no minimum inside the range was found.",
                share(best)
            ),
            (false, []) => "The minimum lies inside the range: both ends are worse beyond the noise.".into(),
            (false, ends) => format!(
                "Whether the minimum lies inside is undecided: the difference to ρ = {} lies within the noise.",
                list(ends.iter().map(|end| format!("{end:.3}")))
            ),
        });
        let shares: Vec<f64> = (0..self.arms.len()).map(share).collect();
        let bend = (shares.len() >= 3).then(|| panel.contrast(&curvature_weights(&shares))).flatten();
        if let Some(estimate) = bend {
            let interval = Interval::of(estimate, 1);
            let verdict = match (interval.is_beyond_noise(), interval.low > 0.0) {
                (true, true) => "the curve bends upwards, like a U or a curve that levels off",
                (true, false) => "the curve bends downwards, unlike a U",
                (false, _) => "no curvature beyond the noise",
            };
            lines.push(format!("Coefficient of ρ² of the best-fitting parabola: {interval}; {verdict}."));
        }
        Ok(lines)
    }

    /// The series in the order of their first arms.
    fn series(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for name in self.arms.iter().filter_map(|arm| arm.series.as_deref()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Weights of all arms from the weights that `weigh` gives to decimal logarithms of the slots of one series.
    fn weights(&self, series: &str, weigh: fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
        let logarithm =
            |arm: &ArmFinding| (arm.series.as_deref() == Some(series)).then(|| arm.x.unwrap_or(1.0).log10());
        let places: Vec<Option<f64>> = self.arms.iter().map(logarithm).collect();
        let mut weights = weigh(&places.iter().copied().flatten().collect::<Vec<_>>()).into_iter();
        places.iter().map(|place| place.and_then(|_| weights.next()).unwrap_or(0.0)).collect()
    }

    fn fits(&self, panel: &Panel) -> Result<Vec<Fit>> {
        let names = self.series();
        let fit = |name: &&str| -> Result<Fit> {
            let arms: Vec<_> = self.arms.iter().filter(|arm| arm.series.as_deref() == Some(name)).collect();
            if arms.len() < 3 {
                return Err(inconclusive(&format!("`{name}` has fewer than three finished arms")));
            }
            let contrast = |weigh| panel.contrast(&self.weights(name, weigh)).ok_or_else(no_error);
            let slope = Interval::of(contrast(slope_weights)?, names.len());
            let points: Vec<(f64, f64)> =
                arms.iter().map(|arm| (arm.x.unwrap_or(1.0).log10(), arm.nats_per_token)).collect();
            let count = points.len() as f64;
            let (x, y) =
                points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / count, y + point.1 / count));
            let intercept = y - slope.estimate.value * x;
            let squares =
                |of: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(|point| of(point).powi(2)).sum::<f64>();
            let rest = squares(&|point| point.1 - intercept - slope.estimate.value * point.0);
            let explained = 1.0 - rest / squares(&|point| point.1 - y);
            let bend = Interval::of(contrast(curvature_weights)?, names.len());
            Ok(Fit { series: (*name).to_owned(), slope, intercept, explained, bend })
        };
        names.iter().map(fit).collect()
    }

    fn about_slots(&self, panel: &Panel) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for Fit { series, slope, explained, bend, .. } in &self.fits {
            let verdict = match (slope.is_beyond_noise(), slope.high < 0.0) {
                (true, true) => "the loss falls with the logarithm of slots",
                (true, false) => "the loss rises with the logarithm of slots",
                (false, _) => "no trend beyond the noise",
            };
            let straight = if bend.is_beyond_noise() {
                "and bends beyond the noise"
            } else {
                "with no curvature beyond the noise"
            };
            lines.push(format!(
                "`{series}`: {slope} nats per token for ten times as many slots; {verdict}. The line explains {:.1} % of \
                 the variance of the means, {straight} (coefficient of the square: {bend}).",
                100.0 * explained
            ));
        }
        let others = self.fits.get(1..).unwrap_or_default();
        for other in others {
            let [first, second] = [&self.fits[0].series, &other.series];
            let [a, b] = [first, second].map(|series| self.weights(series, slope_weights));
            let weights: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
            let interval = Interval::of(panel.contrast(&weights).ok_or_else(no_error)?, others.len());
            let verdict = match (interval.is_beyond_noise(), interval.high < 0.0) {
                (true, true) => format!("`{first}` gains faster"),
                (true, false) => format!("`{second}` gains faster"),
                (false, _) => "they do not differ beyond the noise".into(),
            };
            lines.push(format!("Slope of `{first}` minus that of `{second}`: {interval}; {verdict}."));
        }
        Ok(lines)
    }

    /// Arms by their difference to the reference.
    fn about_arms(&self) -> Vec<String> {
        let mut others: Vec<_> = self.arms.iter().filter_map(|arm| Some((arm, arm.difference?))).collect();
        others.sort_by(|(_, a), (_, b)| b.estimate.value.total_cmp(&a.estimate.value));
        let reference = &self.arms[0].name;
        let line = |(arm, difference): (&ArmFinding, Interval)| {
            let verdict = match (difference.is_beyond_noise(), difference.low > 0.0) {
                (true, true) => "worse",
                (true, false) => "better",
                (false, _) => "no difference beyond the noise",
            };
            format!("`{}` against `{reference}`: {difference} nats per token; {verdict}.", arm.name)
        };
        others.into_iter().map(line).collect()
    }
}

/// Results by arm and seed.
struct Table<'a> {
    seeds: Vec<u64>,
    tokens: Vec<u64>,
    /// Number of training tokens per run.
    training_tokens: u64,
    /// By arm of the plan; none if no seed finished.
    rows: Vec<Option<Vec<&'a RunResult>>>,
    caveats: Vec<String>,
}

impl<'a> Table<'a> {
    fn of(plan: &Plan, results: &'a [RunResult]) -> Result<Self> {
        let find = |arm: &str, seed: u64| {
            let same = |result: &&RunResult| !result.pilot && result.arm == arm && result.seed == seed;
            results.iter().find(same)
        };
        let mut caveats = Vec::new();
        let mut finished: Vec<Vec<u64>> = Vec::new();
        for arm in &plan.arms {
            let (mut done, mut diverged) = (Vec::new(), Vec::new());
            for &seed in &plan.seeds {
                match find(&arm.name, seed) {
                    Some(result) if result.nats_per_token.is_some() => done.push(seed),
                    Some(_) => diverged.push(seed),
                    None => {}
                }
            }
            if !diverged.is_empty() {
                let seeds = list(diverged.iter());
                caveats
                    .push(format!("`{}` diverged with seed {seeds}, and is not compared with it.", arm.name));
            }
            finished.push(done);
        }
        for (arm, factor) in plan.arms.iter().zip(plan.factors(results)) {
            if factor == Factor::Diverged {
                caveats.push(format!(
                    "`{}` diverged at every rate, and is left out. Lower `rates.factors` may prevent this.",
                    arm.name
                ));
            }
        }
        if finished.first().is_none_or(Vec::is_empty) {
            return Err(inconclusive("the reference finished with no seed: nothing can be compared"));
        }
        let common =
            |seed: &u64| finished.iter().filter(|done| !done.is_empty()).all(|done| done.contains(seed));
        let seeds: Vec<u64> = plan.seeds.iter().copied().filter(common).collect();
        if seeds.is_empty() {
            return Err(inconclusive("no seed finished with every arm: nothing can be paired"));
        }
        if seeds.len() < plan.seeds.len() {
            caveats.push(format!(
                "The comparison uses the seeds with which all compared arms finished: {}.",
                list(seeds.iter())
            ));
        }
        if seeds.len() == 1 {
            caveats.push(
                "One seed: intervals cover held-out documents, but not the variation between seeds.".into(),
            );
        }
        let row = |(arm, done): (&crate::arm::Arm, &Vec<u64>)| {
            let row = || seeds.iter().filter_map(|&seed| find(&arm.name, seed)).collect();
            (!done.is_empty()).then(row)
        };
        let rows: Vec<_> = plan.arms.iter().zip(&finished).map(row).collect();
        // The reference has a run with every compared seed.
        let first: &RunResult =
            rows[0].iter().flatten().copied().next().ok_or_else(|| inconclusive("there is no run"))?;
        let (tokens, training_tokens) = (first.documents.tokens.clone(), first.training_tokens);
        Ok(Self { seeds, tokens, training_tokens, rows, caveats })
    }

    fn panel(&self, plan: &Plan) -> Result<Panel> {
        let mut losses = Vec::new();
        for (arm, row) in plan.arms.iter().zip(&self.rows) {
            let Some(row) = row else { continue };
            if row.iter().any(|result| result.documents.tokens != self.tokens) {
                return Err(Error::arm(&arm.name, "was measured on other documents than the reference"));
            }
            losses.push(row.iter().map(|result| result.documents.nats.clone()).collect());
        }
        let tokens = self.tokens.iter().map(|&tokens| tokens as f64).collect();
        Panel::new(losses, tokens).ok_or_else(|| inconclusive("the runs have no held-out documents"))
    }

    /// Panels of the classes that contain held-out tokens.
    fn classes(&self) -> Vec<((u64, Option<u64>), u64, Panel)> {
        let there = || self.rows.iter().flatten();
        let first = there().flatten().next();
        let classes = first.map(|result| result.documents.classes.as_slice()).unwrap_or_default();
        let panel = |(index, class): (usize, &Class)| {
            let of = |result: &&RunResult| Some(result.documents.classes.get(index)?.nats.clone());
            let arm = |row: &Vec<&RunResult>| row.iter().map(of).collect::<Option<Vec<_>>>();
            let tokens: u64 = class.tokens.iter().sum();
            let by_document = class.tokens.iter().map(|&tokens| tokens as f64).collect();
            let panel = Panel::new(there().map(arm).collect::<Option<Vec<_>>>()?, by_document)?;
            (tokens > 0).then_some((class.occurrences, tokens, panel))
        };
        classes.iter().enumerate().filter_map(panel).collect()
    }

    fn arms(&self, plan: &Plan, panel: &Panel) -> Result<Vec<ArmFinding>> {
        let classes = self.classes();
        let there: Vec<_> =
            plan.arms.iter().zip(&self.rows).filter_map(|(arm, row)| Some((arm, row.as_ref()?))).collect();
        let comparisons = there.len() - 1;
        let finding = |(index, (arm, row)): (usize, &(&crate::arm::Arm, &Vec<&RunResult>))| {
            let bits = row.iter().filter_map(|result| result.bits_per_byte);
            let difference = |panel: &Panel, comparisons: usize| match index {
                0 => Ok(None),
                _ => panel
                    .difference(index, 0)
                    .ok_or_else(no_error)
                    .map(|it| Some(Interval::of(it, comparisons))),
            };
            let class = |(occurrences, tokens, panel): &((u64, Option<u64>), u64, Panel)| {
                Ok(ClassFinding {
                    occurrences: *occurrences,
                    tokens: *tokens,
                    nats_per_token: panel.mean(index),
                    difference: difference(panel, comparisons * classes.len())?,
                })
            };
            Ok(ArmFinding {
                name: arm.name.clone(),
                x: arm.x,
                series: arm.series.clone(),
                costs: arm.costs,
                factor: row.first().map_or(1.0, |result| result.factor),
                by_seed: panel.by_seed(index),
                nats_per_token: panel.mean(index),
                bits_per_byte: bits.sum::<f64>() / row.len() as f64,
                difference: difference(panel, comparisons)?,
                by_occurrences: classes.iter().map(class).collect::<Result<_>>()?,
            })
        };
        there.iter().enumerate().map(finding).collect()
    }
}

/// The distinct origins of `results`.
fn origins(results: &[RunResult]) -> Vec<String> {
    let mut origins: Vec<String> = Vec::new();
    for result in results {
        let origin = if result.origin.is_empty() { "not recorded" } else { &result.origin };
        if !origins.iter().any(|other| other == origin) {
            origins.push(origin.to_owned());
        }
    }
    origins
}

fn inconclusive(problem: &str) -> Error {
    Error::Inconclusive(problem.to_owned())
}

fn no_error() -> Error {
    inconclusive("one seed and one held-out document give no error: add seeds, or hold out more documents")
}

fn list<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::arm::{Arm, arms};
    use crate::config::{RateRule, StudyConfig};
    use crate::results::tests::result;

    const BASE: &str = r#"
        [model]
        vocabulary = 64
        width = 32
        blocks = 2
        context = 16
        attention = { kind = "plain", heads = 2, head_width = 16 }
        feed_forward = { width = 32 }
        experts = { first_block = 1, routed = 42, active = 2, width = 16, shared_width = 96 }
        memory = { layers = [1], max_order = 2, heads = 2, row_width = 8, rows_per_head = [500] }
        [data]
        train = "train"
        valid = "valid"
        tokenizer = "tokenizer.json"
        [train]
        steps = 10
        batch = 4
        schedule = { decay = "constant" }
        [study]
        seeds = [0, 1, 2]
    "#;

    fn plan(kind: Kind, study: &str) -> Plan {
        let config: StudyConfig = toml::from_str(&format!("{BASE}\n{study}")).unwrap();
        let arms = arms(kind, &config, Path::new("study.toml")).unwrap();
        Plan {
            kind,
            fingerprints: vec![String::new(); arms.len()],
            arms,
            seeds: vec![0, 1, 2],
            rates: None,
            keep_checkpoints: false,
            held_out_tokens: 100,
        }
    }

    /// Results of 20 documents whose losses follow `loss` of an arm, plus effects of seeds and documents, and `noise`.
    fn results(plan: &Plan, loss: impl Fn(&Arm) -> f64, noise: f64) -> Vec<RunResult> {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 11) as f64 / 2f64.powi(53) - 0.5
        };
        let mut results = Vec::new();
        for arm in &plan.arms {
            for seed in 0..3 {
                let document = |document: i32| {
                    let shared = 0.3 * f64::from(document) + 0.1 * seed as f64;
                    10.0 * (loss(arm) + shared + noise * random())
                };
                results.push(result(&arm.name, seed, &(0..20).map(document).collect::<Vec<_>>()));
            }
        }
        results
    }

    fn statements(plan: &Plan, results: &[RunResult]) -> String {
        Findings::of(plan, results).unwrap().statements.join("\n")
    }

    const SHARES: &str = "allocation = { shares = [1.0, 0.75, 0.5, 0.25] }";

    #[test]
    fn a_minimum_inside_is_found_where_there_is_one() {
        let plan = plan(Kind::Allocation, SHARES);
        let u = |arm: &Arm| (arm.x.unwrap() - 0.7).powi(2);
        let text = statements(&plan, &results(&plan, u, 0.01));
        for words in
            ["ρ = 0.750 has the lowest mean loss", "both ends are worse beyond the noise", "like a U"]
        {
            assert!(text.contains(words), "{text}");
        }
        assert!(text.contains("at the configuration's rates"), "{text}");
    }

    #[test]
    fn nothing_is_claimed_within_the_noise() {
        let plan = plan(Kind::Allocation, SHARES);
        let text = statements(&plan, &results(&plan, |_| 0.0, 1.0));
        assert!(!text.contains("beyond the noise;") && !text.contains("both ends are worse"), "{text}");
        assert!(
            text.contains("within the noise") && text.contains("no curvature beyond the noise"),
            "{text}"
        );
    }

    #[test]
    fn a_minimum_at_the_edge_is_none_inside() {
        let plan = plan(Kind::Allocation, SHARES);
        let text = statements(&plan, &results(&plan, |arm| arm.x.unwrap(), 0.01));
        assert!(text.contains("at the edge of the range, at ρ = 0.250: no minimum"), "{text}");
    }

    #[test]
    fn the_slope_of_a_line_is_found_and_compared() {
        let study = "memory = { slots = [100, 1000, 10000, 100000], series = { flat = { set.model.memory.form = 'v41' } } }";
        let plan = plan(Kind::Memory, study);
        let line = |arm: &Arm| {
            let steep = if arm.series.as_deref() == Some("flat") { -0.01 } else { -0.05 };
            3.0 + steep * arm.x.unwrap().log10()
        };
        let results = results(&plan, line, 0.005);
        let findings = Findings::of(&plan, &results).unwrap();
        let [memory, flat] = [0, 1].map(|index| &findings.fits[index]);
        assert_eq!((memory.series.as_str(), flat.series.as_str()), ("memory", "flat"));
        for (fit, slope) in [(memory, -0.05), (flat, -0.01)] {
            assert!((fit.slope.low..fit.slope.high).contains(&slope), "{fit:?}");
            assert!((fit.slope.estimate.value - slope).abs() < 0.002 && fit.explained > 0.97, "{fit:?}");
            assert!(!fit.bend.is_beyond_noise(), "{fit:?}");
        }
        let text = findings.statements.join("\n");
        assert!(
            text.contains("the loss falls with the logarithm") && text.contains("`memory` gains faster"),
            "{text}"
        );
    }

    #[test]
    fn arms_are_ranked_against_the_reference() {
        let plan = plan(
            Kind::Ablation,
            "ablation.arms = [{ name = 'memory' }, { name = 'same' }, { name = 'worse' }]",
        );
        let loss = |arm: &Arm| if arm.name == "worse" { 3.2 } else { 3.0 };
        let findings = Findings::of(&plan, &results(&plan, loss, 0.05)).unwrap();
        assert_eq!(findings.arms[0].difference, None);
        // Half of the tokens and of the nats are in one class of occurrences.
        let [class] = findings.arms[2].by_occurrences.as_slice() else { panic!("one class") };
        assert_eq!((class.occurrences, class.tokens), ((1, Some(9)), 100));
        let [found, all] =
            [class.difference, findings.arms[2].difference].map(|it| it.unwrap().estimate.value);
        assert!((found - all).abs() < 1e-12, "{found} and {all}");
        assert!((findings.arms[2].difference.unwrap().estimate.value - 0.2).abs() < 0.02);
        assert!(
            findings.statements[0].starts_with("`worse` against `memory`: +0."),
            "{:?}",
            findings.statements
        );
        assert!(findings.statements[0].ends_with("worse."), "{:?}", findings.statements);
        assert!(
            findings.statements[1].ends_with("no difference beyond the noise."),
            "{:?}",
            findings.statements
        );
    }

    #[test]
    fn arms_of_another_budget_are_named() {
        let arms = "[{ name = 'memory' }, { name = 'same' }, { name = 'none', remove = ['model.memory'] }]";
        let plan = plan(Kind::Baselines, &format!("baselines.arms = {arms}"));
        let text = statements(&plan, &results(&plan, |_| 3.0, 0.05));
        let [memory, none] = [0, 2].map(|arm: usize| plan.arms[arm].costs.total_parameters as f64);
        let expected = format!("`none` ({:+.1} % parameters", 100.0 * (none / memory - 1.0));
        assert!(text.contains("Not at the budget of `memory`") && text.contains(&expected), "{text}");
        assert!(!text.contains("`same` ("), "{text}");
    }

    #[test]
    fn a_run_that_diverged_is_said_and_left_out() {
        let plan = plan(Kind::Ablation, "ablation.arms = [{ name = 'a' }, { name = 'b' }, { name = 'c' }]");
        let mut results = results(&plan, |_| 3.0, 0.1);
        let diverge = |result: &mut RunResult| {
            (result.nats_per_token, result.bits_per_byte) = (None, None);
            result.documents = Default::default();
        };
        diverge(&mut results[4]); // b with seed 1
        results[6..].iter_mut().for_each(diverge); // c with all
        let findings = Findings::of(&plan, &results).unwrap();
        assert_eq!((findings.seeds.as_slice(), findings.arms.len()), (&[0, 2][..], 2));
        let text = findings.statements.join("\n");
        assert!(
            text.contains("`b` diverged with seed 1") && text.contains("`c` diverged with seed 0, 1, 2"),
            "{text}"
        );
        results[..3].iter_mut().for_each(diverge);
        assert!(Findings::of(&plan, &results).is_err(), "without a reference nothing is compared");
    }

    #[test]
    fn rates_are_those_of_the_best_pilot_and_an_edge_is_said() {
        let mut plan = plan(Kind::Ablation, "ablation.arms = [{ name = 'a' }, { name = 'b' }]");
        plan.rates = Some(RateRule { factors: vec![0.5, 1.0, 2.0], seed: 9, steps: Some(5) });
        assert_eq!(plan.pilots().len(), 6);
        assert_eq!(plan.pilots()[0].config.train.steps, 5);
        let mut pilots = Vec::new();
        for (arm, best) in [("a", 1.0), ("b", 2.0)] {
            for factor in [0.5_f32, 1.0, 2.0] {
                let factors = plan.factors(&pilots);
                assert_eq!(factors[usize::from(arm == "b")], Factor::Open, "not before its pilots are done");
                let mut pilot = result(arm, 9, &[10.0 + f64::from((factor - best).abs())]);
                (pilot.pilot, pilot.factor) = (true, factor);
                pilots.push(pilot);
            }
        }
        let factors = [Factor::Chosen(1.0), Factor::Chosen(2.0)];
        assert_eq!(plan.factors(&pilots), factors);
        let rates = |run: &crate::plan::Run| run.config.train.optimizer.adam_rate;
        let runs = plan.runs(&factors);
        assert_eq!((runs.len(), rates(&runs[1]) / rates(&runs[0])), (6, 2.0));
        let mut all = results(&plan, |_| 3.0, 0.1);
        all.iter_mut().filter(|result| result.arm == "b").for_each(|result| result.factor = 2.0);
        all.extend(pilots.clone());
        assert!(
            statements(&plan, &all).contains("at the edge of those tried for b:"),
            "{}",
            statements(&plan, &all)
        );
    }

    #[test]
    fn an_arm_that_diverges_at_every_rate_stops_no_other() {
        let arms = "ablation.arms = [{ name = 'a' }, { name = 'b' }, { name = 'c' }]";
        let mut plan = plan(Kind::Ablation, arms);
        plan.rates = Some(RateRule { factors: vec![1.0, 2.0], seed: 9, steps: Some(5) });
        let pilot = |arm: &str, factor: f32| {
            let mut pilot = result(arm, 9, &[10.0]);
            (pilot.pilot, pilot.factor) = (true, factor);
            if arm == "c" {
                pilot.nats_per_token = None;
            }
            pilot
        };
        let pilots = ["a", "b", "c"].map(|arm| [1.0, 2.0].map(|factor| pilot(arm, factor)));
        let pilots: Vec<RunResult> = pilots.into_iter().flatten().collect();
        let factors = [Factor::Chosen(1.0), Factor::Chosen(1.0), Factor::Diverged];
        assert_eq!(plan.factors(&pilots), factors);
        assert!(plan.runs(&factors).iter().all(|run| run.arm < 2));
        let mut all = results(&plan, |_| 3.0, 0.1);
        all.retain(|result| result.arm != "c");
        all.extend(pilots);
        let findings = Findings::of(&plan, &all).unwrap();
        assert_eq!(findings.arms.len(), 2);
        let text = findings.statements.join("\n");
        assert!(text.contains("`c` diverged at every rate"), "{text}");
    }

    #[test]
    fn unequal_documents_and_several_programs_are_said() {
        let plan = plan(Kind::Ablation, "ablation.arms = [{ name = 'a' }, { name = 'b' }]");
        let mut results = results(&plan, |_| 3.0, 0.1);
        let text = statements(&plan, &results);
        assert!(!text.contains("give the precision") && !text.contains("different programs"), "{text}");
        results[1].origin = "elsewhere".to_owned();
        for result in &mut results {
            result.documents.tokens[0] = 190;
        }
        let text = statements(&plan, &results);
        // 380² / (190² + 19 · 10²)
        assert!(text.contains("the precision of 3.8 equal ones"), "{text}");
        assert!(text.contains("different programs or machines: here, elsewhere"), "{text}");
    }
}
