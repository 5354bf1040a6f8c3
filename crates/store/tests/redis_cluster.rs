//! Rows in a Redis Cluster: right, or an error within the time limit, whatever happens to the cluster.
#![cfg(all(feature = "redis", unix))]
#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engram_store::{AddressIdentity, RedisTable, Result, RowFormat, RowSource, Storage, Table, TableOrigin};

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
            // Past the harness, which shows what a test prints only where it fails.
            let said = b"SKIPPED: redis-server is not installed, so that rows in a cluster are not tested\n";
            std::io::stderr().write_all(said).unwrap();
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

/// A cluster of one node that holds the f32 table `file`, and answers the commands in `slow` one byte at a time, so many
/// milliseconds apart. Each `GETRANGE` takes `row` milliseconds more.
struct SlowNode {
    file: Vec<u8>,
    slow: &'static [&'static str],
    byte: u64,
    row: u64,
}

impl SlowNode {
    fn start(self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let node = std::sync::Arc::new(self);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (node, stream) = (std::sync::Arc::clone(&node), stream.unwrap());
                // Until the client has had enough.
                std::thread::spawn(move || node.serve(stream, port));
            }
        });
        format!("redis://127.0.0.1:{port}")
    }

    fn serve(&self, stream: TcpStream, port: u16) -> Option<()> {
        let (mut requests, mut stream) = (BufReader::new(stream.try_clone().ok()?), stream);
        stream.set_nodelay(true).ok()?;
        loop {
            let words = Self::request(&mut requests)?;
            let name = String::from_utf8(words[0].clone()).ok()?;
            let answer = self.answer(&name, &words, port);
            if !self.slow.contains(&name.as_str()) {
                stream.write_all(&answer).ok()?;
                continue;
            }
            for byte in answer {
                std::thread::sleep(Duration::from_millis(self.byte));
                stream.write_all(&[byte]).ok()?;
            }
        }
    }

    fn request(requests: &mut BufReader<TcpStream>) -> Option<Vec<Vec<u8>>> {
        fn number(requests: &mut BufReader<TcpStream>) -> Option<usize> {
            let mut line = String::new();
            requests.read_line(&mut line).ok()?;
            line.get(1..)?.trim().parse().ok()
        }
        let words = number(requests)?;
        let mut word = || {
            let length = number(requests)?;
            let mut word = vec![0; length + 2];
            requests.read_exact(&mut word).ok()?;
            word.truncate(length);
            Some(word)
        };
        (0..words).map(|_| word()).collect()
    }

    fn answer(&self, name: &str, words: &[Vec<u8>], port: u16) -> Vec<u8> {
        let bulk = |bytes: &[u8]| [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
        let number = |word: &[u8]| std::str::from_utf8(word).unwrap().parse::<u64>().unwrap();
        match name {
            "CLUSTER" => {
                format!("*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:{port}\r\n").into_bytes()
            }
            "GET" => bulk(&self.file[..4096]),
            "GETRANGE" => {
                std::thread::sleep(Duration::from_millis(self.row));
                let row_bytes = 4 * WIDTH as u64;
                let value = number(words[1].rsplit(|&byte| byte == b':').next().unwrap());
                let per_value = ((16 << 10) - 32) / (row_bytes + 4);
                let id = value * per_value + number(&words[2]) / (row_bytes + 4);
                let row = &self.file[(4096 + id * row_bytes) as usize..][..row_bytes as usize];
                let sum = crc32fast::hash(&[&id.to_le_bytes()[..], row].concat());
                bulk(&[row, &sum.to_le_bytes()].concat())
            }
            _ => b"+OK\r\n".to_vec(),
        }
    }
}

/// However slowly a node answers, byte by byte or row by row, and whatever it was asked: an error within the limit.
#[test]
fn the_limit_is_one_for_the_whole_request() {
    const LIMIT: Duration = Duration::from_secs(2);
    const AT_MOST: Duration = Duration::from_millis(2500);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.table");
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let truth = Table::from_fn(1000, WIDTH, RowFormat::F32, origin(3), &Storage::Ram, fill).unwrap();
    truth.save(&path).unwrap();
    let file = std::fs::read(&path).unwrap();
    let ids: Vec<u64> = (0..64).map(|i| i * 13 % 1000).collect();
    let node = |slow, byte, row| SlowNode { file: file.clone(), slow, byte, row }.start();
    let read = |address: &str| {
        let source = RedisTable::open(&[address], &origin(3), LIMIT)?;
        let begun = Instant::now();
        let result = read(&source, &truth, &ids);
        assert!(begun.elapsed() < AT_MOST, "{:?}", begun.elapsed());
        result
    };
    read(&node(&[], 0, 0)).unwrap();
    std::thread::scope(|scope| {
        for (slow, byte, row) in [
            (&["GETRANGE"][..], 100, 0),
            (&["GETRANGE"], 5, 0),
            (&[], 0, 300),
            (&["GET"], 100, 0),
            (&["CLUSTER"], 400, 0),
        ] {
            let address = node(slow, byte, row);
            scope.spawn(move || {
                let begun = Instant::now();
                let late = read(&address).unwrap_err().to_string();
                assert!(begun.elapsed() < AT_MOST, "{slow:?}: {:?}", begun.elapsed());
                assert!(late.contains(&address), "{slow:?}: {late}");
            });
        }
    });
}

/// Keys in all of the cluster.
fn keys(cluster: &TestCluster) -> usize {
    cluster
        .masters()
        .into_iter()
        .map(|node| cluster.cli(node, "dbsize").trim().parse::<usize>().unwrap())
        .sum()
}

#[test]
fn what_is_removed_leaves_nothing_and_hurts_no_other_table() {
    let Some(cluster) = TestCluster::start(17_400) else { return };
    let nodes = cluster.nodes();
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, identity: u8, factor: f32| {
        let fill = |id: u64, row: &mut [f32]| row.fill(factor * id as f32);
        let table =
            Table::from_fn(ROWS, WIDTH, RowFormat::F32, origin(identity), &Storage::Ram, fill).unwrap();
        let path = folder.path().join(name);
        table.save(&path).unwrap();
        (path, table)
    };
    let go_on = &mut |_| ControlFlow::Continue(());
    let ((first, _), (second, new), (other, kept)) =
        (save("a", 3, 1.0), save("b", 3, 2.0), save("c", 4, 3.0));
    let old = RedisTable::load(&first, &nodes, LIMIT, go_on).unwrap();
    let of_one = keys(&cluster);
    RedisTable::load(&second, &nodes, LIMIT, go_on).unwrap();
    RedisTable::load(&other, &nodes, LIMIT, go_on).unwrap();
    // One whose loading is given up on.
    let (given_up, _) = save("d", 3, 4.0);
    let mut reports = 0;
    let stopped = RedisTable::load(&given_up, &nodes, LIMIT, &mut |_| {
        reports += 1;
        ControlFlow::Break(())
    });
    assert!(stopped.is_err() && reports == 1);

    let contents = RedisTable::contents(&nodes, &origin(3), LIMIT).unwrap();
    assert_eq!(contents.iter().map(|content| content.offered).collect::<Vec<_>>(), [true, false, false]);
    let every: Vec<u64> = (0..ROWS).step_by(7).collect();
    let mut rows = vec![0.0; every.len() * WIDTH];
    old.gather(&every, &mut rows).unwrap();

    // What is not offered goes; its readers get an error, the others their rows.
    let removed = RedisTable::remove(&nodes, &origin(3), |content| !content.offered, LIMIT, go_on).unwrap();
    assert_eq!(removed.len(), 2);
    assert!(old.gather(&every, &mut rows).unwrap_err().to_string().contains("it is missing"));
    let source = RedisTable::open(&nodes, &origin(3), LIMIT).unwrap();
    read(&source, &new, &every).unwrap();
    assert_eq!(RedisTable::contents(&nodes, &origin(3), LIMIT).unwrap().len(), 1);

    // Begun, interrupted, begun again.
    let stop = &mut |_| ControlFlow::Break(());
    RedisTable::remove(&nodes, &origin(3), |_| true, LIMIT, stop).unwrap_err();
    RedisTable::open(&nodes, &origin(3), LIMIT).unwrap_err();
    let removed = RedisTable::remove(&nodes, &origin(3), |_| true, LIMIT, go_on).unwrap();
    assert_eq!((removed.len(), removed[0].offered), (1, false));
    assert!(RedisTable::contents(&nodes, &origin(3), LIMIT).unwrap().is_empty());
    assert_eq!(keys(&cluster), of_one, "the rows of one table, its header, list, and the set of tables");
    let source = RedisTable::open(&nodes, &origin(4), LIMIT).unwrap();
    read(&source, &kept, &every).unwrap();
    RedisTable::remove(&nodes, &origin(4), |_| true, LIMIT, go_on).unwrap();
    assert_eq!(keys(&cluster), 0);
}
