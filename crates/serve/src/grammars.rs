//! What makes answers follow a form, made when it is first needed: it has all of a model's tokens in a tree.

use std::sync::OnceLock;

use engram_infer::{GrammarCompiler, GrammarError, TextCodec};

/// The compiler of grammars for a server's model.
#[derive(Debug, Default)]
pub(crate) struct Grammars(OnceLock<Result<GrammarCompiler, GrammarError>>);

impl Grammars {
    /// For the tokens of `codec`, of which `ends` end an answer, too. Both are the same in every call.
    pub(crate) fn compiler(&self, codec: &TextCodec, ends: &[u32]) -> Result<&GrammarCompiler, GrammarError> {
        self.0.get_or_init(|| GrammarCompiler::new(codec, ends)).as_ref().map_err(Clone::clone)
    }
}
