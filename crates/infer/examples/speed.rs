//! How fast a model's file is read into memory, reads a prompt and decodes, and how much memory that takes.
//!
//!     cargo run --release -p engram-infer --example speed -- MODEL [DTYPE [TURNS]]
//!
//! DTYPE is `f32`, `bf16`, `int8` or `file`. Prints a line of JSON; `benches/llama_cpp` sets it beside llama.cpp's.
#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on stops")]

use std::path::Path;
use std::time::Instant;

use engram_infer::{Decoder, Dtype, Engine, EngineOptions, Event, Model, Request, Sampling};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, rest @ ..] = &arguments[..] else { panic!("name a model") };
    let dtype = match rest.first().map_or("file", String::as_str) {
        "f32" => Dtype::F32,
        "bf16" => Dtype::Bf16,
        "int8" => Dtype::Int8,
        "file" => Dtype::File,
        other => panic!("{other}: take f32, bf16, int8 or file"),
    };
    let turns: u32 = rest.get(1).map_or(5, |turns| turns.parse().unwrap());
    let start = Instant::now();
    let model = engram_import::Model::open(Path::new(path)).unwrap();
    let decoder = Decoder::new(&model.config().model, model.weights(), dtype).unwrap();
    let vocabulary = decoder.config().vocabulary as u32;
    let token_bytes = model.tokenizer().all_token_bytes().clone();
    drop(model);
    let (opened, packed) = (start.elapsed().as_secs_f64(), decoder.bytes());
    let options = EngineOptions {
        running: 16,
        drafts: 0,
        prompt_tokens: 512,
        chunk: 512,
        cache_bytes: 256 << 20,
        ..EngineOptions::default()
    };
    let engine = Engine::start(Model { decoder, memories: Vec::new(), token_bytes }, options).unwrap();
    let peak = peak_bytes();
    let prefill = median(turns, |turn| {
        let start = Instant::now();
        finish(engine.submit(greedy(tokens(512, turn, vocabulary), 1)).unwrap());
        512.0 / start.elapsed().as_secs_f64()
    });
    let decode = |at_once: u32| median(turns, |turn| decoding(&engine, at_once, 64, turn, vocabulary));
    let (one, sixteen) = (decode(1), decode(16));
    println!(
        "{{\"opened_s\": {opened:.2}, \"packed_mb\": {:.1}, \"peak_mb\": {:.1}, \"prefill_512\": {prefill:.0}, \
         \"decode_1\": {one:.1}, \"decode_16\": {sixteen:.1}}}",
        packed as f64 / 1e6,
        peak as f64 / 1e6
    );
}

/// Tokens per second of all sequences from the time when all have their first.
fn decoding(engine: &Engine, at_once: u32, count: usize, turn: u32, vocabulary: u32) -> f64 {
    let prompt = |index: u32| tokens(16, 1000 * (turn + 1) + index, vocabulary);
    let mut events: Vec<_> =
        (0..at_once).map(|index| engine.submit(greedy(prompt(index), count)).unwrap()).collect();
    for events in &mut events {
        while !matches!(events.blocking_recv(), Some(Event::Token(_))) {}
    }
    // What the first have been given while the last were waited for does not count.
    events.iter_mut().for_each(|events| while events.try_recv().is_ok() {});
    let start = Instant::now();
    let left: usize = events.into_iter().map(finish).sum();
    left as f64 / start.elapsed().as_secs_f64()
}

fn greedy(prompt: Vec<u32>, count: usize) -> Request {
    Request { sampling: Sampling { temperature: 0.0, ..Sampling::default() }, ..Request::new(prompt, count) }
}

/// Tokens that come.
fn finish(mut events: tokio::sync::mpsc::UnboundedReceiver<Event>) -> usize {
    let mut count = 0;
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Token(_) => count += 1,
            Event::Failed(failure) => panic!("{failure}"),
            _ => {}
        }
    }
    count
}

/// Tokens that differ from turn to turn, so that none is found in the cache.
fn tokens(count: u32, seed: u32, vocabulary: u32) -> Vec<u32> {
    (0..count).map(|at| (seed * 7919 + at * 104_729 + 13) % vocabulary).collect()
}

fn median(turns: u32, measure: impl FnMut(u32) -> f64) -> f64 {
    let mut all: Vec<f64> = (0..turns).map(measure).collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// The most memory that this process has had; 0 where the system does not say.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| 1024 * kib)
}
