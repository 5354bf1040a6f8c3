//! Random rows of a table on disk through `DirectTable`, each inside one page of 4 KiB, next to random reads of
//! 4 KiB of the same file by `fio`, in pairs.
//!
//! ```text
//! cargo run --release -p engram-store --example direct_speed -- create FILE GIB
//! cargo run --release -p engram-store --example direct_speed -- compare FILE [SECONDS [PAIRS]]
//! ```
//!
//! Any table file will do for `compare`, if it is larger than the machine's memory; it needs `fio` 3 on the path.

use std::process::Command;
use std::time::Instant;

use engram_store::{
    AddressIdentity, DirectOptions, DirectTable, RowFormat, RowSource, Table, TableHeader, TableOrigin,
    TableWriter,
};

const WIDTH: usize = 1024;
const ROW_BYTES: usize = 4 * WIDTH;

type Error = Box<dyn std::error::Error>;

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 }
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["create", path, gib] => create(path, gib.parse()?),
        ["compare", path] => compare(path, 5.0, 5),
        ["compare", path, seconds] => compare(path, seconds.parse()?, 5),
        ["compare", path, seconds, pairs] => compare(path, seconds.parse()?, pairs.parse()?),
        _ => Err("create FILE GIB | compare FILE [SECONDS [PAIRS]]".into()),
    }
}

/// A table whose row `id` holds `id`, as a `u64`, everywhere.
fn create(path: &str, gib: u64) -> Result<(), Error> {
    let rows = (gib << 30) / ROW_BYTES as u64;
    let mut writer = TableWriter::create(path, rows, WIDTH, RowFormat::F32, origin())?;
    let mut chunk = vec![0; 256 * ROW_BYTES];
    for first in (0..rows).step_by(256) {
        for (id, row) in (first..rows).zip(chunk.chunks_exact_mut(ROW_BYTES)) {
            row.chunks_exact_mut(8).for_each(|eight| eight.copy_from_slice(&id.to_le_bytes()));
        }
        writer.push_encoded(&chunk[..(rows - first).min(256) as usize * ROW_BYTES])?;
    }
    writer.finish()?;
    Ok(())
}

fn compare(path: &str, seconds: f64, pairs: usize) -> Result<(), Error> {
    let origin = TableHeader::read(path)?.origin;
    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ u64::from(std::process::id()));
    for depth in [1, 32, 128] {
        let options = DirectOptions::default().depth(depth);
        let table = DirectTable::open(path, &origin, &options)?;
        if depth == 1 {
            println!("{} rows of {} bytes, by {}", table.rows(), table.bytes_per_row(), table.path_in_use());
            check(&table, &Table::open(path, &origin)?, &mut random)?;
        }
        let mut ratios = Vec::new();
        for _ in 0..pairs {
            let ours = reads_per_second(&table, depth, seconds, &mut random)?;
            let fio = fio(path, depth, seconds)?;
            println!("depth {depth}: {ours:.0} reads/s, fio {fio:.0}, ratio {:.3}", ours / fio);
            ratios.push(ours / fio);
        }
        ratios.sort_by(f64::total_cmp);
        println!("depth {depth}: median ratio {:.3}", ratios[pairs / 2]);
    }
    Ok(())
}

struct Random(u64);

impl Random {
    /// A random row that lies inside one page.
    fn row(&mut self, table: &impl RowSource) -> u64 {
        let row_bytes = table.bytes_per_row() as u64;
        loop {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let id = self.0 % table.rows();
            if id * row_bytes / 4096 == ((id + 1) * row_bytes - 1) / 4096 {
                return id;
            }
        }
    }
}

fn check(direct: &DirectTable, mapped: &Table, random: &mut Random) -> Result<(), Error> {
    let ids: Vec<u64> = (0..1000).map(|_| random.row(direct)).collect();
    let mut rows = [0, 1].map(|byte| vec![byte; ids.len() * direct.bytes_per_row()]);
    direct.read(&ids, &mut rows[0])?;
    mapped.read(&ids, &mut rows[1])?;
    assert!(rows[0] == rows[1], "rows of the mapped table");
    Ok(())
}

fn reads_per_second(
    table: &DirectTable,
    depth: usize,
    seconds: f64,
    random: &mut Random,
) -> Result<f64, Error> {
    let batch = 64 * depth;
    let (mut ids, mut out) = (vec![0; batch], vec![0; batch * table.bytes_per_row()]);
    let (start, mut reads) = (Instant::now(), 0);
    while start.elapsed().as_secs_f64() < seconds {
        ids.fill_with(|| random.row(table));
        table.read(&ids, &mut out)?;
        reads += batch;
    }
    Ok(reads as f64 / start.elapsed().as_secs_f64())
}

fn fio(path: &str, depth: usize, seconds: f64) -> Result<f64, Error> {
    let run = Command::new("fio")
        .args(["--name=row", "--ioengine=io_uring", "--direct=1", "--rw=randread", "--bs=4k", "--time_based"])
        .args(["--norandommap", "--randrepeat=0", "--registerfiles=1", "--fixedbufs=1", "--readonly"])
        .args([format!("--filename={path}"), format!("--iodepth={depth}"), format!("--runtime={seconds}s")])
        .args(["--output-format=terse", "--terse-version=3"])
        .output()?;
    let text = String::from_utf8(run.stdout)?;
    // The eighth field of a terse line is reads a second.
    let rate = text.lines().find(|line| line.starts_with("3;")).and_then(|line| line.split(';').nth(7));
    let rate = rate.ok_or_else(|| format!("fio: {text}{}", String::from_utf8_lossy(&run.stderr)))?;
    Ok(rate.parse()?)
}
