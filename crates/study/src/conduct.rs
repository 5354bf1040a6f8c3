//! Conducts a study, from its first run to its report.

use crate::error::{Error, Result};
use crate::execute::{Watch, Workers};
use crate::figures::figures;
use crate::findings::Findings;
use crate::folder::StudyFolder;
use crate::plan::{Plan, Run};
use crate::provenance::Provenance;
use crate::report::page;
use crate::results::{ResultsLog, RunResult, read_results};
use engram_eval::figure::png;

/// Runs of `plan` without a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Remaining {
    /// Pilot runs, which choose rates.
    pub pilots: Vec<Run>,
    /// Compared runs, at the base's rates while an arm lacks pilots.
    pub runs: Vec<Run>,
}

impl Remaining {
    /// The remaining runs of `plan` after `results`, for the arms `only` (all, if empty).
    pub fn of(plan: &Plan, results: &[RunResult], only: &[usize]) -> Self {
        let left = |runs: Vec<Run>| -> Vec<Run> {
            let wanted = |run: &Run| only.is_empty() || only.contains(&run.arm);
            let done = |run: &Run| results.iter().any(|result| result.run == run.id);
            runs.into_iter().filter(|run| wanted(run) && !done(run)).collect()
        };
        Self { pilots: left(plan.pilots()), runs: left(plan.runs(&plan.factors(results))) }
    }

    /// All of them, in order.
    pub fn all(&self) -> Vec<Run> {
        self.pilots.iter().chain(&self.runs).cloned().collect()
    }
}

impl Workers {
    /// Carries out the remaining runs of `plan` in `folder`, for the arms `only` (all, if empty): first the pilots,
    /// then the compared runs at the rates that the pilots chose.
    ///
    /// # Errors
    /// When a run fails, or `watch` asked to stop.
    pub fn conduct(
        &self,
        plan: &Plan,
        folder: &StudyFolder,
        only: &[usize],
        watch: &dyn Watch,
    ) -> Result<()> {
        let log = ResultsLog::open(folder.path())?;
        let remaining = || Ok::<_, Error>(Remaining::of(plan, &read_results(folder.path())?, only));
        self.clear_finished(plan, folder)?;
        if remaining()?.all().is_empty() {
            return Ok(());
        }
        let positions = plan.positions()?;
        self.carry_out(plan, &positions, remaining()?.pilots, folder, &log, watch)?;
        self.carry_out(plan, &positions, remaining()?.runs, folder, &log, watch)
    }
}

/// Writes the findings of `plan` into its folder: `findings.json`, figures, and `report.html`.
///
/// # Errors
/// When there are too few results, or the file system fails.
pub fn write_up(plan: &Plan, folder: &StudyFolder, provenance: &Provenance) -> Result<Findings> {
    let results = read_results(folder.path())?;
    let findings = Findings::of(plan, &results)?;
    let mut drawn = Vec::new();
    for (name, figure) in figures(&findings) {
        let svg = figure.svg();
        let picture =
            png(&svg).map_err(|problem| Error::Inconclusive(format!("figure {name}: {problem}")))?;
        folder.write(&format!("figures/{name}.svg"), svg.as_bytes())?;
        folder.write(&format!("figures/{name}.png"), &picture)?;
        drawn.push(svg);
    }
    let mut json = serde_json::to_string_pretty(&findings).expect("findings are representable as JSON");
    json.push('\n');
    folder.write("findings.json", json.as_bytes())?;
    let seconds = results.iter().map(|result| result.seconds).sum();
    folder.write("report.html", page(&findings, provenance, &drawn, seconds).as_bytes())?;
    Ok(findings)
}
