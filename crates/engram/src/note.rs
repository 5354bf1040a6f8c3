//! Lines on standard error.

use std::fmt::Display;
use std::io::Write;

/// Writes a line to standard error. Ignores errors: a closed or full standard error must not stop the program.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
