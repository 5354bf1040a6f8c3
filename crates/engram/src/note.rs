//! Lines on standard error.

use std::fmt::Display;
use std::io::Write;

/// Writes a line to standard error. That nobody reads it, or that its disk is full, is no reason to stop.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
