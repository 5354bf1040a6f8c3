//! Which tokens may follow, where an answer has to have a form: JSON of a schema, or calls of functions.
//!
//! A [`GrammarCompiler`] knows the bytes of a model's tokens, and makes a [`Grammar`] of a description. Compiling takes
//! milliseconds, for large schemas longer, and belongs away from threads that serve others. Each answer follows the
//! grammar in a state of its own: it tells which tokens may come next, and takes the one that came. What is drawn is as
//! always, with all other tokens left out; drafts are drawn like other tokens, so that answers are the same with and
//! without them.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{GrammarWithLexer, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::text_codec::TextCodec;

/// A form that no grammar can be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

/// Bytes of a description at most: larger ones take seconds to compile.
const MOST_BYTES: usize = 256 << 10;
/// Blanks and lines between the parts of JSON. Without a bound a model may write nothing else.
const WHITE_SPACE: &str = r"( |\n) {0,24}";

/// Makes grammars for the tokens of a model.
pub struct GrammarCompiler {
    factory: ParserFactory,
    vocabulary: usize,
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// For the tokens of `codec`; those that end an answer may come where it is complete, and so may `more_ends`.
    ///
    /// # Errors
    /// When the tokens cannot be made a tree of.
    pub fn new(codec: &TextCodec, more_ends: &[u32]) -> Result<Self, GrammarError> {
        let words = codec.token_bytes();
        let mut ends: Vec<u32> = codec.end_tokens().iter().chain(more_ends).copied().collect();
        ends.retain(|&end| (end as usize) < words.len());
        let first = ends.first().copied().ok_or_else(|| GrammarError("no token ends an answer".into()))?;
        // Tokens without bytes are special: a text never has them. Their names are marked, so that a grammar can.
        let words: Vec<Vec<u8>> =
            (0..).zip(words.iter()).map(|(token, bytes)| marked(codec, token, bytes)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices =
            [r#"[^"\\\x00-\x1F\x7F]{1,10}"#, r#"[^"\\\x00-\x1F\x7F]{1,30}"#, r#"[^"\\\x00-\x1F\x7F]+"#];
        let slices = slices.map(str::to_owned);
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError(format!("the model's tokens have no grammars: {error:#}")))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Self { factory, vocabulary: words.len() })
    }

    /// JSON that follows `schema`.
    ///
    /// # Errors
    /// When the schema is not one, is too large, or has keywords that are not supported, which are named.
    pub fn json(&self, schema: &Value) -> Result<Grammar, GrammarError> {
        self.compile(GrammarWithLexer::from_json_schema(laid_out(schema, false)?))
    }

    /// A text in Lark's notation, with `%json {…}` for [schemas](json_rule).
    ///
    /// # Errors
    /// As [`json`](Self::json).
    pub fn lark(&self, grammar: String) -> Result<Grammar, GrammarError> {
        self.compile(GrammarWithLexer::from_lark(grammar))
    }

    fn compile(&self, grammar: GrammarWithLexer) -> Result<Grammar, GrammarError> {
        let bytes = grammar.lark_grammar.as_ref().map_or(0, String::len)
            + grammar.json_schema.as_ref().map_or(0, |schema| schema.to_string().len());
        if bytes > MOST_BYTES {
            return Err(GrammarError(format!("it has {bytes} bytes, but may have {MOST_BYTES}")));
        }
        let parser = self.factory.create_parser(TopLevelGrammar::from_grammar(grammar));
        let mut matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(GrammarError(first_lines(&error))),
            // What is asked for first is known once for all answers.
            None => match matcher.compute_mask() {
                Ok(_) => Ok(Grammar(Arc::new(Mutex::new(matcher)))),
                Err(error) => Err(GrammarError(first_lines(&format!("{error:#}")))),
            },
        }
    }
}

/// The bytes of a token, or its marked name.
fn marked(codec: &TextCodec, token: u32, bytes: &[u8]) -> Vec<u8> {
    match bytes {
        [] => match codec.shown(token) {
            name if name.is_empty() => Vec::new(),
            name => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
        },
        // The mark itself is a byte of no text.
        [TokTrie::SPECIAL_TOKEN_MARKER, ..] => Vec::new(),
        bytes => bytes.to_vec(),
    }
}

/// The rule of JSON that follows `schema`, for [`GrammarCompiler::lark`]. Keywords that are not supported are left out
/// if `lenient`, and make the grammar fail otherwise.
///
/// # Errors
/// When the schema is not an object.
pub fn json_rule(schema: &Value, lenient: bool) -> Result<String, GrammarError> {
    Ok(format!("%json {}", laid_out(schema, lenient)?))
}

/// `schema` with bounds on white space.
fn laid_out(schema: &Value, lenient: bool) -> Result<Value, GrammarError> {
    let mut schema = match schema {
        // Anything, and nothing.
        Value::Bool(true) => json!({}),
        Value::Bool(false) => return Err(GrammarError("the schema `false` allows no answer".into())),
        Value::Object(_) => schema.clone(),
        other => return Err(GrammarError(format!("a schema is an object, not {other}"))),
    };
    schema["x-guidance"] = json!({"whitespace_pattern": WHITE_SPACE, "lenient": lenient});
    Ok(schema)
}

/// An error without what the parser adds for its authors.
fn first_lines(error: &str) -> String {
    // The parser's name for a place where no token may follow.
    if error.contains("NoExtensionBias") {
        return "it allows no answer".into();
    }
    let error = error
        .split("\n<state>")
        .next()
        .unwrap_or(error)
        .replace("Unimplemented keys", "unsupported keywords");
    let lines: Vec<&str> = error.lines().map(str::trim).filter(|line| !line.is_empty()).take(4).collect();
    lines.join("; ")
}

/// A form of answers. Equal only to copies of itself.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Grammar {
    /// Where an answer begins.
    pub(crate) fn begin(&self) -> GrammarState {
        let matcher = self.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        GrammarState { matcher, mask: None }
    }
}

/// How far an answer has come.
pub(crate) struct GrammarState {
    matcher: Matcher,
    /// Tokens that may come next, once they have been asked for.
    mask: Option<SimpleVob>,
}

impl GrammarState {
    /// Leaves only tokens that may come next, in `logits`; whether the answer may go on by others than `ends`.
    ///
    /// # Errors
    /// When the grammar is too complex here to tell.
    pub(crate) fn keep(&mut self, logits: &mut [f32], ends: &[u32]) -> Result<bool, GrammarError> {
        let mask = self.mask()?;
        for (index, logit) in logits.iter_mut().enumerate() {
            if index >= mask.len() || !mask.get(index) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let own = ends.iter().filter(|&&end| (end as usize) < mask.len() && mask.is_allowed(end)).count();
        Ok(mask.num_set() > own)
    }

    fn mask(&mut self) -> Result<&SimpleVob, GrammarError> {
        if self.mask.is_none() {
            let mask = self.matcher.compute_mask_or_eos();
            self.mask = Some(mask.map_err(|error| GrammarError(first_lines(&format!("{error:#}"))))?);
        }
        self.mask.as_ref().ok_or_else(|| GrammarError("no tokens are known".into()))
    }

    /// Takes the token that came; whether nothing can follow it.
    ///
    /// # Errors
    /// When the token may not come here.
    pub(crate) fn take(&mut self, token: u32) -> Result<bool, GrammarError> {
        self.mask = None;
        self.matcher
            .consume_token(token)
            .map_err(|error| GrammarError(first_lines(&format!("{error:#}"))))?;
        Ok(self.matcher.stop_reason() != StopReason::NotStopped)
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::models::wordlevel::WordLevel;

    use super::*;

    /// All bytes, some words, `<|end|>` (ends an answer), `<|call|>` (special).
    fn codec() -> TextCodec {
        let mut bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        bytes.extend(["{\"", "\": ", "name", "true", "\"}"].map(|word| word.as_bytes().to_vec()));
        let names = ["<|end|>", "<|call|>"];
        let mut words: Vec<String> = (0..bytes.len()).map(|token| format!("t{token}")).collect();
        words.extend(names.map(str::to_owned));
        let words = words.into_iter().zip(0..).collect();
        let model = WordLevel::builder().vocab(words).unk_token("t0".into()).build().unwrap();
        let mut tokenizer =
            engram_data::TextTokenizer::new(tokenizers::models::ModelWrapper::from(model).into());
        tokenizer.add_special_tokens(names.map(|name| tokenizers::AddedToken::from(name, true))).unwrap();
        let end = bytes.len() as u32;
        bytes.extend([Vec::new(), Vec::new()]);
        TextCodec::new(&tokenizer, bytes.into_iter().collect(), end)
    }

    fn compiler() -> GrammarCompiler {
        GrammarCompiler::new(&codec(), &[]).unwrap()
    }

    /// Tokens that may follow `text`, and whether nothing can.
    fn after(grammar: &Grammar, text: &str) -> Option<(Vec<u32>, bool)> {
        let (mut state, mut done) = (grammar.begin(), false);
        for byte in text.bytes() {
            let mut logits = vec![0.0; 263];
            state.keep(&mut logits, &[]).unwrap();
            if logits[byte as usize] != 0.0 {
                return None;
            }
            done = state.take(byte.into()).unwrap();
        }
        let mut logits = vec![0.0; 263];
        state.keep(&mut logits, &[]).unwrap();
        let allowed = (0..263).filter(|&token| logits[token as usize] == 0.0).collect();
        Some((allowed, done))
    }

    #[test]
    fn an_answer_follows_its_schema() {
        let schema = json!({
            "type": "object", "properties": {"name": {"type": "boolean"}, "n": {"type": "integer"}},
            "required": ["name"], "additionalProperties": false,
        });
        let grammar = compiler().json(&schema).unwrap();
        let (first, _) = after(&grammar, "").unwrap();
        assert!(first.contains(&u32::from(b'{')) && first.contains(&256), "{first:?}");
        assert!(!first.contains(&u32::from(b'[')) && !first.contains(&261), "not yet complete");
        assert!(after(&grammar, r#"{"name": true, "n": 12}"#).unwrap().1, "nothing can follow");
        assert!(!after(&grammar, r#"{"name": true"#).unwrap().0.contains(&261));
        assert!(after(&grammar, r#"{"other""#).is_none() && after(&grammar, r#"{"n": "#).is_none());
        assert!(
            after(&grammar, "{\n").is_some() && after(&grammar, &format!("{{{}", " ".repeat(26))).is_none()
        );
        let number = compiler().json(&json!({"type": "integer"})).unwrap();
        let (next, done) = after(&number, "12").unwrap();
        assert!(!done && next.contains(&261) && next.contains(&u32::from(b'3')), "it may end or go on");
        assert!(!next.contains(&262), "a special token is no text");
        assert_eq!((grammar == grammar.clone(), grammar == number), (true, false));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (schema, name) in [
            (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
            (json!({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}), "not"),
            (json!({"if": {"type": "string"}, "then": {}}), "if"),
            (json!({"$ref": "https://example.org/x.json"}), "example.org"),
            (json!({"$ref": "#/$defs/nowhere"}), "nowhere"),
            (json!({"type": "wrong"}), "wrong"),
            (json!({"type": "string", "pattern": "("}), "("),
            (json!(false), "false"),
            (json!({"$ref": "#"}), "allows no answer"),
            (json!([3]), "object"),
            (json!({"enum": vec!["x".repeat(1000); 300]}), "bytes"),
        ] {
            let error = compiler().json(&schema).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(name), "{schema}: {error}");
            assert!(error.len() < 600 && !error.contains("Error {"), "{error}");
        }
        let lenient = json_rule(&json!({"type": "array", "uniqueItems": true}), true).unwrap();
        assert!(compiler().lark(format!("start: {lenient}")).is_ok());
    }

    #[test]
    fn hard_schemas_end_soon() {
        let mut deep = json!({"type": "string"});
        for _ in 0..100 {
            deep = json!({"type": "object", "properties": {"a": deep, "b": {"type": "number"}}});
        }
        let many: serde_json::Map<String, Value> = (0..2000)
            .map(|i| (format!("property{i}"), json!({"type": "string", "maxLength": 100})))
            .collect();
        for schema in [
            json!({"type": "string", "pattern": "^((a{1,300}){1,300}){1,300}$"}),
            json!({"type": "string", "pattern": "(.*a){40}b"}),
            json!({"type": "string", "minLength": 1_000_000}),
            json!({"type": "array", "minItems": 10_000_000, "items": {"type": "string"}}),
            json!({"type": "object", "properties": many}),
            json!({"anyOf": (0..300).map(|i| json!({"type": "object", "properties": {"a": {"const": i}}})).collect::<Vec<_>>()}),
            json!({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}}, "$ref": "#/$defs/a"}),
            deep,
        ] {
            let began = std::time::Instant::now();
            let compiled = compiler().json(&schema);
            let seconds = began.elapsed().as_secs_f64();
            assert!(seconds < 10.0, "{seconds} s for {}", &schema.to_string()[..60]);
            if let Ok(grammar) = compiled {
                let began = std::time::Instant::now();
                let _ = grammar.begin().keep(&mut vec![0.0; 263], &[]);
                assert!(began.elapsed().as_secs_f64() < 2.0, "{}", &schema.to_string()[..60]);
            }
        }
    }

    #[test]
    fn a_grammar_may_name_special_tokens_and_free_text() {
        let call = json_rule(&json!({"type": "object"}), false).unwrap();
        let grammar = format!(
            "start: call* TEXT?\ncall: opened object \"</c>\"\nopened[lazy]: TEXT \"<c>\"\nobject: {call}\nTEXT: /(.|\\n)+/"
        );
        let grammar = compiler().lark(grammar).unwrap();
        assert!(after(&grammar, "any words").unwrap().0.contains(&261));
        assert!(after(&grammar, "words <c>{}</c>").is_some() && after(&grammar, "words <c>no").is_none());
        let special = compiler().lark("start: <|call|> \"x\"".into()).unwrap();
        assert_eq!(after(&special, "").unwrap().0, [262]);
    }
}
