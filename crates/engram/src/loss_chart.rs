//! Loss curves as an SVG picture.

use std::fmt::Write;

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

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 44.0;
const COLOURS: [&str; 4] = ["#d9580d", "#3a6ea5", "#4b8b3b", "#8a4f9e"];

/// The chart: held-out losses as lines, with smoothed training losses behind them.
pub(crate) fn draw(curves: &[Curve]) -> String {
    let smooth: Vec<_> = curves.iter().map(|curve| smoothed(&curve.training)).collect();
    let points = || smooth.iter().flatten().chain(curves.iter().flat_map(|curve| &curve.held_out));
    let last = points().map(|point| point.0).max().unwrap_or(1).max(1) as f64;
    let (low, high) = points()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), point| (low.min(point.1), high.max(point.1)));
    let (low, high) = if low < high { (low, high) } else { (0.0, 1.0) };
    let ticks = ticks(low, high);
    let x = |step: u64| LEFT + (WIDTH - LEFT - RIGHT) * step as f64 / last;
    let y = |loss: f64| TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low);
    let path = |points: &[(u64, f64)]| {
        let points = points.iter().map(|&(step, loss)| format!("{:.1},{:.1}", x(step), y(loss)));
        points.collect::<Vec<_>>().join(" ")
    };

    let mut svg = String::new();
    let mut add = |line: String| _ = writeln!(svg, "{line}");
    add(format!("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">"));
    add("<title>Loss in nats per token over training steps</title>".into());
    add("<style>svg{background:#fff;color:#333}text{font:13px system-ui,sans-serif;fill:currentColor}\
         .grid{stroke:currentColor;opacity:.15}polyline{fill:none;stroke-linejoin:round}\
         @media(prefers-color-scheme:dark){svg{background:#16171b;color:#ddd}}</style>"
        .into());
    for tick in ticks {
        let at = y(tick);
        add(format!(
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
            WIDTH - RIGHT
        ));
        add(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick:.1}</text>", LEFT - 8.0, at + 4.0));
    }
    for part in 0..=4 {
        let step = (last * f64::from(part) / 4.0).round() as u64;
        let anchor = if part == 4 { "end" } else { "middle" };
        add(format!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{step}</text>",
            x(step),
            HEIGHT - BOTTOM + 18.0
        ));
    }
    add(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text>", WIDTH / 2.0, HEIGHT - 8.0));
    add(format!(
        "<text x=\"{LEFT}\" y=\"20\">nats per token: held out (line with dots), training (faint)</text>"
    ));
    for (index, (curve, training)) in curves.iter().zip(&smooth).enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        add(format!("<polyline stroke=\"{colour}\" opacity=\".35\" points=\"{}\"/>", path(training)));
        add(format!(
            "<polyline stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
            path(&curve.held_out)
        ));
        for &(step, loss) in &curve.held_out {
            add(format!("<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\"/>", x(step), y(loss)));
        }
        let at = TOP + 16.0 + 18.0 * index as f64;
        add(format!(
            "<text x=\"{}\" y=\"{at}\" text-anchor=\"end\" style=\"fill:{colour}\">{}</text>",
            WIDTH - RIGHT - 4.0,
            curve.name
        ));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Means over stretches of steps that leave about two hundred points at most.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let size = points.len().div_ceil(200).max(1);
    let mean = |stretch: &[(u64, f64)]| {
        (
            stretch[stretch.len() / 2].0,
            stretch.iter().map(|point| point.1).sum::<f64>() / stretch.len() as f64,
        )
    };
    points.chunks(size).map(mean).collect()
}

/// About four to eight round values between `low` and `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let steps = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
    let step = steps.into_iter().find(|step| (high - low) / step <= 8.0).unwrap_or((high - low) / 4.0);
    let first = (low / step).ceil() as i64;
    (first..).map(|index| index as f64 * step).take_while(|&tick| tick <= high).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_lie_within_the_picture() {
        let training = (1..=1000).map(|step| (step, 8.0 / (step as f64).sqrt() + 3.0)).collect();
        let curve = Curve { name: "memory".into(), training, held_out: vec![(500, 3.6), (1000, 3.4)] };
        let svg = draw(&[curve]);
        let coordinates = svg.split("points=\"").skip(1).flat_map(|part| {
            part.split('"').next().unwrap().split([' ', ',']).map(|number| number.parse::<f64>().unwrap())
        });
        let coordinates: Vec<f64> = coordinates.collect();
        assert_eq!(coordinates.len(), 2 * (200 + 2));
        for point in coordinates.chunks(2) {
            assert!((LEFT..=WIDTH - RIGHT).contains(&point[0]), "{point:?}");
            assert!((TOP - 0.1..=HEIGHT - BOTTOM + 0.1).contains(&point[1]), "{point:?}");
        }
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(3.1, 8.2), [4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(ticks(1.0, 1.25).len(), 3);
    }

    #[test]
    fn nothing_to_draw_is_still_a_picture() {
        assert!(draw(&[]).ends_with("</svg>\n"));
    }
}
