//! Random 264-byte rows of an 8 GiB table on huge pages, one thread, in pairs with the plain loop in C of
//! `gather.c` over the same table, and with PyTorch's `embedding` over another where `PYTHON` names an interpreter
//! that has it (16 GiB of memory in all). Needs `cc`.
//!
//! ```text
//! PYTHON=python cargo bench -p engram-store --bench peers
//! ```

use std::ffi::CString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use engram_address::AddressIdentity;
use engram_store::{RowFormat, RowSource, Storage, Table, TableOrigin};

const WIDTH: usize = 66;
const ROW_BYTES: usize = 4 * WIDTH;
const ROWS: u64 = (8 << 30) / ROW_BYTES as u64;
const BATCH: usize = 1 << 14;
/// Batches that each side runs at its turn: one that had to wait finds its caches cold.
const TURN: usize = 100;
const PAIRS: usize = 30;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global()?;
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let table = Table::from_fn(ROWS, WIDTH, RowFormat::F32, origin, &Storage::Ram, fill)?;
    let mut out = vec![0; BATCH * ROW_BYTES];
    let mut random = Random(1);
    let mut ours = || {
        let ids = random.batch();
        let start = Instant::now();
        table.read(&ids, &mut out)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let mut ours = || turn(&mut ours);

    let loop_in_c = compiled()?;
    let rows = table.stored_rows().ok_or("a table in RAM")?;
    let (mut random, mut copied) = (Random(2), vec![0; BATCH * ROW_BYTES]);
    let mut in_c = || {
        let ids = random.batch();
        let start = Instant::now();
        // SAFETY: ids are below ROWS, and both buffers hold as many rows as the loop reads and writes.
        unsafe { loop_in_c(rows.as_ptr(), ids.as_ptr(), ids.len(), copied.as_mut_ptr()) };
        Ok(start.elapsed().as_secs_f64())
    };
    compare("the loop in C", &mut ours, || turn(&mut in_c))?;

    let Ok(python) = std::env::var("PYTHON") else {
        println!("PYTHON is not set: PyTorch is not measured");
        return Ok(());
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/pytorch/embedding.py");
    let mut peer = Peer::start(Command::new(python).args([script, "--paired"]))?;
    compare("PyTorch's embedding", &mut ours, || peer.turn())?;
    peer.process.kill()?;
    peer.process.wait()?;
    Ok(())
}

/// Alternates both and prints the medians of their rates and of their ratio.
fn compare(
    name: &str,
    ours: &mut impl FnMut() -> Result<f64, Error>,
    mut other: impl FnMut() -> Result<f64, Error>,
) -> Result<(), Error> {
    let mut seconds = Vec::new();
    for _ in 0..PAIRS {
        seconds.push((ours()?, other()?));
    }
    let median = |value: &dyn Fn(&(f64, f64)) -> f64| middle(seconds.iter().map(value).collect());
    let rate = |seconds: f64| BATCH as f64 / seconds / 1e6;
    println!(
        "Table::read {:.2} M rows/s, {name} {:.2} M rows/s, median of {PAIRS} ratios {:.2}",
        rate(median(&|pair| pair.0)),
        rate(median(&|pair| pair.1)),
        median(&|pair| pair.1 / pair.0)
    );
    Ok(())
}

/// The median time of a turn's batches.
fn turn(batch: &mut impl FnMut() -> Result<f64, Error>) -> Result<f64, Error> {
    Ok(middle((0..TURN).map(|_| batch()).collect::<Result<_, _>>()?))
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// New ids for each batch, so that no row is still in a cache.
struct Random(u64);

impl Random {
    fn batch(&mut self) -> Vec<u64> {
        let mut id = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % ROWS
        };
        (0..BATCH).map(|_| id()).collect()
    }
}

type LoopInC = unsafe extern "C" fn(*const u8, *const u64, usize, *mut u8);

/// `gather.c`, compiled for this machine and loaded.
fn compiled() -> Result<LoopInC, Error> {
    let folder = tempfile::tempdir()?;
    let library = folder.path().join("gather.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gather.c");
    let options = ["-O3", "-march=native", "-shared", "-fPIC"];
    let done = Command::new("cc").args(options).arg(source).arg("-o").arg(&library).status()?;
    if !done.success() {
        return Err(format!("cc could not compile {source}").into());
    }
    let path = CString::new(library.as_os_str().as_encoded_bytes())?;
    // SAFETY: the library has no initialisers, and is never unloaded; the symbol has this type.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        let symbol = if library.is_null() { library } else { libc::dlsym(library, c"gather".as_ptr()) };
        if symbol.is_null() {
            return Err("the compiled loop could not be loaded".into());
        }
        Ok(std::mem::transmute::<*mut libc::c_void, LoopInC>(symbol))
    }
}

/// A process that runs a turn for every line it is sent, and answers with the median seconds of its batches.
struct Peer {
    process: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Peer {
    fn start(command: &mut Command) -> Result<Self, Error> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let answers = BufReader::new(process.stdout.take().ok_or("no output")?);
        Ok(Self { process, answers })
    }

    fn turn(&mut self) -> Result<f64, Error> {
        writeln!(self.process.stdin.as_mut().ok_or("no input")?, "{TURN}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().parse()?)
    }
}
