use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use engram_data::TokenShards;
use engram_store::{CacheCounts, RowSource, TableHeader};
use serde::Serialize;

use super::tier::{Tier, TierOptions};
use crate::commands::addressing::{AddressingOptions, Loaded};
use crate::commands::{print, print_json};
use crate::device_probe;
use crate::failure::{Interrupted, refuse};
use crate::interrupt;
use crate::number::{bytes, short};
use crate::option_values;
use crate::random::Random;
use crate::table::Table;

/// Measure how fast a tier delivers a table's rows, for random or real ids.
///
/// A request is a batch of rows, decoded to f32. Its latency is what a caller sees. Each thread makes one request after
/// the other. Large requests are also divided among the threads of RAYON_NUM_THREADS.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table bench layer1.table --tier ram --batch 4096
  engram table bench layer1.table --tier mapped --cold --zipf 1.0
  engram table bench layer1.table --tier direct --depth 32 --batch 32
  engram table bench layer1.table --tier direct --row-cache 1GiB --zipf 1.0
  engram table bench layer1.table --tier redis --node redis://127.0.0.1:7000 --threads 4
  engram table bench layer1.table --data data/valid --preset v41 --tokenizer tokenizer.json --tokens 1")]
pub(crate) struct Bench {
    /// Table file.
    table: PathBuf,
    #[command(flatten)]
    tier: TierOptions,
    /// Rows per request.
    #[arg(long, value_name = "N", default_value_t = 1024, conflicts_with = "data")]
    batch: usize,
    /// Draw ids by Zipf's law with this exponent, instead of uniformly.
    #[arg(long, value_name = "S", conflicts_with = "data")]
    zipf: Option<f64>,
    /// Request the rows that the tokens of these prepared shards need.
    #[arg(long, value_name = "SHARDS")]
    data: Option<PathBuf>,
    /// Tokens per request, with --data: 1 is a decoding step, 4096 a prompt.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "data")]
    tokens: usize,
    #[command(flatten)]
    addressing: AddressingOptions,
    /// Number of threads that make requests.
    #[arg(long, value_name = "N", default_value = "1", value_parser = option_values::threads)]
    threads: usize,
    /// Duration of the measurement in seconds.
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    seconds: f64,
    /// Drop the file from the system's page cache first. Without it, a warm-up of half the duration runs first.
    #[arg(long)]
    cold: bool,
    /// Seed of the ids.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Rows or tokens of a request at most.
const MOST_PER_REQUEST: usize = 1 << 24;

/// The measurements.
#[derive(Debug, Serialize)]
struct Report {
    table: PathBuf,
    rows: u64,
    bytes_per_row: usize,
    tier: Tier,
    /// The tier in words, with its cache.
    #[serde(skip)]
    described: String,
    /// How the direct tier read the file; the system may have refused the requested way.
    path: Option<String>,
    ids: String,
    threads: usize,
    cold: bool,
    seconds: f64,
    requests: u64,
    rows_per_request: f64,
    /// Latencies in microseconds: median, 95th and 99th percentile, maximum.
    p50_us: f64,
    p95_us: f64,
    p99_us: f64,
    longest_us: f64,
    rows_per_second: f64,
    /// Bytes of stored rows delivered.
    bytes_per_second: f64,
    /// The cache's hit rate, from 0 to 1; none without a cache.
    hit_rate: Option<f64>,
    /// Bytes read from disks during the measurement; none if the system does not tell.
    device_bytes: Option<u64>,
    /// Random 4 KiB reads per second of the disk, measured afterwards with as many concurrent reads.
    device_reads_per_second: Option<f64>,
    /// Number of those concurrent reads; none if the tier reads no file.
    device_depth: Option<usize>,
}

/// How ids are chosen.
enum Ids {
    Uniform { rows: u64, batch: usize },
    Zipf { rows: u64, batch: usize, exponent: f64 },
    Real { loaded: Box<Loaded>, layer: usize, shards: TokenShards, tokens: usize },
}

impl Bench {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let header = TableHeader::read(&self.table)?;
        if self.batch == 0 || self.tokens == 0 {
            return refuse("--batch and --tokens must be at least 1");
        }
        for (name, count) in [("batch", self.batch), ("tokens", self.tokens)] {
            if count > MOST_PER_REQUEST {
                return refuse(format!("--{name} is {count}, but must be at most {MOST_PER_REQUEST}"));
            }
        }
        if !(self.seconds > 0.0 && self.seconds <= 86_400.0) {
            return refuse(format!("--seconds is {}, but must be above 0 and at most a day", self.seconds));
        }
        let ids = self.ids(&header)?;
        interrupt::listen()?;
        if self.cold && !device_probe::forget(&self.table)? {
            return refuse("--cold: this system cannot drop a file from its page cache; leave it out");
        }
        let tier = self.tier.open(&self.table, &header)?;
        let source = tier.source.as_ref();
        let time = Duration::from_secs_f64(self.seconds);
        if !self.cold {
            self.drive(source, &ids, time / 2, 1)?;
        }
        let kept_before = tier.counts();
        let read_before = device_probe::bytes_read();
        let begun = Instant::now();
        let requests = self.drive(source, &ids, time, 2)?;
        let seconds = begun.elapsed().as_secs_f64();
        let device_bytes = device_probe::bytes_read().zip(read_before).map(|(after, before)| after - before);
        let mut report = self.report(&header, &ids, requests, seconds);
        report.hit_rate =
            tier.counts().zip(kept_before).map(|(after, before)| since(before, after).hit_rate());
        report.device_bytes = device_bytes;
        report.path = tier.path;
        if let Some(depth) = self.device_depth() {
            let reads = device_probe::random_reads(&self.table, depth, Duration::from_secs(1))?;
            report.device_reads_per_second = reads;
        }
        if self.json { print_json(&report) } else { print(report.to_table().to_string()) }
    }

    fn ids(&self, header: &TableHeader) -> anyhow::Result<Ids> {
        let (rows, batch) = (header.rows, self.batch);
        let Some(path) = &self.data else {
            return match self.zipf {
                None => Ok(Ids::Uniform { rows, batch }),
                Some(exponent) if exponent > 0.0 && exponent <= 10.0 => {
                    Ok(Ids::Zipf { rows, batch, exponent })
                }
                Some(exponent) => refuse(format!("--zipf is {exponent}, but must be above 0 and at most 10")),
            };
        };
        let loaded = self.addressing.load()?;
        if loaded.addressing.identity() != header.origin.identity {
            return refuse(format!(
                "{}: its rows were placed by the addressing {}, not by {}, which the options choose",
                self.table.display(),
                header.origin.identity.short(),
                loaded.addressing.identity().short()
            ));
        }
        let (layer, _) = loaded.layer(Some(header.origin.layer))?;
        let shards = TokenShards::open(path)?;
        shards.check_tokenizer(&loaded.tokenizer)?;
        if shards.len() < self.tokens as u64 {
            return refuse(format!("{}: has {} tokens, not {}", path.display(), shards.len(), self.tokens));
        }
        Ok(Ids::Real { loaded: Box::new(loaded), layer, shards, tokens: self.tokens })
    }

    /// Number of concurrent reads to try the disk with: the tier's own number; none if the tier reads no file.
    fn device_depth(&self) -> Option<usize> {
        self.tier.reads_in_flight().map(|each| (each * self.threads).min(512))
    }

    /// Makes requests from every thread for `time`. Returns latencies and rows of each request.
    fn drive(
        &self,
        source: &dyn RowSource,
        ids: &Ids,
        time: Duration,
        round: u64,
    ) -> anyhow::Result<Vec<(Duration, usize)>> {
        let begun = Instant::now();
        let thread = |number: u64| -> anyhow::Result<Vec<(Duration, usize)>> {
            let mut random = Random::new(self.seed ^ (round << 48) ^ (number << 32));
            let (mut wanted, mut rows, mut requests) = (Vec::new(), Vec::new(), Vec::new());
            // At least one request, however short the time.
            while (requests.is_empty() || begun.elapsed() < time) && !interrupt::asked() {
                ids.next(&mut random, &mut wanted)?;
                rows.resize(wanted.len() * source.width(), 0.0);
                let asked = Instant::now();
                source.gather(&wanted, &mut rows)?;
                requests.push((asked.elapsed(), wanted.len()));
            }
            Ok(requests)
        };
        let requests = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.threads as u64).map(|number| scope.spawn(move || thread(number))).collect();
            let joined = threads.into_iter().map(|thread| match thread.join() {
                Ok(requests) => requests,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect::<anyhow::Result<Vec<_>>>()
        })?;
        if interrupt::asked() {
            return Err(Interrupted(String::new()).into());
        }
        Ok(requests.concat())
    }

    fn report(
        &self,
        header: &TableHeader,
        ids: &Ids,
        requests: Vec<(Duration, usize)>,
        seconds: f64,
    ) -> Report {
        let mut times: Vec<f64> = requests.iter().map(|request| request.0.as_secs_f64() * 1e6).collect();
        times.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).or(times.last()).copied();
        let at = |share: f64| at(share).unwrap_or(f64::NAN);
        let rows: usize = requests.iter().map(|request| request.1).sum();
        let bytes_per_row = header.format.bytes_per_row(header.width);
        Report {
            table: self.table.clone(),
            rows: header.rows,
            bytes_per_row,
            tier: self.tier.kind,
            described: self.tier.name(),
            path: None,
            ids: ids.to_string(),
            threads: self.threads,
            cold: self.cold,
            seconds,
            requests: times.len() as u64,
            rows_per_request: rows as f64 / times.len().max(1) as f64,
            p50_us: at(0.5),
            p95_us: at(0.95),
            p99_us: at(0.99),
            longest_us: at(1.0),
            rows_per_second: rows as f64 / seconds,
            bytes_per_second: (rows * bytes_per_row) as f64 / seconds,
            hit_rate: None,
            device_bytes: None,
            device_reads_per_second: None,
            device_depth: self.device_depth(),
        }
    }
}

impl Ids {
    /// The next request.
    fn next(&self, random: &mut Random, ids: &mut Vec<u64>) -> anyhow::Result<()> {
        ids.clear();
        match self {
            Self::Uniform { rows, batch } => ids.extend((0..*batch).map(|_| random.below(*rows))),
            Self::Zipf { rows, batch, exponent } => {
                ids.extend((0..*batch).map(|_| random.zipf(*rows, *exponent)));
            }
            Self::Real { loaded, layer, shards, tokens } => {
                // A random place of the corpus, with the tokens before it that its first n-grams include.
                let start = random.below(shards.len() - *tokens as u64 + 1);
                let before = start.min(loaded.addressing.max_order() as u64 - 1);
                let text = shards.tokens(start - before..start + *tokens as u64)?;
                loaded.addressing.row_ids(*layer, &text[..], ids)?;
                ids.drain(..before as usize * loaded.addressing.layers()[*layer].slots());
            }
        }
        Ok(())
    }
}

impl fmt::Display for Ids {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform { batch, .. } => write!(out, "{batch} random rows"),
            Self::Zipf { batch, exponent, .. } => {
                write!(out, "{batch} rows by Zipf's law, exponent {exponent}")
            }
            Self::Real { tokens, .. } => write!(out, "the rows of {tokens} tokens of text"),
        }
    }
}

impl Report {
    fn to_table(&self) -> Table {
        let mut table = Table::new([self.table.display().to_string().as_str(), ""]);
        let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
        let size = bytes(self.rows * self.bytes_per_row as u64);
        row("rows", format!("{} of {} bytes: {size}", short(self.rows), self.bytes_per_row));
        row("tier", format!("{}{}", self.described, if self.cold { ", cold" } else { ", warm" }));
        if let Some(path) = &self.path {
            row("read by", path.clone());
        }
        row("a request", self.ids.clone());
        let threads = if self.threads == 1 { "thread" } else { "threads" };
        row("requests", format!("{} from {} {threads}, {:.1} s", self.requests, self.threads, self.seconds));
        row("latency, median", microseconds(self.p50_us));
        row("95th percentile", microseconds(self.p95_us));
        row("99th percentile", microseconds(self.p99_us));
        row("maximum", microseconds(self.longest_us));
        row("rows/s", short(self.rows_per_second as u64));
        row("bytes of rows/s", bytes(self.bytes_per_second as u64));
        if let Some(rate) = self.hit_rate {
            row("hit rate of the cache", format!("{:.1} %", rate * 100.0));
        }
        if let Some(read) = self.device_bytes {
            row("read from disk", bytes(read));
        }
        if let Some((reads, depth)) = self.device_reads_per_second.zip(self.device_depth) {
            let name = format!("random 4 KiB reads/s of the disk, {depth} in flight");
            row(&name, short(reads as u64));
        }
        table
    }
}

/// The cache's counts between `before` and `after`.
fn since(before: CacheCounts, after: CacheCounts) -> CacheCounts {
    CacheCounts {
        hits: after.hits - before.hits,
        misses: after.misses - before.misses,
        fetched: after.fetched - before.fetched,
    }
}

/// A time in the unit that suits it.
fn microseconds(time: f64) -> String {
    match time {
        time if time < 1e3 => format!("{time:.1} µs"),
        time if time < 1e6 => format!("{:.2} ms", time / 1e3),
        time => format!("{:.2} s", time / 1e6),
    }
}
