//! A process that trains a mapped table and saves it is killed, over and over: what is found afterwards is, to
//! the bit, a state that it saved, and not an older one than was found before.
//!
//! `ENGRAM_KILLS=200 cargo test --release -p engram-store --test killed -- --nocapture` kills more often and
//! says what it hit.
#![cfg(unix)]
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use engram_store::{
    AddressIdentity, DistinctRows, RowInit, RowOptimizer, Storage, TableOrigin, TableReader, TrainableTable,
};

const ROWS: u64 = 20_000;
const WIDTH: usize = 16;
/// Updates between two checkpoints.
const EVERY: u64 = 3;
/// The child's folder.
const FOLDER: &str = "ENGRAM_KILLED_FOLDER";

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([3; 32]), layer: 2 }
}

fn new(storage: &Storage) -> TrainableTable {
    let init = RowInit::Normal { deviation: 0.1, seed: 5 };
    TrainableTable::new(ROWS, WIDTH, init, RowOptimizer::adam(), origin(), storage).unwrap()
}

/// The next update, which depends on the step alone.
fn train(table: &mut TrainableTable) {
    let mut numbers = vec![0.0; 4000 * (WIDTH + 1)];
    RowInit::Normal { deviation: 1.0, seed: table.step() }.fill(0, &mut numbers);
    let (places, grads) = numbers.split_at(4000);
    let batch: Vec<u64> = places.iter().map(|place| (place.abs() * 1e6) as u64 % ROWS).collect();
    let distinct = DistinctRows::of(&batch);
    table.update(distinct.ids(), &grads[..distinct.len() * WIDTH], 0.01).unwrap();
}

#[test]
#[ignore = "runs until it is killed: started by the test below"]
fn child() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect("the folder"));
    let (path, storage) = (folder.join("table"), Storage::MappedIn(folder));
    let mut table = match TrainableTable::load(&path, &origin(), &storage) {
        Ok(table) => table,
        Err(error) if path.exists() => panic!("{error}"),
        Err(_) => new(&storage),
    };
    loop {
        (0..EVERY).for_each(|_| train(&mut table));
        table.save(&path).unwrap();
    }
}

fn start(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--test-threads=1"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Removes what killed processes left, and returns how many files that were.
fn clear(folder: &Path) -> usize {
    let left = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let left: Vec<_> = left.filter(|path| !path.ends_with("table")).collect();
    for path in &left {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with(".table-") && name.ends_with(".tmp"), "{name} was left behind");
        fs::remove_file(path).unwrap();
    }
    left.len()
}

#[test]
fn a_killed_process_leaves_a_state_that_it_saved() {
    let kills = std::env::var("ENGRAM_KILLS").map_or(10, |kills| kills.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let mut wanted = new(&Storage::Ram);
    let (mut in_a_save, mut moved, mut lived) = (0, 0, Duration::ZERO);
    for kill in 0..kills {
        let mut waits = [0.0];
        RowInit::Normal { deviation: 1.0, seed: kill }.fill(9, &mut waits);
        let wait = Duration::from_secs_f32(0.02 + 0.15 * waits[0].abs());
        let started = Instant::now();
        let mut child = start(folder.path());
        std::thread::sleep(wait);
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "it ended by itself");
        lived += started.elapsed();
        let left = clear(folder.path());
        assert!(left <= 1, "{left} temporary files");
        in_a_save += left;
        if !path.exists() {
            assert_eq!(wanted.step(), 0, "a checkpoint disappeared");
            continue;
        }

        TableReader::open_for(&path, &origin()).unwrap().verify(&mut |_| ControlFlow::Continue(())).unwrap();
        let found = TrainableTable::load(&path, &origin(), &Storage::Ram).unwrap();
        assert!(found.step().is_multiple_of(EVERY) && found.step() >= wanted.step(), "step {}", found.step());
        moved += u64::from(found.step() > wanted.step());
        while wanted.step() < found.step() {
            train(&mut wanted);
        }
        let again = folder.path().join("wanted");
        wanted.save(&again).unwrap();
        assert!(
            fs::read(&again).unwrap() == fs::read(&path).unwrap(),
            "not the state of step {}",
            found.step()
        );
        fs::remove_file(again).unwrap();
    }
    println!(
        "{kills} kills after {:.0} ms on average, {in_a_save} of them in a save, {moved} with a new checkpoint; \
         {} steps, every state found was one that had been saved",
        lived.as_secs_f64() * 1e3 / kills as f64,
        wanted.step()
    );
    assert!(kills < 10 || wanted.step() > 0 && in_a_save > 0, "no kill met what it was meant to");
}
