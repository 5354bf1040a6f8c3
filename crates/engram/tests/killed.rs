//! A run that is killed goes on as if it had never stopped.

mod common;

use std::time::Duration;

use common::{CONFIG, Random, Workshop, wait_until};

fn config(steps: u64) -> String {
    CONFIG
        .replace("steps = 12", &format!("steps = {steps}"))
        .replace("evaluate_every = 6", "evaluate_every = 10")
        .replace("checkpoint_every = 6", "checkpoint_every = 3")
}

/// Kills a run after `moment` and returns whether it had already ended by itself.
fn run_and_kill(workshop: &Workshop, line: &str, moment: Duration) -> bool {
    let mut child = workshop.start(line);
    std::thread::sleep(moment);
    let ended = child.try_wait().unwrap().is_some();
    child.kill().unwrap();
    child.wait().unwrap();
    ended
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
    const STEPS: u64 = 600;
    let workshop = Workshop::prepared();
    workshop.write("config.toml", config(STEPS));
    let mut random = Random(2026);
    let (mut kills, mut resumed) = (0, 0);
    for _ in 0..30 {
        let begun = workshop.path("run/checkpoints").exists()
            && workshop.list("run/checkpoints").iter().any(|name| name.starts_with("step-"));
        let line = format!("train config.toml --out run{}", if begun { " --resume" } else { "" });
        let ended = run_and_kill(&workshop, &line, Duration::from_millis(20 + random.below(400)));
        kills += u32::from(!ended);
        resumed += u32::from(begun);
        if begun {
            // The newest checkpoint loads, every time.
            workshop.ok("eval loss run data/valid --tokens 10");
        }
    }
    assert!(
        kills >= 20 && resumed >= 15,
        "{kills} kills, {resumed} of resumed runs: the test tests too little"
    );

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
