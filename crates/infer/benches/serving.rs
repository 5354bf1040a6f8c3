//! How fast the engine answers, and what a memory that lives elsewhere costs.
//!
//!     cargo bench -p engram-infer --bench serving -- decode [FORMAT]
//!     cargo bench -p engram-infer --bench serving -- offload FOLDER [SEQUENCES [GIB]]
//!
//! `decode`: a model of the shape of SmolLM2-135M in f32, bf16, int8 or all three; `benches/pytorch/decode.py` does the same in PyTorch.
//! `offload`: a dense backbone whose memory has more than ten times its parameters; FOLDER gets the file of a table of
//! GIB for the direct reads.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use engram_address::{Addressing, Vocabulary};
use engram_config::{ModelConfig, Precision};
use engram_infer::{Decoder, Dtype, Engine, EngineOptions, Event, Model, Request, RowTiers, Sampling};
use engram_model::LanguageModel;
use engram_store::{
    DirectOptions, DirectTable, PrefetchOptions, RowFormat, RowSource, Storage, Table, TableOrigin,
    TableWriter,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::UnboundedReceiver;

#[path = "../tests/common/mod.rs"]
mod common;

use common::weights;

fn main() {
    // `cargo bench` and `cargo test` add options of their own.
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["decode"] => decode(&[Dtype::F32, Dtype::Bf16, Dtype::Int8]),
        ["decode", "f32"] => decode(&[Dtype::F32]),
        ["decode", "bf16"] => decode(&[Dtype::Bf16]),
        ["decode", "int8"] => decode(&[Dtype::Int8]),
        ["offload", folder, sequences @ ..] => {
            let number =
                |index: usize, default| sequences.get(index).map_or(default, |it| it.parse().unwrap());
            offload(Path::new(folder), number(0, 512), number(1, 2) as u64);
        }
        _ => println!("name what to measure: `decode [FORMAT]`, or `offload FOLDER`"),
    }
}

/// The shape of SmolLM2-135M.
const SMALL: &str = r#"
    vocabulary = 49152
    width = 576
    blocks = 30
    context = 2048
    tied_head = true
    attention = { kind = "plain", heads = 9, key_heads = 3, head_width = 64 }
    feed_forward = { width = 1536 }
"#;

fn decode(formats: &[Dtype]) {
    let config: ModelConfig = toml::from_str(SMALL).unwrap();
    let model = LanguageModel::new(&config, &Device::flex(), 1, Precision::F32).unwrap();
    for &format in formats {
        let decoder = Decoder::new(&config, &weights(&model), format).unwrap();
        let bytes = decoder.bytes();
        let model = Model::new(decoder, None, [""; 0].into_iter().collect());
        let options =
            EngineOptions { running: 16, drafts: 0, prompt_tokens: 512, ..EngineOptions::default() };
        let engine = Engine::start(model, options).unwrap();
        println!("{format:?}: {} MB of weights", bytes / 1_000_000);
        let prefill = best(3, |turn| {
            let start = Instant::now();
            finish(engine.submit(greedy(random(512, turn), 1)).unwrap());
            512.0 / start.elapsed().as_secs_f64()
        });
        println!("  prefill, 512 tokens: {prefill:.0} tokens/s");
        for sequences in [1, 16] {
            let speed = best(3, |turn| decoding_speed(&engine, sequences, 64, turn));
            println!("  decoding, {sequences} at once after 128 tokens: {speed:.1} tokens/s");
        }
    }
}

/// Tokens per second of all sequences from the time when all have their first.
fn decoding_speed(engine: &Engine, sequences: usize, tokens: usize, turn: u64) -> f64 {
    let prompt = |index: usize| random(128, 1000 * turn + index as u64);
    let mut events: Vec<_> =
        (0..sequences).map(|index| engine.submit(greedy(prompt(index), tokens)).unwrap()).collect();
    for events in &mut events {
        while !matches!(events.blocking_recv(), Some(Event::Token(_))) {}
    }
    // What the first to come have been given while the last were waited for does not count.
    events.iter_mut().for_each(|events| while events.try_recv().is_ok() {});
    let start = Instant::now();
    let left: usize = events.into_iter().map(|events| finish(events).0).sum();
    left as f64 / start.elapsed().as_secs_f64()
}

/// A dense backbone of 137 million parameters, and four rows of half a kilobyte for each token.
fn offloaded(rows_per_head: u64) -> ModelConfig {
    toml::from_str(&format!(
        r#"
        vocabulary = 8192
        width = 1024
        blocks = 10
        context = 1024
        tied_head = true
        attention = {{ kind = "latent", heads = 16, latent_rank = 256, content_width = 64, rotary_width = 32, value_width = 64 }}
        feed_forward = {{ width = 3072 }}
        memory = {{ layers = [1], max_order = 3, heads = 2, row_width = {ROW_WIDTH}, rows_per_head = [{rows_per_head}, {rows_per_head}] }}
        "#
    ))
    .unwrap()
}

/// Values of a row, in f32.
const ROW_WIDTH: usize = 128;
/// Sequences that are submitted together. Few: a machine that others share changes its speed by several per cent within
/// seconds, so that ways are compared best in short turns.
const AT_ONCE: usize = 8;
/// Rows per head of a table that fits the processor's caches, and of one of 2 GiB.
const FEW: u64 = 1_000;
const MANY: u64 = 1_000_000;

fn offload(folder: &Path, sequences: usize, gib: u64) {
    let (small, large) = (table_in_ram(FEW), table_in_ram(MANY));
    let on_disk = (gib << 30) / (4 * 4 * ROW_WIDTH as u64);
    let direct = table_on_disk(on_disk, &folder.join("offload.table"));
    let requests = requests(sequences);
    let total: usize = requests.iter().map(|request| request.prompt.len() + request.max_tokens).sum();
    println!("{sequences} sequences, {total} tokens in all");
    let ways: [(&str, u64, &Arc<dyn RowSource>, bool); 5] = [
        ("a table that fits the cache", FEW, &small, false),
        ("RAM, prefetched", MANY, &large, false),
        ("RAM, read in the forward pass", MANY, &large, true),
        ("direct, prefetched", on_disk, &direct, false),
        ("direct, read in the forward pass", on_disk, &direct, true),
    ];
    let engines =
        ways.each_ref().map(|(_, rows, source, on_demand)| engine(*rows, Arc::clone(source), *on_demand));
    let mut found: [Found; 5] = Default::default();
    // In turn, and each way now first, now last, so that what else happens on the machine happens to all; what is to be
    // avoided, every eighth time.
    for (turn, part) in requests.chunks(AT_ONCE).enumerate() {
        let mut seconds = [None; 5];
        for way in (0..5).map(|way| (way + turn) % 5) {
            let (.., on_demand) = ways[way];
            if on_demand && turn % 8 > 0 {
                continue;
            }
            let start = Instant::now();
            let submit = |request: &Request| engines[way].submit(request.clone()).unwrap();
            let events: Vec<_> = part.iter().map(submit).collect();
            found[way].wait += events.into_iter().map(|events| finish(events).1).sum::<Duration>();
            seconds[way] = Some(start.elapsed().as_secs_f64());
        }
        let tokens = part.iter().map(|it| it.prompt.len() + it.max_tokens).sum();
        for (found, own) in found.iter_mut().zip(seconds) {
            if let (Some(own), Some(first)) = (own, seconds[0]) {
                found.add((part.len(), tokens), own, first);
            }
        }
        let done = turn * AT_ONCE + part.len();
        if turn % 16 == 15 || done == sequences {
            println!("after {done} sequences");
            found.iter().zip(&ways).for_each(|(found, (name, ..))| println!("{name:34} {found}"));
        }
    }
}

/// What one way of having rows has done.
#[derive(Default)]
struct Found {
    sequences: usize,
    tokens: usize,
    seconds: f64,
    /// Speed as a part of the first way's, part by part.
    relative: Vec<f64>,
    wait: Duration,
}

impl Found {
    fn add(&mut self, (sequences, tokens): (usize, usize), seconds: f64, first: f64) {
        self.sequences += sequences;
        self.tokens += tokens;
        self.seconds += seconds;
        self.relative.push(first / seconds);
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.relative.len() as f64;
        let mean = self.relative.iter().sum::<f64>() / count;
        let variance = self.relative.iter().map(|it| (it - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let (speed, error) = (self.tokens as f64 / self.seconds, (variance / count).sqrt());
        let wait = self.wait.as_secs_f64() / self.sequences as f64;
        write!(
            f,
            "{:4} sequences  {speed:7.1} tokens/s  {mean:.4} ± {error:.4} of the first  {wait:.4} s waited per request",
            self.sequences
        )
    }
}

fn addressing(config: &ModelConfig) -> Addressing {
    let memory = config.memory.as_ref().unwrap();
    Addressing::new(&memory.addressing(), Vocabulary::identity(config.vocabulary)).unwrap()
}

/// Rows of the model's memory with so many per head, and what their table is called.
fn rows_and_origin(rows_per_head: u64) -> (u64, TableOrigin) {
    let addressing = addressing(&offloaded(rows_per_head));
    let layer = &addressing.layers()[0];
    let rows = layer.rows();
    println!("table of {rows} rows, {:.2} GB", (rows * 4 * ROW_WIDTH as u64) as f64 / 1e9);
    (rows, TableOrigin { identity: addressing.identity(), layer: layer.layer() as u64 })
}

fn fill(id: u64, row: &mut [f32]) {
    row.iter_mut().zip(0..).for_each(|(value, i)| {
        *value = ((id.wrapping_mul(0x9e37_79b9) ^ i) % 1000) as f32 / 1000.0 - 0.5;
    });
}

fn table_in_ram(rows_per_head: u64) -> Arc<dyn RowSource> {
    let (rows, origin) = rows_and_origin(rows_per_head);
    Arc::new(Table::from_fn(rows, ROW_WIDTH, RowFormat::F32, origin, &Storage::Ram, fill).unwrap())
}

fn table_on_disk(rows_per_head: u64, path: &Path) -> Arc<dyn RowSource> {
    let (rows, origin) = rows_and_origin(rows_per_head);
    if path.exists() {
        // Of an earlier time, or of another size, which opening it finds.
        return Arc::new(DirectTable::open(path, &origin, &DirectOptions::default()).unwrap());
    }
    let mut writer = TableWriter::create(path, rows, ROW_WIDTH, RowFormat::F32, origin).unwrap();
    let mut some = Vec::new();
    for first in (0..rows).step_by(1 << 16) {
        some.resize((rows - first).min(1 << 16) as usize * ROW_WIDTH, 0.0);
        some.chunks_exact_mut(ROW_WIDTH).zip(first..).for_each(|(row, id)| fill(id, row));
        writer.push(&some).unwrap();
    }
    writer.finish().unwrap();
    Arc::new(DirectTable::open(path, &origin, &DirectOptions::default()).unwrap())
}

fn engine(rows_per_head: u64, source: Arc<dyn RowSource>, on_demand: bool) -> Engine {
    let config = offloaded(rows_per_head);
    let model = LanguageModel::new(&config, &Device::flex(), 1, Precision::F32).unwrap();
    let tiers = RowTiers::new(addressing(&config), vec![source], &PrefetchOptions::default()).unwrap();
    let rows = Some(if on_demand { tiers.on_demand() } else { tiers });
    let decoder = Decoder::new(&config, &weights(&model), Dtype::F32).unwrap();
    let options = EngineOptions { running: AT_ONCE, waiting: 1000, drafts: 0, ..EngineOptions::default() };
    Engine::start(Model::new(decoder, rows, [""; 0].into_iter().collect()), options).unwrap()
}

/// Sequences of 100 to 1024 tokens, of which up to 64 are generated. All tokens are random: hardly a row comes twice.
fn requests(count: usize) -> Vec<Request> {
    let mut random_length = ChaCha8Rng::seed_from_u64(9);
    let request = |index: usize| {
        let length = random_length.random_range(100..=1024);
        let generated = random_length.random_range(16..=64);
        let tokens = random(length - generated, index as u64).iter().map(|token| token % 8192).collect();
        greedy(tokens, generated)
    };
    (0..count).map(request).collect()
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        ..Request::new(prompt, max_tokens)
    }
}

fn random(count: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(0..49152)).collect()
}

/// Tokens that still came, and the time waited for rows.
fn finish(mut events: UnboundedReceiver<Event>) -> (usize, Duration) {
    let mut tokens = 0;
    loop {
        match events.blocking_recv().unwrap() {
            Event::Token(_) => tokens += 1,
            Event::Gates(_) | Event::PromptLogprobs(_) => {}
            Event::Done(summary) => return (tokens, summary.row_wait),
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
}

fn best(turns: u64, mut measure: impl FnMut(u64) -> f64) -> f64 {
    (0..turns).map(&mut measure).fold(0.0, f64::max)
}
