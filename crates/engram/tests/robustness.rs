//! What people bring: damaged corpora, two trainings in one folder, changed settings, odd names, dumb outputs.

#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

mod common;

use common::{CONFIG, Outcome, Workshop, json, wait_until};

/// The exit status of what was asked for that is impossible.
const INPUT: i32 = 2;

fn prepare(workshop: &Workshop, options: &str) -> Outcome {
    workshop
        .run(&format!("data prepare odd.jsonl --tokenizer tokenizer.json --hold-out 0 --out odd {options}"))
}

#[test]
fn damaged_records_are_refused_skipped_or_mended() {
    let workshop = Workshop::prepared();
    let lines = b"\xef\xbb\xbf{\"text\": \"one\"}\r\n{\"text\": \"t\xffwo\"}\r\n{\"text\": null}\r\n{\"text\": \"\\ud83d\"}\r\n";
    workshop.write("odd.jsonl", lines);
    prepare(&workshop, "").expect(INPUT, &["odd.jsonl", "line 2", "byte 31"]);
    let skipped = prepare(&workshop, "--skip-damaged").expect(0, &["skipped", ": 3", "line 3", "null"]);
    assert!(skipped.stdout.contains("train"), "{}", skipped.stdout);
    std::fs::remove_dir_all(workshop.path("odd")).unwrap();
    prepare(&workshop, "--replace-damaged").expect(INPUT, &["line 3", "null"]);
    prepare(&workshop, "--replace-damaged --skip-damaged").expect(0, &["U+FFFD", ": 2", "skipped", ": 1"]);
    let train = "tokenizer train odd.jsonl --vocabulary 258 --out odd.json";
    workshop.fails(train, INPUT, &["line 2"]);
    workshop.run(&format!("{train} --skip-damaged")).expect(0, &["skipped", ": 3"]);
}

#[test]
fn few_documents_hold_out_one() {
    let workshop = Workshop::prepared();
    let lines: String = (0..20).map(|number| format!("{{\"text\": \"document {number}\"}}\n")).collect();
    workshop.write("odd.jsonl", lines);
    let run = workshop.run("data prepare odd.jsonl --tokenizer tokenizer.json --hold-out 0.000001 --out few");
    run.expect(0, &["none of the 20 documents", "the nearest is held out"]);
    assert_eq!(workshop.list("few"), ["train", "valid"]);
}

#[test]
fn the_second_training_in_a_folder_is_refused() {
    let workshop = Workshop::prepared();
    workshop.write("long.toml", CONFIG.replace("steps = 12", "steps = 1000000"));
    let mut first = workshop.start("train long.toml --out run");
    wait_until("the first steps", || {
        std::fs::read_to_string(workshop.path("run/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 3)
    });
    let holder = format!("process {} on ", first.id());
    for line in ["train long.toml --out run", "train long.toml --out run --resume"] {
        workshop.fails(line, INPUT, &["run: ", &holder, "trains here"]);
    }
    assert!(first.try_wait().unwrap().is_none(), "the first goes on");
    workshop.shell(&format!("kill -INT {}", first.id()));
    assert_eq!(first.wait().unwrap().code(), Some(130));
    // The lock ends with the process, however it ends.
    let mut killed = workshop.start("train long.toml --out run --resume");
    let steps = workshop.metrics("run").len();
    wait_until("more steps", || {
        std::fs::read_to_string(workshop.path("run/metrics.jsonl"))
            .is_ok_and(|text| text.lines().count() > steps)
    });
    killed.kill().unwrap();
    killed.wait().unwrap();
    let mut third = workshop.start("train long.toml --out run --resume");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(third.try_wait().unwrap().is_none());
    third.kill().unwrap();
    third.wait().unwrap();
}

#[test]
fn settings_that_differ_are_named_and_refused_unless_they_are_to_change() {
    let workshop = Workshop::trained();
    let resume = "train other.toml --out run --resume";
    for (change, key) in [
        ("steps = 12\nseed = 5", "train.seed"),
        ("steps = 18", "train.steps"),
        ("steps = 12\noptimizer = { adam_rate = 0.5 }", "train.optimizer.adam_rate"),
    ] {
        workshop.write("other.toml", CONFIG.replace("steps = 12", change));
        workshop.fails(resume, INPUT, &["run: ", key, ", now ", &format!("--change {key}")]);
        workshop.fails(&format!("{resume} --change train.batch"), INPUT, &[key]);
        workshop.fails(&format!("{resume} --change train.sede"), INPUT, &["train.sede"]);
    }
    workshop.write("other.toml", CONFIG.replace("evaluate_every = 6", "evaluate_every = 3"));
    workshop.run(resume).expect(0, &["another setting: train.evaluate_every: 6, now 3"]);
    // More steps stretch the schedule: its rate at the seam is told.
    let outcome = workshop.run("train config.toml --out run --resume --steps 40");
    outcome.expect(0, &["train.steps: 12, now 40", "rate at step 12 is 0.8", "it would be 0.100"]);
    let outcome = workshop.run("train config.toml --out run --resume");
    outcome.expect(INPUT, &["train.steps: 40, now 12"]);
}

#[test]
fn a_run_continues_with_other_data_where_that_is_asked_for() {
    let workshop = Workshop::trained();
    let corpus: String =
        workshop.read("corpus.jsonl").lines().rev().map(|line| format!("{line}\n")).collect();
    workshop.write("reversed.jsonl", corpus);
    workshop.ok("data prepare reversed.jsonl --tokenizer tokenizer.json --hold-out 0.2 --out new");
    workshop.write("new.toml", CONFIG.replace("data/", "new/"));
    let line = "train new.toml --out run --resume --steps 15";
    workshop.fails(line, INPUT, &["new/train", "--change data.train"]);
    workshop.fails(&format!("{line} --change data.train"), INPUT, &["new/valid", "--change data.valid"]);
    workshop.run(&format!("{line} --change data")).expect(0, &["other training data, from their beginning"]);
    assert_eq!(workshop.metrics("run").last().unwrap()["step"], 15);
    // The same data in another place are the same data.
    std::fs::rename(workshop.path("new"), workshop.path("moved")).unwrap();
    workshop.write("moved.toml", CONFIG.replace("data/", "moved/"));
    workshop.ok("train moved.toml --out run --resume --steps 16");
}

#[test]
fn a_run_needs_no_held_out_data() {
    let workshop = Workshop::prepared();
    workshop.write("open.toml", CONFIG.replace("valid = \"data/valid\"\n", ""));
    workshop.run("train open.toml --out run").expect(0, &["no held-out losses"]);
    assert!(workshop.metrics("run").iter().all(|metric| metric["kind"] == "step"));
    workshop.ok("train open.toml --out run --resume --steps 13");
    workshop.ok("eval loss run data/valid");
}

#[test]
fn a_model_beyond_all_memory_is_refused_with_numbers() {
    let workshop = Workshop::prepared();
    let large = CONFIG.replace("width = 32", "width = 16384").replace("blocks = 2", "blocks = 800");
    workshop.write("large.toml", large.replace("width = 48", "width = 65536"));
    let words = ["memory", "GiB of weights", "GiB of gradients", "GiB of optimiser"];
    workshop.fails("train large.toml --out run", INPUT, &words);
    assert!(!workshop.path("run").exists(), "nothing was made");
    let rows = CONFIG.replace("[500, 500]", "[4000000000, 4000000000]");
    workshop.write("rows.toml", &rows);
    workshop.fails("train rows.toml --out run", INPUT, &["GiB of memory tables", "mapped"]);
    // A limit of the process counts, too.
    workshop.write("config.toml", CONFIG.replace("width = 48", "width = 40000000"));
    let limited = workshop.shell("ulimit -v 4000000; exec \"$ENGRAM\" train config.toml --out run");
    if cfg!(target_os = "linux") {
        limited.expect(INPUT, &["ulimit -v", "3.81 GiB"]);
    }
}

/// Sizes whose products no counter holds are refused by name, by every command that reads a configuration.
#[test]
fn sizes_beyond_counting_are_refused() {
    let workshop = Workshop::prepared();
    let huge = (1_u64 << 62).to_string();
    for (key, named) in [
        ("width = 32", "model."),
        ("blocks = 2", "model.blocks"),
        ("context = 32", "model.context"),
        ("heads = 2", "model."),
        ("latent_rank = 16", "model.attention"),
        ("content_width = 8", "model.attention"),
        ("routed = 4", "model.experts"),
        ("shared_width = 16", "model.experts"),
        ("row_width = 8", "model.memory"),
        ("[500, 500]", "model.memory.rows_per_head"),
    ] {
        let name = key.split(" = ").next().unwrap();
        let larger = match key.starts_with('[') {
            true => format!("[{huge}, {huge}]"),
            false => format!("{name} = {huge}"),
        };
        assert!(CONFIG.contains(key), "{key}");
        workshop.write("huge.toml", CONFIG.replace(key, &larger));
        workshop.fails("params huge.toml", INPUT, &[named]);
        workshop.fails("train huge.toml --out run", INPUT, &[named]);
    }
    assert!(!workshop.path("run").exists(), "nothing was made");
}

#[test]
fn epochs_are_counted() {
    let workshop = Workshop::prepared();
    workshop.run("train config.toml --out run --steps 400").expect(0, &["the data repeats: 400 steps"]);
    let metrics = workshop.metrics("run");
    let epoch = |index: usize| metrics[index]["epoch"].as_f64().unwrap();
    let steps: Vec<usize> = (0..metrics.len()).filter(|&index| metrics[index]["kind"] == "step").collect();
    assert!(epoch(steps[0]) > 0.0 && epoch(steps[0]) < 0.1 && epoch(*steps.last().unwrap()) > 1.0);
    assert!(steps.windows(2).all(|pair| epoch(pair[0]) < epoch(pair[1])));
}

#[test]
fn large_numbers_in_json_are_strings() {
    let workshop = Workshop::prepared();
    let listing = json(&workshop.ok("rows --tokenizer tokenizer.json --config config.toml --json words"));
    let multipliers = listing["layers"][0]["multipliers"].as_array().unwrap();
    assert!(!multipliers.is_empty());
    for multiplier in multipliers {
        assert!(multiplier.as_str().unwrap().parse::<i64>().is_ok(), "{multiplier}");
    }
}

#[cfg(unix)]
#[test]
fn names_and_outputs_that_are_odd() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let workshop = Workshop::prepared();
    // Standard error that takes nothing.
    for line in ["2> /dev/full", "2>&-"] {
        let outcome = workshop.shell(&format!(
            "\"$ENGRAM\" train config.toml --out 'my run' {line}; s=$?; rm -r 'my run'; exit $s"
        ));
        assert_eq!(outcome.status, Some(0), "{line}: {}", outcome.stderr);
    }
    // Names that are folders, or stand in files.
    workshop.fails("data prepare corpus.jsonl --tokenizer data --out d", INPUT, &["data"]);
    workshop.fails(
        "data prepare corpus.jsonl --tokenizer tokenizer.json --out config.toml/d",
        INPUT,
        &["config.toml"],
    );
    workshop.fails("train data --out run", INPUT, &["data"]);
    workshop.fails("train config.toml --out config.toml", INPUT, &["config.toml"]);
    workshop.fails("params data", INPUT, &["data"]);
    // Names that are not UTF-8.
    let odd = OsStr::from_bytes(b"caf\xe9");
    let run = |arguments: &[&OsStr]| Outcome::of(workshop.command(arguments).output().unwrap());
    let words = |text: &'static str| text.split(' ').map(OsStr::new);
    let prepare: Vec<&OsStr> =
        words("data prepare corpus.jsonl --tokenizer tokenizer.json --hold-out 0.2 --out")
            .chain([odd])
            .collect();
    run(&prepare).expect(0, &[]);
    let train: Vec<&OsStr> = words("train config.toml --out").chain([odd]).collect();
    std::fs::remove_dir_all(workshop.path("").join(odd)).unwrap();
    run(&train).expect(0, &[]);
    let folder = workshop.path("").join(OsStr::from_bytes(b"\xff"));
    std::fs::create_dir(&folder).unwrap();
    for name in ["config.toml", "tokenizer.json"] {
        std::fs::copy(workshop.path(name), folder.join(name)).unwrap();
    }
    std::fs::rename(workshop.path("data"), folder.join("data")).unwrap();
    let config = folder.join("config.toml");
    run(&[OsStr::new("train"), config.as_os_str(), OsStr::new("--out"), OsStr::new("run")])
        .expect(INPUT, &["not UTF-8", "rename"]);
}
