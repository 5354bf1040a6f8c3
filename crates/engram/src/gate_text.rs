//! The gates of a memory over a text, ready to be shown.

use serde::Serialize;

/// A text's tokens and, for each memory layer, how far the gate opened at each of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GateText {
    /// Texts of the tokens, which follow each other without a gap.
    pub(crate) tokens: Vec<String>,
    /// Longest n-gram that is looked up.
    pub(crate) max_order: usize,
    /// One for each memory layer.
    pub(crate) layers: Vec<GateLayer>,
}

/// Gates of one memory layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GateLayer {
    /// The block, counted from 0.
    pub(crate) layer: usize,
    /// `[time][stream]`, each in 0..1.
    pub(crate) gates: Vec<Vec<f32>>,
}

impl GateLayer {
    /// The mean over the streams at every token.
    pub(crate) fn means(&self) -> Vec<f32> {
        self.gates.iter().map(|streams| streams.iter().sum::<f32>() / streams.len() as f32).collect()
    }
}

/// `text` on one line: what has no shape of its own gets one.
pub(crate) fn visible(text: &str) -> String {
    let shape = |c: char| match c {
        '\n' => '↵',
        '\t' => '⇥',
        c if c.is_control() => '�',
        c => c,
    };
    text.chars().map(shape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_shape_gets_one() {
        assert_eq!(visible("a\n\tb\u{1b}"), "a↵⇥b�");
    }
}
