//! Rows in a Redis Cluster: right, or an error within the time limit, whatever happens to the cluster.
#![cfg(all(feature = "redis", unix))]
#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engram_address::AddressIdentity;
use engram_store::{RedisTable, Result, RowFormat, RowSource, Storage, Table, TableOrigin};

const ROWS: u64 = 20_000;
const WIDTH: usize = 32;
const LIMIT: Duration = Duration::from_secs(15);

fn origin(identity: u8) -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([identity; 32]), layer: 1 }
}

/// A cluster of its own for a test; none, said loudly, where Redis is not installed.
struct TestCluster {
    folder: PathBuf,
    nodes: Vec<String>,
}

impl TestCluster {
    fn start(first_port: u16) -> Option<Self> {
        if Command::new("redis-server").arg("--version").output().is_err() {
            eprintln!("SKIPPED: redis-server is not installed, so that rows in a cluster are not tested");
            return None;
        }
        let folder = tempfile::tempdir().unwrap().keep();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/redis-cluster");
        let started =
            Command::new(script).arg("start").arg(&folder).arg(first_port.to_string()).output().unwrap();
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        let nodes = String::from_utf8(started.stdout).unwrap().lines().skip(1).map(str::to_owned).collect();
        Some(Self { folder, nodes })
    }

    fn nodes(&self) -> Vec<&str> {
        self.nodes.iter().map(String::as_str).collect()
    }

    /// Runs `redis-cli` on some node.
    fn cli(&self, node: usize, arguments: &str) -> String {
        let port = self.nodes[node].rsplit(':').next().unwrap();
        let output = Command::new("redis-cli").args(["-c", "-p", port]).args(arguments.split(' ')).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    }

    /// The nodes that are masters now, by number.
    fn masters(&self) -> Vec<usize> {
        (0..6).filter(|&node| self.cli(node, "role").starts_with("master")).collect()
    }

    fn signal(&self, node: usize, signal: &str) {
        let port = self.nodes[node].rsplit(':').next().unwrap();
        let pid = std::fs::read_to_string(self.folder.join(port).join("pid")).unwrap();
        assert!(Command::new("kill").args([signal, pid.trim()]).status().unwrap().success());
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/redis-cluster");
        let _ = Command::new(script).arg("stop").arg(&self.folder).status();
    }
}

fn table() -> Table {
    let fill = |id: u64, row: &mut [f32]| {
        row.iter_mut().enumerate().for_each(|(i, value)| *value = (id as f32 + 0.25) * (i as f32 - 7.5));
    };
    Table::from_fn(ROWS, WIDTH, RowFormat::Fp8E4m3, origin(3), &Storage::Ram, fill).unwrap()
}

fn load(cluster: &TestCluster, table: &Table) -> RedisTable {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.table");
    table.save(&path).unwrap();
    let mut rows = 0;
    let loaded = RedisTable::load(&path, &cluster.nodes(), LIMIT, &mut |progress| {
        rows = progress.done;
        ControlFlow::Continue(())
    });
    assert_eq!(rows, ROWS);
    loaded.unwrap()
}

/// The next batch of a linear congruential generator, with repeats.
fn batch(state: &mut u64, count: usize) -> Vec<u64> {
    let mut next = || {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % ROWS
    };
    let mut ids: Vec<u64> = (0..count).map(|_| next()).collect();
    ids[count / 2] = ids[0];
    ids
}

/// Reads `ids`; a result is right, or this panics.
fn read(source: &RedisTable, truth: &Table, ids: &[u64]) -> Result<()> {
    let bytes = source.bytes_per_row();
    let (mut found, mut expected) = (vec![0; ids.len() * bytes], vec![0; ids.len() * bytes]);
    source.read(ids, &mut found)?;
    truth.read(ids, &mut expected).unwrap();
    assert!(found == expected, "a wrong row");
    Ok(())
}

#[test]
fn rows_come_back_as_they_were_loaded_or_not_at_all() {
    let Some(cluster) = TestCluster::start(17_100) else { return };
    let truth = table();
    let missing = RedisTable::open(&cluster.nodes(), &origin(3), LIMIT).unwrap_err().to_string();
    assert!(missing.contains("holds no table, but layer 1"), "{missing}");
    let loaded = load(&cluster, &truth);

    // Any one node is enough to find the others.
    let source = RedisTable::open(&cluster.nodes()[4..5], &origin(3), LIMIT).unwrap();
    assert_eq!((source.rows(), source.width(), source.format()), (ROWS, WIDTH, RowFormat::Fp8E4m3));
    assert_eq!((source.origin(), source.content()), (origin(3), loaded.content()));
    let every: Vec<u64> = (0..ROWS).collect();
    read(&source, &truth, &every).unwrap();
    let mut state = 1;
    for count in [1, 2, 17, 9000] {
        read(&source, &truth, &batch(&mut state, count)).unwrap();
    }
    read(&source, &truth, &[]).unwrap();
    let outside = read(&source, &truth, &[5, ROWS]).unwrap_err().to_string();
    assert!(outside.contains("row 20000, at position 1"), "{outside}");

    // Another table is refused, with both named.
    let other = origin(4);
    let refused = RedisTable::open(&cluster.nodes(), &other, LIMIT).unwrap_err().to_string();
    assert!(refused.contains(&origin(3).to_string()) && refused.contains(&other.to_string()), "{refused}");

    // A slot that moves to another master meanwhile is followed there.
    let (from, to) = (cluster.masters()[0], cluster.masters()[1]);
    let moved: Vec<u64> = (0..ROWS).step_by(50).collect();
    let id = |node| cluster.cli(node, "cluster myid").trim().to_owned();
    let address = cluster.nodes[from].trim_start_matches("redis://").to_owned();
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (from, to) = (id(from), id(to));
            let arguments = ["--cluster", "reshard", &address, "--cluster-from", &from, "--cluster-to", &to];
            let slots = ["--cluster-slots", "1500", "--cluster-yes"];
            let moving = Command::new("redis-cli").args(arguments).args(slots).output().unwrap();
            done.store(true, Ordering::SeqCst);
            assert!(moving.status.success(), "{}", String::from_utf8_lossy(&moving.stdout));
        });
        while !done.load(Ordering::SeqCst) {
            read(&source, &truth, &moved).unwrap();
        }
    });
    read(&source, &truth, &every).unwrap();

    // Values that somebody changed.
    let content = source.content().to_string();
    let key = format!("engram:{}:0", &content[..16]);
    assert_eq!(cluster.cli(0, &format!("setrange {key} 1 x")).trim(), "16317");
    let changed = read(&source, &truth, &[0]).unwrap_err().to_string();
    assert!(changed.contains("row 0") && changed.contains(&key) && changed.contains("checksum"), "{changed}");
    cluster.cli(0, &format!("set {key} short"));
    let cut = read(&source, &truth, &[0]).unwrap_err().to_string();
    assert!(cut.contains("5 bytes where 37 are needed"), "{cut}");
    cluster.cli(0, &format!("del {key}"));
    let gone = read(&source, &truth, &[0]).unwrap_err().to_string();
    assert!(gone.contains("it is missing"), "{gone}");
    read(&source, &truth, &[ROWS - 1]).unwrap();
    // The connections are in order after all this, and loading again repairs the table.
    load(&cluster, &truth);
    read(&source, &truth, &every).unwrap();
}

#[test]
fn a_master_that_dies_or_hangs_under_load_costs_no_row() {
    let Some(cluster) = TestCluster::start(17_200) else { return };
    let truth = table();
    load(&cluster, &truth);
    let source = RedisTable::open(&cluster.nodes(), &origin(3), LIMIT).unwrap();
    let (stop, batches, slowest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (source, truth, stop, batches, slowest) = (&source, &truth, &stop, &batches, &slowest);
            scope.spawn(move || {
                let mut state = thread;
                while !stop.load(Ordering::SeqCst) {
                    let begun = Instant::now();
                    read(source, truth, &batch(&mut state, 200)).unwrap();
                    slowest.fetch_max(begun.elapsed().as_millis() as u64, Ordering::SeqCst);
                    batches.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let more = |what: &str| {
            let (before, begun) = (batches.load(Ordering::SeqCst), Instant::now());
            // Every thread has finished what it had begun, and something since.
            while batches.load(Ordering::SeqCst) < before + 20 {
                assert!(begun.elapsed() < 2 * LIMIT, "no batch after {what}");
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        more("the beginning");
        cluster.signal(cluster.masters()[0], "-KILL");
        more("a master was killed");
        // One that hangs answers nothing and closes nothing.
        cluster.signal(cluster.masters()[0], "-STOP");
        more("a master hung");
        stop.store(true, Ordering::SeqCst);
    });
    let (batches, slowest) = (batches.into_inner(), slowest.into_inner());
    println!("{batches} batches of 200 rows, all right; the slowest took {slowest} ms");
    assert!(u128::from(slowest) < LIMIT.as_millis());
}

#[test]
fn a_cluster_that_is_gone_is_an_error_within_the_limit() {
    let Some(cluster) = TestCluster::start(17_300) else { return };
    let truth = table();
    load(&cluster, &truth);
    let limit = Duration::from_millis(800);
    let source = RedisTable::open(&cluster.nodes(), &origin(3), limit).unwrap();
    read(&source, &truth, &[1, 2, 3]).unwrap();
    (0..6).for_each(|node| cluster.signal(node, "-STOP"));
    let begun = Instant::now();
    let hung = read(&source, &truth, &[1, 5000, 9000]).unwrap_err().to_string();
    assert!(begun.elapsed() < 2 * limit, "{:?}", begun.elapsed());
    assert!(hung.contains("no answer within 800ms"), "{hung}");
    (0..6).for_each(|node| cluster.signal(node, "-CONT"));
    let begun = Instant::now();
    while read(&source, &truth, &[1, 5000, 9000]).is_err() {
        assert!(begun.elapsed() < LIMIT, "it has not recovered");
    }
    (0..6).for_each(|node| cluster.signal(node, "-KILL"));
    let begun = Instant::now();
    let dead = read(&source, &truth, &[1, 5000, 9000]).unwrap_err().to_string();
    assert!(begun.elapsed() < 2 * limit, "{:?}", begun.elapsed());
    assert!(dead.contains("refused") || dead.contains("no node serves"), "{dead}");
}

/// A server that answers everything with `answer`, or not at all.
fn fake(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("redis://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                while matches!(stream.read(&mut request), Ok(1..)) {
                    if stream.write_all(answer).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

#[test]
fn servers_that_are_no_cluster() {
    let limit = Duration::from_millis(400);
    let answers: [&[u8]; 6] = [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+OK\r\n+OK\r\n+OK\r\n",
        b"*1\r\n*3\r\n:0\r\n:99999\r\n*2\r\n$1\r\nh\r\n:7\r\n",
        b"-ERR This instance has cluster support disabled\r\n",
        b"$999999999999\r\n",
    ];
    for answer in answers {
        let address = fake(answer);
        let begun = Instant::now();
        let refused = RedisTable::open(&[&address], &origin(3), limit).unwrap_err().to_string();
        assert!(begun.elapsed() < 3 * limit, "{:?}", begun.elapsed());
        assert!(refused.contains(&address) && refused.contains("layout"), "{refused}");
    }
    let nothing = RedisTable::open(&[], &origin(3), limit).unwrap_err().to_string();
    assert!(nothing.contains("no node is named"), "{nothing}");
    let wrong = RedisTable::open(&["127.0.0.1;7000"], &origin(3), limit).unwrap_err().to_string();
    assert!(wrong.contains("127.0.0.1;7000: not an address"), "{wrong}");
}
