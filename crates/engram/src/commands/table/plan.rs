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
/// This machine is measured where an option does not say otherwise: memory and the limits of its containers, random reads
/// of RAM, and, with --probe, random reads of a disk. A token is one step of decoding and reads the rows of all layers. A
/// prompt fetches each of its distinct rows once: 88 % of the rows of 4096 tokens of English. The times are for one thread
/// and one sequence.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  engram table plan --preset v41 --ram 128GiB --disk-reads 400000
  engram table plan --config configs/quickstart-memory.toml --probe layer1.table
  engram table plan --preset qwen --stats stats.json --ram 16GiB")]
pub(crate) struct Plan {
    /// Tables of a published model.
    #[arg(long, conflicts_with = "config")]
    preset: Option<Published>,
    /// Tables of this configuration's `[model.memory]`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Layout of a row, if not the preset's, or f32.
    #[arg(long)]
    format: Option<RowFormat>,
    /// Memory for rows: 128GiB. Without it, half of what this machine or its container has.
    #[arg(long, value_name = "SIZE")]
    ram: Option<ByteSize>,
    /// Random 4 KiB reads a second of the disk, with many in flight.
    #[arg(long, value_name = "N", conflicts_with = "probe")]
    disk_reads: Option<f64>,
    /// Microseconds that one read of an idle disk takes.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100.0, conflicts_with = "probe")]
    disk_latency: f64,
    /// A large file on the disk, to measure its random reads and their latency.
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
    disk: Option<Disk>,
    prompt: u64,
    /// Share of a prompt's rows that are distinct.
    distinct: f64,
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

/// Random reads of a disk.
#[derive(Debug, Clone, Copy, Serialize)]
struct Disk {
    /// With many in flight.
    reads_per_second: f64,
    /// Seconds of one read alone: half of the reads take at most this, and 99 %.
    latency_p50: f64,
    latency_p99: f64,
}

/// Reads in flight that the disk is measured with: as many as the direct tier keeps there.
const DEPTH: usize = 128;
/// A 99th percentile over the median, where it is not measured: as `engram table bench` finds on idle machines.
const TAIL: f64 = 2.0;
/// The share of the rows looked up within a number of tokens that are distinct, over orders 2 to 4: English,
/// `docs/results/row-use.md`.
const DISTINCT: [(f64, f64); 5] =
    [(64.0, 0.981), (512.0, 0.940), (4096.0, 0.875), (32_768.0, 0.772), (262_144.0, 0.645)];

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
        if !(self.disk_latency > 0.0 && self.disk_latency.is_finite()) {
            return refuse(format!("--disk-latency is {}, but must be above 0", self.disk_latency));
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
        let disk = self.disk()?;
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
            disk,
            prompt: self.prompt,
            distinct: distinct(self.prompt),
            tiers: Vec::new(),
            caches: Vec::new(),
            tables,
        };
        report.tiers = report.tiers_of(size);
        report.caches = report.caches_of(&caches);
        if self.json { print_json(&report) } else { print(report.to_text()) }
    }

    /// The disk as it is given or measured; none if neither was asked for.
    fn disk(&self) -> anyhow::Result<Option<Disk>> {
        let Some(path) = &self.probe else {
            let latency = self.disk_latency / 1e6;
            return Ok(self.disk_reads.map(|reads_per_second| Disk {
                reads_per_second,
                latency_p50: latency,
                latency_p99: TAIL * latency,
            }));
        };
        let time = Duration::from_secs(1);
        let measured =
            device_probe::read_latency(path, time)?.zip(device_probe::random_reads(path, DEPTH, time)?);
        let Some((latency, reads_per_second)) = measured else {
            return refuse(format!(
                "--probe {}: its file system does not read past the page cache; give --disk-reads",
                path.display()
            ));
        };
        Ok(Some(Disk { reads_per_second, latency_p50: latency.p50, latency_p99: latency.p99 }))
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
            tiers.push(in_memory("GPU (at least as RAM)", size <= gpu));
        }
        tiers.push(in_memory("ram", size <= self.ram));
        if let Some(disk) = self.disk {
            tiers.extend(self.disk_tiers(disk, 1.0 - (self.ram as f64 / size as f64).min(1.0)));
        }
        tiers
    }

    /// The tiers of a file on `disk`, of which a share of the rows is not in memory when it is mapped.
    fn disk_tiers(&self, disk: Disk, cold: f64) -> [TierPlan; 2] {
        let Disk { reads_per_second, latency_p50, latency_p99 } = disk;
        let (token, prompt) = (self.rows_per_token as f64, (self.rows_per_token * self.prompt) as f64);
        let distinct = self.distinct * prompt;
        // A map reads one missing page after another. Slow reads among many even out.
        let missing = token * cold;
        let mapped = token / self.ram_rows_per_second + missing * latency_p50;
        let mapped_tail = mapped + missing.sqrt() * (latency_p99 - latency_p50);
        // The direct tier has the rows of a token in flight at once.
        let direct = latency_p50 + token / reads_per_second;
        [
            TierPlan {
                tier: "mapped",
                fits: true,
                token_p50: mapped,
                token_p99: mapped_tail.max(TAIL * token / self.ram_rows_per_second),
                prompt_p50: prompt / self.ram_rows_per_second + distinct * cold * latency_p50,
                tokens_per_second: 1.0 / mapped,
            },
            TierPlan {
                tier: "direct",
                fits: true,
                token_p50: direct,
                token_p99: latency_p99 + token / reads_per_second,
                prompt_p50: latency_p50 + distinct / reads_per_second,
                tokens_per_second: 1.0 / direct,
            },
        ]
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
        match self.disk {
            Some(disk) => {
                text += &format!(
                    "the disk does {} random reads/s; one alone takes {}, 99 % within {}\n",
                    short(disk.reads_per_second as u64),
                    seconds(disk.latency_p50),
                    seconds(disk.latency_p99)
                );
            }
            None => text += "the disk is unknown: give --disk-reads, or a file on it with --probe\n",
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

/// The share of the rows of `tokens` tokens that are distinct, between the measured lengths by the logarithm of the length.
fn distinct(tokens: u64) -> f64 {
    let tokens = (tokens as f64).max(1.0);
    let (first, last) = (DISTINCT[0], DISTINCT[DISTINCT.len() - 1]);
    if tokens <= first.0 {
        // One token repeats nothing.
        return 1.0 - (1.0 - first.1) * tokens.ln() / first.0.ln();
    }
    let between = DISTINCT.windows(2).find(|pair| tokens <= pair[1].0);
    between.map_or(last.1, |pair| {
        let share = (tokens / pair[0].0).ln() / (pair[1].0 / pair[0].0).ln();
        pair[0].1 + share * (pair[1].1 - pair[0].1)
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ram: u64, disk: Disk) -> Report {
        Report {
            tables: Vec::new(),
            bytes: 1000 << 20,
            rows_per_token: 48,
            bytes_per_token: 48 * 264,
            memory: Memory::of_this_machine(),
            ram,
            gpu_memory: None,
            ram_rows_per_second: 10e6,
            disk: Some(disk),
            prompt: 4096,
            distinct: distinct(4096),
            tiers: Vec::new(),
            caches: Vec::new(),
        }
    }

    #[test]
    fn what_a_tier_takes_follows_from_the_disk() {
        let disk = Disk { reads_per_second: 100e3, latency_p50: 100e-6, latency_p99: 300e-6 };
        // A quarter of the rows is not in memory.
        let report = report(750 << 20, disk);
        let tiers = report.tiers_of(report.bytes);
        let near =
            |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
        let [ram, mapped, direct] = &tiers[..] else { panic!("{tiers:?}") };
        assert!(!ram.fits && mapped.fits && direct.fits);
        near(ram.token_p50, 4.8e-6);
        near(mapped.token_p50, 12.0 * 100e-6 + 4.8e-6);
        near(mapped.token_p99, mapped.token_p50 + 12f64.sqrt() * 200e-6);
        near(direct.token_p50, 100e-6 + 480e-6);
        near(direct.token_p99, 300e-6 + 480e-6);
        near(direct.prompt_p50, 100e-6 + 0.875 * 4096.0 * 48.0 / 100e3);
        near(direct.tokens_per_second, 1.0 / 580e-6);
    }

    #[test]
    fn longer_prompts_repeat_more_of_their_rows() {
        assert_eq!((distinct(1), distinct(64), distinct(4096)), (1.0, 0.981, 0.875));
        assert!((distinct(1448) - 0.9075).abs() < 1e-4, "{}", distinct(1448));
        assert_eq!(distinct(10_000_000), 0.645);
    }
}
