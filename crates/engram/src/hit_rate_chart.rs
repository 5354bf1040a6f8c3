//! Hit rates by cache size as an SVG picture.

use std::fmt::Write;

use crate::number::bytes;

/// One curve: a name, and hit rates in 0..=1 by bytes, ascending.
#[derive(Debug, Clone)]
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(u64, f64)>,
    pub(crate) dashed: bool,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
const COLOURS: [&str; 5] = ["#d9580d", "#16171b", "#3a6ea5", "#4b8b3b", "#8a4f9e"];

/// The picture. Cache sizes are logarithmic.
pub(crate) fn draw(title: &str, curves: &[Curve]) -> String {
    let sizes = || curves.iter().flat_map(|curve| &curve.points).map(|point| point.0.max(1));
    let low = (sizes().min().unwrap_or(1) as f64).log2();
    let high = (sizes().max().unwrap_or(2) as f64).log2().max(low + 1.0);
    let x = |size: u64| LEFT + (WIDTH - LEFT - RIGHT) * ((size.max(1) as f64).log2() - low) / (high - low);
    let y = |rate: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - rate);

    let mut svg = String::new();
    let mut add = |line: String| _ = writeln!(svg, "{line}");
    add(format!("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">"));
    add(format!("<title>{}</title>", escaped(title)));
    add("<style>svg{background:#fff;color:#333}text{font:13px system-ui,sans-serif;fill:currentColor}\
         .grid{stroke:currentColor;opacity:.15}polyline{fill:none;stroke-linejoin:round;stroke-width:2}\
         @media(prefers-color-scheme:dark){svg{background:#16171b;color:#ddd}.black{stroke:#ddd}}</style>"
        .into());
    for tenth in (0..=10).step_by(2) {
        let at = y(f64::from(tenth) / 10.0);
        let right = WIDTH - RIGHT;
        add(format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"));
        let (at, left) = (at + 4.0, LEFT - 8.0);
        add(format!("<text x=\"{left}\" y=\"{at:.1}\" text-anchor=\"end\">{}%</text>", tenth * 10));
    }
    let step = ((high - low) / 6.0).ceil().max(1.0) as usize;
    for power in (low.ceil() as u32..=high.floor() as u32).step_by(step) {
        let (at, bottom) = (x(1 << power), HEIGHT - BOTTOM);
        add(format!("<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>"));
        let label = bytes(1 << power).replace(".00", "").replace(".0", "");
        add(format!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", bottom + 18.0));
    }
    let (middle, bottom) = (WIDTH / 2.0, HEIGHT - 8.0);
    add(format!("<text x=\"{middle}\" y=\"{bottom}\" text-anchor=\"middle\">cache</text>"));
    add(format!("<text x=\"{LEFT}\" y=\"20\">{}</text>", escaped(title)));
    for (index, curve) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let class = if index % COLOURS.len() == 1 { " class=\"black\"" } else { "" };
        let dash = if curve.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let points: Vec<String> =
            curve.points.iter().map(|&(size, rate)| format!("{:.1},{:.1}", x(size), y(rate))).collect();
        let points = points.join(" ");
        add(format!("<polyline{class} stroke=\"{colour}\"{dash} points=\"{points}\"/>"));
        let at = TOP + 18.0 + 20.0 * index as f64;
        let [from, to, text] = [LEFT + 12.0, LEFT + 40.0, LEFT + 48.0];
        let line = at - 4.0;
        add(format!("<polyline{class} stroke=\"{colour}\"{dash} points=\"{from},{line} {to},{line}\"/>"));
        add(format!("<text x=\"{text}\" y=\"{at}\">{}</text>", escaped(&curve.name)));
    }
    svg.push_str("</svg>\n");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_lie_within_the_picture() {
        let points =
            |top: f64| (20..=38).map(|power| (1 << power, top * f64::from(power - 20) / 18.0)).collect();
        let all = Curve { name: "all <orders>".into(), points: points(1.0), dashed: false };
        let pinned = Curve { name: "pinned".into(), points: points(0.9), dashed: true };
        let svg = draw("Hits & misses", &[all, pinned]);
        assert!(svg.contains("Hits &amp; misses") && svg.contains("all &lt;orders>"));
        assert!(svg.contains(">1 MiB<") && svg.contains(">32 GiB<"), "{svg}");
        let numbers = svg.split("points=\"").skip(1).flat_map(|part| {
            part.split('"').next().unwrap().split([' ', ',']).map(|number| number.parse::<f64>().unwrap())
        });
        let numbers: Vec<f64> = numbers.collect();
        assert_eq!(numbers.len(), 2 * (2 * 19 + 2 * 2));
        for point in numbers.chunks(2) {
            assert!((LEFT..=WIDTH - RIGHT).contains(&point[0]), "{point:?}");
            assert!((TOP..=HEIGHT - BOTTOM).contains(&point[1]), "{point:?}");
        }
        assert!(draw("nothing", &[]).ends_with("</svg>\n"));
    }
}
