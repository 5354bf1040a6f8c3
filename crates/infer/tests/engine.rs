//! What the engine answers is what each request would have been answered alone.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{EVERYTHING, Fixture, PLAIN, WITHOUT_MEMORY, assert_close, random_tokens, token_bytes};
use engram_infer::{
    BadParameter, Engine, EngineError, EngineOptions, Event, Failure, Finish, GeneratedToken,
    GrammarCompiler, Refusal, Request, Sampling, Summary, TextCodec, TokenLogprob,
};
use engram_store::{RowFormat, RowSource, StoreError, Table};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::UnboundedReceiver;

const GREEDY: Sampling = Sampling {
    temperature: 0.0,
    top_k: None,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    seed: 0,
};

/// A small cache and small pieces of everything, so that all of it happens.
const SMALL: EngineOptions = EngineOptions {
    running: 64,
    waiting: 2000,
    page: 8,
    cache_bytes: 3 << 20,
    chunk: 12,
    prompt_tokens: 30,
    drafts: 4,
    threads: 2,
};

#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<GeneratedToken>,
    text: String,
    summary: Summary,
}

fn answer(mut events: UnboundedReceiver<Event>) -> Result<Answer, Failure> {
    let (mut tokens, mut text) = (Vec::new(), String::new());
    loop {
        match events.blocking_recv().expect("an end") {
            Event::Token(token) => {
                text += &token.text;
                tokens.push(token);
            }
            Event::Gates(_) | Event::PromptLogprobs(_) => {}
            Event::Done(summary) => {
                text += &summary.text;
                return Ok(Answer { tokens, text, summary });
            }
            Event::Failed(failure) => return Err(failure),
        }
    }
}

fn ask(engine: &Engine, request: Request) -> Answer {
    answer(engine.submit(request).unwrap()).unwrap()
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request { sampling: GREEDY, ..Request::new(prompt, max_tokens) }
}

/// A value of the metrics' text.
fn metric(engine: &Engine, name: &str) -> u64 {
    let text = engine.metrics().text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} in\n{text}")).parse().unwrap()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Prompts of which many begin alike, and some repeat themselves, so that drafts can be right.
fn prompts(count: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let beginnings: Vec<Vec<u32>> =
        (0..5).map(|index| random_tokens(9 * index, seed ^ index as u64)).collect();
    let prompt = |index: usize| {
        let mut prompt = beginnings[random.random_range(0..5)].clone();
        let own = random_tokens(random.random_range(1..20), seed ^ (1000 + index as u64));
        match random.random_range(0..3) {
            0 => prompt.extend(own[..own.len().min(6)].repeat(3)),
            _ => prompt.extend(own),
        }
        prompt
    };
    (0..count).map(prompt).collect()
}

#[test]
fn a_thousand_greedy_answers_are_those_of_the_plain_forward_pass() {
    for (config, count) in [(EVERYTHING, 700), (PLAIN, 200), (WITHOUT_MEMORY, 100)] {
        let fixture = Fixture::new(config);
        let engine = Engine::start(fixture.served(), SMALL).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut asked = Vec::new();
        for prompt in prompts(count, 11) {
            let request = greedy(prompt, random.random_range(1..24));
            asked.push((request.clone(), engine.submit(request).unwrap()));
        }
        let (mut tokens, mut near_ties) = (0, 0);
        for (request, events) in asked {
            let answer = answer(events).unwrap();
            assert_eq!(answer.summary.finish, Finish::Length);
            assert_eq!(answer.tokens.len(), request.max_tokens);
            let generated: Vec<u32> = answer.tokens.iter().map(|token| token.id).collect();
            let whole = [&request.prompt[..], &generated].concat();
            let logits = fixture.plain_all(&whole[..whole.len() - 1]);
            for (index, &token) in generated.iter().enumerate() {
                let logits = &logits[request.prompt.len() - 1 + index];
                let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let below = best - logits[token as usize];
                // Where two tokens are as likely but for rounding, either is the likeliest.
                assert!(below < 1e-4, "token {index} of {request:?} is {below} below the likeliest");
                near_ties += usize::from(below > 0.0);
                tokens += 1;
            }
        }
        assert!(near_ties * 1000 < tokens, "{near_ties} near ties of {tokens}");
        assert!(metric(&engine, "engram_cached_prompt_tokens_total") > 0, "prefixes are shared");
        assert!(metric(&engine, "engram_accepted_tokens_total") > 0, "drafts are right at times");
        let (drafted, accepted) = ("engram_drafted_tokens_total", "engram_accepted_tokens_total");
        assert!(metric(&engine, drafted) > metric(&engine, accepted), "and wrong at times");
        eventually("no page is lost", || metric(&engine, "engram_cache_pages_in_use") == 0);
    }
}

#[test]
fn an_answer_is_the_same_alone_and_in_any_company() {
    let fixture = Fixture::new(EVERYTHING);
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let requests: Vec<Request> = prompts(150, 3)
        .into_iter()
        .map(|prompt| {
            let sampling = Sampling {
                temperature: random.random_range(0.0..1.5),
                top_k: random.random_bool(0.3).then(|| random.random_range(1..70)),
                top_p: random.random_range(0.3..1.0),
                min_p: random.random_range(0.0..0.1),
                repetition_penalty: random.random_range(0.8..1.5),
                presence_penalty: random.random_range(-0.5..0.5),
                frequency_penalty: random.random_range(-0.5..0.5),
                seed: random.random(),
            };
            let logprobs = random.random_bool(0.5).then_some(3);
            let memory = random.random_bool(0.7).then_some(0);
            let stop = if random.random_bool(0.3) { vec!["A".into(), "3".into()] } else { Vec::new() };
            let end_tokens = if random.random_bool(0.3) { vec![7] } else { Vec::new() };
            Request { sampling, logprobs, memory, stop, end_tokens, ..Request::new(prompt, 20) }
        })
        .collect();

    let together = Engine::start(fixture.served(), SMALL).unwrap();
    let events: Vec<_> = requests.iter().map(|request| together.submit(request.clone()).unwrap()).collect();
    let together: Vec<Answer> = events.into_iter().map(|events| answer(events).unwrap()).collect();

    let plainly = EngineOptions { drafts: 0, chunk: 96, prompt_tokens: 96, page: 16, ..SMALL };
    let alone = Engine::start(fixture.served(), plainly).unwrap();
    for (request, found) in requests.into_iter().zip(together) {
        let expected = ask(&alone, request);
        assert_eq!((found.tokens, found.text), (expected.tokens, expected.text));
        assert_eq!(found.summary.finish, expected.summary.finish);
        assert_eq!(expected.summary.drafted, [0, 0]);
    }
}

#[test]
fn probabilities_are_those_of_the_plain_forward_pass() {
    let fixture = Fixture::new(EVERYTHING);
    let engine = Engine::start(fixture.served(), SMALL).unwrap();
    let prompt = random_tokens(15, 1);
    let sampling = Sampling { seed: 4, ..Sampling::default() };
    let answer = ask(&engine, Request { logprobs: Some(64), sampling, ..Request::new(prompt.clone(), 10) });
    let mut tokens = prompt;
    for token in answer.tokens {
        let logits = fixture.plain_next(&tokens);
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        let expected: Vec<f32> = logits.iter().map(|logit| logit - sum.ln()).collect();
        let logprob = token.logprob.unwrap();
        assert_close(&[logprob.logprob], &[expected[token.id as usize]], 1e-4);
        let mut found = vec![0.0; 64];
        logprob.top.iter().for_each(|&(token, value)| found[token as usize] = value);
        assert_close(&found, &expected, 1e-4);
        assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
        tokens.push(token.id);
    }
}

#[test]
fn gates_come_for_every_position_that_was_computed() {
    let fixture = Fixture::new(EVERYTHING);
    let engine = Engine::start(fixture.served(), SMALL).unwrap();
    let prompt = random_tokens(6, 2).repeat(4);
    // The second time the prompt is in the cache, and its gates come all the same.
    for _ in 0..2 {
        let request = Request { gates: true, ..greedy(prompt.clone(), 12) };
        let mut events = engine.submit(request).unwrap();
        let (mut tokens, mut gates) = (prompt.clone(), vec![Vec::new(); 2]);
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Token(token) => tokens.push(token.id),
                Event::Gates(of) => {
                    assert_eq!(of.first * 3, gates[0].len(), "no gap");
                    gates
                        .iter_mut()
                        .zip(of.layers)
                        .for_each(|(all, new): (&mut Vec<f32>, _)| all.extend(new));
                }
                Event::PromptLogprobs(_) => panic!("nobody asked for them"),
                Event::Done(_) => break,
                Event::Failed(failure) => panic!("{failure}"),
            }
        }
        let expected = fixture.plain_gates(&tokens[..tokens.len() - 1]);
        for (found, expected) in gates.iter().zip(&expected) {
            assert!(found.len() >= expected.len());
            assert_close(&found[..expected.len()], expected, 1e-4);
        }
    }
}

#[test]
fn a_continuation_ends_where_it_was_asked_to() {
    let fixture = Fixture::new(EVERYTHING);
    let engine = Engine::start(fixture.served(), SMALL).unwrap();
    let prompt = random_tokens(10, 9);
    let free = ask(&engine, greedy(prompt.clone(), 30));
    assert_eq!((free.summary.finish, free.text.len()), (Finish::Length, 30));
    assert_eq!((free.summary.prompt_tokens, free.summary.completion_tokens), (10, 30));

    let stop = free.text[7..10].to_owned();
    let first = free.text.find(&stop).unwrap();
    let stopped = ask(&engine, Request { stop: vec![stop], ..greedy(prompt.clone(), 30) });
    assert_eq!((stopped.summary.finish, &stopped.text[..]), (Finish::Stop, &free.text[..first]));

    let end = free.tokens[5].id;
    let first = free.tokens.iter().position(|token| token.id == end).unwrap();
    let ended = ask(&engine, Request { end_tokens: vec![end], ..greedy(prompt.clone(), 30) });
    assert_eq!((ended.summary.finish, &ended.text[..]), (Finish::Stop, &free.text[..first]));
    assert_eq!(ended.summary.completion_tokens, first + 1);

    let none = ask(&engine, greedy(prompt, 0));
    assert_eq!((none.summary.finish, none.tokens.len()), (Finish::Length, 0));
}

#[test]
fn impossible_requests_are_refused_with_the_reason() {
    let engine = Engine::start(Fixture::new(EVERYTHING).served(), SMALL).unwrap();
    let refused = |request: Request| engine.submit(request).unwrap_err();
    assert_eq!(refused(Request::new(vec![], 5)), Refusal::EmptyPrompt);
    let token = refused(Request::new(vec![1, 64], 5));
    assert_eq!(token, Refusal::Token { token: 64, position: 1, vocabulary: 64 });
    let long = refused(Request::new(vec![1; 90], 7));
    assert_eq!(long, Refusal::TooLong { context: 96, prompt: 90, max_tokens: 7 });
    assert!(matches!(refused(Request::new(vec![1], usize::MAX)), Refusal::TooLong { .. }));
    let sampling = Sampling { top_p: 2.0, ..GREEDY };
    let parameter = refused(Request { sampling, ..Request::new(vec![1], 5) });
    assert!(matches!(parameter, Refusal::Parameter(BadParameter { name: "top_p", .. })));

    let page = EngineOptions { cache_bytes: 20_000, ..SMALL };
    let engine = Engine::start(Fixture::new(EVERYTHING).served(), page).unwrap();
    assert!(matches!(engine.submit(Request::new(vec![1; 50], 40)).unwrap_err(), Refusal::Cache { .. }));
    engine.stop();
    assert_eq!(engine.submit(Request::new(vec![1], 1)).unwrap_err(), Refusal::Stopping);
}

#[test]
fn options_that_leave_nothing_are_refused() {
    let fixture = Fixture::new(EVERYTHING);
    let refused = |options| match Engine::start(fixture.served(), options) {
        Err(EngineError::Option { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(EngineOptions { running: 0, ..SMALL }), "running");
    assert_eq!(refused(EngineOptions { page: 0, ..SMALL }), "page");
    assert_eq!(refused(EngineOptions { chunk: 0, ..SMALL }), "chunk");
    assert_eq!(refused(EngineOptions { prompt_tokens: 3, ..SMALL }), "prompt_tokens");
    assert_eq!(refused(EngineOptions { cache_bytes: 10, ..SMALL }), "cache_bytes");
    let without = engram_infer::Model::new(fixture.decoder(), None, token_bytes());
    assert!(matches!(Engine::start(without, SMALL), Err(EngineError::Rows { layers: 2, found: 0 })));
}

/// Rows that fail, or come late, while a switch says so.
struct Switched {
    table: Arc<Table>,
    broken: Arc<AtomicBool>,
    slow: Duration,
}

impl RowSource for Switched {
    fn rows(&self) -> u64 {
        self.table.rows()
    }
    fn width(&self) -> usize {
        self.table.width()
    }
    fn format(&self) -> RowFormat {
        self.table.format()
    }
    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<(), StoreError> {
        std::thread::sleep(self.slow);
        if self.broken.load(SeqCst) {
            return Err(StoreError::SourcePanicked { message: "the tier is down".into() });
        }
        self.table.read(ids, out)
    }
}

/// An engine over such rows, and the switch.
fn switched(fixture: &Fixture, slow: Duration, options: EngineOptions) -> (Engine, Arc<AtomicBool>) {
    let broken = Arc::new(AtomicBool::new(false));
    let sources = fixture.tables.iter().map(|table| {
        let (table, broken) = (Arc::clone(table), Arc::clone(&broken));
        Arc::new(Switched { table, broken, slow }) as Arc<dyn RowSource>
    });
    let rows = fixture.tiers_of(sources.collect());
    let model = engram_infer::Model::new(fixture.decoder(), rows, token_bytes());
    (Engine::start(model, options).unwrap(), broken)
}

#[test]
fn a_tier_that_fails_fails_what_runs_and_nothing_after() {
    let fixture = Fixture::new(EVERYTHING);
    let (engine, broken) = switched(&fixture, Duration::ZERO, SMALL);
    let prompt = random_tokens(40, 1);
    let expected = ask(&engine, greedy(prompt.clone(), 20));
    broken.store(true, SeqCst);
    let failures: Vec<_> = (0..5)
        .map(|_| answer(engine.submit(greedy(random_tokens(30, 2), 20)).unwrap()).unwrap_err())
        .collect();
    assert!(failures.iter().all(|failure| failure.to_string().contains("the tier is down")), "{failures:?}");
    broken.store(false, SeqCst);
    let found = ask(&engine, greedy(prompt, 20));
    assert_eq!(found.tokens, expected.tokens);
    eventually("pages are freed", || metric(&engine, "engram_cache_pages_in_use") == 0);
    assert_eq!(metric(&engine, "engram_requests_total{outcome=\"failed\"}"), 5);
}

#[test]
fn waiting_for_rows_is_measured() {
    let fixture = Fixture::new(EVERYTHING);
    let (engine, _) = switched(&fixture, Duration::from_millis(3), EngineOptions { drafts: 0, ..SMALL });
    let answer = ask(&engine, greedy(random_tokens(5, 1), 10));
    let wait = answer.summary.row_wait;
    assert!(wait > Duration::from_millis(15) && wait < Duration::from_secs(5), "{wait:?}");
}

/// A step does not wait for a newcomer's rows while it has other work.
#[test]
fn rows_that_are_late_hold_nobody_else_up() {
    let fixture = Fixture::new(EVERYTHING);
    let (engine, _) = switched(&fixture, Duration::from_secs(1), SMALL);
    let without = Request { memory: None, ..greedy(random_tokens(5, 1), 40) };
    let mut first = engine.submit(without).unwrap();
    while !matches!(first.blocking_recv().unwrap(), Event::Token(_)) {}
    let mut late = engine.submit(greedy(random_tokens(5, 2), 1)).unwrap();
    assert_eq!(answer(first).unwrap().summary.completion_tokens, 40);
    assert!(late.try_recv().is_err(), "its rows cannot have come yet");
    assert_eq!(answer(late).unwrap().tokens.len(), 1);
}

#[test]
fn whoever_leaves_frees_the_place() {
    let fixture = Fixture::new(EVERYTHING);
    let one = EngineOptions { running: 1, waiting: 2, ..SMALL };
    let (engine, _) = switched(&fixture, Duration::from_millis(20), one);
    let running = engine.submit(greedy(random_tokens(40, 1), 50)).unwrap();
    eventually("the first runs", || metric(&engine, "engram_running_requests") == 1);
    let waiting: Vec<_> = (0..2).map(|_| engine.submit(greedy(random_tokens(4, 2), 2)).unwrap()).collect();
    assert_eq!(engine.submit(greedy(vec![1], 1)).unwrap_err(), Refusal::Busy { waiting: 2 });
    drop(running);
    let mut waiting = waiting.into_iter();
    drop(waiting.next());
    assert_eq!(answer(waiting.next().unwrap()).unwrap().tokens.len(), 2);
    eventually("both are counted", || metric(&engine, "engram_requests_total{outcome=\"cancelled\"}") == 2);
    eventually("pages are freed", || metric(&engine, "engram_cache_pages_in_use") == 0);
}

#[test]
fn a_request_ends_at_its_deadline() {
    let fixture = Fixture::new(EVERYTHING);
    let (engine, _) = switched(&fixture, Duration::from_millis(20), EngineOptions { running: 1, ..SMALL });
    let deadline = Some(Instant::now() + Duration::from_millis(150));
    let late = |prompt| engine.submit(Request { deadline, ..greedy(prompt, 50) }).unwrap();
    let (running, waiting) = (late(random_tokens(40, 1)), late(random_tokens(4, 1)));
    assert_eq!(answer(running).unwrap_err(), Failure::Deadline);
    assert_eq!(answer(waiting).unwrap_err(), Failure::Deadline);
}

#[test]
fn an_engine_that_is_dropped_answers_what_it_took() {
    let engine = Engine::start(Fixture::new(PLAIN).served(), SMALL).unwrap();
    let events: Vec<_> =
        (0..20).map(|seed| engine.submit(greedy(random_tokens(9, seed), 9)).unwrap()).collect();
    drop(engine);
    for events in events {
        assert_eq!(answer(events).unwrap().tokens.len(), 9);
    }
}

/// With few pages requests lose their places and get them back; nobody can tell from the answers.
#[test]
fn a_request_that_loses_its_place_is_answered_as_alone() {
    for config in [EVERYTHING, PLAIN] {
        let fixture = Fixture::new(config);
        let requests: Vec<Request> = prompts(40, 21)
            .into_iter()
            .zip(0..)
            .map(|(prompt, seed)| {
                let sampling = Sampling { temperature: 0.9, repetition_penalty: 1.2, seed, ..GREEDY };
                let (logprobs, memory) = ((seed % 3 == 0).then_some(2), (seed % 4 != 1).then_some(0));
                let prompt_logprobs = (seed % 5 == 0).then_some(1);
                let max_tokens = 96 - prompt.len();
                Request { sampling, logprobs, prompt_logprobs, memory, ..Request::new(prompt, max_tokens) }
            })
            .collect();
        let alone = Engine::start(fixture.served(), EngineOptions { drafts: 0, ..SMALL }).unwrap();
        let expected: Vec<(Answer, Vec<TokenLogprob>)> =
            requests.iter().map(|request| scored(alone.submit(request.clone()).unwrap())).collect();
        let page_bytes = 4 * fixture.decoder().cache_layout(SMALL.page).page_values();
        let mut lost = 0;
        // A whole context takes 12 pages.
        for pages in [12, 17, 25, 40] {
            let options = EngineOptions { cache_bytes: page_bytes * pages, ..SMALL };
            let few = Engine::start(fixture.served(), options).unwrap();
            // Short answers lead it to expect short ones, so that it lets in more than there is room for.
            (0..60).for_each(|seed| drop(ask(&few, greedy(random_tokens(3, seed), 2))));
            let events: Vec<_> =
                requests.iter().map(|request| few.submit(request.clone()).unwrap()).collect();
            let found = events.into_iter().map(scored);
            for ((found, scores), (expected, expected_scores)) in found.zip(&expected) {
                assert_eq!((&found.tokens, &found.text), (&expected.tokens, &expected.text));
                assert_eq!(&scores, expected_scores);
            }
            lost += metric(&few, "engram_preempted_requests_total");
            eventually("no page is lost", || metric(&few, "engram_cache_pages_in_use") == 0);
        }
        assert!(lost > 10, "{lost} places were lost");
    }
}

/// Answers that have to have a form have it, and are the same with drafts and without, alone, in company, and after a
/// place was lost.
#[test]
fn an_answer_that_follows_a_form_is_the_same_in_any_way() {
    let fixture = Fixture::new(EVERYTHING);
    let words = (0..token_bytes().len() as u32).map(|token| (format!("t{token}"), token)).collect();
    let model = tokenizers::models::wordlevel::WordLevel::builder().vocab(words).unk_token("t0".into());
    let model = tokenizers::models::ModelWrapper::from(model.build().unwrap());
    let tokenizer = engram_data::TextTokenizer::new(model.into());
    // The last token ends an answer.
    let end = token_bytes().len() as u32 - 1;
    let compiler = GrammarCompiler::new(&TextCodec::new(&tokenizer, token_bytes(), end), &[]).unwrap();
    let list =
        compiler.lark("start: \"[\" item (\",\" item){0,30} \"]\"\nitem: /[0-3]{1,3}/".into()).unwrap();
    let number = compiler.json(&serde_json::json!({"type": "integer", "minimum": 7})).unwrap();
    let request = |(prompt, seed): (Vec<u32>, u64)| {
        let sampling = Sampling { temperature: [0.0, 0.8][seed as usize % 2], seed, ..GREEDY };
        let grammar =
            [Some(list.clone()), Some(number.clone()), Some(list.clone()), None][seed as usize % 4].clone();
        let (end_tokens, min_tokens) = (vec![end], [0, 5][seed as usize % 3 % 2]);
        Request { sampling, grammar, end_tokens, min_tokens, ..Request::new(prompt, 40) }
    };
    let requests: Vec<Request> = prompts(24, 33).into_iter().zip(0..).map(request).collect();
    let alone = Engine::start(fixture.served(), EngineOptions { drafts: 0, ..SMALL }).unwrap();
    let expected: Vec<Answer> = requests.iter().map(|request| ask(&alone, request.clone())).collect();
    let is_list = |text: &str| {
        let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let digits =
            |item: &str| (1..=3).contains(&item.len()) && item.bytes().all(|b| (b'0'..=b'3').contains(&b));
        inner.is_some_and(|inner| inner.split(',').all(digits))
    };
    let mut lists = 0;
    for (request, answer) in requests.iter().zip(&expected) {
        let whole = answer.summary.finish == Finish::Stop;
        if request.grammar.as_ref() == Some(&list) {
            assert!(answer.text.starts_with('[') && (!whole || is_list(&answer.text)), "{}", answer.text);
            lists += usize::from(whole);
        } else if request.grammar.as_ref() == Some(&number) && whole {
            assert!(answer.text.parse::<u128>().unwrap() >= 7, "{}", answer.text);
        }
    }
    assert!(lists > 0, "no list was completed");
    let page_bytes = 4 * fixture.decoder().cache_layout(SMALL.page).page_values();
    let (mut lost, mut accepted) = (0, 0);
    for (drafts, pages) in [(0, 200), (4, 200), (4, 14)] {
        let options = EngineOptions { drafts, cache_bytes: page_bytes * pages, ..SMALL };
        let engine = Engine::start(fixture.served(), options).unwrap();
        (0..60).for_each(|seed| drop(ask(&engine, greedy(random_tokens(3, seed), 2))));
        let events: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
        for (found, expected) in events.into_iter().map(|events| answer(events).unwrap()).zip(&expected) {
            assert_eq!((&found.tokens, &found.text), (&expected.tokens, &expected.text));
            assert_eq!(found.summary.finish, expected.summary.finish);
        }
        lost += metric(&engine, "engram_preempted_requests_total");
        accepted += metric(&engine, "engram_accepted_tokens_total");
    }
    assert!(lost > 0 && accepted > 0, "{lost} places lost, {accepted} drafts right");
    // Several choices for one prompt each follow it from its beginning.
    let several = (0..3).map(|seed| {
        let sampling = Sampling { temperature: 1.0, seed, ..GREEDY };
        Request { sampling, ..request((random_tokens(9, 3), 0)) }
    });
    for events in alone.submit_all(several.collect()).unwrap() {
        let text = answer(events).unwrap().text;
        assert!(text.starts_with('['), "{text}");
    }
}

/// An answer with the probabilities of its prompt.
fn scored(mut events: UnboundedReceiver<Event>) -> (Answer, Vec<TokenLogprob>) {
    let (mut tokens, mut text, mut scores) = (Vec::new(), String::new(), Vec::new());
    loop {
        match events.blocking_recv().expect("an end") {
            Event::Token(token) => {
                text += &token.text;
                tokens.push(token);
            }
            Event::PromptLogprobs(more) => scores.extend(more),
            Event::Gates(_) => {}
            Event::Done(summary) => {
                text += &summary.text;
                return (Answer { tokens, text, summary }, scores);
            }
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
}

#[test]
fn choices_for_one_prompt_read_it_once() {
    let fixture = Fixture::new(EVERYTHING);
    let prompt = random_tokens(60, 5);
    let request = |seed| Request {
        sampling: Sampling { seed, ..Sampling::default() },
        ..Request::new(prompt.clone(), 12)
    };
    let engine = Engine::start(fixture.served(), EngineOptions { drafts: 0, ..SMALL }).unwrap();
    let requests: Vec<Request> = (0..6).map(request).collect();
    let together = engine.submit_all(requests.clone()).unwrap();
    let together: Vec<Answer> = together.into_iter().map(|events| answer(events).unwrap()).collect();
    let computed: f64 = {
        let text = engine.metrics().text();
        let line = text.lines().find_map(|line| line.strip_prefix("engram_batch_tokens_sum "));
        line.unwrap().parse().unwrap()
    };
    assert_eq!(computed, 60.0 + 6.0 * 11.0, "the prompt is computed once, and each choice's tokens");
    let alone = Engine::start(fixture.served(), SMALL).unwrap();
    for (request, found) in requests.into_iter().zip(together) {
        assert_eq!(found.tokens, ask(&alone, request).tokens);
    }
    // More choices than places: those without one wait for it.
    let two = Engine::start(fixture.served(), EngineOptions { running: 2, ..SMALL }).unwrap();
    let events = two.submit_all((0..6).map(request).collect()).unwrap();
    for (seed, events) in events.into_iter().enumerate() {
        assert_eq!(answer(events).unwrap().tokens, ask(&alone, request(seed as u64)).tokens);
    }
}

#[test]
fn prompts_are_scored_as_by_the_plain_forward_pass() {
    let fixture = Fixture::new(EVERYTHING);
    let engine = Engine::start(fixture.served(), SMALL).unwrap();
    let prompt = random_tokens(40, 3);
    let logits = fixture.plain_all(&prompt);
    // The second time the prompt is in the cache, and is scored all the same.
    for max_tokens in [0, 3] {
        let request = Request { prompt_logprobs: Some(2), ..greedy(prompt.clone(), max_tokens) };
        let (answer, scores) = scored(engine.submit(request).unwrap());
        assert_eq!((answer.tokens.len(), scores.len()), (max_tokens, prompt.len() - 1));
        for (position, score) in scores.iter().enumerate() {
            let logits = &logits[position];
            let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
            assert_close(&[score.logprob], &[logits[prompt[position + 1] as usize] - sum.ln()], 1e-4);
            assert_eq!(score.top.len(), 2);
        }
    }
    let one = Request { prompt_logprobs: Some(0), ..greedy(vec![5], 0) };
    assert!(scored(engine.submit(one).unwrap()).1.is_empty(), "a first token has nothing before it");
}

#[test]
fn an_answer_does_not_end_too_early_and_a_bias_moves_it() {
    let fixture = Fixture::new(PLAIN);
    let engine = Engine::start(fixture.served(), SMALL).unwrap();
    let prompt = random_tokens(9, 4);
    let every: Vec<u32> = (0..63).collect();
    let late = Request { end_tokens: every, min_tokens: 4, ..greedy(prompt.clone(), 20) };
    let found = ask(&engine, late);
    assert_eq!(found.tokens.iter().map(|token| token.id).take(4).collect::<Vec<_>>(), [63; 4]);
    let biased = Request { logit_bias: vec![(17, 100.0)], ..greedy(prompt.clone(), 3) };
    assert!(ask(&engine, biased).tokens.iter().all(|token| token.id == 17));
    let unknown = Request { logit_bias: vec![(64, 1.0)], ..greedy(prompt, 3) };
    assert!(matches!(
        engine.submit(unknown),
        Err(Refusal::Parameter(BadParameter { name: "logit_bias", .. }))
    ));
}

#[test]
fn a_server_that_lets_nobody_wait_still_answers() {
    let engine =
        Engine::start(Fixture::new(PLAIN).served(), EngineOptions { running: 2, waiting: 0, ..SMALL })
            .unwrap();
    for seed in 0..3 {
        assert_eq!(ask(&engine, greedy(random_tokens(5, seed), 3)).tokens.len(), 3);
    }
    let three = vec![greedy(vec![1], 1), greedy(vec![2], 1), greedy(vec![3], 1)];
    assert!(matches!(engine.submit_all(three), Err(Refusal::Busy { .. })), "all or none");
    eventually("nothing of it runs", || metric(&engine, "engram_running_requests") == 0);
}
