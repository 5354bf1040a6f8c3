//! Puts questions to a model: texts to tokens, tokens to batches, likelihoods to outcomes.

use std::collections::HashSet;
use std::ops::ControlFlow;

use engram_data::Begin;

use super::error::{Error, Result};
use super::options::AskOptions;
use super::outcome::{Length, Outcome, Said};
use super::question::{Ask, Place, Question, Statement};
use super::scorer::{Cost, Likelihood, Request, Scorer, TargetScore};
use super::task_file::{Form, LongPerplexity, Task};

/// Progress callback: tokens done and in total.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Number of prompts continued at a time.
const TEXTS: usize = 32;

/// Asks the questions numbered `pending` of a task, and passes each outcome to `each` as soon as it is known, in no
/// particular order. Returns how many of all questions, pending or not, are truncated at their beginning.
///
/// # Errors
/// A question longer than the model's context, with its line; errors of the model; errors of `each`; or
/// [`Error::Interrupted`] when `progress` breaks. Outcomes passed on before remain valid.
pub fn ask(
    scorer: &dyn Scorer,
    (task, questions): (&Task, &[Question]),
    pending: &[usize],
    options: AskOptions,
    each: &mut dyn FnMut(Outcome) -> Result<()>,
    progress: Progress<'_>,
) -> Result<usize> {
    let asking = Asking { scorer, questions, options };
    let now = asking.put(task.form(), pending, each, progress)?;
    let limit = match task.form() {
        Form::Generation { text, .. } => text.tokens,
        _ => 0,
    };
    let pending: HashSet<usize> = pending.iter().copied().collect();
    let mut before = 0;
    for (_, question) in questions.iter().enumerate().filter(|(number, _)| !pending.contains(number)) {
        before += usize::from(asking.is_cut(question, limit)?);
    }
    Ok(now + before)
}

/// How documents are read.
#[derive(Clone, Copy)]
enum Reading<'a> {
    /// In windows that read at least `overlap` tokens again.
    Once { overlap: usize },
    /// With the whole context, and again with little. `keys` gives the tokens that count, by question, if known.
    LongAndShort { of: &'a LongPerplexity, keys: Option<&'a [Vec<usize>]> },
}

struct Asking<'a> {
    scorer: &'a dyn Scorer,
    questions: &'a [Question],
    options: AskOptions,
}

/// A request, with its question and its place in it.
struct Owned {
    question: usize,
    part: usize,
    request: Request,
}

impl Asking<'_> {
    /// Asks the pending questions. Returns how many of them were truncated.
    fn put(
        &self,
        form: &Form,
        pending: &[usize],
        each: &mut dyn FnMut(Outcome) -> Result<()>,
        progress: Progress<'_>,
    ) -> Result<usize> {
        match form {
            Form::Generation { text, rule } => {
                let score = |text: &str, answers: &[String]| rule.score(text, answers);
                self.generate(pending, (&text.stop, text.tokens), &score, each, progress)
            }
            Form::Perplexity { text } => self.likelihoods(
                pending,
                Reading::Once { overlap: text.overlap.unwrap_or(1) },
                each,
                progress,
            ),
            Form::LongPerplexity { text, keys } => {
                let keys = keys.as_deref();
                self.likelihoods(pending, Reading::LongAndShort { of: text, keys }, each, progress)
            }
            Form::MultipleChoice { .. } | Form::Cloze { .. } => {
                self.likelihoods(pending, Reading::Once { overlap: 1 }, each, progress)
            }
        }
    }

    /// Whether the beginning of a question is truncated; `limit` is the maximum number of generated tokens.
    fn is_cut(&self, question: &Question, limit: usize) -> Result<bool> {
        match &question.ask {
            // Documents are read in windows.
            Ask::Document { .. } => Ok(false),
            Ask::Generation { prompt, .. } => Ok(self.prompt(prompt, limit, &question.place)?.1),
            Ask::Choice { .. } | Ask::Cloze(_) => {
                Ok(self.requests(question, Reading::Once { overlap: 1 })?.1)
            }
        }
    }

    fn likelihoods(
        &self,
        pending: &[usize],
        reading: Reading<'_>,
        each: &mut dyn FnMut(Outcome) -> Result<()>,
        progress: Progress<'_>,
    ) -> Result<usize> {
        let (mut requests, mut cut) = (Vec::new(), 0);
        let mut answers: Vec<Answers> = Vec::with_capacity(pending.len());
        for (at, &question) in pending.iter().enumerate() {
            let (parts, cuts) = self.requests(&self.questions[question], reading)?;
            answers.push(Answers::new(&parts));
            cut += usize::from(cuts);
            requests.extend((parts.into_iter().enumerate()).map(|(part, request)| Owned {
                question: at,
                part,
                request,
            }));
        }
        let batches = batches(&mut requests, self.scorer.cost(), self.options.batch);
        let total = batches.iter().map(|batch| batch.cost as u64).sum();
        let mut done = 0;
        for Batch { range, cost } in batches {
            if progress(done, total).is_break() {
                return Err(Error::Interrupted);
            }
            let batch: Vec<&Request> = requests[range.clone()].iter().map(|owned| &owned.request).collect();
            let scores = self.scorer.score(&batch)?;
            for (owned, scores) in requests[range].iter().zip(scores) {
                let answer = &mut answers[owned.question];
                answer.add(owned.part, scores);
                if answer.is_complete() {
                    let question = pending[owned.question];
                    each(self.outcome(question, answer, reading)?)?;
                }
            }
            done += cost as u64;
        }
        Ok(cut)
    }

    /// The requests of a question, and whether any was truncated.
    fn requests(&self, question: &Question, reading: Reading<'_>) -> Result<(Vec<Request>, bool)> {
        let statements = match &question.ask {
            Ask::Choice { statements, .. } => statements.as_slice(),
            Ask::Cloze(statement) => std::slice::from_ref(statement),
            Ask::Document { text } => return Ok((self.read(text, reading, &question.place)?, false)),
            Ask::Generation { .. } => {
                return Err(Error::Mismatch("texts to generate cannot be scored".into()));
            }
        };
        let (mut requests, mut cut) = (Vec::new(), false);
        for statement in statements {
            let (context, continuation) = self.tokens(statement, &question.place)?;
            let length = context.len() + continuation.len() - 1;
            let beyond = length.saturating_sub(self.scorer.context());
            if beyond > 0 && (!self.options.cut || beyond >= context.len()) {
                return Err(too_long(&question.place, length, self.scorer.context()));
            }
            cut |= beyond > 0;
            requests.extend(Request::new(&context[beyond..], &continuation));
        }
        Ok((requests, cut))
    }

    /// Tokens of a statement's context and of its continuation.
    ///
    /// Blanks at the end of the prompt belong to the continuation, because tokens begin with blanks. Both are encoded
    /// together; the continuation starts after as many tokens as the prompt alone has.
    fn tokens(&self, statement: &Statement, place: &Place) -> Result<(Vec<u32>, Vec<u32>)> {
        let prompt = statement.prompt.trim_end();
        let continuation = [&statement.prompt[prompt.len()..], &statement.continuation].concat();
        let mut context = self.scorer.encode(prompt)?;
        let whole = self.scorer.encode(&[prompt, &continuation].concat())?;
        let after = whole.get(context.len()..).unwrap_or_default().to_vec();
        if after.is_empty() {
            let problem =
                format!("the continuation {continuation:?} has no token of its own after its prompt");
            return Err(Error::line(&place.path, place.line, problem));
        }
        self.begin(&mut context);
        Ok((context, after))
    }

    fn begin(&self, tokens: &mut Vec<u32>) {
        match self.scorer.begin() {
            Begin::Always(token) => tokens.insert(0, token),
            Begin::IfEmpty(token) if tokens.is_empty() => tokens.push(token),
            Begin::IfEmpty(_) => {}
        }
    }

    /// The windows of a document; windows with little context after the others.
    fn read(&self, text: &str, reading: Reading<'_>, place: &Place) -> Result<Vec<Request>> {
        let context = self.scorer.context();
        match reading {
            Reading::Once { overlap } => self.windows(text, (context, overlap), place),
            Reading::LongAndShort { of: &LongPerplexity { short, step, .. }, .. } => {
                let little = (short + step).saturating_sub(1);
                if short == 0 || step == 0 || little >= context {
                    let problem = format!(
                        "a short context of {short} tokens, read {step} at a time, is not shorter than the model's, {context}"
                    );
                    return Err(Error::line(&place.path, place.line, problem));
                }
                let mut requests = self.windows(text, (context, short), place)?;
                requests.extend(self.windows(text, (little, short), place)?);
                Ok(requests)
            }
        }
    }

    fn windows(&self, text: &str, (context, overlap): (usize, usize), place: &Place) -> Result<Vec<Request>> {
        let tokens = self.scorer.encode(text)?;
        let (Begin::Always(begin) | Begin::IfEmpty(begin)) = self.scorer.begin();
        if tokens.is_empty() || !(1..=context).contains(&overlap) {
            let problem = format!("the document has no tokens, or the overlap is not in 1..={context}");
            return Err(Error::line(&place.path, place.line, problem));
        }
        let tokens = [&[begin], &tokens[..]].concat();
        let spans = windows(tokens.len() - 1, context, overlap).into_iter();
        Ok(spans
            .filter_map(|Window { start, first, end }| {
                Request::new(&tokens[start..first], &tokens[first..end])
            })
            .collect())
    }

    fn outcome(&self, number: usize, answers: &Answers, reading: Reading<'_>) -> Result<Outcome> {
        let question = &self.questions[number];
        let parts: Vec<Likelihood> = answers.parts.iter().map(|part| Likelihood::of(part)).collect();
        let whole = Likelihood {
            log_probability: parts.iter().map(|part| part.log_probability).sum(),
            greedy: parts.iter().all(|part| part.greedy),
        };
        let said = match (&question.ask, reading) {
            (Ask::Choice { choices, answer, .. }, _) => {
                let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
                let of = |choice: usize| (choice..parts.len()).step_by(choices.len());
                let log_probability =
                    |choice| mean(of(choice).map(|part| parts[part].log_probability).collect());
                let tokens = |choice| mean(of(choice).map(|part| answers.parts[part].len() as f64).collect());
                let length = |(choice, text): (usize, &String)| Length {
                    tokens: tokens(choice).ceil() as usize,
                    characters: text.chars().count(),
                    bytes: text.len(),
                };
                let lengths = choices.iter().enumerate().map(length).collect();
                let log_probabilities = (0..choices.len()).map(log_probability).collect();
                Said::Choice { log_probabilities, lengths, answer: *answer }
            }
            (Ask::Document { text }, Reading::Once { .. }) => {
                let tokens = answers.parts.iter().map(Vec::len).sum();
                Said::Document { log_probability: whole.log_probability, tokens, bytes: text.len() }
            }
            (Ask::Document { .. }, Reading::LongAndShort { of, keys }) => {
                let keys = keys.map(|keys| keys.get(number).map_or(&[][..], Vec::as_slice));
                let said = long_document(&answers.parts, of, keys);
                said.map_err(|problem| Error::line(&question.place.path, question.place.line, problem))?
            }
            (Ask::Cloze(_) | Ask::Generation { .. }, _) => {
                let tokens = answers.parts.iter().map(Vec::len).sum();
                Said::Cloze { log_probability: whole.log_probability, tokens, greedy: whole.greedy }
            }
        };
        Ok(Outcome { question: number, line: question.place.line, said })
    }

    /// Tokens of a prompt, with room for `limit` generated tokens, and whether it was truncated.
    fn prompt(&self, prompt: &str, limit: usize, place: &Place) -> Result<(Vec<u32>, bool)> {
        // Unchanged: white space at the end of a prompt, such as indentation of code, belongs to it.
        let mut tokens = self.scorer.encode(prompt)?;
        self.begin(&mut tokens);
        let length = tokens.len() + limit;
        let beyond = length.saturating_sub(self.scorer.context());
        if beyond > 0 && (!self.options.cut || beyond >= tokens.len()) {
            return Err(too_long(place, length, self.scorer.context()));
        }
        Ok((tokens.split_off(beyond), beyond > 0))
    }

    fn generate(
        &self,
        pending: &[usize],
        (stop, limit): (&[String], usize),
        score: &dyn Fn(&str, &[String]) -> f64,
        each: &mut dyn FnMut(Outcome) -> Result<()>,
        progress: Progress<'_>,
    ) -> Result<usize> {
        let (mut prompts, mut cut) = (Vec::new(), 0);
        for &number in pending {
            let question = &self.questions[number];
            let Ask::Generation { prompt, answers } = &question.ask else {
                return Err(Error::Mismatch("the question has another form".into()));
            };
            let (tokens, is_cut) = self.prompt(prompt, limit, &question.place)?;
            cut += usize::from(is_cut);
            prompts.push((number, tokens, answers));
        }
        // The longest first, so that the remaining time is overestimated rather than underestimated.
        prompts.sort_by_key(|(_, tokens, _)| std::cmp::Reverse(tokens.len()));
        let cost = |prompts: &[(usize, Vec<u32>, &Vec<String>)]| {
            prompts.iter().map(|(_, tokens, _)| (tokens.len() + limit) as u64).sum::<u64>()
        };
        let (mut done, total) = (0, cost(&prompts));
        for batch in prompts.chunks(TEXTS) {
            if progress(done, total).is_break() {
                return Err(Error::Interrupted);
            }
            let tokens: Vec<&[u32]> = batch.iter().map(|(_, tokens, _)| tokens.as_slice()).collect();
            let mut finished = |_: usize, tokens: &[u32]| {
                self.scorer.decode(tokens).is_ok_and(|text| stop.iter().any(|stop| text.contains(stop)))
            };
            let texts = self.scorer.proceed(&tokens, limit, &mut finished)?;
            for ((number, _, answers), tokens) in batch.iter().zip(texts) {
                let text = self.scorer.decode(&tokens)?;
                let end = stop.iter().filter_map(|stop| text.find(stop)).min().unwrap_or(text.len());
                let text = text[..end].to_owned();
                let score = score(&text, answers);
                let line = self.questions[*number].place.line;
                each(Outcome { question: *number, line, said: Said::Generation { text, score } })?;
            }
            done += cost(batch);
        }
        Ok(cut)
    }
}

fn too_long(place: &Place, length: usize, context: usize) -> Error {
    let problem = format!(
        "prompt and answer have {length} tokens, but the model's context is {context}: use fewer examples, \
         remove this record, or truncate beginnings (--cut)"
    );
    Error::line(&place.path, place.line, problem)
}

/// LongPPL's tokens (Fang et al. 2024, arXiv 2410.23771): those that a long context makes likelier by more than `alpha`
/// nats, to more than `beta`. `parts` are the windows with the whole context, then those with little. Each half has
/// every token once.
fn long_document(
    parts: &[Vec<TargetScore>],
    of: &LongPerplexity,
    keys: Option<&[usize]>,
) -> std::result::Result<Said, String> {
    let scores = || parts.iter().flatten().map(|token| f64::from(token.log_probability));
    let tokens = scores().count() / 2;
    let long: Vec<f64> = scores().take(tokens).collect();
    let is_key = |&(long, short): &(&f64, f64)| long - short > of.alpha && *long > of.beta;
    let keys: Vec<usize> = match keys {
        Some(keys) => keys.to_vec(),
        None => {
            let pairs = long.iter().zip(scores().skip(tokens)).enumerate();
            pairs.filter(|(_, pair)| is_key(pair)).map(|(token, _)| token).collect()
        }
    };
    if let Some(key) = keys.iter().find(|&&key| key >= tokens) {
        return Err(format!(
            "key token {key} is not among its {tokens} tokens: the keys belong to another tokenizer or text"
        ));
    }
    let key_log_probability = keys.iter().map(|&key| long[key]).sum();
    Ok(Said::LongDocument { log_probability: long.iter().sum(), tokens, key_log_probability, keys })
}

/// The scores of a question's parts so far.
struct Answers {
    /// The scores of each part's tokens; empty until they are known.
    parts: Vec<Vec<TargetScore>>,
    open: usize,
}

impl Answers {
    fn new(parts: &[Request]) -> Self {
        Self { parts: vec![Vec::new(); parts.len()], open: parts.len() }
    }

    fn add(&mut self, part: usize, scores: Vec<TargetScore>) {
        self.open -= usize::from(self.parts[part].is_empty());
        self.parts[part] = scores;
    }

    fn is_complete(&self) -> bool {
        self.open == 0
    }
}

/// Number of tokens that two sequences have in common at their beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A run of requests that are scored together.
struct Batch {
    range: std::ops::Range<usize>,
    cost: usize,
}

/// Orders the requests so that similar ones are neighbours, and divides them into batches of at most `budget` (at least
/// one request each).
fn batches(requests: &mut [Owned], cost: Cost, budget: usize) -> Vec<Batch> {
    let inputs = |owned: &Owned| owned.request.inputs().len();
    match cost {
        Cost::DistinctTokens => requests.sort_by(|a, b| a.request.inputs().cmp(b.request.inputs())),
        Cost::PaddedTokens => requests.sort_by_key(|owned| std::cmp::Reverse(inputs(owned))),
    }
    let mut batches: Vec<Batch> = Vec::new();
    let mut open = Batch { range: 0..0, cost: 0 };
    for index in 0..requests.len() {
        let own = inputs(&requests[index]);
        let with = match cost {
            // A batch does not share the tokens of the previous one.
            Cost::DistinctTokens if !open.range.is_empty() => {
                let before = requests[index - 1].request.inputs();
                open.cost + own - common(before, requests[index].request.inputs())
            }
            Cost::PaddedTokens if !open.range.is_empty() => {
                inputs(&requests[open.range.start]) * (open.range.len() + 1)
            }
            _ => own,
        };
        if with > budget && !open.range.is_empty() {
            batches.push(std::mem::replace(&mut open, Batch { range: index..index + 1, cost: own }));
        } else {
            open = Batch { range: open.range.start..index + 1, cost: with };
        }
    }
    if !open.range.is_empty() {
        batches.push(open);
    }
    batches
}

/// A window over a text: tokens `first..end` are predicted from `start` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First token to read.
    pub start: usize,
    /// First token to predict.
    pub first: usize,
    /// End of the tokens to predict.
    pub end: usize,
}

/// Windows over a text of one leading token and `count` more. Each of these is predicted once, and no window is longer
/// than `context`. From the second window on, at least `overlap` tokens (1: the minimum) are read again; the last
/// window reads as many as fit.
pub fn windows(count: usize, context: usize, overlap: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut first = 1;
    while first <= count {
        let step = if first == 1 { context } else { context + 1 - overlap.clamp(1, context) };
        let end = (first + step).min(count + 1);
        // The last token is predicted, not read.
        let start = (end - 1).saturating_sub(context);
        windows.push(Window { start, first, end });
        first = end;
    }
    windows
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::tasks::few_shot::FewShot;
    use engram_import::{
        Model,
        testing::{CONFIG, gguf},
    };
    use engram_infer::{Decoder, Dtype, Offline};

    use crate::tasks::ModelScorer;

    /// The model that every test asks: 60 tokens of context.
    fn model() -> ModelScorer {
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        std::fs::write(file.path(), gguf(60, 1).bytes()).unwrap();
        let model = Model::open(file.path()).unwrap();
        let decoder = Decoder::new(&model.config().model, model.weights(), Dtype::F32).unwrap();
        let offline = Offline::new(decoder, None, 1 << 20, 1).unwrap();
        ModelScorer::new(offline, model.tokenizer().clone(), model.begin(), model.identity().unwrap())
    }

    fn request() -> impl Strategy<Value = Request> {
        let tokens = |most| proptest::collection::vec(0_u32..4, 1..most);
        (tokens(6), tokens(5)).prop_map(|(context, end)| Request::new(&context, &end).unwrap())
    }

    /// Scores one request.
    fn likelihood(model: &ModelScorer, request: &Request) -> Likelihood {
        Likelihood::of(&model.score(&[request]).unwrap()[0])
    }

    fn close(found: Likelihood, expected: Likelihood) {
        let difference = (found.log_probability - expected.log_probability).abs();
        assert!(difference < 1e-4 && found.greedy == expected.greedy, "{found:?}, not {expected:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn company_and_order_change_nothing(
            requests in proptest::collection::vec(request(), 1..10), turn in 0_usize..10,
        ) {
            let model = model();
            let alone: Vec<Likelihood> =
                requests.iter().map(|request| likelihood(&model, request)).collect();
            let mut order: Vec<usize> = (0..requests.len()).collect();
            order.rotate_left(turn % requests.len());
            let batch: Vec<&Request> = order.iter().map(|&index| &requests[index]).collect();
            for (index, found) in order.into_iter().zip(model.score(&batch).unwrap()) {
                close(Likelihood::of(&found), alone[index]);
            }
        }

        #[test]
        fn chunks_add_up(tokens in proptest::collection::vec(0_u32..256, 3..20), cut in 1_usize..19) {
            let model = model();
            let cut = 1 + cut % (tokens.len() - 2);
            let score = |start: usize, end: usize| {
                likelihood(&model, &Request::new(&tokens[..start], &tokens[start..end]).unwrap())
            };
            let (whole, first, second) = (score(1, tokens.len()), score(1, cut + 1), score(cut + 1, tokens.len()));
            let log_probability = first.log_probability + second.log_probability;
            close(Likelihood { log_probability, greedy: first.greedy && second.greedy }, whole);
        }

        #[test]
        fn batches_hold_every_request_once(
            requests in proptest::collection::vec(request(), 1..30), budget in 1_usize..40, padded: bool,
        ) {
            let cost = if padded { Cost::PaddedTokens } else { Cost::DistinctTokens };
            let mut owned: Vec<Owned> = (requests.into_iter().enumerate())
                .map(|(question, request)| Owned { question, part: 0, request })
                .collect();
            let count = owned.len();
            let batches = batches(&mut owned, cost, budget);
            let mut next = 0;
            for Batch { range, cost: found } in batches {
                prop_assert_eq!(range.start, next);
                next = range.end;
                let inputs: Vec<&[u32]> = owned[range.clone()].iter().map(|o| o.request.inputs()).collect();
                let expected = match cost {
                    Cost::PaddedTokens => inputs.iter().map(|i| i.len()).max().unwrap() * inputs.len(),
                    Cost::DistinctTokens => {
                        let beginnings = inputs.iter().flat_map(|input| (1..=input.len()).map(|end| &input[..end]));
                        beginnings.collect::<std::collections::HashSet<_>>().len()
                    }
                };
                prop_assert_eq!(found, expected);
                prop_assert!(found <= budget || range.len() == 1);
            }
            prop_assert_eq!(next, count);
            let mut questions: Vec<usize> = owned.iter().map(|owned| owned.question).collect();
            questions.sort_unstable();
            prop_assert_eq!(questions, (0..count).collect::<Vec<_>>());
        }

        #[test]
        fn windows_predict_every_token_once(count in 1_usize..200, context in 1_usize..50, overlap in 1_usize..50) {
            let overlap = overlap.min(context);
            let mut next = 1;
            for Window { start, first, end } in windows(count, context, overlap) {
                prop_assert_eq!(first, next);
                prop_assert!(start < first && end > first && end - 1 - start <= context);
                prop_assert!(first == 1 || first - start >= overlap);
                next = end;
            }
            prop_assert_eq!(next, count + 1);
        }
    }

    #[test]
    fn windows_by_hand() {
        let window = |start, first, end| Window { start, first, end };
        assert_eq!(windows(5, 8, 1), [window(0, 1, 6)]);
        assert_eq!(windows(10, 4, 1), [window(0, 1, 5), window(4, 5, 9), window(6, 9, 11)]);
        assert_eq!(windows(7, 4, 3), [window(0, 1, 5), window(2, 5, 7), window(3, 7, 8)]);
    }

    /// Outcomes of a task over records, asked in batches of `batch` tokens.
    fn outcomes(task: &str, records: &str, options: AskOptions) -> Result<(Vec<Outcome>, usize)> {
        outcomes_from(0, task, records, options)
    }

    /// The same of the questions from `first` on.
    fn outcomes_from(
        first: usize,
        task: &str,
        records: &str,
        options: AskOptions,
    ) -> Result<(Vec<Outcome>, usize)> {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("task.toml", task);
        write("a.jsonl", records);
        let task = Task::load(&folder.path().join("task.toml"))?;
        let questions = task.questions(None, FewShot { count: None, seed: 0 }, None)?;
        let pending: Vec<usize> = (first..questions.len()).collect();
        let mut outcomes = Vec::new();
        let mut each = |outcome| {
            outcomes.push(outcome);
            Ok(())
        };
        let mut steps = Vec::new();
        let mut progress = |done, total| {
            steps.push((done, total));
            ControlFlow::Continue(())
        };
        let cut = ask(&model(), (&task, &questions), &pending, options, &mut each, &mut progress)?;
        assert!(steps.is_sorted() && steps.iter().all(|&(done, total)| done < total));
        outcomes.sort_by_key(|outcome| outcome.question);
        Ok((outcomes, cut))
    }

    const CHOICE: &str =
        "data = 'a.jsonl'\n[multiple_choice]\nprompt = '{{ q }}'\nchoices = 'c'\nanswer = '0'";

    #[test]
    fn a_choice_is_scored_as_its_tokens_are() {
        let records = "{\"q\": \"ab \", \"c\": [\"x\", \"yz\"]}\n{\"q\": \"\", \"c\": [\"x\", \"yz\"]}";
        let (whole, _) = outcomes(CHOICE, records, AskOptions::default()).unwrap();
        let small = AskOptions { batch: 1, ..AskOptions::default() };
        let (apart, _) = outcomes(CHOICE, records, small).unwrap();
        let model = model();
        let tokens = |text: &str| model.encode(text).unwrap();
        for (index, outcome) in whole.iter().enumerate() {
            let Said::Choice { log_probabilities, lengths, .. } = &outcome.said else { panic!() };
            let Said::Choice { log_probabilities: others, .. } = &apart[index].said else { panic!() };
            let prompt = if index == 0 { tokens("ab") } else { vec![model.tokenizer().end_of_text()] };
            for (choice, text) in ["x", "yz"].into_iter().enumerate() {
                // The blank at the prompt's end, and the delimiter.
                let end = tokens(&format!("{}{text}", if index == 0 { "  " } else { " " }));
                let likelihood = likelihood(&model, &Request::new(&prompt, &end).unwrap());
                assert!((likelihood.log_probability - log_probabilities[choice]).abs() < 1e-4);
                assert!((others[choice] - log_probabilities[choice]).abs() < 1e-4);
                let length = Length { tokens: end.len(), characters: text.len(), bytes: text.len() };
                assert_eq!(lengths[choice], length);
            }
        }
    }

    #[test]
    fn what_is_longer_than_the_context_is_refused_or_cut() {
        let task = "data = 'a.jsonl'\n[cloze]\nprompt = '{{ q }}'\ntarget = 'x'";
        let records = format!("{{\"q\": \"short\"}}\n{{\"q\": \"{}\"}}", "long".repeat(20));
        let error = outcomes(task, &records, AskOptions::default()).unwrap_err().to_string();
        assert!(
            error.contains("a.jsonl:2: prompt and answer have 81 tokens, but the model's context is 60"),
            "{error}"
        );
        let (cut, count) =
            outcomes(task, &records, AskOptions { cut: true, ..AskOptions::default() }).unwrap();
        assert_eq!((cut.len(), count), (2, 1));
        // The end remains: the same as the question without the beginning.
        let end = format!("{{\"q\": \"{}\"}}", &"long".repeat(20)[21..]);
        let (end, _) = outcomes(task, &end, AskOptions::default()).unwrap();
        assert_eq!(cut[1].said, end[0].said);
    }

    #[test]
    fn what_was_cut_before_is_counted_too() {
        let records = format!("{{\"q\": \"{}\"}}\n", "long".repeat(20)).repeat(2) + "{\"q\": \"a\"}";
        let options = AskOptions { cut: true, ..AskOptions::default() };
        let cloze = "data = 'a.jsonl'\n[cloze]\nprompt = '{{ q }}'\ntarget = 'x'";
        let text =
            "data = 'a.jsonl'\n[generation]\nprompt = '{{ q }}'\nanswers = 'q'\nstop = ['.']\ntokens = 3";
        for task in [cloze, text] {
            for first in 0..=3 {
                let (outcomes, cut) = outcomes_from(first, task, &records, options).unwrap();
                assert_eq!((outcomes.len(), cut), (3 - first, 2), "{task} from {first}");
            }
        }
    }

    #[test]
    fn generated_texts_end_where_they_should() {
        let task = "data = 'a.jsonl'\n[generation]\nprompt = '{{ q }}'\nanswers = 'a'\nstop = []\ntokens = 5";
        let prompts = ["ab", "abc", "ab:\n  ", " "];
        let record = |prompt: &&str| serde_json::json!({"q": prompt, "a": "?"}).to_string();
        let records = &prompts.iter().map(record).collect::<Vec<_>>().join("\n");
        let (outcomes_, _) = outcomes(task, records, AskOptions::default()).unwrap();
        let model = model();
        for (outcome, prompt) in outcomes_.iter().zip(prompts) {
            let Said::Generation { text, score: 0.0 } = &outcome.said else { panic!("{outcome:?}") };
            // Each token is the likeliest by its score.
            let (mut context, mut expected) = (model.encode(prompt).unwrap(), Vec::new());
            for _ in 0..5 {
                let next = (0..CONFIG.vocabulary as u32)
                    .find(|&token| likelihood(&model, &Request::new(&context, &[token]).unwrap()).greedy);
                if next == Some(model.tokenizer().end_of_text()) {
                    break;
                }
                context.extend(next);
                expected.extend(next);
            }
            assert_eq!(text, &model.decode(&expected).unwrap());
        }
        let Said::Generation { text, .. } = &outcomes_[0].said else { panic!() };
        let stop = text.chars().nth(1).unwrap();
        let stopping = task.replace("stop = []", &format!("stop = [{:?}]", stop.to_string()));
        let (stopped, _) = outcomes(&stopping, records, AskOptions::default()).unwrap();
        let Said::Generation { text: found, .. } = &stopped[0].said else { panic!() };
        assert_eq!(found, &text[..text.find(stop).unwrap()]);
    }

    #[test]
    fn a_document_is_as_likely_as_its_windows() {
        let task = |overlap: usize| {
            format!("data = 'a.jsonl'\n[perplexity]\ntext = '{{{{ q }}}}'\noverlap = {overlap}")
        };
        let text = "many words ".repeat(12);
        let records = format!("{{\"q\": {text:?}}}");
        let of =
            |overlap| outcomes(&task(overlap), &records, AskOptions::default()).unwrap().0[0].said.clone();
        let Said::Document { log_probability, tokens, bytes } = of(1) else { panic!() };
        assert_eq!((tokens, bytes), (text.len(), text.len()));
        let model = model();
        let all = [vec![model.tokenizer().end_of_text()], model.encode(&text).unwrap()].concat();
        let expected: f64 = (windows(text.len(), 60, 1).iter())
            .map(|window| {
                Request::new(&all[window.start..window.first], &all[window.first..window.end]).unwrap()
            })
            .map(|request| likelihood(&model, &request).log_probability)
            .sum();
        assert!((log_probability - expected).abs() < 1e-3);
        assert_ne!(of(30), of(1));
        let error = outcomes(&task(61), &records, AskOptions::default()).unwrap_err().to_string();
        assert!(error.contains("a.jsonl:1: ") && error.contains("1..=60"), "{error}");
    }

    #[test]
    fn key_tokens_are_those_that_context_makes_likely() {
        let task = "data = 'a.jsonl'\n[long_perplexity]\ntext = '{{ q }}'\nshort = 4\nstep = 3\n\
                    alpha = 0.02\nbeta = -5.5";
        let text = "many words, and more of them than fit. ".repeat(3);
        let records = format!("{{\"q\": {text:?}}}");
        let (found, _) = outcomes(task, &records, AskOptions::default()).unwrap();
        let Said::LongDocument { log_probability, tokens, key_log_probability, keys } = &found[0].said else {
            panic!("{found:?}")
        };
        let model = model();
        let all = [vec![model.tokenizer().end_of_text()], model.encode(&text).unwrap()].concat();
        let read = |context: usize| -> Vec<f64> {
            let windows = windows(all.len() - 1, context, 4).into_iter();
            let requests =
                windows.map(|w| Request::new(&all[w.start..w.first], &all[w.first..w.end]).unwrap());
            requests
                .flat_map(|request| model.score(&[&request]).unwrap().remove(0))
                .map(|token| f64::from(token.log_probability))
                .collect()
        };
        let (long, short) = (read(60), read(6));
        let expected: Vec<usize> = (0..long.len())
            .filter(|&token| long[token] - short[token] > 0.02 && long[token] > -5.5)
            .collect();
        assert!(
            !expected.is_empty() && expected.len() < long.len() / 2,
            "{} of {}",
            expected.len(),
            long.len()
        );
        assert_eq!((keys, *tokens), (&expected, text.len()));
        let sum: f64 = expected.iter().map(|&token| long[token]).sum();
        assert!((key_log_probability - sum).abs() < 1e-3);
        assert!((log_probability - long.iter().sum::<f64>()).abs() < 1e-3);

        let error = outcomes(&task.replace("short = 4", "short = 60"), &records, AskOptions::default());
        assert!(error.unwrap_err().to_string().contains("a.jsonl:1: a short context of 60 tokens"));
    }

    #[test]
    fn it_stops_when_asked() {
        let model = model();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("t.toml"), CHOICE).unwrap();
        std::fs::write(folder.path().join("a.jsonl"), "{\"q\": \"a\", \"c\": [\"x\", \"y\"]}\n".repeat(3))
            .unwrap();
        let task = Task::load(Path::new(&folder.path().join("t.toml"))).unwrap();
        let questions = task.questions(None, FewShot { count: None, seed: 0 }, None).unwrap();
        let mut each = |_| panic!("an outcome before the first batch");
        let mut stop = |_, _| ControlFlow::Break(());
        let asked = ask(&model, (&task, &questions), &[0, 1], AskOptions::default(), &mut each, &mut stop);
        assert!(matches!(asked, Err(Error::Interrupted)));
    }
}
