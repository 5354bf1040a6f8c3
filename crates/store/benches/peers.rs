//! Random rows of an 8 GiB table of f32 on huge pages, one thread, in turn with the loops in C of `gather.c` over
//! the same table (rows of 264 bytes), a plain gather and one that only touches the rows, and with PyTorch's
//! `embedding` over another (264 and 512 bytes) where `PYTHON` names an interpreter that has it (16 GiB of memory in
//! all). Needs `cc`.
//!
//! ```text
//! PYTHON=python cargo bench -p engram-store --bench peers
//! ```

use std::ffi::CStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use engram_store::{AddressIdentity, RowFormat, RowSource, Storage, Table, TableOrigin};

/// Ids in a batch: some 40 tokens of V4.1's addressing, 700, and 5500.
const BATCHES: [usize; 3] = [1 << 10, 1 << 14, 1 << 17];
/// Rows that each side reads at its turn: one that had to wait finds its caches cold.
const TURN: usize = 100 << 14;
const PAIRS: usize = 30;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global()?;
    let [gather_in_c, touch_in_c] = compiled([c"gather", c"touch"])?;
    let python = std::env::var("PYTHON").ok();
    if python.is_none() {
        println!("PYTHON is not set: PyTorch is not measured");
    }
    // 264 bytes, as they are stored.
    let table = table(66)?;
    let rows = table.stored_rows().ok_or("a table in RAM")?;
    let mut peer = python.as_deref().map(|python| Peer::start(python, 66)).transpose()?;
    for batch in BATCHES {
        let name = format!("Table::read, 264 bytes, batches of {batch}");
        let (mut random, mut out) = (Random::of(&table), vec![0; batch * 264]);
        let mut read = || timed(random.batch(batch), |ids| Ok(table.read(ids, &mut out)?));
        let (mut random, mut copied) = (Random::of(&table), vec![0; batch * 264]);
        for (other, in_c) in [("the loop in C", gather_in_c), ("only touching the rows in C", touch_in_c)] {
            let mut in_c = || {
                timed(random.batch(batch), |ids| {
                    // SAFETY: ids are rows of the table, and both buffers hold as many rows as the loop reads and
                    // writes.
                    unsafe { in_c(rows.as_ptr(), ids.as_ptr(), ids.len(), copied.as_mut_ptr()) };
                    Ok(())
                })
            };
            compare(&name, batch, &mut read, other, || turn(batch, &mut in_c))?;
        }
        if let Some(peer) = &mut peer {
            compare(&name, batch, &mut read, "PyTorch's embedding", || peer.turn(batch))?;
        }
    }
    drop((peer, table));

    // 512 bytes, decoded.
    let Some(python) = python else { return Ok(()) };
    let table = self::table(128)?;
    let mut peer = Peer::start(&python, 128)?;
    for batch in BATCHES {
        let name = format!("Table::gather, 512 bytes, batches of {batch}");
        let (mut random, mut out) = (Random::of(&table), vec![0.0; batch * 128]);
        let mut gather = || timed(random.batch(batch), |ids| Ok(table.gather(ids, &mut out)?));
        compare(&name, batch, &mut gather, "PyTorch's embedding", || peer.turn(batch))?;
    }
    Ok(())
}

fn table(width: usize) -> Result<Table, Error> {
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    Ok(Table::from_fn((8 << 30) / (4 * width as u64), width, RowFormat::F32, origin, &Storage::Ram, fill)?)
}

/// Seconds that the work on these ids takes.
fn timed(ids: Vec<u64>, work: impl FnOnce(&[u64]) -> Result<(), Error>) -> Result<f64, Error> {
    let start = Instant::now();
    work(&ids)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Alternates both and prints the medians of their rates and of their ratio.
fn compare(
    name: &str,
    batch: usize,
    ours: &mut impl FnMut() -> Result<f64, Error>,
    other_name: &str,
    mut other: impl FnMut() -> Result<f64, Error>,
) -> Result<(), Error> {
    let mut seconds = Vec::new();
    for _ in 0..PAIRS {
        seconds.push((turn(batch, ours)?, other()?));
    }
    let median = |value: &dyn Fn(&(f64, f64)) -> f64| middle(seconds.iter().map(value).collect());
    let rate = |seconds: f64| batch as f64 / seconds / 1e6;
    println!(
        "{name}: {:.2} M rows/s, {other_name} {:.2} M rows/s, median of {PAIRS} ratios {:.2}",
        rate(median(&|pair| pair.0)),
        rate(median(&|pair| pair.1)),
        median(&|pair| pair.1 / pair.0)
    );
    Ok(())
}

/// The median time of a turn's batches.
fn turn(batch: usize, run: &mut impl FnMut() -> Result<f64, Error>) -> Result<f64, Error> {
    Ok(middle((0..TURN / batch).map(|_| run()).collect::<Result<_, _>>()?))
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// New ids for each batch, so that no row is still in a cache.
struct Random {
    state: u64,
    rows: u64,
}

impl Random {
    fn of(table: &Table) -> Self {
        Self { state: 1, rows: table.rows() }
    }

    fn batch(&mut self, ids: usize) -> Vec<u64> {
        let mut id = || {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.state % self.rows
        };
        (0..ids).map(|_| id()).collect()
    }
}

type LoopInC = unsafe extern "C" fn(*const u8, *const u64, usize, *mut u8);

/// Functions of `gather.c`, which are compiled and loaded on Unix only.
#[cfg(not(unix))]
fn compiled<const N: usize>(_: [&CStr; N]) -> Result<[LoopInC; N], Error> {
    Err("this comparison loads a shared library as Unix does".into())
}

/// Functions of `gather.c`, compiled for this machine and loaded.
#[cfg(unix)]
fn compiled<const N: usize>(names: [&CStr; N]) -> Result<[LoopInC; N], Error> {
    let folder = tempfile::tempdir()?;
    let library = folder.path().join("gather.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gather.c");
    let options = ["-O3", "-march=native", "-shared", "-fPIC"];
    let done = Command::new("cc").args(options).arg(source).arg("-o").arg(&library).status()?;
    if !done.success() {
        return Err(format!("cc could not compile {source}").into());
    }
    let path = std::ffi::CString::new(library.as_os_str().as_encoded_bytes())?;
    // SAFETY: the library has no initialisers, and is never unloaded.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        return Err("the compiled loops could not be loaded".into());
    }
    let mut functions = Vec::new();
    for name in names {
        // SAFETY: the library stays loaded.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
        if symbol.is_null() {
            return Err(format!("{source} has no {}", name.to_string_lossy()).into());
        }
        // SAFETY: both functions of the file have this type.
        functions.push(unsafe { std::mem::transmute::<*mut libc::c_void, LoopInC>(symbol) });
    }
    functions.try_into().map_err(|_| "as many functions as names".into())
}

/// A process that runs a turn for every line it is sent, and answers with the median seconds of its batches.
struct Peer {
    process: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Peer {
    /// PyTorch's `embedding` with rows of so many values.
    fn start(python: &str, width: usize) -> Result<Self, Error> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/pytorch/embedding.py");
        let mut command = Command::new(python);
        command.args([script, "--paired", &width.to_string()]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let answers = BufReader::new(process.stdout.take().ok_or("no output")?);
        Ok(Self { process, answers })
    }

    fn turn(&mut self, batch: usize) -> Result<f64, Error> {
        writeln!(self.process.stdin.as_mut().ok_or("no input")?, "{} {batch}", TURN / batch)?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().parse()?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends by itself when there is nothing more to read; its memory is wanted now.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
