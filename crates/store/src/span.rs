//! Stretches of a file that are read together.

use std::io;

/// A stretch of the file, from and to page boundaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) bytes: usize,
}

/// Why span number `span` could not be read. [`io::ErrorKind::TimedOut`]: no read was completed within the limit.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) span: usize,
    pub(crate) source: io::Error,
}
