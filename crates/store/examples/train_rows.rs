//! Trains a table from text, in RAM or mapped from disk, and says how fast: the same losses, to the bit, at
//! what speed?
//!
//! The words of a text, cut into pieces of up to four bytes, predict the next one. The 2- and 3-grams before it
//! are hashed to 16 rows (two orders, eight heads, as in `configs/corpus-memory.toml`); the rows, side by side,
//! enter a network of one hidden layer, which predicts the class of the next piece. Rows learn by Adam. While one
//! batch computes, the next one's rows are fetched, and with `--write-back` the last one's written.
//!
//! ```text
//! cargo run --release -p engram-store --example train_rows -- TEXT [--mapped FOLDER] [--rows 11534336]
//!     [--width 32] [--heads 8] [--hidden 4608] [--steps 40] [--skip 20] [--no-prefetch] [--write-back]
//! ```
//!
//! Under a memory limit (version 1 of control groups, as root):
//!
//! ```text
//! mkdir /sys/fs/cgroup/memory/small && echo 1G > /sys/fs/cgroup/memory/small/memory.limit_in_bytes
//! sh -c 'echo $$ > /sys/fs/cgroup/memory/small/cgroup.procs; exec target/release/examples/train_rows …'
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use engram_address::AddressIdentity;
use engram_kernels::{linear, linear_backward_input, linear_backward_weight, linear_cross_entropy};
use engram_store::{DistinctRows, RowInit, RowOptimizer, RowSource, Storage, TableOrigin, TrainableTable};

/// Sequences of a batch, words of each, lengths of n-grams (2 and 3), classes of the next word.
const SEQUENCES: usize = 16;
const WORDS: usize = 256;
const ORDERS: usize = 2;
const CLASSES: u64 = 1024;

struct Options {
    text: String,
    storage: Storage,
    rows: u64,
    width: usize,
    heads: usize,
    hidden: usize,
    steps: usize,
    skip: usize,
    prefetch: bool,
    write_back: bool,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        text: String::new(),
        storage: Storage::Ram,
        rows: 11 << 20,
        width: 32,
        heads: 8,
        hidden: 4608,
        steps: 40,
        skip: 20,
        prefetch: true,
        write_back: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--mapped" => options.storage = Storage::MappedIn(value()?.into()),
            "--rows" => options.rows = value()?.parse()?,
            "--width" => options.width = value()?.parse()?,
            "--heads" => options.heads = value()?.parse()?,
            "--hidden" => options.hidden = value()?.parse()?,
            "--steps" => options.steps = value()?.parse()?,
            "--skip" => options.skip = value()?.parse()?,
            "--write-back" => options.write_back = true,
            "--no-prefetch" => options.prefetch = false,
            _ => options.text = argument,
        }
    }
    Ok(options)
}

fn hash(a: u64, b: u64) -> u64 {
    let mixed = (a ^ b.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The words of a text, in pieces of up to four bytes, as hashes.
fn words(path: &str) -> Result<Vec<u64>, Box<dyn Error>> {
    let text = std::fs::read(path)?;
    let words = text.split(u8::is_ascii_whitespace);
    let pieces = words.flat_map(|word| word.chunks(4));
    Ok(pieces.map(|piece| piece.iter().fold(7, |state, &byte| hash(state, u64::from(byte)))).collect())
}

/// A batch: the rows of every word, and the class of the word after it.
#[derive(Default)]
struct Batch {
    rows: DistinctRows,
    targets: Vec<u32>,
}

impl Batch {
    fn of(words: &[u64], step: usize, table_rows: u64, heads: usize) -> Self {
        let mut ids = Vec::with_capacity(SEQUENCES * WORDS * ORDERS * heads);
        let mut targets = Vec::new();
        for sequence in 0..SEQUENCES {
            let start = (words.len() / SEQUENCES * sequence + step * WORDS) % (words.len() - WORDS - 3);
            for window in words[start..start + WORDS + 3].windows(4).take(WORDS) {
                let &[before, last, this, next] = window else { continue };
                let orders = [hash(this, last), hash(hash(this, last), before)];
                let heads = orders.iter().flat_map(|&gram| (0..heads as u64).map(move |head| (gram, head)));
                ids.extend(heads.map(|(gram, head)| (hash(gram, head + 1) >> 8) % table_rows));
                targets.push((hash(next, 99) >> 8 & (CLASSES - 1)) as u32);
            }
        }
        Self { rows: DistinctRows::of(&ids), targets }
    }
}

/// A layer of weights with plain gradient descent.
struct Layer(Vec<f32>);

impl Layer {
    fn new(inputs: usize, outputs: usize, seed: u64) -> Self {
        let mut weights = vec![0.0; inputs * outputs];
        let deviation = (2.0 / inputs as f32).sqrt();
        RowInit::Normal { deviation, seed }.fill(0, &mut weights);
        Self(weights)
    }

    fn descend(&mut self, gradient: &[f32]) {
        self.0.iter_mut().zip(gradient).for_each(|(weight, gradient)| *weight -= 0.2 * gradient);
    }
}

/// One step of the network on the batch's words \[words, slots · width\]: the loss, and the gradient of its
/// input.
fn compute(input: &[f32], targets: &[u32], first: &mut Layer, second: &mut Layer) -> (f32, Vec<f32>) {
    let inputs = input.len() / targets.len();
    let hidden_width = first.0.len() / inputs;
    let mut hidden = linear(input, &first.0, inputs);
    hidden.iter_mut().for_each(|value| *value = value.max(0.0));
    let output = linear_cross_entropy(&hidden, &second.0, targets, true);
    let gradients = output.gradients.expect("they were asked for");
    let mut grad = gradients.hidden;
    grad.iter_mut().zip(&hidden).for_each(|(grad, &value)| *grad = if value > 0.0 { *grad } else { 0.0 });
    let input_gradient = linear_backward_input(&grad, &first.0, inputs);
    first.descend(&linear_backward_weight(input, &grad, inputs));
    second.descend(&gradients.weight);
    debug_assert_eq!(grad.len(), targets.len() * hidden_width);
    (output.mean, input_gradient)
}

fn main() -> Result<(), Box<dyn Error>> {
    let Options { text, storage, rows, width, heads, hidden, steps, skip, prefetch, write_back } = options()?;
    let words = words(&text)?;
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([0; 32]), layer: 0 };
    let init = RowInit::Normal { deviation: 0.1, seed: 1 };
    let started = Instant::now();
    let mut table = TrainableTable::new(rows, width, init, RowOptimizer::adam(), origin, &storage)?;
    let gigabytes = (rows * 12 * width as u64) as f64 / 2f64.powi(30);
    println!(
        "{storage}: {rows} rows of {width}, {gigabytes:.2} GiB with state, made in {:.1?}",
        started.elapsed()
    );

    let (mut first, mut second) =
        (Layer::new(ORDERS * heads * width, hidden, 2), Layer::new(hidden, CLASSES as usize, 3));
    let mut batch = Batch::of(&words, 0, rows, heads);
    let mut parts = [const { Vec::new() }; 4];
    for step in 0..skip + steps {
        let begun = Instant::now();
        let mut at = begun;
        let mut lap =
            |part: &mut Vec<Duration>| part.push(std::mem::replace(&mut at, Instant::now()).elapsed());
        let [gathering, computing, updating, all] = &mut parts;

        let mut distinct = vec![0.0; batch.rows.len() * width];
        table.gather(batch.rows.ids(), &mut distinct)?;
        lap(gathering);

        let (loss, gradient, next) = std::thread::scope(|scope| {
            let table = &table;
            if write_back {
                scope.spawn(|| table.write_back());
            }
            let ahead = scope.spawn(|| {
                let next = Batch::of(&words, step + 1, rows, heads);
                if prefetch {
                    table.prefetch(next.rows.ids())?;
                }
                Ok::<_, engram_store::StoreError>(next)
            });
            let mut input = vec![0.0; batch.rows.index().len() * width];
            batch.rows.expand(&distinct, width, &mut input)?;
            let (loss, gradient) = compute(&input, &batch.targets, &mut first, &mut second);
            let next = ahead.join().map_err(|_| "the prefetching thread panicked")??;
            Ok::<_, Box<dyn Error>>((loss, gradient, next))
        })?;
        lap(computing);

        let mut sums = vec![0.0; distinct.len()];
        batch.rows.sum(&gradient, width, &mut sums)?;
        table.update(batch.rows.ids(), &sums, 0.002)?;
        lap(updating);
        all.push(begun.elapsed());
        println!(
            "step {step} loss {loss:.4} {:08x} rows {} {:.0?}",
            loss.to_bits(),
            batch.rows.len(),
            all[step]
        );
        batch = next;
    }

    let mut took = Duration::ZERO;
    for (part, name) in parts.iter_mut().zip(["gathering", "computing", "updating", "a step"]) {
        let part = &mut part[skip..];
        took = part.iter().sum();
        part.sort();
        let median = part[part.len() / 2];
        println!("{name:10} median {median:>9.1?}, longest {:>9.1?}, sum {took:.2?}", part[part.len() - 1]);
    }
    println!("{:.0} words a second", (steps * SEQUENCES * WORDS) as f64 / took.as_secs_f64());
    Ok(())
}
