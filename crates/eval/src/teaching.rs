//! What teaching facts did to a model: what it answers now, and what changed elsewhere.

use engram_data::{Begin, Tokenizer};
use engram_infer::{Offline, OfflineError};
use serde::{Deserialize, Serialize};

/// A question: a text to continue, and what should follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Tokens before the text, such as a turn of a chat. Default: the model's begin.
    pub before: Vec<u32>,
    /// The text.
    pub prompt: String,
    /// What should follow.
    pub answer: String,
}

/// How a question was answered, by greedy decoding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reply {
    /// The text.
    pub prompt: String,
    /// What should follow.
    pub answer: String,
    /// What followed.
    pub said: String,
    /// Whether that is the answer, and no word runs on from it.
    pub exact: bool,
    /// Whether it begins as the answer does: its tokens are the answer's up to the first that is not blank.
    pub begins: bool,
    /// Whether the answer stands anywhere in it, and no word runs on from it.
    pub names: bool,
}

/// How many of some questions were answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Those that were.
    pub yes: usize,
    /// All.
    pub of: usize,
}

impl Share {
    /// Those of `all` that are so.
    pub fn of<T>(all: &[T], is: impl Fn(&T) -> bool) -> Self {
        Self { yes: all.iter().filter(|one| is(one)).count(), of: all.len() }
    }

    /// As a fraction; `None` if there are none to count.
    pub fn fraction(self) -> Option<f64> {
        (self.of > 0).then(|| self.yes as f64 / self.of as f64)
    }
}

/// What changed on text that has nothing to do with the facts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Positions compared.
    pub positions: usize,
    /// Mean of KL(base ‖ taught), in nats.
    pub divergence: f64,
    /// Positions where a logit has other bits.
    pub changed: usize,
}

/// Why a model is not asked.
#[derive(Debug, thiserror::Error)]
pub enum TeachingError {
    /// The model cannot compute the texts.
    #[error(transparent)]
    Model(#[from] OfflineError),
    /// The tokenizer refuses a text.
    #[error(transparent)]
    Tokenizer(#[from] engram_data::Error),
}

/// Tokens that an answer may take beyond those that it should have.
const MORE: usize = 4;

/// Those of `questions` that fit a context of `context` tokens together with any of their answers.
///
/// # Errors
/// When the tokenizer refuses a text.
pub fn fitting(
    questions: Vec<Question>,
    texts: (&Tokenizer, Begin),
    context: usize,
) -> Result<Vec<Question>, TeachingError> {
    let mut lengths = Vec::with_capacity(questions.len());
    let mut longest = 0;
    for question in &questions {
        lengths.push(prompt(texts, question)?.len());
        longest = longest.max(texts.0.encode(&question.answer)?.len() + MORE);
    }
    let all = questions.into_iter().zip(lengths);
    Ok(all.filter(|(_, length)| length + longest <= context).map(|(question, _)| question).collect())
}

/// The tokens of a prompt, with what stands before every text.
fn prompt((tokenizer, begin): (&Tokenizer, Begin), question: &Question) -> Result<Vec<u32>, TeachingError> {
    let mut tokens = match begin {
        _ if !question.before.is_empty() => question.before.clone(),
        Begin::Always(token) => vec![token],
        Begin::IfEmpty(_) => Vec::new(),
    };
    tokens.extend(tokenizer.encode(&question.prompt)?);
    Ok(tokens)
}

/// What `model` answers to `questions`.
///
/// # Errors
/// When a question does not fit the context, rows are unavailable, or `interrupted`.
pub fn ask(
    model: &mut Offline,
    texts: (&Tokenizer, Begin),
    questions: &[Question],
    interrupted: &dyn Fn() -> bool,
) -> Result<Vec<Reply>, TeachingError> {
    let tokenizer = texts.0;
    let mut prompts = Vec::with_capacity(questions.len());
    let mut answers = Vec::with_capacity(questions.len());
    for question in questions {
        prompts.push(prompt(texts, question)?);
        answers.push(tokenizer.encode(&question.answer)?);
    }
    let limit = answers.iter().map(|answer| answer.len() + MORE).max().unwrap_or(0);
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let mut finished = |prompt: usize, said: &[u32]| said.len() >= answers[prompt].len() + MORE;
    let said = model.proceed(&slices, (limit, tokenizer.end_of_text()), &mut finished, interrupted)?;
    let mut replies = Vec::with_capacity(questions.len());
    for ((question, answer), said) in questions.iter().zip(&answers).zip(said) {
        let text = tokenizer.decode(&said)?;
        replies.push(Reply {
            prompt: question.prompt.clone(),
            answer: question.answer.clone(),
            exact: is_exact(&text, &question.answer),
            begins: begins(tokenizer, &said, answer)?,
            names: names(&text, &question.answer),
            said: text,
        });
    }
    Ok(replies)
}

/// Whether the tokens `said` are those of `answer` up to the answer's first that is not blank. Digits that stand alone
/// have a token of blank before them, which says nothing.
fn begins(tokenizer: &Tokenizer, said: &[u32], answer: &[u32]) -> Result<bool, TeachingError> {
    for (place, token) in answer.iter().enumerate() {
        if said.get(place) != Some(token) {
            return Ok(false);
        }
        if !tokenizer.decode(&[*token])?.trim().is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether `said` is `answer` and no word runs on from it. A blank before either is no difference.
fn is_exact(said: &str, answer: &str) -> bool {
    let rest = said.trim_start().strip_prefix(answer.trim());
    rest.is_some_and(|rest| !rest.starts_with(|next| runs_on(next) || next == '\''))
}

/// Whether `answer` stands anywhere in `said` as whole words.
fn names(said: &str, answer: &str) -> bool {
    let answer = answer.trim();
    said.match_indices(answer).any(|(at, _)| {
        let (before, after) = (&said[..at], &said[at + answer.len()..]);
        !before.ends_with(runs_on) && !after.starts_with(runs_on)
    })
}

/// Whether this continues a word.
fn runs_on(next: char) -> bool {
    next.is_alphanumeric() || next == '-'
}

/// What `taught` says otherwise than `base` on `texts`, each of which fits the context.
///
/// # Errors
/// When a text does not fit, or rows are unavailable.
pub fn change(
    base: &mut Offline,
    taught: &mut Offline,
    texts: &[Vec<u32>],
    interrupted: &dyn Fn() -> bool,
) -> Result<Change, OfflineError> {
    let mut change = Change::default();
    let vocabulary = base.decoder().config().vocabulary;
    for text in texts {
        if interrupted() {
            return Err(OfflineError::Interrupted);
        }
        let mut of_base = Vec::new();
        base.logits(text, &mut |_, logits| of_base.extend_from_slice(logits))?;
        taught.logits(text, &mut |first, logits| {
            let own = of_base[first * vocabulary..].chunks_exact(vocabulary);
            for (base, taught) in own.zip(logits.chunks_exact(vocabulary)) {
                change.positions += 1;
                if base.iter().zip(taught).any(|(a, b)| a.to_bits() != b.to_bits()) {
                    change.changed += 1;
                    change.divergence += divergence(base, taught);
                }
            }
        })?;
    }
    change.divergence /= change.positions.max(1) as f64;
    Ok(change)
}

/// KL of the distributions that have these logits, in nats.
fn divergence(base: &[f32], taught: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(most) + logits.iter().map(|&logit| f64::from(logit - most).exp()).sum::<f64>().ln()
    };
    let (of_base, of_taught) = (log_sum(base), log_sum(taught));
    let term = |(&base, &taught): (&f32, &f32)| {
        let (base, taught) = (f64::from(base) - of_base, f64::from(taught) - of_taught);
        base.exp() * (base - taught)
    };
    base.iter().zip(taught).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_runs_on_is_not_exact() {
        for said in [" Ulm", "Ulm.", " Ulm, Germany", " Ulm\nQ: "] {
            assert!(is_exact(said, " Ulm"), "{said:?}");
        }
        for said in ["", " Ul", " Ulmer", " Ulm-Nord", " in Ulm", " Ulm's"] {
            assert!(!is_exact(said, " Ulm"), "{said:?}");
        }
    }

    #[test]
    fn an_answer_is_named_anywhere_as_whole_words() {
        for said in [" Ulm", " the town of Ulm.", "Ulm's seat", " Ulmer Ulm"] {
            assert!(names(said, " Ulm"), "{said:?}");
        }
        for said in ["", " Ulmer", " Neu-Ulm", " Ul m"] {
            assert!(!names(said, " Ulm"), "{said:?}");
        }
    }

    #[test]
    fn divergence_is_zero_of_equals_and_positive_of_others() {
        let logits = [0.5, -1.0, 2.0];
        assert_eq!(divergence(&logits, &logits), 0.0);
        // Two outcomes: ½·ln(½/¼) + ½·ln(½/¾).
        let found = divergence(&[0.0, 0.0], &[0.0, 3.0_f32.ln()]);
        assert!((found - 0.5 * (2.0_f64.ln() + (2.0_f64 / 3.0).ln())).abs() < 1e-6, "{found}");
    }
}
