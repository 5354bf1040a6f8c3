use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytesize::ByteSize;
use clap::Args;
use engram_address::assign_primes;
use engram_config::load_model_config;
use engram_store::{AddressIdentity, RowFormat, RowSource, Storage, Table, TableOrigin};
use serde::{Deserialize, Serialize};

use crate::commands::addressing::Published;
use crate::commands::{print, print_json};
use crate::device_probe;
use crate::failure::refuse;
use crate::machine::Memory;
use crate::number::{bytes, short};
use crate::random::Random;
use crate::table::Table as TextTable;

/// Show which tiers hold a model's tables on a machine, and how fast their rows come.
///
/// What is not given is measured here: memory with the limits of containers, random reads of RAM, and, with --probe, of a
/// disk. A step of decoding reads the rows of one token of each sequence; a prompt those of all its tokens, of which about
/// half are repeated.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table plan --preset v41 --ram 128GiB --disk-reads 400000
  engram table plan --config configs/quickstart-memory.toml --probe layer1.table
  engram table plan --preset qwen --stats stats.json --ram 16GiB")]
pub(crate) struct Plan {
    /// Tables of a published model.
    #[arg(long, required_unless_present = "config", conflicts_with = "config")]
    preset: Option<Published>,
    /// Tables of this configuration's `[model.memory]`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Layout of a row, if not the preset's, or f32.
    #[arg(long)]
    format: Option<RowFormat>,
    /// Memory for rows; if not given, half of what this machine or its container has.
    #[arg(long, value_name = "SIZE")]
    ram: Option<ByteSize>,
    /// Random 4 KiB reads a second of the disk.
    #[arg(long, value_name = "N", conflicts_with = "probe")]
    disk_reads: Option<f64>,
    /// A large file on the disk, to measure its random reads.
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// Memory of the GPU for rows.
    #[arg(long, value_name = "SIZE")]
    gpu_memory: Option<ByteSize>,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    prompt: u64,
    /// What `engram table stats --json` printed, for the sizes of caches.
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The answer.
#[derive(Debug, Serialize)]
struct Report {
    tables: Vec<PlannedTable>,
    bytes: u64,
    rows_per_token: u64,
    bytes_per_token: u64,
    memory: Memory,
    /// Memory that rows may take.
    ram: u64,
    gpu_memory: Option<u64>,
    /// Random rows a second that one thread reads from RAM, measured.
    ram_rows_per_second: f64,
    disk_reads_per_second: Option<f64>,
    prompt: u64,
    tiers: Vec<TierPlan>,
    caches: Vec<CachePlan>,
}

#[derive(Debug, Serialize)]
struct PlannedTable {
    layer: usize,
    rows: u64,
    bytes: u64,
}

/// What to expect of a tier.
#[derive(Debug, Serialize)]
struct TierPlan {
    tier: &'static str,
    fits: bool,
    /// Seconds that the rows of one token take: half of the time, and 99 % of it.
    token_p50: f64,
    token_p99: f64,
    /// Seconds that the rows of a prompt take.
    prompt_p50: f64,
    /// Tokens a second whose rows one thread reads, at most.
    tokens_per_second: f64,
}

#[derive(Debug, Serialize)]
struct CachePlan {
    bytes: u64,
    /// Share of the look-ups that it serves.
    hit_rate: f64,
    /// Disk reads a token.
    reads_per_token: f64,
}

/// Seconds of one random read of a disk with nothing else to do.
const DISK_LATENCY: f64 = 100e-6;
/// The share of a prompt's rows that are distinct.
const DISTINCT: f64 = 0.5;
/// A 99th percentile over the median, where nothing else is known: as `engram table bench` finds on idle machines.
const TAIL: f64 = 2.0;

/// What a table of a model is like.
struct Shape {
    layers: Vec<(usize, u64)>,
    rows_per_token: u64,
    width: usize,
    format: RowFormat,
}

impl Plan {
    /// Runs the command.
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.prompt == 0 {
            return refuse("--prompt is 0, but must be 1 or more");
        }
        if let Some(reads) = self.disk_reads.filter(|reads| !(*reads > 0.0 && reads.is_finite())) {
            return refuse(format!("--disk-reads is {reads}, but must be above 0"));
        }
        let shape = self.shape()?;
        let caches = self.stats.as_deref().map(hit_rates).transpose()?.unwrap_or_default();
        let memory = Memory::of_this_machine();
        let ram = match (self.ram, memory.usable()) {
            (Some(size), _) => size.as_u64(),
            (None, Some(usable)) => usable / 2,
            (None, None) => return refuse("this system does not tell how much memory it has: give --ram"),
        };
        let disk_reads = match (&self.probe, self.disk_reads) {
            (Some(path), _) => device_probe::random_reads(path, 64, Duration::from_secs(1))?,
            (None, given) => given,
        };
        let row_bytes = shape.format.bytes_per_row(shape.width);
        let ram_rows = measure_ram(&shape, ram)?;
        let tables: Vec<PlannedTable> = shape
            .layers
            .iter()
            .map(|&(layer, rows)| PlannedTable { layer, rows, bytes: rows * row_bytes as u64 })
            .collect();
        let size = tables.iter().map(|table| table.bytes).sum();
        let gpu_memory = self.gpu_memory.map(|size| size.as_u64());
        let mut report = Report {
            bytes: size,
            rows_per_token: shape.rows_per_token,
            bytes_per_token: shape.rows_per_token * row_bytes as u64,
            memory,
            ram,
            gpu_memory,
            ram_rows_per_second: ram_rows,
            disk_reads_per_second: disk_reads,
            prompt: self.prompt,
            tiers: Vec::new(),
            caches: Vec::new(),
            tables,
        };
        report.tiers = report.tiers_of(size);
        report.caches = report.caches_of(&caches);
        if self.json { print_json(&report) } else { print(report.to_text()) }
    }

    fn shape(&self) -> anyhow::Result<Shape> {
        if let Some(path) = &self.config {
            let Some(memory) = load_model_config(path)?.memory else {
                return refuse(format!("{}: its model has no memory (`[model.memory]`)", path.display()));
            };
            let primes = assign_primes(memory.layers.len(), &memory.rows_per_head, memory.heads)?;
            let rows = |primes: &Vec<Vec<u64>>| primes.iter().flatten().sum();
            return Ok(Shape {
                layers: memory.layers.iter().copied().zip(primes.iter().map(rows)).collect(),
                rows_per_token: (memory.layers.len() * memory.heads * (memory.max_order - 1)) as u64,
                width: memory.row_width,
                format: self.format.unwrap_or(RowFormat::F32),
            });
        }
        let Some(preset) = self.preset else { return refuse("name a --preset or a --config") };
        let (config, width, format) = preset.tables();
        let primes = assign_primes(config.layers.len(), &config.base_rows, config.heads)?;
        let rows = |primes: &Vec<Vec<u64>>| primes.iter().flatten().sum();
        Ok(Shape {
            layers: config.layers.iter().copied().zip(primes.iter().map(rows)).collect(),
            rows_per_token: (config.layers.len() * config.heads * config.base_rows.len()) as u64,
            width,
            format: self.format.unwrap_or(format),
        })
    }
}

/// Random rows a second from RAM, of a table as large as is reasonable for a measurement.
fn measure_ram(shape: &Shape, ram: u64) -> anyhow::Result<f64> {
    let row_bytes = shape.format.bytes_per_row(shape.width) as u64;
    let largest = shape.layers.iter().map(|layer| layer.1).max().unwrap_or(1);
    let rows = (ram / 4).min(1 << 28).div_euclid(row_bytes).clamp(1, largest);
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let table = Table::from_fn(rows, shape.width, shape.format, origin, &Storage::Ram, |id, row| {
        row[0] = id as f32;
    })?;
    // As a batch of tokens asks.
    let batch = 64 * shape.rows_per_token as usize;
    let mut random = Random::new(1);
    let (mut ids, mut out) = (vec![0; batch], vec![0.0; batch * shape.width]);
    let (begun, mut read) = (Instant::now(), 0u64);
    let mut inside = Duration::ZERO;
    while begun.elapsed() < Duration::from_millis(500) {
        ids.iter_mut().for_each(|id| *id = random.below(rows));
        let asked = Instant::now();
        table.gather(&ids, &mut out)?;
        inside += asked.elapsed();
        read += batch as u64;
    }
    Ok(read as f64 / inside.as_secs_f64())
}

impl Report {
    fn tiers_of(&self, size: u64) -> Vec<TierPlan> {
        let token = self.rows_per_token as f64;
        let prompt = token * self.prompt as f64;
        let in_memory = |tier, fits| {
            let row = 1.0 / self.ram_rows_per_second;
            TierPlan {
                tier,
                fits,
                token_p50: token * row,
                token_p99: TAIL * token * row,
                prompt_p50: prompt * row,
                tokens_per_second: self.ram_rows_per_second / token,
            }
        };
        let mut tiers = Vec::new();
        if let Some(gpu) = self.gpu_memory {
            tiers.push(in_memory("GPU (as RAM at least)", size <= gpu));
        }
        tiers.push(in_memory("ram", size <= self.ram));
        let share_cold = 1.0 - (self.ram as f64 / size as f64).min(1.0);
        if let Some(reads) = self.disk_reads_per_second {
            // Pages that are missing are read one after another; of a prompt, ahead.
            let mapped = token * (share_cold * DISK_LATENCY + 1.0 / self.ram_rows_per_second);
            tiers.push(TierPlan {
                tier: "mapped",
                fits: true,
                token_p50: mapped,
                token_p99: TAIL * mapped,
                prompt_p50: DISTINCT * prompt * share_cold / reads + prompt / self.ram_rows_per_second,
                tokens_per_second: 1.0 / mapped,
            });
            let direct = DISK_LATENCY + token / reads;
            tiers.push(TierPlan {
                tier: "direct",
                fits: true,
                token_p50: direct,
                token_p99: TAIL * direct,
                prompt_p50: DISTINCT * prompt / reads,
                tokens_per_second: 1.0 / direct,
            });
        }
        tiers
    }

    /// Caches worth having: each serves clearly more than the one before.
    fn caches_of(&self, rates: &[Rate]) -> Vec<CachePlan> {
        let mut caches: Vec<CachePlan> = Vec::new();
        for rate in rates.iter().filter(|rate| rate.bytes <= self.ram) {
            if caches.last().is_none_or(|last| rate.all > last.hit_rate + 0.03) {
                let reads_per_token = self.rows_per_token as f64 * (1.0 - rate.all);
                caches.push(CachePlan { bytes: rate.bytes, hit_rate: rate.all, reads_per_token });
            }
        }
        caches
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        let mut table = TextTable::new(["table", "rows", "size"]);
        for PlannedTable { layer, rows, bytes: size } in &self.tables {
            table.row([format!("layer {layer}"), short(*rows), bytes(*size)]);
        }
        text += &format!("{table}\n");
        text += &format!(
            "{} in all; a token reads {} rows, {}\n{}\nrows may take {}; one thread reads {} random rows/s from RAM\n",
            bytes(self.bytes),
            self.rows_per_token,
            bytes(self.bytes_per_token),
            self.memory,
            bytes(self.ram),
            short(self.ram_rows_per_second as u64),
        );
        match self.disk_reads_per_second {
            Some(reads) => text += &format!("the disk does {} random reads/s\n", short(reads as u64)),
            None => text += "the disk is not known: give --disk-reads, or a file on it with --probe\n",
        }
        let prompt = format!("prompt of {}", self.prompt);
        let mut table = TextTable::new([
            "tier",
            "fits",
            "a token, half within",
            "99 % within",
            prompt.as_str(),
            "tokens/s",
        ]);
        for tier in &self.tiers {
            table.row([
                tier.tier.to_owned(),
                if tier.fits { "yes" } else { "no" }.to_owned(),
                seconds(tier.token_p50),
                seconds(tier.token_p99),
                seconds(tier.prompt_p50),
                short(tier.tokens_per_second as u64),
            ]);
        }
        text += &format!("\n{table}");
        if !self.caches.is_empty() {
            let mut table = TextTable::new(["cache", "found in it", "disk reads a token"]);
            for CachePlan { bytes: size, hit_rate, reads_per_token } in &self.caches {
                table.row([
                    bytes(*size),
                    format!("{:.1} %", 100.0 * hit_rate),
                    format!("{reads_per_token:.1}"),
                ]);
            }
            text += &format!("\n{table}");
        }
        text
    }
}

/// A time in the unit that suits it.
fn seconds(time: f64) -> String {
    match time {
        time if time < 1e-3 => format!("{:.1} µs", time * 1e6),
        time if time < 1.0 => format!("{:.2} ms", time * 1e3),
        time => format!("{time:.2} s"),
    }
}

/// A hit rate of `engram table stats --json`.
#[derive(Debug, Deserialize)]
struct Rate {
    bytes: u64,
    all: f64,
}

fn hit_rates(path: &Path) -> anyhow::Result<Vec<Rate>> {
    #[derive(Deserialize)]
    struct Stats {
        hit_rates: Vec<Rate>,
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    match serde_json::from_str::<Stats>(&text) {
        Ok(stats) => Ok(stats.hit_rates),
        Err(error) => {
            refuse(format!("{}: {error}; give what `engram table stats --json` printed", path.display()))
        }
    }
}
