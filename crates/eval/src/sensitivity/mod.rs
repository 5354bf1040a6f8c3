//! Sensitivity: what a model's answers lose when its memory is switched off (arXiv 2601.07372, section 6.3).
//!
//! One checkpoint answers the same questions with its memory on and off. For every task this gives
//!
//! * the scores, their paired difference, and the share that is *retained*, off over on: the paper's measure. It is
//!   given only if the score with the memory on is above guessing and above always giving the same answer, and if there
//!   are enough right answers for an error;
//! * the log-probability of the right answer in nats per token, on, off, and their paired difference. It also changes
//!   in models that are too small to give the right answer;
//! * for multiple choice, the log-probability of the right choice among the choices. Without a memory a model may find
//!   all choices likelier, or none; this measures how well it distinguishes them.
//!
//! Tasks are grouped by the kinds in their files ([`TaskKind`]), and facts are compared with reading: a memory that
//! stores knowledge should matter more for facts than for questions about a passage in the prompt. A group's value is
//! the mean of its tasks' values. Its error is that of their questions: it covers other questions of *these* tasks. If
//! both groups have two tasks or more, the difference also has an error over tasks, which treats them as a sample of
//! similar tasks.

mod estimate;
mod figures;
mod statements;

use std::collections::BTreeMap;

use serde::Serialize;

pub use estimate::Estimate;
pub use figures::{FIGURES, figures};

use crate::tasks::{Outcome, Result, TaskKind, check_same_questions};

/// Outcomes of the same questions, in their order.
#[derive(Debug, Clone, Copy)]
pub struct OnOff<'a> {
    /// With the memory on.
    pub on: &'a [Outcome],
    /// With the memory off.
    pub off: &'a [Outcome],
}

/// The results of all tasks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Findings {
    /// The tasks, in the order in which they were asked.
    pub tasks: Vec<TaskFinding>,
    /// The kinds that have tasks.
    pub groups: Vec<Group>,
    /// Facts against reading, for every quantity that both have.
    pub facts_less_reading: Vec<Contrast>,
    /// The statements.
    pub statements: Vec<String>,
}

/// The result of one task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskFinding {
    /// Its name.
    pub task: String,
    /// Its kind, if its file gives one.
    pub kind: Option<TaskKind>,
    /// Number of questions.
    pub questions: usize,
    /// Questions whose beginning was truncated to fit the context.
    pub cut: usize,
    /// Scores; none for documents, and for a single question.
    pub score: Option<Score>,
    /// Log-probability of the right answer, in nats per token; none for a single question.
    pub likelihood: Option<Change>,
    /// For multiple choice, log-probability of the right one among the choices, in nats per question.
    pub among_choices: Option<Change>,
}

/// A quantity with the memory on and off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Change {
    /// On.
    pub on: f64,
    /// Off.
    pub off: f64,
    /// Off minus on, question by question.
    pub difference: Estimate,
}

/// Scores with the memory on and off, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Both scores, and their difference.
    #[serde(flatten)]
    pub change: Change,
    /// The score of a model that knows nothing: by guessing among the choices or, if that is higher, by always giving
    /// the most frequent right answer.
    pub guess: f64,
    /// Off over on. Given only if the score with the memory on is above guessing beyond the noise and [`FEWEST_RIGHT`]
    /// answers or more are right. Not given if its error would be 0, because no right answer remains or every question
    /// has the same score on and off.
    pub retained: Option<Estimate>,
}

/// The minimum number of right answers for reporting a score. The error of a share is estimated from the answers
/// themselves, and a handful of them cannot give one.
pub const FEWEST_RIGHT: usize = 10;

/// The compared quantities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Log-probability of the right answer, off minus on, in nats per token.
    Likelihood,
    /// Log-probability of the right one among the choices, off minus on, in nats per question.
    AmongChoices,
    /// Score, off minus on, if scores are interpreted.
    Score,
    /// Score, off over on.
    Retained,
}

/// The tasks of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// Their kind.
    pub kind: TaskKind,
    /// The mean over the tasks that have the quantity.
    pub means: Vec<GroupMean>,
}

/// The mean of a quantity over the tasks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GroupMean {
    /// The quantity.
    pub quantity: Quantity,
    /// Number of tasks that have it.
    pub tasks: usize,
    /// The mean; its error is over the tasks' questions.
    pub mean: Estimate,
}

/// Facts minus reading; below zero if facts lose more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Contrast {
    /// The quantity.
    pub quantity: Quantity,
    /// Number of tasks of facts, and of reading.
    pub tasks: [usize; 2],
    /// The difference with the error over the questions of these tasks.
    pub over_questions: Estimate,
    /// The difference with the error over tasks; none if either kind has a single task.
    pub over_tasks: Option<Estimate>,
}

impl Quantity {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 4] = [Self::Likelihood, Self::AmongChoices, Self::Score, Self::Retained];

    /// Its value for a task.
    pub fn of(self, task: &TaskFinding) -> Option<Estimate> {
        match self {
            Self::Likelihood => Some(task.likelihood?.difference),
            Self::AmongChoices => Some(task.among_choices?.difference),
            Self::Score => task.score.filter(Score::is_telling).map(|score| score.change.difference),
            Self::Retained => task.score?.retained,
        }
    }
}

impl TaskFinding {
    /// The result of a task with `cut` truncated questions. For a task whose own outcomes have no likelihood of right
    /// answers, `answers` are outcomes of questions that do.
    ///
    /// # Errors
    /// When the questions differ between on and off.
    pub fn of(
        (task, kind): (&str, Option<TaskKind>),
        cut: usize,
        asked: OnOff<'_>,
        answers: Option<OnOff<'_>>,
    ) -> Result<Self> {
        let answers = answers.unwrap_or(asked);
        for OnOff { on, off } in [asked, answers] {
            check_same_questions(on, off)?;
        }
        Ok(Self {
            task: task.to_owned(),
            kind,
            questions: asked.on.len(),
            cut,
            score: Score::of(asked),
            likelihood: Change::between(answers, |outcome| {
                outcome.likelihood().map(|(nats, tokens)| (nats, tokens as f64))
            }),
            among_choices: Change::between(asked, |outcome| Some((outcome.among_choices()?, 1.0))),
        })
    }
}

impl Score {
    /// Whether scores are interpreted.
    pub fn is_telling(&self) -> bool {
        self.retained.is_some()
    }

    fn of(OnOff { on, off }: OnOff<'_>) -> Option<Self> {
        let scores = |outcomes: &[Outcome]| outcomes.iter().map(Outcome::score).collect::<Option<Vec<_>>>();
        let (first, second) = (scores(on)?, scores(off)?);
        let guesses = guesses(on);
        let above: Vec<f64> = first.iter().zip(&guesses).map(|(score, guess)| score - guess).collect();
        let enough = first.iter().sum::<f64>() >= FEWEST_RIGHT as f64;
        let pairs: Vec<(f64, f64)> = second.into_iter().zip(first).collect();
        let is_above = Estimate::sample(&above)?.interval().0 > 0.0;
        let triples: Vec<_> = pairs.iter().map(|&(off, on)| (on, off, 1.0)).collect();
        Some(Self {
            change: Change::of(&triples)?,
            guess: guesses.iter().sum::<f64>() / guesses.len() as f64,
            retained: Estimate::ratio(&pairs).filter(|retained| enough && is_above && retained.error > 0.0),
        })
    }
}

/// Each question's score by a model that knows nothing: one that guesses among the choices or, if that is higher in
/// total, one that always gives the choice that is right most often.
fn guesses(outcomes: &[Outcome]) -> Vec<f64> {
    let by_chance: Vec<f64> = outcomes.iter().map(Outcome::guess).collect();
    let mut right = BTreeMap::new();
    for answer in outcomes.iter().filter_map(Outcome::answer) {
        *right.entry(answer).or_insert(0_usize) += 1;
    }
    match right.into_iter().max_by_key(|&(_, count)| count) {
        Some((choice, count)) if count as f64 > by_chance.iter().sum() => {
            let says = |outcome: &Outcome| f64::from(u8::from(outcome.answer() == Some(choice)));
            outcomes.iter().map(says).collect()
        }
        _ => by_chance,
    }
}

impl Change {
    /// An estimate from the amounts and sizes that `amount` gives. None if some outcome has none.
    fn between(
        OnOff { on, off }: OnOff<'_>,
        amount: impl Fn(&Outcome) -> Option<(f64, f64)>,
    ) -> Option<Self> {
        let pair = |(on, off): (&Outcome, &Outcome)| {
            let ((on, of), (off, _)) = (amount(on)?, amount(off)?);
            Some((on, off, of))
        };
        Self::of(&on.iter().zip(off).map(pair).collect::<Option<Vec<_>>>()?)
    }

    /// Estimates from amounts on and off, and their sizes, question by question.
    fn of(questions: &[(f64, f64, f64)]) -> Option<Self> {
        let differences: Vec<(f64, f64)> = questions.iter().map(|(on, off, of)| (off - on, *of)).collect();
        let difference = Estimate::ratio(&differences)?;
        let total: f64 = questions.iter().map(|(_, _, of)| of).sum();
        let on = questions.iter().map(|(on, ..)| on).sum::<f64>() / total;
        let off = questions.iter().map(|(_, off, _)| off).sum::<f64>() / total;
        Some(Self { on, off, difference })
    }
}

impl Findings {
    /// The results over all tasks.
    pub fn of(tasks: Vec<TaskFinding>) -> Self {
        let groups = TaskKind::ALL.into_iter().filter_map(|kind| Group::of(kind, &tasks)).collect();
        let contrasts = Quantity::ALL.into_iter().filter_map(|quantity| Contrast::of(quantity, &tasks));
        let facts_less_reading = contrasts.collect();
        let mut findings = Self { tasks, groups, facts_less_reading, statements: Vec::new() };
        findings.statements = statements::about(&findings);
        findings
    }
}

/// The quantity of every task of this kind that has it.
fn values(quantity: Quantity, kind: TaskKind, tasks: &[TaskFinding]) -> Vec<Estimate> {
    let of_kind = tasks.iter().filter(|task| task.kind == Some(kind));
    of_kind.filter_map(|task| quantity.of(task)).collect()
}

impl Group {
    /// None without tasks.
    fn of(kind: TaskKind, tasks: &[TaskFinding]) -> Option<Self> {
        let mean = |quantity| {
            let values = values(quantity, kind, tasks);
            Some(GroupMean { quantity, tasks: values.len(), mean: Estimate::mean(&values)? })
        };
        let there = tasks.iter().any(|task| task.kind == Some(kind));
        there.then(|| Self { kind, means: Quantity::ALL.into_iter().filter_map(mean).collect() })
    }
}

impl Contrast {
    /// None if one of the two kinds has no task with the quantity.
    fn of(quantity: Quantity, tasks: &[TaskFinding]) -> Option<Self> {
        let groups = [TaskKind::Facts, TaskKind::Reading].map(|kind| values(quantity, kind, tasks));
        let [facts, reading] = &groups;
        let over_questions = Estimate::mean(facts)?.less(Estimate::mean(reading)?);
        let sample = |group: &[Estimate]| {
            Estimate::sample(&group.iter().map(|estimate| estimate.value).collect::<Vec<_>>())
        };
        let over_tasks = sample(facts).zip(sample(reading)).map(|(facts, reading)| facts.less(reading));
        Some(Self { quantity, tasks: [facts.len(), reading.len()], over_questions, over_tasks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::{Length, Said};

    fn clozes(values: &[(f64, usize, bool)]) -> Vec<Outcome> {
        let outcome = |(question, &(log_probability, tokens, greedy)): (usize, &(f64, usize, bool))| {
            Outcome { question, line: question + 1, said: Said::Cloze { log_probability, tokens, greedy } }
        };
        values.iter().enumerate().map(outcome).collect()
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found}, not {expected}");
    }

    #[test]
    fn a_task_by_hand() {
        let on = clozes(&[(-1.0, 1, true), (-4.0, 2, true), (-3.0, 1, true), (-2.0, 1, true)].repeat(4));
        let off = clozes(&[(-2.0, 1, true), (-8.0, 2, false), (-3.0, 1, true), (-2.0, 1, false)].repeat(4));
        let found =
            TaskFinding::of(("t", Some(TaskKind::Facts)), 3, OnOff { on: &on, off: &off }, None).unwrap();
        assert_eq!((found.questions, found.cut), (16, 3));
        let likelihood = found.likelihood.unwrap();
        close(likelihood.on, -2.0);
        close(likelihood.off, -3.0);
        // Four times −5 nats over 5 tokens: residuals 0, −2, 1, 1, by the tokens of all others.
        close(likelihood.difference.value, -1.0);
        let squares: f64 = 4.0 * ((2.0_f64 / 18.0).powi(2) + 2.0 * (1.0_f64 / 19.0).powi(2));
        close(likelihood.difference.error, (15.0 / 16.0 * squares).sqrt());
        let score = found.score.unwrap();
        assert_eq!((score.change.on, score.change.off, score.guess), (1.0, 0.5, 0.0));
        close(score.change.difference.error, (16.0_f64 / 15.0 * 4.0).sqrt() / 16.0);
        close(score.retained.unwrap().value, 0.5);
        assert!(TaskFinding::of(("t", None), 0, OnOff { on: &on, off: &off[1..] }, None).is_err());
    }

    /// Questions with two choices, in groups: number, answer, and right choice.
    fn choices(groups: &[(usize, usize, usize)]) -> Vec<Outcome> {
        let each = groups.iter().flat_map(|&(count, said, answer)| vec![(said, answer); count]);
        let outcome = |(question, (said, answer)): (usize, (usize, usize))| Outcome {
            question,
            line: question + 1,
            said: Said::Choice {
                log_probabilities: [0, 1].map(|choice| if choice == said { -1.0 } else { -2.0 }).to_vec(),
                lengths: vec![Length { tokens: 1, characters: 1, bytes: 1 }; 2],
                answer,
            },
        };
        each.enumerate().map(outcome).collect()
    }

    fn score(on: &[Outcome], off: &[Outcome]) -> Score {
        TaskFinding::of(("t", None), 0, OnOff { on, off }, None).unwrap().score.unwrap()
    }

    #[test]
    fn nothing_is_retained_of_a_guess() {
        // 60 of 100 are the first choice. Without the memory half of the answers are right.
        let off = choices(&[(30, 0, 0), (30, 1, 0), (20, 0, 1), (20, 1, 1)]);
        for always in [0, 1] {
            let found = score(&choices(&[(60, always, 0), (40, always, 1)]), &off);
            assert_eq!((found.guess, found.retained), (0.6, None), "always {always}");
            assert!(!found.is_telling());
        }
        let knows = score(&choices(&[(50, 0, 0), (10, 1, 0), (5, 0, 1), (35, 1, 1)]), &off);
        close(knows.retained.unwrap().value, 50.0 / 85.0);
        assert!(knows.is_telling());
        // 55 of 100 is not above guessing if either choice is right equally often.
        let guesses = choices(&[(28, 0, 0), (22, 1, 0), (23, 0, 1), (27, 1, 1)]);
        let off = choices(&[(25, 0, 0), (25, 1, 0), (25, 0, 1), (25, 1, 1)]);
        let found = score(&guesses, &off);
        assert_eq!((found.change.on, found.guess, found.retained), (0.55, 0.5, None));
    }

    #[test]
    fn nothing_is_retained_without_an_error() {
        let right =
            |count: usize| clozes(&(0..1000).map(|question| (-1.0, 1, question < count)).collect::<Vec<_>>());
        // A few right answers are above guessing, which scores 0, but they cannot give a share.
        assert_eq!(score(&right(FEWEST_RIGHT - 1), &right(1)).retained, None);
        close(score(&right(FEWEST_RIGHT), &right(1)).retained.unwrap().value, 0.1);
        assert_eq!(score(&right(400), &right(0)).retained, None, "none remains: 0 ± 0");
        assert_eq!(score(&right(400), &right(400)).retained, None, "all remain: 1 ± 0");
        let kept = score(&right(400), &right(1)).retained.unwrap();
        assert!(kept.error > 0.0, "{kept:?}");
    }

    #[test]
    fn generated_answers_are_weighed_by_other_questions() {
        let text = |score| {
            let said = |question| Outcome {
                question,
                line: question + 1,
                said: Said::Generation { text: String::new(), score },
            };
            (0..2).map(said).collect::<Vec<_>>()
        };
        let (on, off) = (text(1.0), text(0.0));
        let asked = OnOff { on: &on, off: &off };
        assert_eq!(TaskFinding::of(("t", None), 0, asked, None).unwrap().likelihood, None);
        let (on, off) = (clozes(&[(-1.0, 1, true); 2]), clozes(&[(-3.0, 1, true); 2]));
        let found = TaskFinding::of(("t", None), 0, asked, Some(OnOff { on: &on, off: &off })).unwrap();
        assert_eq!(found.likelihood.unwrap().difference.value, -2.0);
        assert_eq!(found.score.unwrap().change.difference.value, -1.0);
    }

    #[test]
    fn groups_and_their_contrast() {
        let task = |kind, value, error| {
            let difference = Estimate { value, error, degrees: 99.0 };
            let change = Change { on: 0.0, off: value, difference };
            let likelihood = Some(change);
            TaskFinding {
                task: "t".into(),
                kind,
                questions: 100,
                cut: 0,
                score: None,
                likelihood,
                among_choices: None,
            }
        };
        let (facts, reading) = (Some(TaskKind::Facts), Some(TaskKind::Reading));
        let tasks = vec![
            task(facts, -1.0, 0.3),
            task(facts, -3.0, 0.4),
            task(reading, -0.5, 0.1),
            task(None, -9.0, 0.1),
        ];
        let findings = Findings::of(tasks.clone());
        assert_eq!(findings.groups.len(), 2);
        assert_eq!((findings.groups[0].kind, findings.groups[0].means[0].tasks), (TaskKind::Facts, 2));
        close(findings.groups[0].means[0].mean.value, -2.0);
        close(findings.groups[0].means[0].mean.error, 0.25);
        let [contrast] = findings.facts_less_reading[..] else { panic!("{findings:?}") };
        close(contrast.over_questions.value, -1.5);
        close(contrast.over_questions.error, (0.0625_f64 + 0.01).sqrt());
        assert_eq!(contrast.over_tasks, None, "one task of reading");
        let more = [tasks, vec![task(reading, -1.5, 0.1)]].concat();
        let over_tasks = Findings::of(more).facts_less_reading[0].over_tasks.unwrap();
        close(over_tasks.value, -1.0);
        // Standard errors over tasks: 1 and 0.5.
        close(over_tasks.error, 1.25_f64.sqrt());
    }
}
