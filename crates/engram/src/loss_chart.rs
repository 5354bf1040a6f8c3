//! Loss curves as a figure.

use engram_eval::figure::{Axis, Bar, Figure, Point, Scale, Series};

/// One curve: a name, a training loss per step, and held-out losses at some steps.
#[derive(Debug, Clone, Default)]
pub(crate) struct Curve {
    /// Its name.
    pub(crate) name: String,
    /// Step and training loss, ascending.
    pub(crate) training: Vec<(u64, f64)>,
    /// Step and held-out loss, ascending.
    pub(crate) held_out: Vec<(u64, f64)>,
}

/// Dots of training losses that a figure has at most, for each curve.
const DOTS: usize = 200;

/// Held-out losses as lines with points, smoothed training losses as faint dots behind them.
pub(crate) fn figure(curves: &[Curve]) -> Figure {
    let series = |(colour, curve): (usize, &Curve)| {
        let place = |&(step, loss): &(u64, f64)| (step as f64, loss);
        let line: Vec<(f64, f64)> = curve.held_out.iter().map(place).collect();
        let points = line.iter().map(|&(x, y)| Point { x, y, bar: Bar::None }).collect();
        Series {
            name: curve.name.clone(),
            colour,
            dots: smoothed(&curve.training).iter().map(place).collect(),
            line,
            points,
            ..Series::default()
        }
    };
    Figure {
        title: "Loss: held out (lines), training (faint dots)".into(),
        x: Axis { label: "step".into(), scale: Scale::Linear },
        y: Axis { label: "nats per token".into(), scale: Scale::Linear },
        series: curves.iter().enumerate().map(series).collect(),
    }
}

/// Means over stretches of steps, so that at most [`DOTS`] points are left.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let size = points.len().div_ceil(DOTS).max(1);
    let mean = |stretch: &[(u64, f64)]| {
        let sum: f64 = stretch.iter().map(|point| point.1).sum();
        (stretch[stretch.len() / 2].0, sum / stretch.len() as f64)
    };
    points.chunks(size).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_its_held_out_losses_and_at_most_so_many_dots() {
        let training = (1..=1000).map(|step| (step, if step <= 500 { 8.0 } else { 3.0 })).collect();
        let curve = Curve { name: "memory".into(), training, held_out: vec![(500, 3.6), (1000, 3.4)] };
        let figure = figure(&[curve.clone(), Curve { name: "baseline".into(), ..curve }]);
        let [memory, baseline] = &figure.series[..] else { panic!("{figure:?}") };
        assert_eq!(memory.line, [(500.0, 3.6), (1000.0, 3.4)]);
        assert_eq!((memory.dots.len(), memory.dots[0].1, memory.dots[199].1), (DOTS, 8.0, 3.0));
        assert_ne!(memory.colour, baseline.colour);
        assert!(figure.svg().contains(">memory<"));
    }

    #[test]
    fn nothing_to_draw_is_still_a_picture() {
        assert!(figure(&[]).svg().ends_with("</svg>\n"));
    }
}
