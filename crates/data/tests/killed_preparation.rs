//! A process that prepares data is killed at random moments, over and over. The last one ends in the bytes of an
//! uninterrupted preparation.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use engram_data::{Corpus, PrepareOptions, TokenShards, Tokenizer, TokenizerTraining, prepare};

/// The folder of the child process.
const FOLDER: &str = "ENGRAM_KILLED_PREPARATION";
const KILLS: u32 = 20;

fn options() -> PrepareOptions {
    PrepareOptions { hold_out: 0.1, shard_tokens: 100_000, checkpoint_bytes: 400_000 }
}

fn run(folder: &Path, out: &str) -> u64 {
    let corpus = Corpus::open(&[folder.join("corpus")]).unwrap();
    let tokenizer = Tokenizer::load(&folder.join("tokenizer.json")).unwrap();
    let mut resumed = 0;
    prepare(&corpus, &tokenizer, &folder.join(out), &options(), &mut |progress| {
        resumed = progress.resumed;
        Continue(())
    })
    .unwrap();
    resumed
}

#[test]
#[ignore = "runs until it is killed: started by the test below"]
fn child() {
    run(Path::new(&std::env::var_os(FOLDER).expect("the folder")), "killed");
}

fn write_corpus(folder: &Path) {
    std::fs::create_dir(folder.join("corpus")).unwrap();
    for file in 0..4 {
        let line = |number: usize| {
            let words = format!("Line {number} of {file} names the whale {} times. ", number * 7919 % 1000);
            serde_json::json!({ "text": words.repeat(1 + number % 50) }).to_string() + "\n"
        };
        let lines: String = (0..1500).map(line).collect();
        let compressed = zstd::encode_all(lines.as_bytes(), 3).unwrap();
        std::fs::write(folder.join(format!("corpus/{file}.jsonl.zst")), compressed).unwrap();
        std::fs::write(folder.join(format!("corpus/{file}.txt")), &lines[..50_000]).unwrap();
    }
    let corpus = Corpus::open(&[folder.join("corpus")]).unwrap();
    let training = TokenizerTraining { vocabulary: 320, byte_budget: 1 << 20 };
    let tokenizer = Tokenizer::train(&corpus, &training, &mut |_| Continue(())).unwrap();
    tokenizer.save(&folder.join("tokenizer.json")).unwrap();
}

/// A number below `end`, another each time.
fn random(state: &mut u64, end: u32) -> u32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state % u64::from(end)) as u32
}

fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for split in ["train", "valid"] {
        for entry in std::fs::read_dir(folder.join(split)).unwrap() {
            let path = entry.unwrap().path();
            files.push((
                path.strip_prefix(folder).unwrap().display().to_string(),
                std::fs::read(path).unwrap(),
            ));
        }
    }
    files.sort();
    files
}

#[test]
fn kills_at_random_moments_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_corpus(folder);
    let begun = Instant::now();
    assert_eq!(run(folder, "whole"), 0);
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    let duration = begun.elapsed();
    let has_state = || folder.join(".preparing-killed/state.json").exists();
    let (mut kills, mut resumed, mut state) = (0, 0, 2026);
    while kills < KILLS {
        let had_state = has_state();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--ignored"])
            .env(FOLDER, folder)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(
            duration.mul_f64(f64::from(random(&mut state, 250)) / 1000.0) + Duration::from_millis(5),
        );
        child.kill().unwrap();
        let ended = child.wait().unwrap();
        assert!(ended.code().is_none_or(|code| code == 0), "the child failed");
        if killed.exists() {
            // It came to its end. The kills go on with another preparation.
            assert!(bytes(&killed) == bytes(&whole));
            std::fs::remove_dir_all(&killed).unwrap();
        }
        if ended.code().is_none() {
            kills += 1;
            resumed += u32::from(had_state);
        }
    }
    assert!(resumed >= KILLS / 4, "only {resumed} resumed runs were killed: the test tests too little");
    let had_state = has_state();
    assert_eq!(run(folder, "killed") > 0, had_state);
    assert!(bytes(&killed) == bytes(&whole), "the bytes differ");
    let identity = |out: &Path| TokenShards::open(&out.join("train")).unwrap().identity();
    assert_eq!(identity(&killed), identity(&whole));
    assert!(!folder.join(".preparing-killed").exists());
    println!("{KILLS} kills, {resumed} of them of resumed runs");
}
