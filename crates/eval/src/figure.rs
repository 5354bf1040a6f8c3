//! Figures: points with error bars and lines over two axes, as SVG, and as PNG with the same picture.
//!
//! Numbers are written with fixed digits, so that equal results give equal files.

use std::fmt::Write;
use std::sync::Arc;

/// A figure of series over two axes.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Title.
    pub title: String,
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical axis.
    pub y: Axis,
    /// The series; later ones are drawn on top.
    pub series: Vec<Series>,
}

/// An axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Axis {
    /// Its quantity and unit.
    pub label: String,
    /// How values map to places.
    pub scale: Scale,
}

/// How values map to places on an axis.
#[derive(Debug, Clone, PartialEq)]
pub enum Scale {
    /// Proportionally.
    Linear,
    /// By their logarithm; values must be above 0.
    Logarithmic,
    /// The whole numbers from 0 on, each with a name.
    Names(Vec<String>),
}

/// Elements that belong together, in one colour.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// Its name; an empty name is left out of the key.
    pub name: String,
    /// Index of its colour.
    pub colour: usize,
    /// Corners of a line.
    pub line: Vec<(f64, f64)>,
    /// Whether the line is dashed.
    pub dashed: bool,
    /// Small, faint dots: single measurements.
    pub dots: Vec<(f64, f64)>,
    /// Points with error bars.
    pub points: Vec<Point>,
    /// Whether a horizontal bar reaches from zero to each point.
    pub bars: bool,
}

/// A point with an optional error bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Its error bar.
    pub bar: Bar,
}

/// An error bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bar {
    /// None.
    None,
    /// Along the horizontal axis, from and to.
    Horizontal(f64, f64),
    /// Along the vertical axis, from and to.
    Vertical(f64, f64),
}

const WIDTH: f64 = 720.0;
const TOP: f64 = 44.0;
const RIGHT: f64 = 24.0;
const BOTTOM: f64 = 56.0;
/// Distinguishable with all kinds of colour vision (Okabe and Ito); then grey.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777"];

impl Figure {
    /// The figure as an SVG document.
    pub fn svg(&self) -> String {
        let names = match &self.y.scale {
            Scale::Names(names) => names.as_slice(),
            Scale::Linear | Scale::Logarithmic => &[],
        };
        let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        let left = if names.is_empty() { 76.0 } else { (24.0 + 7.0 * longest as f64).clamp(76.0, 320.0) };
        let height = if names.is_empty() { 420.0 } else { TOP + BOTTOM + 26.0 * names.len() as f64 };
        let corners: Vec<(f64, f64)> = self.series.iter().flat_map(Series::extent).collect();
        let x = Places::of(&self.x.scale, corners.iter().map(|corner| corner.0), left, WIDTH - RIGHT);
        // Names go downwards, numbers upwards.
        let (bottom, top) = if names.is_empty() { (height - BOTTOM, TOP) } else { (TOP, height - BOTTOM) };
        let y = Places::of(&self.y.scale, corners.iter().map(|corner| corner.1), bottom, top);
        let mut page = Page { svg: String::new(), x, y, left, height };
        page.open(&self.title);
        page.axes(&self.x.label, &self.y.label);
        for series in &self.series {
            page.series(series);
        }
        page.key(&self.series);
        page.svg.push_str("</svg>\n");
        page.svg
    }
}

impl Series {
    fn extent(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let ends = |point: &Point| match point.bar {
            Bar::None => [(point.x, point.y); 2],
            Bar::Horizontal(low, high) => [(low, point.y), (high, point.y)],
            Bar::Vertical(low, high) => [(point.x, low), (point.x, high)],
        };
        let points = self.points.iter().flat_map(ends);
        let zeros = self.points.iter().filter(|_| self.bars).map(|point| (0.0, point.y));
        self.line.iter().chain(&self.dots).copied().chain(points).chain(zeros)
    }

    fn colour(&self) -> &'static str {
        COLOURS[self.colour % COLOURS.len()]
    }
}

/// Values of an axis and their places on the page.
struct Places {
    logarithmic: bool,
    linear: bool,
    /// Values (or their decimal logarithms) at the two ends.
    from: f64,
    to: f64,
    /// Their places.
    begin: f64,
    end: f64,
    ticks: Vec<(f64, String)>,
}

impl Places {
    fn of(scale: &Scale, values: impl Iterator<Item = f64>, begin: f64, end: f64) -> Self {
        let logarithmic = *scale == Scale::Logarithmic;
        let inner = |value: f64| if logarithmic { value.log10() } else { value };
        let values = values.map(inner).filter(|value| value.is_finite());
        let (low, high) = values
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let margin = if high > low { 0.06 * (high - low) } else { 0.5 };
        let (from, to, ticks) = match scale {
            Scale::Names(names) => {
                let ticks = names.iter().enumerate().map(|(index, name)| (index as f64, name.clone()));
                (-0.5, names.len() as f64 - 0.5, ticks.collect())
            }
            Scale::Linear => (low - margin, high + margin, linear_ticks(low - margin, high + margin)),
            Scale::Logarithmic => (low - margin, high + margin, decades(low - margin, high + margin)),
        };
        Self { logarithmic, linear: *scale == Scale::Linear, from, to, begin, end, ticks }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if self.logarithmic { value.log10() } else { value };
        self.begin + (value - self.from) / (self.to - self.from) * (self.end - self.begin)
    }

    /// Whether the number 0 has a place; names and logarithms have none.
    fn has_zero(&self) -> bool {
        self.linear && (self.from..=self.to).contains(&0.0)
    }
}

/// About four to eight round values between two others, as text.
fn linear_ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let power = 10f64.powf(((high - low) / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = step.into_iter().find(|step| (high - low) / step <= 8.0).unwrap_or(high - low);
    let digits = (-step.log10().floor()).max(0.0) as usize;
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    let tick = |index: i64| {
        let value = index as f64 * step;
        (value, format!("{value:.digits$}"))
    };
    (first..=last).map(tick).collect()
}

/// Powers of ten between two decimal logarithms, with their doubles and fivefolds if these are few.
fn decades(low: f64, high: f64) -> Vec<(f64, String)> {
    let factors: &[f64] = if high - low > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let written = |value: f64| match value {
        value if value >= 1e9 => format!("{}G", value / 1e9),
        value if value >= 1e6 => format!("{}M", value / 1e6),
        value if value >= 1e3 => format!("{}k", value / 1e3),
        value => format!("{value}"),
    };
    let mut ticks = Vec::new();
    for power in low.floor() as i32..=high.ceil() as i32 {
        let values = factors.iter().map(|factor| factor * 10f64.powi(power));
        let inside = values.filter(|value| (low..=high).contains(&value.log10()));
        ticks.extend(inside.map(|value| (value, written(value))));
    }
    ticks
}

struct Page {
    svg: String,
    x: Places,
    y: Places,
    left: f64,
    height: f64,
}

impl Page {
    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.svg.write_fmt(element);
        self.svg.push('\n');
    }

    fn open(&mut self, title: &str) {
        let height = self.height;
        self.add(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" role=\"img\" font-family=\"Ubuntu, system-ui, sans-serif\" font-size=\"13\" \
             fill=\"#222\">\n<title>{title}</title>\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>",
            title = escape(title)
        ));
        self.add(format_args!("<text x=\"16\" y=\"26\" font-size=\"16\">{}</text>", escape(title)));
    }

    fn axes(&mut self, x_label: &str, y_label: &str) {
        let (left, right, top, bottom) = (self.left, WIDTH - RIGHT, TOP, self.height - BOTTOM);
        let (x_ticks, y_ticks) = (self.x.ticks.clone(), self.y.ticks.clone());
        for (value, text) in x_ticks {
            let x = self.x.place(value);
            self.add(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#e6e6e6\"/>"
            ));
            let below = bottom + 18.0;
            self.add(format_args!(
                "<text x=\"{x:.1}\" y=\"{below}\" text-anchor=\"middle\">{}</text>",
                escape(&text)
            ));
        }
        for (value, text) in y_ticks {
            let y = self.y.place(value);
            self.add(format_args!(
                "<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#e6e6e6\"/>"
            ));
            let (x, y) = (left - 8.0, y + 4.5);
            self.add(format_args!(
                "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>",
                escape(&text)
            ));
        }
        if self.x.has_zero() {
            let x = self.x.place(0.0);
            self.add(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#999\"/>"
            ));
        }
        if self.y.has_zero() {
            let y = self.y.place(0.0);
            self.add(format_args!(
                "<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#999\"/>"
            ));
        }
        let (width, height) = (right - left, bottom - top);
        self.add(format_args!(
            "<rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" fill=\"none\" stroke=\"#999\"/>"
        ));
        let (middle, low) = ((left + right) / 2.0, self.height - 14.0);
        self.add(format_args!(
            "<text x=\"{middle}\" y=\"{low}\" text-anchor=\"middle\">{}</text>",
            escape(x_label)
        ));
        let middle = (top + bottom) / 2.0;
        self.add(format_args!(
            "<text transform=\"translate(18 {middle}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(y_label)
        ));
    }

    fn series(&mut self, series: &Series) {
        let colour = series.colour();
        if !series.line.is_empty() {
            let corner = |&(x, y): &(f64, f64)| format!("{:.1},{:.1}", self.x.place(x), self.y.place(y));
            let corners: Vec<_> = series.line.iter().map(corner).collect();
            let corners = corners.join(" ");
            let dashes = if series.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
            self.add(format_args!(
                "<polyline points=\"{corners}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dashes}/>"
            ));
        }
        for &(x, y) in &series.dots {
            let (x, y) = (self.x.place(x), self.y.place(y));
            self.add(format_args!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\" fill-opacity=\"0.4\"/>"
            ));
        }
        for point in series.points.iter().filter(|_| series.bars) {
            let ends = [0.0, point.x].map(|x| self.x.place(x));
            let (left, width) = (ends[0].min(ends[1]), (ends[0] - ends[1]).abs());
            let top = self.y.place(point.y) - 8.0;
            self.add(format_args!(
                "<rect class=\"bar\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"16\" \
                 fill=\"{colour}\" fill-opacity=\"0.35\"/>"
            ));
        }
        for point in &series.points {
            let (x, y) = (self.x.place(point.x), self.y.place(point.y));
            let ends = match point.bar {
                Bar::None => None,
                Bar::Horizontal(low, high) => Some([self.x.place(low), y, self.x.place(high), y]),
                Bar::Vertical(low, high) => Some([x, self.y.place(low), x, self.y.place(high)]),
            };
            if let Some([x1, y1, x2, y2]) = ends {
                self.add(format_args!(
                    "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" \
                     stroke-width=\"2\"/>"
                ));
            }
            self.add(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{colour}\"/>"));
        }
    }

    /// Names of the series, in the top right corner.
    fn key(&mut self, series: &[Series]) {
        let named = series.iter().filter(|series| !series.name.is_empty());
        for (index, series) in named.enumerate() {
            let (x, y) = (WIDTH - RIGHT - 10.0, TOP + 20.0 + 18.0 * index as f64);
            let (colour, name) = (series.colour(), escape(&series.name));
            self.add(format_args!(
                "<text x=\"{x}\" y=\"{y}\" text-anchor=\"end\" fill=\"{colour}\">{name}</text>"
            ));
        }
    }
}

/// Text escaped for XML and HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

/// Renders an SVG document as a PNG picture of twice its size in pixels. The font is embedded in the program.
///
/// # Errors
/// When the document cannot be drawn; says what is wrong with it.
pub fn png(svg: &str) -> Result<Vec<u8>, String> {
    use resvg::{tiny_skia, usvg};
    let mut fonts = usvg::fontdb::Database::new();
    fonts.load_font_data(epaint_default_fonts::UBUNTU_LIGHT.to_vec());
    fonts.set_sans_serif_family("Ubuntu");
    let options = usvg::Options { fontdb: Arc::new(fonts), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options).map_err(|error| error.to_string())?;
    let size = tree.size().to_int_size().scale_by(2.0).ok_or("an empty picture")?;
    let mut picture = tiny_skia::Pixmap::new(size.width(), size.height()).ok_or("an empty picture")?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(2.0, 2.0), &mut picture.as_mut());
    picture.encode_png().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(label: &str, scale: Scale) -> Axis {
        Axis { label: label.into(), scale }
    }

    fn figure() -> Figure {
        let point = |x: f64, y: f64| Point { x, y, bar: Bar::Vertical(y - 0.1, y + 0.1) };
        Figure {
            title: "Loss & <slots>".into(),
            x: axis("slots", Scale::Logarithmic),
            y: axis("nats per token", Scale::Linear),
            series: vec![Series {
                name: "memory".into(),
                line: vec![(1e3, 4.0), (1e6, 3.0)],
                dots: vec![(1e4, 3.8)],
                points: vec![point(1e3, 4.0), point(1e6, 3.0)],
                ..Series::default()
            }],
        }
    }

    fn numbers<'a>(svg: &'a str, key: &str) -> Vec<f64> {
        let start = format!("{key}=\"");
        svg.split(start.as_str())
            .skip(1)
            .map(|rest: &'a str| rest.split('"').next().unwrap().parse().unwrap())
            .collect()
    }

    #[test]
    fn everything_lies_within_the_axes() {
        let svg = figure().svg();
        let (x, y) = (numbers(&svg, "cx"), numbers(&svg, "cy"));
        assert_eq!(x.len(), 3);
        assert!(x.iter().all(|x| (76.0..WIDTH - RIGHT).contains(x)), "{x:?}");
        assert!(y.iter().all(|y| (TOP..420.0 - BOTTOM).contains(y)), "{y:?}");
        // A third of the way on a logarithmic axis; higher loss is higher.
        let by_place = |of: f64| x[1] + of * (x[2] - x[1]);
        assert!((x[0] - by_place(1.0 / 3.0)).abs() < 0.2, "{x:?}");
        assert!(y[1] < y[0] && y[0] < y[2], "{y:?}");
        assert!(svg.contains("Loss &amp; &lt;slots&gt;") && svg.contains(">10k<"), "{svg}");
    }

    #[test]
    fn names_go_downwards() {
        let names = ["no gate", "no convolution"].map(String::from).to_vec();
        let point = |x: f64, y: f64| Point { x, y, bar: Bar::Horizontal(x - 0.01, x + 0.01) };
        let figure = Figure {
            title: "Arms".into(),
            x: axis("difference", Scale::Linear),
            y: axis("", Scale::Names(names)),
            series: vec![Series { points: vec![point(0.03, 0.0), point(0.0, 1.0)], ..Series::default() }],
        };
        let svg = figure.svg();
        let y = numbers(&svg, "cy");
        assert!(y[0] < y[1], "{y:?}");
        assert!(svg.contains(">no convolution<"));

        // Bars begin at zero, so zero must be on the page.
        let mut bars = figure;
        bars.series[0] = Series {
            points: vec![
                Point { x: -2.0, y: 0.0, bar: Bar::None },
                Point { x: -1.0, y: 1.0, bar: Bar::None },
            ],
            bars: true,
            ..Series::default()
        };
        let svg = bars.svg();
        let bar: String = svg.lines().filter(|line| line.contains("\"bar\"")).collect();
        let (left, width, ends) = (numbers(&bar, "x"), numbers(&bar, "width"), numbers(&svg, "cx"));
        assert_eq!(left, ends, "to the left of zero");
        assert!((left[0] + width[0] - left[1] - width[1]).abs() < 0.2, "{left:?} {width:?}");
        assert!((width[0] - 2.0 * width[1]).abs() < 0.2, "{width:?}");
    }

    #[test]
    fn ticks_are_round_and_few() {
        let texts = |low, high| linear_ticks(low, high).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(-0.013, 0.021), ["-0.010", "-0.005", "0.000", "0.005", "0.010", "0.015", "0.020"]);
        assert_eq!(texts(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(decades(3.9, 5.1).len(), 4);
        assert_eq!(decades(2.0, 7.0).len(), 6);
    }

    #[test]
    fn the_picture_has_its_text() {
        let decode = |figure: &Figure| png(&figure.svg()).unwrap();
        let with = decode(&figure());
        assert_eq!(&with[..8], b"\x89PNG\r\n\x1a\n");
        assert_eq!(with, decode(&figure()), "equal figures give equal pictures");
        let mut without = figure();
        without.title = String::new();
        assert_ne!(with, decode(&without), "a title is drawn");
        assert!(png("<svg").is_err());
    }

    #[test]
    fn nothing_to_draw_is_still_a_figure() {
        let empty = Figure { series: Vec::new(), ..figure() };
        assert!(empty.svg().ends_with("</svg>\n") && !empty.svg().contains("NaN"));
        assert!(png(&empty.svg()).is_ok());
    }
}
