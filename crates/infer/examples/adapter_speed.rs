//! What an adapter costs while a model decodes, one sequence, token by token.
//!
//!     cargo run --release -p engram-infer --example adapter_speed -- MODEL [TOKENS [FOLDER]]
//!
//! MODEL is anything that `engram serve` opens and that has no memory. The adapter has two memory layers in V4.1's form,
//! 2- and 3-grams with 8 heads each and rows of 64 values. Rows are zero (a fresh adapter), or random in RAM, or in a
//! file in FOLDER that is read past the system's memory. Base and adapter take turns, a few tokens each, so that both
//! see the same machine; the ratio is that of the medians.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engram_config::{MemoryConfig, MemoryForm};
use engram_import::testing::{memory, memory_weights};
use engram_import::{Model, memory_addressing};
use engram_infer::{Cache, Chunk, Decoder, Dtype, Needed, Root, RowIds, RowTiers, Sequence};
use engram_store::{
    DirectOptions, DirectTable, PrefetchOptions, RowFormat, RowSource, Storage, Table, TableOrigin,
    TableWriter, ZeroRows,
};

/// Tokens that one of the two decodes before it is the other's turn.
const TURN: usize = 8;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(path) = arguments.first() else {
        println!("name a model");
        return;
    };
    let tokens: usize = arguments.get(1).map_or(256, |count| count.parse().unwrap());
    let model = Model::open(Path::new(path)).unwrap();
    let config = &model.config().model;
    let mut decoder = Decoder::new(config, model.weights(), Dtype::File).unwrap();
    let memory = MemoryConfig {
        layers: vec![1, config.blocks / 2],
        heads: 8,
        row_width: 64,
        rows_per_head: vec![20_000, 20_000],
        pad_id: model.tokenizer().end_of_text(),
        ..memory(MemoryForm::V41)
    };
    decoder.add_memory(&memory, &memory_weights(&memory, config.width, 1)).unwrap();
    let addressing = memory_addressing(&memory, model.tokenizer()).unwrap();
    let origins = || {
        let identity = addressing.identity();
        addressing
            .layers()
            .iter()
            .map(move |layer| (layer.rows(), TableOrigin { identity, layer: layer.layer() as u64 }))
    };
    let fill = |id: u64, row: &mut [f32]| {
        row.iter_mut().enumerate().for_each(|(i, value)| *value = ((id as f32) * 0.37 + i as f32).sin());
    };
    let tiers = |sources: Vec<Arc<dyn RowSource>>| {
        RowTiers::new(addressing.clone(), sources, &PrefetchOptions::default()).unwrap()
    };

    let zeros = origins().map(|(rows, origin)| Arc::new(ZeroRows::new(rows, 64, origin).unwrap()) as Arc<_>);
    let zeros = RowTiers::near(addressing.clone(), zeros.collect()).unwrap();
    compare("rows of zero", &decoder, &zeros, tokens);

    let in_ram = origins().map(|(rows, origin)| {
        let table = Table::from_fn(rows, 64, RowFormat::Bf16, origin, &Storage::Ram, fill);
        Arc::new(table.unwrap()) as Arc<dyn RowSource>
    });
    compare("rows in RAM", &decoder, &tiers(in_ram.collect()), tokens);

    let Some(folder) = arguments.get(2) else { return };
    let on_disk = origins().map(|(rows, origin)| {
        let path = Path::new(folder).join(format!("layer{}.table", origin.layer));
        let mut writer = TableWriter::create(&path, rows, 64, RowFormat::Bf16, origin).unwrap();
        writer.fill(fill, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        writer.finish().unwrap();
        Arc::new(DirectTable::open(&path, &origin, &DirectOptions::default()).unwrap()) as Arc<dyn RowSource>
    });
    compare("rows on disk", &decoder, &tiers(on_disk.collect()), tokens);
}

/// One sequence that is decoded.
struct Line<'a> {
    decoder: &'a Decoder,
    tiers: Option<&'a RowTiers>,
    cache: Cache,
    sequence: Sequence,
    tokens: Vec<u32>,
    history: engram_address::History,
    times: Vec<Duration>,
}

impl<'a> Line<'a> {
    fn new(decoder: &'a Decoder, tiers: &'a RowTiers, reads: bool) -> Self {
        let mut cache = Cache::new(decoder.cache_layout(16), 200);
        let root = if reads { Root::Memory(0) } else { Root::NoMemory };
        let sequence = cache.begin(root, &[]);
        let (history, tiers) = (tiers.addressing().history(), reads.then_some(tiers));
        Self { decoder, tiers, cache, sequence, tokens: Vec::new(), history, times: Vec::new() }
    }

    fn next(&mut self) {
        let token = (self.tokens.len() as u32 * 7919 + 13) % self.decoder.config().vocabulary as u32;
        let begun = Instant::now();
        let mut rows = Vec::new();
        if let Some(tiers) = self.tiers {
            let mut ids = RowIds::default();
            ids.add(&mut self.history, &[token], tiers).unwrap();
            rows.push(tiers.fetch(ids, Needed::Now).unwrap());
        }
        self.cache.reserve(&mut self.sequence, 1).unwrap();
        let memory = self.tiers.map(|_| 0);
        let chunk = Chunk { sequence: &self.sequence, tokens: &[token], memory, logits: 1, targets: &[] };
        self.decoder.step(&mut self.cache, &[chunk], &mut rows).unwrap();
        self.times.push(begun.elapsed());
        self.tokens.push(token);
        self.cache.commit(&mut self.sequence, self.tokens.len(), &self.tokens);
    }

    fn median(&mut self) -> f64 {
        self.times.sort();
        self.times[self.times.len() / 2].as_secs_f64()
    }
}

fn compare(name: &str, decoder: &Decoder, tiers: &RowTiers, tokens: usize) {
    let (mut base, mut adapter) = (Line::new(decoder, tiers, false), Line::new(decoder, tiers, true));
    let pool = rayon::ThreadPoolBuilder::new().build().unwrap();
    pool.install(|| {
        for _ in 0..tokens.div_ceil(TURN) {
            (0..TURN).for_each(|_| base.next());
            (0..TURN).for_each(|_| adapter.next());
        }
    });
    let (base, adapter) = (base.median(), adapter.median());
    println!(
        "{name}: base {:.2} ms a token, with the adapter {:.2} ms: {:.3} of the base's speed",
        1e3 * base,
        1e3 * adapter,
        base / adapter
    );
}
