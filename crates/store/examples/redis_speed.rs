//! Rows a second from a Redis Cluster, in batches of several sizes, by one thread and by four.
//!
//! ```text
//! scripts/redis-cluster start
//! cargo run --release -p engram-store --features redis --example redis_speed -- redis://127.0.0.1:7100
//! redis-benchmark -p 7100 --cluster -t get -d 264 -r 1000000 -n 1000000 -c 4 -P 512
//! ```
//!
//! Loads a table of a million rows of 264 bytes (fp8, 256 values) and reads random rows of it.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use engram_store::{
    AddressIdentity, RedisTable, RowFormat, RowSource, Storage, StoreError, Table, TableOrigin,
};

const ROWS: u64 = 1_000_000;
const WIDTH: usize = 256;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(node) = std::env::args().nth(1) else {
        return Err("name a node of the cluster, such as redis://127.0.0.1:7100".into());
    };
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
    let limit = Duration::from_secs(10);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("million.table");
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    Table::from_fn(ROWS, WIDTH, RowFormat::Fp8E4m3, origin, &Storage::Ram, fill)?.save(&path)?;
    let begun = Instant::now();
    let table = RedisTable::load(&path, &[&node], limit, &mut |_| ControlFlow::Continue(()))?;
    println!("loaded in {:.1} s", begun.elapsed().as_secs_f64());
    println!("{:>6} {:>8} {:>12} {:>10} {:>10}", "batch", "threads", "rows/s", "p50 ms", "p99 ms");
    for threads in [1, 4] {
        for batch in [16, 512, 8192] {
            report(&table, threads, batch)?;
        }
    }
    Ok(())
}

/// Reads from several threads, and prints a line.
fn report(table: &RedisTable, threads: u64, batch: usize) -> Result<(), Box<dyn std::error::Error>> {
    let begun = Instant::now();
    let times = std::thread::scope(|scope| {
        let running: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || reads(table, thread, batch))).collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")).collect::<Vec<_>>()
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut sorted = Vec::new();
    for times in times {
        sorted.extend(times??);
    }
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| 1e3 * sorted[(share * (sorted.len() - 1) as f64) as usize];
    let rows = (sorted.len() * batch) as f64 / seconds;
    println!("{batch:>6} {threads:>8} {rows:>12.0} {:>10.2} {:>10.2}", at(0.5), at(0.99));
    Ok(())
}

/// Seconds that each batch of random rows took, over two seconds.
fn reads(table: &RedisTable, seed: u64, batch: usize) -> Result<Vec<f64>, StoreError> {
    let mut state = seed;
    let mut out = vec![0; batch * table.bytes_per_row()];
    let (mut times, begun) = (Vec::new(), Instant::now());
    while begun.elapsed() < Duration::from_secs(2) {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % ROWS
        };
        let ids: Vec<u64> = (0..batch).map(|_| next()).collect();
        let start = Instant::now();
        table.read(&ids, &mut out)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(times)
}
