//! Figures of effective depth: LogitLens curves, and the similarity of two models' layers.

use std::fmt::Write;

use super::{Aligned, Divergence};
use crate::figure::{Axis, Bar, Figure, Point, Scale, Series, escape};

/// Divergences over blocks: one curve per model, with its name and bars of one standard error.
pub fn lens(models: &[(String, &[Divergence])]) -> Figure {
    let deepest =
        models.iter().flat_map(|(_, points)| points.iter()).map(|point| point.depth).max().unwrap_or(1);
    // Names count from 0, layers from 1.
    let place = |point: &Divergence| point.depth as f64 - 1.0;
    let series = models.iter().enumerate().map(|(colour, (name, points))| Series {
        name: name.clone(),
        colour,
        line: points.iter().map(|point| (place(point), point.nats)).collect(),
        points: (points.iter())
            .map(|point| {
                let bar = point
                    .error
                    .map_or(Bar::None, |error| Bar::Vertical(point.nats - error, point.nats + error));
                Point { x: place(point), y: point.nats, bar }
            })
            .collect(),
        ..Series::default()
    });
    Figure {
        title: "LogitLens: divergence of every layer from the final prediction; ± one standard error".into(),
        x: Axis { label: "blocks passed".into(), scale: Scale::Names(numbers(deepest)) },
        y: Axis {
            label: "KL divergence from the final distribution, nats per token".into(),
            scale: Scale::Linear,
        },
        series: series.collect(),
    }
}

/// 1, 2, …; some are left blank if there are many.
fn numbers(last: usize) -> Vec<String> {
    let every = last.div_ceil(16).max(1);
    let text =
        |number: usize| if (number - 1).is_multiple_of(every) { number.to_string() } else { String::new() };
    (1..=last).map(text).collect()
}

const LEFT: f64 = 76.0;
const TOP: f64 = 122.0;
const BOTTOM: f64 = 56.0;
/// For the colour scale.
const RIGHT: f64 = 120.0;

/// Similarity of A's layers (across) and B's (upwards) as an SVG document, with the soft alignment as a line, bars of
/// one standard error, and a dashed diagonal. `names` are those of A and B.
pub fn cka(cka: &[Vec<f64>], soft: &[Aligned], names: [&str; 2]) -> String {
    let (columns, rows) = (cka.len(), cka.first().map_or(0, Vec::len));
    let cell = (480.0 / columns.max(rows).max(1) as f64).clamp(8.0, 72.0);
    let map = Map { left: LEFT, bottom: TOP + cell * rows as f64, cell };
    let right = LEFT + cell * columns as f64;
    let (width, height) = ((right + RIGHT).max(600.0), map.bottom + BOTTOM);
    let mut svg = String::new();
    let mut add = |line: String| _ = writeln!(svg, "{line}");
    add(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\" role=\"img\" font-family=\"Ubuntu, system-ui, sans-serif\" font-size=\"13\" \
         fill=\"#222\">\n<title>CKA between the layers of two models</title>\n\
         <rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"#fff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\">Similarity of the layers of A and B</text>"
    ));
    for (line, text) in [
        format!("A: {}", names[0]),
        format!("B: {}", names[1]),
        "line: soft alignment of every layer of A, ± one standard error; dashed: equal depth".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        add(label(16.0, 50.0 + 20.0 * line as f64, "start", text));
    }
    map.cells(cka, &mut add);
    for (index, text) in numbers(columns).iter().enumerate() {
        add(label(map.x(index as f64 + 1.0), map.bottom + 18.0, "middle", text));
    }
    for (index, text) in numbers(rows).iter().enumerate() {
        add(label(LEFT - 8.0, map.y(index as f64 + 1.0) + 4.5, "end", text));
    }
    add(label((LEFT + right) / 2.0, height - 14.0, "middle", "blocks passed in A"));
    let middle = (TOP + map.bottom) / 2.0;
    add(format!(
        "<text transform=\"translate(28 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">blocks passed in B</text>"
    ));
    map.alignment(soft, columns.min(rows), &mut add);
    colours((right + 32.0, TOP, map.bottom), &mut add);
    svg.push_str("</svg>\n");
    svg
}

/// Positions of cells on the page.
struct Map {
    left: f64,
    bottom: f64,
    cell: f64,
}

impl Map {
    /// Middle of the cell of a layer, counted from 1; may lie between two.
    fn x(&self, layer: f64) -> f64 {
        self.left + self.cell * (layer - 0.5)
    }

    fn y(&self, layer: f64) -> f64 {
        self.bottom - self.cell * (layer - 0.5)
    }

    fn cells(&self, cka: &[Vec<f64>], add: &mut dyn FnMut(String)) {
        let side = self.cell;
        for (column, similarities) in cka.iter().enumerate() {
            for (row, similarity) in similarities.iter().enumerate() {
                let (left, top) =
                    (self.x(column as f64 + 1.0) - side / 2.0, self.y(row as f64 + 1.0) - side / 2.0);
                let fill = if similarity.is_nan() { "none".to_owned() } else { heat(*similarity) };
                add(format!(
                    "<rect class=\"cell\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{side:.1}\" height=\"{side:.1}\" \
                     fill=\"{fill}\"><title>A {}, B {}: {similarity:.3}</title></rect>",
                    column + 1,
                    row + 1
                ));
            }
        }
    }

    /// White on slightly wider black, visible on every colour.
    fn alignment(&self, soft: &[Aligned], last: usize, add: &mut dyn FnMut(String)) {
        let (begin, end) = (1.0, last as f64);
        add(format!(
            "<line stroke=\"#fff\" stroke-dasharray=\"4 4\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            self.x(begin),
            self.y(begin),
            self.x(end),
            self.y(end)
        ));
        let points: Vec<(f64, f64, f64)> = (soft.iter().filter(|point| point.aligned.is_finite()))
            .map(|point| {
                let error = point.error.unwrap_or(0.0);
                (self.x(point.depth as f64), self.y(point.aligned), self.cell * error)
            })
            .collect();
        let line: Vec<String> = points.iter().map(|(x, y, _)| format!("{x:.1},{y:.1}")).collect();
        for (colour, width) in [("#111", 4), ("#fff", 2)] {
            add(format!(
                "<polyline fill=\"none\" stroke-linejoin=\"round\" stroke=\"{colour}\" stroke-width=\"{width}\" \
                 points=\"{}\"/>",
                line.join(" ")
            ));
            for (x, y, error) in &points {
                add(format!(
                    "<line stroke=\"{colour}\" stroke-width=\"{width}\" x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" \
                     y2=\"{:.1}\"/>\n<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{:.1}\" fill=\"{colour}\"/>",
                    y - error,
                    y + error,
                    2.0 + f64::from(width) / 2.0
                ));
            }
        }
    }
}

/// The colour scale, from 0 at the bottom to 1 at the top.
fn colours((left, top, bottom): (f64, f64, f64), add: &mut dyn FnMut(String)) {
    const STEPS: u32 = 50;
    let height = (bottom - top) / f64::from(STEPS);
    for step in 0..STEPS {
        let (fill, y) =
            (heat((f64::from(step) + 0.5) / f64::from(STEPS)), bottom - height * f64::from(step + 1));
        // Slightly higher than its step, to hide seams.
        let height = height + 0.5;
        add(format!(
            "<rect x=\"{left:.1}\" y=\"{y:.2}\" width=\"16\" height=\"{height:.2}\" fill=\"{fill}\"/>"
        ));
    }
    for (value, text) in [(0.0, "0"), (0.5, "0.5"), (1.0, "1")] {
        add(label(left + 22.0, bottom - (bottom - top) * value + 4.5, "start", text));
    }
    add(label(left - 4.0, top - 12.0, "start", "CKA"));
}

fn label(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text))
}

/// From dark blue at 0 over red to pale yellow at 1. Values outside get the colour of the nearer end.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::png;

    #[test]
    fn curves_have_their_errors_and_names_are_text() {
        let points: Vec<Divergence> =
            (1..=3).map(|depth| Divergence { depth, nats: 3.0 - depth as f64, error: Some(0.1) }).collect();
        let figure = lens(&[("runs/<a>".into(), &points), ("b".into(), &points[..2])]);
        assert_eq!(figure.series[0].line, [(0.0, 2.0), (1.0, 1.0), (2.0, 0.0)]);
        assert_eq!(figure.series[0].points[1].bar, Bar::Vertical(0.9, 1.1));
        assert_eq!((figure.series[1].points.len(), figure.series[1].colour), (2, 1));
        let svg = figure.svg();
        for text in ["runs/&lt;a&gt;", ">blocks passed<", "nats per token<", ">3<"] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        // No line through the first block: axes of names have no zero.
        let at_zero = |line: &&str| line.starts_with("<line") && line.contains("#999");
        assert_eq!(svg.lines().filter(at_zero).count(), 1, "{svg}");
        assert!(png(&svg).is_ok());
    }

    #[test]
    fn a_map_has_a_cell_for_every_pair_and_the_line_of_alignment() {
        let map = vec![vec![0.5, 1.0, f64::NAN], vec![0.0, -0.1, 1.2]];
        let soft = [(1, 1.5), (2, 3.0)].map(|(depth, aligned)| Aligned { depth, aligned, error: Some(0.5) });
        let svg = cka(&map, &soft, ["a", "<b>"]);
        assert_eq!(svg.matches("class=\"cell\"").count(), 6);
        assert_eq!(svg.matches("fill=\"none\"><title>A 1, B 3").count(), 1);
        assert_eq!(svg.matches(&format!("fill=\"{}\"><title>", heat(1.0))).count(), 2);
        assert_eq!((heat(0.0).as_str(), heat(1.0).as_str()), ("#14103c", "#fcf4a4"));
        for text in
            [">blocks passed in A<", ">blocks passed in B<", ">CKA<", "B: &lt;b&gt;", "soft alignment"]
        {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        // Cells of 72: layer 1 of A is like B's between the first and the second, layer 2 like the third.
        let bottom = TOP + 3.0 * 72.0;
        let at = |layer: f64, aligned: f64| {
            format!("{:.1},{:.1}", LEFT + 72.0 * (layer - 0.5), bottom - 72.0 * (aligned - 0.5))
        };
        let line = format!("points=\"{} {}\"", at(1.0, 1.5), at(2.0, 3.0));
        assert_eq!(svg.matches(&line).count(), 2, "{line} in {svg}");
        let (with, without) = (png(&svg).unwrap(), png(&cka(&map, &[], ["a", "<b>"])).unwrap());
        assert_ne!(with, without, "the line is drawn");
    }

    #[test]
    fn many_layers_have_some_numbers() {
        assert_eq!(numbers(3), ["1", "2", "3"]);
        assert_eq!(numbers(30).iter().filter(|text| !text.is_empty()).count(), 15);
        assert_eq!(numbers(30).len(), 30);
    }
}
