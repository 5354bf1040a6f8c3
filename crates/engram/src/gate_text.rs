//! The gates of a memory over a text.

use serde::Serialize;

/// A text's tokens and, for each memory layer, each token's gates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct GateText {
    /// Texts of the tokens; joined, they are the whole text.
    pub(crate) tokens: Vec<String>,
    /// Longest n-gram of the memory.
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

/// A scale from gates to heat. It leaves out the outermost twentieth on each side: otherwise one odd token would take
/// up the whole range.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// This gate and all below it are cold.
    pub(crate) low: f32,
    /// This gate and all above it are hot.
    pub(crate) high: f32,
}

impl Scale {
    /// The scale for these gates.
    pub(crate) fn of<'a>(gates: impl Iterator<Item = &'a f32>) -> Self {
        let mut sorted: Vec<f32> = gates.copied().collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let last = sorted.len().saturating_sub(1) as f64;
        let at = |share: f64| sorted.get((last * share).round() as usize).copied().unwrap_or(0.0);
        Self { low: at(0.05), high: at(0.95) }
    }

    /// `gate` in 0..=1.
    pub(crate) fn heat(&self, gate: f32) -> f32 {
        let span = self.high - self.low;
        if span > 0.0 { ((gate - self.low) / span).clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// `text` on one line: invisible characters become visible ones.
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
    fn the_outermost_gates_do_not_stretch_the_scale() {
        let mut gates: Vec<f32> = (0..101).map(|gate| 0.4 + gate as f32 / 1000.0).collect();
        (gates[0], gates[100]) = (0.0, 1.0);
        let scale = Scale::of(gates.iter());
        assert_eq!((scale.low, scale.high), (gates[5], gates[95]));
        assert_eq!((scale.heat(0.0), scale.heat(1.0)), (0.0, 1.0));
        assert!((scale.heat(gates[50]) - 0.5).abs() < 1e-5);
    }

    #[test]
    fn equal_gates_are_no_division_by_zero() {
        assert_eq!(Scale::of([0.5, 0.5].iter()).heat(0.5), 0.0);
        assert_eq!(Scale::of([].iter()).heat(0.5), 0.0);
    }

    #[test]
    fn what_has_no_shape_gets_one() {
        assert_eq!(visible("a\n\tb\u{1b}"), "a↵⇥b�");
    }
}
