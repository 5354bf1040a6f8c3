//! Statements that the findings support.

use super::{Contrast, Estimate, FEWEST_RIGHT, Findings, Quantity, TaskFinding};
use crate::tasks::TaskKind;

/// The statements, the most important first.
pub(super) fn about(findings: &Findings) -> Vec<String> {
    let mut lines: Vec<String> =
        findings.facts_less_reading.iter().map(|found| compared(found, findings)).collect();
    if lines.is_empty() {
        lines.push(not_compared(findings));
    }
    let untold = |task: &&TaskFinding| task.score.is_some_and(|score| !score.is_telling());
    lines.extend(named(findings.tasks.iter().filter(untold)).map(|names| {
        format!(
            "With the memory on, scores are not above guessing beyond the noise, or fewer than \
             {FEWEST_RIGHT} answers are right, or the retained share has no error. These scores are left out: {names}."
        )
    }));
    lines.extend(
        named(findings.tasks.iter().filter(|task| task.kind.is_none()))
            .map(|names| format!("In no group, because their files have no `kind`: {names}.")),
    );
    lines
}

impl Quantity {
    /// Its name, with its unit.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Likelihood => "Log-probability of the right answer, off minus on, in nats per token",
            Self::AmongChoices => {
                "Log-probability of the right one among the choices, off minus on, in nats per question"
            }
            Self::Score => "Score, off minus on, in points of 100",
            Self::Retained => "Share of the score that is retained, in per cent",
        }
    }

    /// An estimate with its error, as text.
    pub(super) fn text(self, estimate: Estimate) -> String {
        let (value, error) = (estimate.value, estimate.error);
        match self {
            Self::Likelihood | Self::AmongChoices => format!("{value:+.4} ± {error:.4}"),
            Self::Score => format!("{:+.2} ± {:.2}", 100.0 * value, 100.0 * error),
            Self::Retained => format!("{:.1} ± {:.1}", 100.0 * value, 100.0 * error),
        }
    }

    /// A difference with its error, its interval, and the verdict on facts and reading.
    fn verdict(self, facts_less_reading: Estimate) -> String {
        let (low, high) = facts_less_reading.interval();
        let (scale, digits) = match self {
            Self::Likelihood | Self::AmongChoices => (1.0, 4),
            Self::Score | Self::Retained => (100.0, 2),
        };
        let [value, error, from, to] =
            [facts_less_reading.value, facts_less_reading.error, low, high].map(|number| scale * number);
        let verdict = match (high < 0.0, low > 0.0) {
            (true, _) => "facts lose more, beyond the noise",
            (_, true) => "reading loses more, beyond the noise",
            _ => "no difference beyond the noise",
        };
        format!("{value:+.digits$} ± {error:.digits$} (95 %: {from:+.digits$} to {to:+.digits$}): {verdict}")
    }
}

fn compared(contrast: &Contrast, findings: &Findings) -> String {
    let quantity = contrast.quantity;
    let mean = |kind| {
        let group = findings.groups.iter().find(|group| group.kind == kind)?;
        group.means.iter().find(|mean| mean.quantity == quantity)
    };
    let groups = [TaskKind::Facts, TaskKind::Reading].into_iter().filter_map(|kind| {
        let found = mean(kind)?;
        Some(format!("{} {} ({})", kind.name(), quantity.text(found.mean), tasks(found.tasks)))
    });
    let of_others = match contrast.over_tasks {
        Some(estimate) => format!("with these tasks as a sample, {}", quantity.verdict(estimate)),
        None => "a single task of a kind allows no statement about other tasks".to_owned(),
    };
    format!(
        "{}: {}. Facts minus reading: over the questions of these tasks, {}; {of_others}.",
        quantity.words(),
        groups.collect::<Vec<_>>().join(", "),
        quantity.verdict(contrast.over_questions)
    )
}

fn not_compared(findings: &Findings) -> String {
    let there = |kind| findings.groups.iter().any(|group| group.kind == kind);
    let missing: Vec<&str> = [TaskKind::Facts, TaskKind::Reading]
        .into_iter()
        .filter(|&kind| !there(kind))
        .map(TaskKind::name)
        .collect();
    match missing[..] {
        [] => "Facts and reading have no quantity in common to compare.".to_owned(),
        _ => format!(
            "Facts are not compared with reading: there is no task of kind {}.",
            missing.join(" and ")
        ),
    }
}

fn tasks(count: usize) -> String {
    if count == 1 { "1 task".to_owned() } else { format!("{count} tasks") }
}

/// Their names, if there are any.
fn named<'a>(tasks: impl Iterator<Item = &'a TaskFinding>) -> Option<String> {
    let names: Vec<&str> = tasks.map(|task| task.task.as_str()).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::{Change, Score};
    use super::*;

    fn task(name: &str, kind: Option<TaskKind>, value: f64, error: f64) -> TaskFinding {
        let difference = Estimate { value, error, degrees: 199.0 };
        let likelihood = Some(Change { on: -2.0, off: -2.0 + value, difference });
        TaskFinding {
            task: name.into(),
            kind,
            questions: 200,
            cut: 0,
            score: None,
            likelihood,
            among_choices: None,
        }
    }

    fn text(tasks: &[TaskFinding]) -> String {
        Findings::of(tasks.to_vec()).statements.join("\n")
    }

    const FACTS: Option<TaskKind> = Some(TaskKind::Facts);
    const READING: Option<TaskKind> = Some(TaskKind::Reading);

    #[test]
    fn facts_lose_more_only_beyond_the_noise() {
        let clear = text(&[task("a", FACTS, -0.8, 0.05), task("b", READING, -0.2, 0.05)]);
        assert!(clear.contains("facts -0.8000 ± 0.0500 (1 task), reading -0.2000"), "{clear}");
        assert!(
            clear.contains("over the questions of these tasks, -0.6000 ± 0.0707 (95 %: -0.73"),
            "{clear}"
        );
        assert!(
            clear.contains("facts lose more, beyond the noise; a single task of a kind allows"),
            "{clear}"
        );
        let noisy = text(&[task("a", FACTS, -0.8, 0.3), task("b", READING, -0.2, 0.3)]);
        assert!(noisy.contains("no difference beyond the noise") && !noisy.contains("lose"), "{noisy}");
        let against = text(&[task("a", FACTS, -0.2, 0.05), task("b", READING, -0.8, 0.05)]);
        assert!(against.contains("reading loses more, beyond the noise"), "{against}");
    }

    #[test]
    fn what_holds_of_these_tasks_need_not_hold_of_others() {
        let tasks = [
            task("a", FACTS, -1.4, 0.01),
            task("b", FACTS, -0.2, 0.01),
            task("c", READING, -0.1, 0.01),
            task("d", READING, -0.3, 0.01),
        ];
        let text = text(&tasks);
        assert!(
            text.contains("facts lose more, beyond the noise; with these tasks as a sample, -0.6"),
            "{text}"
        );
        assert!(text.trim_end().ends_with("no difference beyond the noise."), "{text}");
    }

    #[test]
    fn what_is_left_out_is_said() {
        let mut guess = task("g", FACTS, -0.8, 0.05);
        let difference = Estimate { value: -0.01, error: 0.02, degrees: 199.0 };
        let change = Change { on: 0.5, off: 0.49, difference };
        guess.score = Some(Score { change, guess: 0.5, retained: None });
        let text = text(&[guess, task("h", None, -0.1, 0.1)]);
        assert!(text.contains("no task of kind reading."), "{text}");
        assert!(
            text.contains("not above guessing beyond the noise, or")
                && text.contains("These scores are left out: g."),
            "{text}"
        );
        assert!(text.contains("no `kind`: h."), "{text}");
    }
}
