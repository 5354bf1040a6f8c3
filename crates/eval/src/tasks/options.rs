//! How questions are asked.

/// How questions are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskOptions {
    /// Cost of a batch, in tokens.
    pub batch: usize,
    /// Cut the beginning of what is longer than the context, as the harness does, instead of refusing it.
    pub cut: bool,
}

impl Default for AskOptions {
    fn default() -> Self {
        Self { batch: 2048, cut: false }
    }
}
