//! The figures of a study's findings.

use crate::arm::Kind;
use crate::findings::{ArmFinding, Findings};
use engram_eval::figure::{Axis, Bar, Figure, Point, Scale, Series};

const LOSS: &str = "held-out loss, nats per token";

/// The figures, each with its file name.
pub fn figures(findings: &Findings) -> Vec<(&'static str, Figure)> {
    match findings.study {
        Kind::Allocation => {
            vec![("loss", allocation(findings)), ("difference", allocation_difference(findings))]
        }
        Kind::Memory => vec![("loss", slots(findings))],
        Kind::Placement | Kind::Ablation | Kind::Baselines => vec![("difference", differences(findings))],
    }
}

fn axis(label: impl Into<String>, scale: Scale) -> Axis {
    Axis { label: label.into(), scale }
}

fn plain(x: f64, y: f64) -> Point {
    Point { x, y, bar: Bar::None }
}

/// Means as points, seeds as dots.
fn measured<'a>(name: &str, colour: usize, arms: impl Iterator<Item = &'a ArmFinding>) -> Series {
    let mut series = Series { name: name.into(), colour, ..Series::default() };
    for arm in arms {
        let x = arm.x.unwrap_or_default();
        series.points.push(plain(x, arm.nats_per_token));
        series.dots.extend(arm.by_seed.iter().map(|&loss| (x, loss)));
    }
    series
}

fn allocation(findings: &Findings) -> Figure {
    let mut series = measured("", 0, findings.arms.iter());
    series.line = series.points.iter().map(|point| (point.x, point.y)).collect();
    Figure {
        title: format!(
            "Loss by the share of experts; dots: {} seeds, points: their mean",
            findings.seeds.len()
        ),
        x: axis("ρ, share of the resting parameters in routed experts", Scale::Linear),
        y: axis(LOSS, Scale::Linear),
        series: vec![series],
    }
}

fn allocation_difference(findings: &Findings) -> Figure {
    let point = |arm: &ArmFinding| {
        let x = arm.x.unwrap_or_default();
        arm.difference.map_or(plain(x, 0.0), |difference| Point {
            x,
            y: difference.estimate.value,
            bar: Bar::Vertical(difference.low, difference.high),
        })
    };
    let points: Vec<Point> = findings.arms.iter().map(point).collect();
    let line = points.iter().map(|point| (point.x, point.y)).collect();
    Figure {
        title: "Difference to experts alone (ρ = 1), with joint 95 % intervals".into(),
        x: axis("ρ, share of the resting parameters in routed experts", Scale::Linear),
        y: axis("difference, nats per token", Scale::Linear),
        series: vec![Series { points, line, ..Series::default() }],
    }
}

fn slots(findings: &Findings) -> Figure {
    let series = findings.fits.iter().enumerate().map(|(colour, fit)| {
        let arms = findings.arms.iter().filter(|arm| arm.series.as_ref() == Some(&fit.series));
        let (value, error) = (fit.slope.estimate.value, fit.slope.estimate.error);
        let name = format!("{}: {value:+.4} ± {error:.4} per factor of 10", fit.series);
        let mut series = measured(&name, colour, arms);
        let at = |x: f64| (x, fit.intercept + value * x.log10());
        let ends = [f64::min, f64::max].map(|end| series.points.iter().map(|point| point.x).reduce(end));
        series.line = ends.into_iter().flatten().map(at).collect();
        series
    });
    Figure {
        title: format!(
            "Loss by the rows of memory; dots: {} seeds, line: least squares",
            findings.seeds.len()
        ),
        x: axis("slots (rows of all tables; other series: same number of parameters)", Scale::Logarithmic),
        y: axis(LOSS, Scale::Linear),
        series: series.collect(),
    }
}

fn differences(findings: &Findings) -> Figure {
    let reference = &findings.arms[0].name;
    let mut others: Vec<_> = findings.arms.iter().filter_map(|arm| Some((arm, arm.difference?))).collect();
    others.sort_by(|(_, a), (_, b)| b.estimate.value.total_cmp(&a.estimate.value));
    let point = |(place, (_, difference)): (usize, &(&ArmFinding, crate::findings::Interval))| Point {
        x: difference.estimate.value,
        y: place as f64,
        bar: Bar::Horizontal(difference.low, difference.high),
    };
    let points = others.iter().enumerate().map(point).collect();
    let names = others.iter().map(|(arm, _)| arm.name.clone()).collect();
    Figure {
        title: format!("Difference in loss to “{reference}”, with joint 95 % intervals"),
        x: axis("difference, nats per token (right: worse)", Scale::Linear),
        y: axis("", Scale::Names(names)),
        series: vec![Series { points, ..Series::default() }],
    }
}
