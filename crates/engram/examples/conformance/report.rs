//! One line per tensor.

use std::fmt::{Debug, Display};
use std::path::Path;

/// Counts what was compared, and prints it.
#[derive(Debug, Default)]
pub(crate) struct Report {
    lines: usize,
    misses: usize,
}

/// Largest difference that floats may have from the value `expected`.
fn tolerance(expected: f32) -> f64 {
    1e-5 + 1e-4 * f64::from(expected).abs()
}

impl Report {
    /// Tensors compared so far.
    pub(crate) fn lines(&self) -> usize {
        self.lines
    }

    /// Those of them that do not agree.
    pub(crate) fn misses(&self) -> usize {
        self.misses
    }

    /// The following lines are about this file.
    pub(crate) fn file(&self, path: &Path) {
        println!("{}", path.display());
    }

    /// Something that could not be compared, and why.
    pub(crate) fn note(&self, name: &str, why: impl Display) {
        println!("  ----  {name}: {why}");
    }

    /// Floats, within the tolerance; NaN never agrees.
    pub(crate) fn floats(&mut self, name: &str, found: &[f32], expected: &[f32]) {
        if found.len() != expected.len() {
            return self.line(name, false, format!("{} values, expected {}", found.len(), expected.len()));
        }
        let (mut largest, mut share) = (0.0_f64, 0.0_f64);
        for (&found, &expected) in found.iter().zip(expected) {
            let error = (f64::from(found) - f64::from(expected)).abs();
            // `max` passes NaN over, which either value may bring.
            let or_infinite = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
            largest = largest.max(or_infinite(error));
            share = share.max(or_infinite(error / tolerance(expected)));
        }
        let percent = share * 100.0;
        self.line(
            name,
            share <= 1.0,
            format!("largest error {largest:8.1e}, {percent:3.0} % of the tolerance"),
        );
    }

    /// Integers, exactly.
    pub(crate) fn integers<T: PartialEq + Debug>(&mut self, name: &str, found: &[T], expected: &[T]) {
        let differing = found.iter().zip(expected).position(|(found, expected)| found != expected);
        let what = match differing {
            _ if found.len() != expected.len() => {
                format!("{} values, expected {}", found.len(), expected.len())
            }
            Some(i) => format!("value {i} is {:?}, expected {:?}", found[i], expected[i]),
            None => format!("{} integers, exact", expected.len()),
        };
        self.line(name, found == expected, what);
    }

    fn line(&mut self, name: &str, agrees: bool, what: String) {
        self.lines += 1;
        self.misses += usize::from(!agrees);
        println!("  {}  {name:<52}{what}", if agrees { "ok  " } else { "MISS" });
    }
}
