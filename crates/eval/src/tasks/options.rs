//! Options of asking questions.

/// Options of asking questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskOptions {
    /// Cost of a batch, in tokens.
    pub batch: usize,
    /// Truncate the beginning of questions longer than the context, as the harness does. Otherwise they are refused.
    pub cut: bool,
}

impl Default for AskOptions {
    fn default() -> Self {
        Self { batch: 4096, cut: false }
    }
}
