//! Heat maps of gates for a terminal or plain text.

use std::fmt::Write;

use unicode_width::UnicodeWidthStr;

use crate::gate_text::{GateLayer, GateText, Scale, visible};
use crate::terminal;

/// How a map is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Canvas {
    /// Columns.
    pub(crate) width: usize,
    /// Whether the terminal shows 24-bit colours. Without them, bars below the text show the gates.
    pub(crate) colour: bool,
}

impl Canvas {
    /// The canvas of standard output.
    pub(crate) fn of_stdout() -> Self {
        let colour = terminal::takes_colour(&std::io::stdout());
        let width = terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| usize::from(width.0));
        Self { width: width.unwrap_or(100).max(20), colour }
    }
}

/// The maps of one model's texts, with one scale per memory layer. Each token shows its mean gate over the streams, or
/// the gate of one stream.
pub(crate) fn draw(texts: &[GateText], stream: Option<usize>, canvas: Canvas) -> String {
    let mut out = String::new();
    for index in 0..texts.first().map_or(0, |text| text.layers.len()) {
        let gates: Vec<Vec<f32>> = texts.iter().map(|text| shown(&text.layers[index], stream)).collect();
        let scale = Scale::of(gates.iter().flatten());
        let _ = writeln!(out, "layer {}   {}", texts[0].layers[index].layer, legend(&scale, canvas.colour));
        for (text, gates) in texts.iter().zip(&gates) {
            for line in lines(&text.tokens, canvas.width) {
                draw_line(&mut out, &text.tokens, gates, line, &scale, canvas.colour);
            }
            out.push('\n');
        }
    }
    out
}

fn shown(layer: &GateLayer, stream: Option<usize>) -> Vec<f32> {
    match stream {
        Some(stream) => layer.gates.iter().map(|streams| streams[stream]).collect(),
        None => layer.means(),
    }
}

fn legend(scale: &Scale, colour: bool) -> String {
    let steps = (0..8).map(|step| step as f32 / 7.0);
    let bar: String = match colour {
        true => steps.map(|heat| coloured("  ", heat)).collect(),
        false => steps.map(block).collect(),
    };
    format!("gate ≤ {:.2} {bar} ≥ {:.2}", scale.low, scale.high)
}

/// Ranges of tokens that fit on a line, broken between words where possible. A line break in the text also ends a line.
fn lines(tokens: &[String], width: usize) -> Vec<std::ops::Range<usize>> {
    let (mut lines, mut start, mut used) = (Vec::new(), 0, 0);
    // Where the last word on the line begins, and the columns before it.
    let mut word = None;
    for (index, token) in tokens.iter().enumerate() {
        let needed = visible(token).width();
        if index > start && token.starts_with(' ') {
            word = Some((index, used));
        }
        if index > start && used + needed > width {
            let (end, before) = word.take().unwrap_or((index, used));
            lines.push(start..end);
            (start, used) = (end, used - before);
        }
        used += needed;
        if token.ends_with('\n') {
            lines.push(start..index + 1);
            (start, used, word) = (index + 1, 0, None);
        }
    }
    if start < tokens.len() {
        lines.push(start..tokens.len());
    }
    lines
}

fn draw_line(
    out: &mut String,
    tokens: &[String],
    gates: &[f32],
    line: std::ops::Range<usize>,
    scale: &Scale,
    colour: bool,
) {
    let (mut text, mut bars) = (String::new(), String::new());
    for index in line.clone() {
        let (token, heat) = (visible(&tokens[index]), scale.heat(gates[index]));
        let token = if index == line.start { token.trim_start_matches(' ') } else { &token };
        if colour {
            text.push_str(&coloured(token, heat));
        } else {
            text.push_str(token);
            bars.extend(std::iter::repeat_n(block(heat), token.width()));
        }
    }
    let _ = writeln!(out, "{}", text.trim_end_matches(' '));
    if !colour {
        let _ = writeln!(out, "{bars}");
    }
}

fn block(heat: f32) -> char {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    BLOCKS[(heat * 7.0).round() as usize]
}

/// `text` on a background from dark blue over red to yellow. Sets both colours, so that any terminal can show it.
fn coloured(text: &str, heat: f32) -> String {
    const STOPS: [[f32; 3]; 4] =
        [[28.0, 30.0, 48.0], [104.0, 38.0, 98.0], [214.0, 73.0, 62.0], [253.0, 208.0, 92.0]];
    let position = heat * (STOPS.len() - 1) as f32;
    let index = (position as usize).min(STOPS.len() - 2);
    let part = position - index as f32;
    let [r, g, b] =
        std::array::from_fn(|c| (STOPS[index][c] * (1.0 - part) + STOPS[index + 1][c] * part).round() as u8);
    let ink = if heat > 0.7 { "20;20;20" } else { "240;240;240" };
    format!("\x1b[48;2;{r};{g};{b}m\x1b[38;2;{ink}m{text}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> GateText {
        let tokens = ["By", " the", " way", ",\n", "he"].map(String::from).to_vec();
        let gates = [0.1, 0.45, 0.8, 0.1, 0.2].map(|gate| vec![gate, gate]).to_vec();
        GateText { tokens, max_order: 3, layers: vec![GateLayer { layer: 1, gates }] }
    }

    #[test]
    fn plain_text_has_bars_below_it() {
        let map = draw(&[text()], None, Canvas { width: 40, colour: false });
        let expected = "layer 1   gate ≤ 0.10 ▁▂▃▄▅▆▇█ ≥ 0.80\n\
                        By the way,↵\n\
                        ▁▁▅▅▅▅████▁▁\n\
                        he\n\
                        ▂▂\n\n";
        assert_eq!(map, expected);
    }

    #[test]
    fn lines_break_between_words() {
        let tokens = ["Bel", "g", "ium", " and", " Lux", "em", "bourg", ".\n", "Unbreakable", "word"];
        let lines = |width| {
            let tokens = tokens.map(String::from);
            lines(&tokens, width).into_iter().map(|line| tokens[line].concat()).collect::<Vec<_>>()
        };
        assert_eq!(lines(20), ["Belgium and", " Luxembourg.\n", "Unbreakableword"]);
        assert_eq!(lines(24), ["Belgium and Luxembourg.\n", "Unbreakableword"]);
        assert_eq!(lines(8), ["Belgium", " and", " Luxem", "bourg.\n", "Unbreakable", "word"]);
    }

    #[test]
    fn colour_is_set_and_reset_per_token() {
        let map = draw(&[text()], Some(1), Canvas { width: 40, colour: true });
        assert!(map.contains("m way\x1b[0m"), "{map:?}");
        assert!(!map.contains('█'));
    }
}
