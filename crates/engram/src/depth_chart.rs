//! LogitLens curves and CKA heat maps as SVG pictures.

use std::fmt::Write;

use engram_eval::depth::{Aligned, Divergence};

const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 52.0;
const COLOURS: [&str; 2] = ["#d9580d", "#3a6ea5"];
const STYLE: &str = "<style>svg{background:#fff;color:#333}text{font:13px system-ui,sans-serif;fill:currentColor}\
    .grid{stroke:currentColor;opacity:.15}polyline{fill:none;stroke-linejoin:round}\
    @media(prefers-color-scheme:dark){svg{background:#16171b;color:#ddd}}</style>";

/// Divergences over blocks, one curve a model, with bars of one standard error.
pub(crate) fn lens(curves: &[(String, &[Divergence])]) -> String {
    let (width, height) = (640.0, 400.0);
    let points = || curves.iter().flat_map(|(_, points)| points.iter());
    let deepest = points().map(|point| point.depth).max().unwrap_or(1);
    let top = points().map(|point| point.nats + point.error.unwrap_or(0.0)).fold(0.0, f64::max).max(1e-9);
    let x =
        |depth: usize| LEFT + (width - LEFT - RIGHT) * (depth as f64 - 1.0) / (deepest as f64 - 1.0).max(1.0);
    let y = |nats: f64| TOP + (height - TOP - BOTTOM) * (1.0 - nats / top);
    let mut svg = begin(width, height, "Divergence of every layer from the final distribution");
    let mut add = |line: String| _ = writeln!(svg, "{line}");
    for tick in ticks(top) {
        let (at, right) = (y(tick), width - RIGHT);
        add(format!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"));
        add(label(LEFT - 8.0, at + 4.0, "end", &format!("{}", (tick * 1e6).round() / 1e6)));
    }
    for depth in (1..=deepest).step_by(deepest.div_ceil(12)) {
        add(label(x(depth), height - BOTTOM + 18.0, "middle", &depth.to_string()));
    }
    add(label(width / 2.0, height - 12.0, "middle", "blocks passed"));
    add(label(LEFT, 20.0, "start", "KL(final ‖ layer), nats per token; bars: one standard error"));
    for (index, (name, points)) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let line: Vec<String> =
            points.iter().map(|point| format!("{:.1},{:.1}", x(point.depth), y(point.nats))).collect();
        add(format!("<polyline stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>", line.join(" ")));
        for point in *points {
            let (at, error) = (x(point.depth), point.error.unwrap_or(0.0));
            let (low, high) = (y((point.nats - error).max(0.0)), y(point.nats + error));
            add(format!(
                "<line stroke=\"{colour}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>"
            ));
            add(format!("<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", y(point.nats)));
        }
        let at = TOP + 8.0 + 18.0 * index as f64;
        add(format!(
            "<text x=\"{}\" y=\"{at}\" text-anchor=\"end\" style=\"fill:{colour}\">{}</text>",
            width - RIGHT - 4.0,
            escape(name)
        ));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Similarity of A's layers (across) and B's (upwards), with the soft alignment as a line and the diagonal dashed.
pub(crate) fn cka(cka: &[Vec<f64>], soft: &[Aligned], [a, b]: [&str; 2]) -> String {
    let (columns, rows) = (cka.len(), cka.first().map_or(0, Vec::len));
    let cell = (480.0 / columns.max(rows).max(1) as f64).clamp(8.0, 56.0);
    let (inner_width, inner_height) = (cell * columns as f64, cell * rows as f64);
    let (width, height) = ((LEFT + inner_width + RIGHT).max(520.0), TOP + inner_height + BOTTOM);
    // Middle of the cell of a layer, counted from 1 and perhaps between two.
    let x = |layer: f64| LEFT + cell * (layer - 0.5);
    let y = |layer: f64| TOP + inner_height - cell * (layer - 0.5);
    let mut svg = begin(width, height, "CKA between the layers of two models");
    let mut add = |line: String| _ = writeln!(svg, "{line}");
    for (column, similarities) in cka.iter().enumerate() {
        for (row, similarity) in similarities.iter().enumerate() {
            let (left, top) = (x(column as f64 + 1.0) - cell / 2.0, y(row as f64 + 1.0) - cell / 2.0);
            let fill = if similarity.is_nan() { "none".to_owned() } else { heat(*similarity) };
            add(format!(
                "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{cell:.1}\" height=\"{cell:.1}\" fill=\"{fill}\">\
                 <title>A {}, B {}: {similarity:.3}</title></rect>",
                column + 1,
                row + 1
            ));
        }
    }
    for layer in (1..=columns).step_by(columns.div_ceil(12).max(1)) {
        add(label(x(layer as f64), TOP + inner_height + 18.0, "middle", &layer.to_string()));
    }
    for layer in (1..=rows).step_by(rows.div_ceil(12).max(1)) {
        add(label(LEFT - 8.0, y(layer as f64) + 4.0, "end", &layer.to_string()));
    }
    let diagonal = columns.min(rows) as f64;
    add(format!(
        "<line stroke=\"#fff\" stroke-dasharray=\"4 4\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
        x(1.0),
        y(1.0),
        x(diagonal),
        y(diagonal)
    ));
    let aligned = soft.iter().filter(|point| point.aligned.is_finite());
    let line: Vec<String> = aligned
        .clone()
        .map(|point| format!("{:.1},{:.1}", x(point.depth as f64), y(point.aligned)))
        .collect();
    add(format!("<polyline stroke=\"#111\" stroke-width=\"4\" points=\"{}\"/>", line.join(" ")));
    add(format!("<polyline stroke=\"#fff\" stroke-width=\"2\" points=\"{}\"/>", line.join(" ")));
    add(label(LEFT, 20.0, "start", "CKA, dark 0 to bright 1; line: soft alignment; dashed: equal depth"));
    add(label(LEFT, 40.0, "start", &format!("up: blocks passed in {b}")));
    add(label(LEFT, height - 12.0, "start", &format!("across: blocks passed in {a}")));
    svg.push_str("</svg>\n");
    svg
}

fn begin(width: f64, height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\">\n\
         <title>{title}</title>\n{STYLE}\n"
    )
}

fn label(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text))
}

/// From dark blue at 0 over red to pale yellow at 1; what lies outside is drawn as the nearer end.
fn heat(similarity: f64) -> String {
    const STOPS: [[f64; 3]; 4] =
        [[20.0, 16.0, 60.0], [140.0, 41.0, 99.0], [240.0, 112.0, 50.0], [252.0, 244.0, 164.0]];
    let at = similarity.clamp(0.0, 1.0) * 3.0;
    let stop = (at.floor() as usize).min(2);
    let mix = |channel: usize| {
        let (from, to) = (STOPS[stop][channel], STOPS[stop + 1][channel]);
        (from + (to - from) * (at - stop as f64)).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

/// Round values from 0 to `top`, some four to ten of them.
fn ticks(top: f64) -> Vec<f64> {
    let magnitude = 10f64.powf(top.log10().floor());
    let steps = [0.1, 0.2, 0.5, 1.0].map(|step| step * magnitude);
    let step = steps.into_iter().find(|step| top / step <= 8.0).unwrap_or(magnitude * 2.0);
    (0..).map(|index| f64::from(index) * step).take_while(|&tick| tick <= top).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_lie_within_the_picture_and_names_are_text() {
        let points: Vec<Divergence> =
            (1..=3).map(|depth| Divergence { depth, nats: 3.0 - depth as f64, error: Some(0.1) }).collect();
        let svg = lens(&[("runs/<a>".into(), &points)]);
        assert!(svg.contains("runs/&lt;a&gt;") && svg.ends_with("</svg>\n"));
        let line = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let numbers: Vec<f64> = line.split([' ', ',']).map(|number| number.parse().unwrap()).collect();
        assert_eq!(numbers.len(), 6);
        assert_eq!((numbers[0], numbers[4]), (LEFT, 640.0 - RIGHT));
        assert!((numbers[5] - (400.0 - BOTTOM)).abs() < 0.1, "nothing is left at the end");
    }

    #[test]
    fn a_map_has_a_cell_for_every_pair() {
        let map = vec![vec![0.5, 1.0, f64::NAN], vec![0.0, -0.1, 1.2]];
        let soft = [(1, 1.5), (2, 3.0)].map(|(depth, aligned)| Aligned { depth, aligned, error: None });
        let svg = cka(&map, &soft, ["a", "b"]);
        assert_eq!(svg.matches("<rect").count(), 6);
        assert_eq!(svg.matches("fill=\"none\"").count(), 1);
        assert_eq!(svg.matches(&heat(1.0)).count(), 2);
        assert_eq!((heat(0.0).as_str(), heat(1.0).as_str()), ("#14103c", "#fcf4a4"));
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(3.9), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]);
        assert_eq!(ticks(0.02).len(), 5);
    }
}
