//! A preparation of data that is killed and repeated ends in the bytes of an uninterrupted one.

#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

mod common;

use std::time::{Duration, Instant};

use common::{Random, Workshop};

const INPUT: i32 = 2;

/// A corpus of text files, JSON lines and compressed JSON lines, some 16 MB.
fn workshop() -> Workshop {
    let workshop = Workshop::with_corpus();
    workshop.ok("tokenizer train corpus.jsonl --vocabulary 320 --out tokenizer.json");
    std::fs::create_dir(workshop.path("texts")).unwrap();
    let line = |file: u64, number: u64| {
        let words = format!("Line {number} of file {file} names the whale {} times. ", number * 7919 % 1000);
        format!("{{\"text\": \"{}\"}}\n", words.repeat(1 + (number % 50) as usize))
    };
    for file in 0..4 {
        let text: String = (0..3000).map(|number| line(file, number)).collect();
        workshop.write(&format!("texts/{file}.jsonl"), &text);
        workshop.write(&format!("texts/{file}.txt"), &text[..100_000]);
    }
    workshop
}

const PREPARE: &str =
    "data prepare texts --tokenizer tokenizer.json --hold-out 0.1 --checkpoint-bytes 100000 --out";

/// The bytes of the shards.
fn shards(workshop: &Workshop, out: &str) -> Vec<Vec<u8>> {
    let read = |split: &str| std::fs::read(workshop.path(&format!("{out}/{split}/00000.tokens"))).unwrap();
    ["train", "valid"].map(read).to_vec()
}

#[test]
fn kills_at_random_moments_change_nothing() {
    const KILLS: usize = 12;
    let workshop = workshop();
    let begun = Instant::now();
    workshop.ok(&format!("{PREPARE} whole"));
    let whole = begun.elapsed();
    let state = || workshop.path(".preparing-killed/state.json").exists();
    let mut random = Random(2026);
    let (mut kills, mut resumed) = (0, 0);
    while kills < KILLS {
        let had_state = state();
        let mut child = workshop.start(&format!("{PREPARE} killed"));
        std::thread::sleep(whole.mul_f64(random.below(200) as f64 / 1000.0));
        child.kill().unwrap();
        if child.wait().unwrap().success() {
            // It ended before it was killed. Begin again, until there are enough kills.
            assert_eq!(shards(&workshop, "killed"), shards(&workshop, "whole"));
            std::fs::remove_dir_all(workshop.path("killed")).unwrap();
            continue;
        }
        kills += 1;
        resumed += usize::from(had_state);
        assert!(!workshop.path("killed/train").exists(), "the output appears only when it is complete");
    }
    assert!(resumed >= KILLS / 3, "only {resumed} resumed runs were killed: the test tests too little");
    let last = workshop.run(&format!("{PREPARE} killed"));
    assert_eq!(last.status, Some(0), "{}", last.stderr);
    assert_eq!(last.stderr.contains("resuming an unfinished preparation"), true, "{}", last.stderr);
    assert_eq!(shards(&workshop, "killed"), shards(&workshop, "whole"));
    assert!(!workshop.path(".preparing-killed").exists());
}

#[test]
fn another_request_is_refused_while_one_is_unfinished() {
    let workshop = workshop();
    let mut child = workshop.start(&format!("{PREPARE} data"));
    let begun = Instant::now();
    while !workshop.path(".preparing-data/state.json").exists() {
        assert!(begun.elapsed() < Duration::from_secs(30) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    // While it works, no other process prepares the same output.
    workshop.run(&format!("{PREPARE} data")).expect(INPUT, &[".preparing-data", "another process"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let other = PREPARE.replace("--hold-out 0.1", "--hold-out 0.2");
    workshop
        .run(&format!("{other} data"))
        .expect(INPUT, &["hold_out was 0.1, and is 0.2 now", ".preparing-data"]);
    workshop.write("texts/3.txt", "changed");
    workshop
        .run(&format!("{PREPARE} data"))
        .expect(INPUT, &["texts/3.txt: has changed", "had 100000 bytes, and has 7 now", ".preparing-data"]);
    std::fs::remove_dir_all(workshop.path(".preparing-data")).unwrap();
    workshop.ok(&format!("{PREPARE} data"));
}
