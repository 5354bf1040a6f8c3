//! The figures of findings: a bar per task, and a mean below the tasks of each kind.

use super::{Estimate, Findings, Quantity};
use crate::figure::{Axis, Bar, Figure, Point, Scale, Series};
use crate::tasks::TaskKind;

/// File names of all possible figures.
pub const FIGURES: [&str; 3] = ["likelihood", "choices", "retained"];

/// The figures, each with its file name, one of [`FIGURES`]. Empty figures are left out.
pub fn figures(findings: &Findings) -> Vec<(&'static str, Figure)> {
    let draw = |quantity: Quantity| {
        let (file, title, label, scale) = match quantity {
            Quantity::Likelihood => (
                "likelihood",
                "Loss of right answers' likelihood without the memory, with 95 % intervals",
                "log-probability of the right answer, memory off minus on, nats per token",
                1.0,
            ),
            Quantity::Retained => (
                "retained",
                "Share of the score retained without the memory, with 95 % intervals",
                "score with the memory off over score with it on, %",
                100.0,
            ),
            Quantity::AmongChoices => (
                "choices",
                "Loss of right choices' likelihood without the memory, with 95 % intervals",
                "log-probability of the right one among the choices, memory off minus on, nats per question",
                1.0,
            ),
            Quantity::Score => return None,
        };
        let bars = Bars::of(findings, quantity, scale);
        let figure = Figure {
            title: title.into(),
            x: Axis { label: label.into(), scale: Scale::Linear },
            y: Axis { label: String::new(), scale: Scale::Names(bars.names) },
            series: bars.series,
        };
        (!figure.series.is_empty()).then_some((file, figure))
    };
    Quantity::ALL.into_iter().filter_map(draw).collect()
}

/// Bars from top to bottom, in a colour for each kind.
struct Bars {
    names: Vec<String>,
    series: Vec<Series>,
}

impl Bars {
    fn of(findings: &Findings, quantity: Quantity, scale: f64) -> Self {
        let mut bars = Self { names: Vec::new(), series: Vec::new() };
        let kinds = TaskKind::ALL.into_iter().map(Some).chain([None]);
        for (colour, kind) in kinds.enumerate() {
            let mut series = Series { colour, bars: true, ..Series::default() };
            let tasks = findings.tasks.iter().filter(|task| task.kind == kind);
            let mut rows: Vec<(String, Estimate)> =
                tasks.filter_map(|task| Some((task.task.clone(), quantity.of(task)?))).collect();
            let groups = findings.groups.iter().filter(|group| Some(group.kind) == kind && rows.len() > 1);
            let means: Vec<_> = groups.flat_map(|group| &group.means).collect();
            let mean = means.into_iter().find(|mean| mean.quantity == quantity);
            if let Some((mean, kind)) = mean.zip(kind) {
                rows.push((format!("{}, mean of {}", kind.name(), mean.tasks), mean.mean));
            } else if let (Some(kind), [(name, _)]) = (kind, &mut rows[..]) {
                *name = format!("{name} ({})", kind.name());
            }
            for (name, estimate) in rows {
                let (low, high) = estimate.interval();
                let bar = Bar::Horizontal(scale * low, scale * high);
                series.points.push(Point { x: scale * estimate.value, y: bars.names.len() as f64, bar });
                bars.names.push(name);
            }
            if !series.points.is_empty() {
                bars.series.push(series);
            }
        }
        bars
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Change, Score, TaskFinding};
    use super::*;

    #[test]
    fn kinds_stand_together_with_their_mean() {
        let task = |name: &str, kind, value| {
            let difference = Estimate { value, error: 0.1, degrees: 50.0 };
            let likelihood = Some(Change { on: 0.0, off: value, difference });
            TaskFinding {
                task: name.into(),
                kind,
                questions: 9,
                cut: 0,
                score: None,
                likelihood,
                among_choices: None,
            }
        };
        let tasks = vec![
            task("lama", Some(TaskKind::Facts), -1.0),
            task("mine", None, -5.0),
            task("boolq", Some(TaskKind::Reading), -0.5),
            task("trivia", Some(TaskKind::Facts), -3.0),
        ];
        let mut right = tasks.clone();
        let retained = Estimate { value: 0.4, error: 0.1, degrees: 50.0 };
        let change = Change { on: 0.5, off: 0.2, difference: retained };
        right[0].score = Some(Score { change, guess: 0.0, retained: Some(retained) });
        let [_, ("retained", figure)] = &figures(&Findings::of(right))[..] else { panic!("one has a score") };
        assert_eq!(figure.series.iter().map(|series| series.points[0].x).collect::<Vec<_>>(), [40.0]);
        let drawn = figures(&Findings::of(tasks));
        let [("likelihood", figure)] = &drawn[..] else { panic!("no task has a score: {drawn:?}") };
        let Scale::Names(names) = &figure.y.scale else { panic!("names") };
        assert_eq!(names[..], ["lama", "trivia", "facts, mean of 2", "boolq (reading)", "mine"]);
        let points = |series: usize| figure.series[series].points.iter().map(|point| (point.x, point.y));
        assert_eq!(points(0).collect::<Vec<_>>(), [(-1.0, 0.0), (-3.0, 1.0), (-2.0, 2.0)]);
        assert_eq!(points(1).collect::<Vec<_>>(), [(-0.5, 3.0)]);
        let svg = figure.svg();
        assert_eq!(svg.matches("class=\"bar\"").count(), 5, "{svg}");
        let colour = |bar: usize| {
            let line = svg.lines().filter(|line| line.contains("class=\"bar\"")).nth(bar).unwrap();
            line.split("fill=\"").nth(1).unwrap()[..7].to_owned()
        };
        assert_ne!(colour(0), colour(4), "a task without a kind is not one of facts");
        assert!(crate::figure::png(&svg).is_ok());
    }
}
