use std::path::{Path, PathBuf};

use clap::Args;
use engram_eval::tasks::{Header, Outcome, Paired, compare, read_record};
use serde::Serialize;

use super::super::{print, print_json};
use super::with_error;
use crate::failure::refuse;
use crate::table::Table;

/// Compare two models' answers to the same questions, question by question.
///
/// Both folders come from `engram eval tasks --out`. Pairing removes the questions' common difficulty, so the
/// difference has a smaller error than either value.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram eval compare results/baseline results/memory
  engram eval compare results/baseline/lambada.jsonl results/memory/lambada.jsonl --json

`only first` and `only second` count the questions that only that model answered right. `p (McNemar)` is the probability
of a split at least as uneven if both models were equally good (McNemar's exact test); in JSON it is `chance`.")]
pub(crate) struct Compare {
    /// Folder or file of the first model's answers.
    first: PathBuf,
    /// Folder or file of the second model's answers.
    second: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Two models on one task.
#[derive(Debug, Serialize)]
struct Comparison {
    task: String,
    first: String,
    second: String,
    measures: Vec<Paired>,
}

impl Compare {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let pairs = pairs(&self.first, &self.second)?;
        let comparisons = pairs.iter().map(|(first, second)| Comparison::of(first, second));
        let comparisons = comparisons.collect::<anyhow::Result<Vec<_>>>()?;
        if self.json { print_json(&comparisons) } else { print(table(&comparisons).to_string()) }
    }
}

impl Comparison {
    fn of(first: &Path, second: &Path) -> anyhow::Result<Self> {
        let ((one, first_outcomes), (other, second_outcomes)) = (whole(first)?, whole(second)?);
        if one.questions_hash != other.questions_hash {
            return refuse(format!(
                "{} and {} answer different questions: run both with the same task file, --max-records, --shots and --seed",
                first.display(),
                second.display()
            ));
        }
        let measures = compare(&first_outcomes, &second_outcomes)?;
        Ok(Self { task: one.task, first: one.model_name, second: other.model_name, measures })
    }
}

/// The record of a finished run.
fn whole(path: &Path) -> anyhow::Result<(Header, Vec<Outcome>)> {
    let (header, outcomes) = read_record(path)?;
    if outcomes.len() < header.questions {
        return refuse(format!(
            "{} has {} of {} answers: resume it with the command that wrote it",
            path.display(),
            outcomes.len(),
            header.questions
        ));
    }
    Ok((header, outcomes))
}

/// The two files, or the files that both folders have.
fn pairs(first: &Path, second: &Path) -> anyhow::Result<Vec<(PathBuf, PathBuf)>> {
    match (first.is_dir(), second.is_dir()) {
        (false, false) => return Ok(vec![(first.to_owned(), second.to_owned())]),
        (true, true) => {}
        _ => return refuse("name two folders, or two files"),
    }
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in first.read_dir()? {
        let name = PathBuf::from(entry?.file_name());
        if name.extension().is_some_and(|extension| extension == "jsonl") && second.join(&name).is_file() {
            names.push(name);
        }
    }
    names.sort();
    if names.is_empty() {
        return refuse(format!("{} and {} have no task in common", first.display(), second.display()));
    }
    Ok(names.into_iter().map(|name| (first.join(&name), second.join(&name))).collect())
}

fn table(comparisons: &[Comparison]) -> Table {
    let header = [
        "task",
        "measure",
        "first",
        "second",
        "difference",
        "± error",
        "only first",
        "only second",
        "p (McNemar)",
    ];
    let mut table = Table::new(header);
    for Comparison { task, measures, .. } in comparisons {
        for pair in measures {
            let value = |value| with_error(pair.measure, value, None).0;
            let (difference, error) = with_error(pair.measure, pair.difference, pair.standard_error);
            let [first, second] = match pair.only_one_right {
                Some(counts) => counts.map(|count| count.to_string()),
                None => ["", ""].map(str::to_owned),
            };
            let chance = pair.chance.map_or(String::new(), |chance| format!("{chance:.3}"));
            let name = pair.measure.name().to_owned();
            let values = [value(pair.first), value(pair.second), difference, error, first, second, chance];
            table.row([task.clone(), name].into_iter().chain(values));
        }
    }
    table
}
