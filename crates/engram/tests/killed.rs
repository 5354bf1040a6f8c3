//! A run that is killed goes on as if it had never stopped.

#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

mod common;

use std::time::{Duration, Instant};

use common::{CONFIG, Random, Workshop, wait_until};

fn config(steps: u64) -> String {
    CONFIG
        .replace("steps = 12", &format!("steps = {steps}"))
        .replace("evaluate_every = 6", "evaluate_every = 10")
        .replace("checkpoint_every = 6", "checkpoint_every = 3")
}

/// Kills a run once it has logged `lines` more lines, and a moment later; at the latest after ten seconds, which
/// only a run that cannot go on would take.
fn run_and_kill(workshop: &Workshop, line: &str, lines: u64, moment: Duration) {
    let logged = || {
        std::fs::read_to_string(workshop.path("run/metrics.jsonl")).map_or(0, |text| text.lines().count())
            as u64
    };
    let target = logged() + lines;
    let mut child = workshop.start(line);
    let begun = Instant::now();
    while logged() < target && begun.elapsed() < Duration::from_secs(10) {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn half_and_half_make_a_whole() {
    let workshop = Workshop::prepared();
    workshop.write("config.toml", config(200));
    workshop.ok("train config.toml --out whole");
    let mut child = workshop.start("train config.toml --out half");
    let steps = || {
        std::fs::read_to_string(workshop.path("half/metrics.jsonl")).map_or(0, |text| text.lines().count())
    };
    wait_until("half of the steps", || steps() >= 100);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(steps() < 200, "it had ended before it was killed");
    workshop.ok("train config.toml --out half --resume");
    assert_eq!(workshop.metrics("half"), workshop.metrics("whole"));
}

#[test]
fn thirty_kills_at_random_moments_change_nothing() {
    // Killed runs repeat the steps after their last checkpoint, so that thirty of them cannot reach the end.
    const STEPS: u64 = 1000;
    let workshop = Workshop::prepared();
    workshop.write("config.toml", config(STEPS));
    let mut random = Random(2026);
    let mut resumed = 0;
    for _ in 0..30 {
        let begun = workshop.path("run/checkpoints").exists()
            && workshop.list("run/checkpoints").iter().any(|name| name.starts_with("step-"));
        let line = format!("train config.toml --out run{}", if begun { " --resume" } else { "" });
        run_and_kill(&workshop, &line, random.below(30), Duration::from_millis(random.below(20)));
        resumed += u32::from(begun);
        if begun {
            // The newest checkpoint loads, every time.
            workshop.ok("eval loss run data/valid --tokens 10");
        }
    }
    assert!(resumed >= 15, "only {resumed} resumed runs were killed: the test tests too little");

    workshop.ok("train config.toml --out run --resume");
    workshop.ok("train config.toml --out whole");
    let (killed, whole) = (workshop.metrics("run"), workshop.metrics("whole"));
    assert_eq!(killed.len(), whole.len());
    for (killed, whole) in killed.iter().zip(&whole) {
        assert_eq!(killed, whole);
    }
    let unfinished = workshop.list("run/checkpoints").into_iter().filter(|name| name.starts_with('.'));
    assert_eq!(unfinished.count(), 0, "what was cut off has been cleared away");
}
