//! `engram table`: tables are made, checked, converted, taken in and given out; what cannot be is refused.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

mod common;

use std::path::Path;
use std::process::Command;

use common::{Outcome, Workshop, wait_until};
use serde_json::Value;

const INPUT: i32 = 2;
const MACHINE: i32 = 1;
const INTERRUPTED: i32 = 130;

/// An addressing of which only the name is known.
const ORIGIN: &str = "--identity 0707070707070707070707070707070707070707070707070707070707070707 --layer 1";

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn same(workshop: &Workshop, one: &str, other: &str) -> bool {
    std::fs::read(workshop.path(one)).unwrap() == std::fs::read(workshop.path(other)).unwrap()
}

/// A folder with the table `made` of normal values in this format.
fn with_table(format: &str) -> Workshop {
    let workshop = Workshop::with_corpus();
    workshop.ok(&format!(
        "table create made {ORIGIN} --rows 9088 --width 160 --format {format} --deviation 0.02 --seed 3"
    ));
    workshop
}

#[test]
fn a_table_goes_through_every_command_and_comes_back_byte_for_byte() {
    let workshop = with_table("f32");
    let info = json(&workshop.ok("table info made --json"));
    assert_eq!((&info["rows"], &info["width"], &info["format"]), (&9088.into(), &160.into(), &"f32".into()));
    assert_eq!((&info["layer"], &info["bytes_per_row"]), (&1.into(), &640.into()));
    assert_eq!(info["file_bytes"], std::fs::metadata(workshop.path("made")).unwrap().len());
    let content = info["content"].as_str().unwrap();
    let verified = workshop.ok("table verify made");
    assert!(verified.contains("9088 rows") && verified.contains(content), "{verified}");
    assert!(workshop.ok("table info made").contains(content));

    // The same again is the same file; another seed or layer is not.
    workshop.ok(&format!("table create again {ORIGIN} --rows 9088 --width 160 --deviation 0.02 --seed 3"));
    assert!(same(&workshop, "made", "again"));
    workshop.ok(&format!("table create other {ORIGIN} --rows 9088 --width 160 --deviation 0.02 --seed 4"));
    assert!(!same(&workshop, "made", "other"));

    // DeepSeek's layout, in one file and in two; Qwen's in fp8 with one scale, and in bf16.
    for (format, out) in [
        ("fp8e4m3", "one.safetensors"),
        ("fp8e4m3", "folder --file-bytes 1"),
        ("fp8e4m3:auto", "qwen"),
        ("bf16", "qwen16.safetensors"),
    ] {
        let (table, folder) = (format!("{format}.of.{out}"), out.split(' ').next().unwrap());
        let table = table.replace([' ', ':'], "-");
        let report = json(&workshop.ok(&format!("table convert made {table} --format {format} --json")));
        let (error, cosine) =
            (report["relative_rms_error"].as_f64().unwrap(), report["mean_cosine"].as_f64());
        let largest = if format == "bf16" { 0.002 } else { 0.04 };
        assert!(error > 0.0 && error < largest && cosine.unwrap() > 0.999, "{format}: {report}");
        assert_eq!((&report["rows_compared"], &report["lost"]), (&9088.into(), &0.into()));
        let said = workshop.ok(&format!("table export {table} {out}"));
        assert!(said.contains("9088 rows"), "{said}");
        workshop.ok(&format!("table import {folder} {table}.back {ORIGIN}"));
        assert!(same(&workshop, &table, &format!("{table}.back")), "{format} through {out}");
        // What was exported, imported and exported again is the same safetensors file.
        if Path::new(folder).extension().is_some() {
            workshop.ok(&format!("table export {table}.back again-{out}"));
            assert!(same(&workshop, folder, &format!("again-{folder}")), "{out}");
        }
    }
    assert_eq!(workshop.list("folder").len(), 3, "two tensors and their index");

    // Names of one's own, for a format without a published layout.
    workshop.fails("table export made own.safetensors", INPUT, &["made", "f32", "--weights"]);
    workshop.ok("table export made own.safetensors --weights first second");
    workshop.ok(&format!("table import own.safetensors own {ORIGIN} --weights first second"));
    assert!(same(&workshop, "made", "own"));
    assert!(workshop.list(".").iter().all(|name| !name.starts_with('.')), "{:?}", workshop.list("."));
}

#[test]
fn a_models_table_is_made_as_training_makes_it_and_its_conversion_is_judged_by_the_model() {
    let workshop = Workshop::prepared();
    workshop.write(
        "init.toml",
        common::CONFIG
            .replace("pad_id = 1", "pad_id = 1\nrow_init = 0.5")
            .replace("evaluate_every", "keep = 9\nevaluate_every"),
    );
    workshop.ok("train init.toml --out run");
    workshop.ok("table create made --config init.toml --tokenizer tokenizer.json");
    let trained = "run/checkpoints/step-00000012/memory.layer1.table";
    let (made, of_run) = (
        json(&workshop.ok("table info made --json")),
        json(&workshop.ok(&format!("table info {trained} --json"))),
    );
    for key in ["rows", "width", "layer", "identity", "format"] {
        assert_eq!(made[key], of_run[key], "{key}");
    }
    assert_eq!((&made["training"], &of_run["training"]["step"]), (&Value::Null, &12.into()));
    workshop.ok("table create same --checkpoint run");
    assert!(same(&workshop, "made", "same"));
    // A run begins with the very same rows.
    let first = "run/checkpoints/step-00000000/memory.layer1.table";
    workshop.ok(&format!("table convert {first} first --format f32"));
    assert!(same(&workshop, "made", "first"));

    let judged = |format: &str| {
        let line = format!(
            "table convert {trained} {format} --format {format} --model run --data data/valid --json"
        );
        json(&workshop.ok(&line))["loss"].take()
    };
    let exact = judged("f32");
    assert_eq!(exact["before"], exact["after"]);
    let loss = json(&workshop.ok("eval loss run data/valid --json"));
    assert_eq!(exact["before"], loss);
    let coarse = judged("int4");
    assert_eq!(coarse["before"], loss);
    assert_ne!(coarse["after"], loss);
    let text =
        workshop.ok(&format!("table convert {trained} again --format int4 --model run --data data/valid"));
    assert!(text.contains("nats per token") && text.contains("cosine"), "{text}");

    // A table of another addressing is not the model's.
    workshop.ok(&format!("table create foreign {ORIGIN} --rows 50 --width 8"));
    let line = "table convert foreign out --format f16 --model run --data data/valid";
    workshop.fails(line, INPUT, &["foreign", "addressing"]);
    assert!(!workshop.path("out").exists());
}

#[test]
fn damaged_and_foreign_files_are_refused_by_name_and_place() {
    let workshop = with_table("fp8e4m3");
    let whole = std::fs::read(workshop.path("made")).unwrap();
    let refused = |words: &[&str]| {
        for line in [
            "table verify damaged",
            "table convert damaged out --format int8",
            "table export damaged out.safetensors",
            "table export damaged out",
        ] {
            let words: Vec<&str> = words.iter().copied().chain(["damaged", "byte"]).collect();
            workshop.fails(line, INPUT, &words);
            assert_eq!(workshop.list("."), ["corpus.jsonl", "damaged", "made"], "{line}");
        }
    };
    // A flipped bit in the second block of rows, which the message names.
    let mut flipped = whole.clone();
    flipped[4096 + (1 << 20) + 77] ^= 4;
    workshop.write("damaged", &flipped);
    refused(&[&format!("byte {}", 4096 + (1 << 20)), "rows 6355 to"]);
    workshop.ok("table info damaged");
    let mut flipped = whole.clone();
    flipped[20] ^= 1;
    workshop.write("damaged", &flipped);
    refused(&["byte 0"]);
    workshop.fails("table info damaged", INPUT, &["damaged", "byte 0"]);
    // Cut off, too long, another file, a newer version, nothing.
    workshop.write("damaged", &whole[..whole.len() - 100]);
    refused(&[&format!("byte {}", whole.len() - 100), &whole.len().to_string()]);
    workshop.write("damaged", [whole.as_slice(), b"more"].concat());
    refused(&["promises"]);
    workshop.write("damaged", &whole[..1000]);
    refused(&["byte 1000", "header"]);
    workshop.write("damaged", [b"PK\x03\x04".as_slice(), &[7; 9000]].concat());
    refused(&["byte 0", "ENGRAMTB"]);
    let mut newer = whole.clone();
    newer[8] = 99;
    workshop.write("damaged", &newer);
    refused(&["byte 8", "version 99"]);
    workshop.write("damaged", "");
    refused(&["byte 0"]);
    workshop.fails("table verify nowhere", INPUT, &["nowhere", "No such file"]);
    workshop.fails("table verify .", INPUT, &["directory"]);
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let workshop = Workshop::prepared();
    let before = workshop.list(".");
    let refused = |line: &str, words: &[&str]| {
        workshop.fails(line, INPUT, words);
        assert_eq!(workshop.list("."), before, "{line}");
    };
    refused("table create t --rows 5 --width 4", &["--identity", "--config"]);
    refused("table create t --identity 07 --layer 1 --rows 5 --width 4", &["07", "64"]);
    refused(&format!("table create t {ORIGIN} --width 4"), &["--rows"]);
    refused(&format!("table create t {ORIGIN} --rows 4"), &["--width"]);
    refused(&format!("table create t {ORIGIN} --rows 0 --width 4"), &["rows is 0"]);
    refused(&format!("table create t {ORIGIN} --rows 5 --width 4 --format fp7"), &["fp7", "fp8e4m3"]);
    refused(&format!("table create t {ORIGIN} --rows 5 --width 4 --deviation=-1"), &["deviation", "-1"]);
    refused(&format!("table create no/t {ORIGIN} --rows 5 --width 4"), &["no", "folder"]);
    refused(&format!("table create corpus.jsonl {ORIGIN} --rows 5 --width 4"), &["corpus.jsonl", "exists"]);
    refused("table create t --config config.toml --tokenizer tokenizer.json --rows 7", &["--rows 7"]);
    refused(
        "table create t --config config.toml --tokenizer tokenizer.json --layer 0",
        &["--layer 0", "layers 1"],
    );
    refused(
        "table create t --preset v41 --tokenizer tokenizer.json --layer 1",
        &["99,092 classes", "this one has"],
    );
    refused("table create t --config config.toml", &["--tokenizer"]);
    refused(
        &format!("table create t {ORIGIN} --config config.toml --tokenizer tokenizer.json"),
        &["--identity"],
    );
    // More than the disk has: refused by the system, and nothing stays.
    let huge = workshop.run(&format!("table create t {ORIGIN} --rows 99999999999999999 --width 999999"));
    assert_eq!(huge.expect(INPUT, &["rows", "2^60"]).stdout, "");
    assert_eq!(workshop.list("."), before);
}

#[test]
fn an_existing_output_is_kept() {
    let workshop = with_table("bf16");
    workshop.write("there.safetensors", "mine");
    std::fs::create_dir(workshop.path("folder")).unwrap();
    workshop.write("folder/mine", "mine");
    for line in [
        "table convert made there.safetensors --format f16",
        "table convert made made --format f16",
        "table export made there.safetensors",
        "table export made folder",
        &format!("table import there.safetensors made {ORIGIN}"),
    ] {
        workshop.fails(line, INPUT, &["already exists"]);
    }
    assert_eq!(workshop.read("there.safetensors"), "mine");
    assert_eq!(workshop.list("folder"), ["mine"]);
    workshop.ok("table verify made");
}

#[test]
fn checkpoints_that_do_not_hold_the_table_are_refused() {
    let workshop = with_table("fp8e4m3");
    workshop.ok("table export made layer1.safetensors");
    let refused = |line: &str, words: &[&str]| {
        workshop.fails(line, INPUT, words);
        assert!(!workshop.path("out").exists(), "{line}");
    };
    let import = |source: &str, more: &str| format!("table import {source} out {ORIGIN} {more}");
    let other_layer = import("layer1.safetensors", "").replace("--layer 1", "--layer 14");
    refused(&other_layer, &["layer 14", "layers.14.engram"]);
    refused(&import("layer1.safetensors", "--weights embed"), &["embed", "no tensor"]);
    refused(&import("layer1.safetensors", "--weights layers.1.engram.embed.weight"), &["scales"]);
    refused(
        &import("layer1.safetensors", "--weights layers.1.engram.embed.scale"),
        &["layers.1.engram.embed.scale", "byte"],
    );
    refused(&import("nowhere.safetensors", ""), &["nowhere.safetensors", "No such file"]);
    refused(&import(".", ""), &["neither", "model.safetensors"]);
    refused(&import("corpus.jsonl", ""), &["corpus.jsonl", "byte"]);
    let whole = std::fs::read(workshop.path("layer1.safetensors")).unwrap();
    workshop.write("cut.safetensors", &whole[..whole.len() - 1]);
    refused(&import("cut.safetensors", ""), &["cut.safetensors", "promises", "byte 8"]);
    workshop.write("cut.safetensors", &whole[..6]);
    refused(&import("cut.safetensors", ""), &["cut.safetensors", "byte 6"]);
    // The given addressing has other rows than the checkpoint.
    workshop.ok("tokenizer train corpus.jsonl --vocabulary 320 --out tokenizer.json");
    let preset = "table import layer1.safetensors out --preset v41 --tokenizer tokenizer.json --layer 1";
    refused(preset, &["tokenizer.json", "99,092 classes", "this one has"]);
    workshop.write("config.toml", common::CONFIG);
    let own = "table import layer1.safetensors out --config config.toml --tokenizer tokenizer.json --layer 1";
    refused(own, &["9088 rows", "in layer 1"]);
    refused(&import("layer1.safetensors", "--scale x"), &["--weights"]);
}

#[test]
fn layouts_that_do_not_fit_are_refused_and_leave_no_folder() {
    let workshop = with_table("bf16");
    let before = workshop.list(".");
    let refused = |line: &str, words: &[&str]| {
        workshop.fails(line, INPUT, words);
        assert_eq!(workshop.list("."), before, "{line}");
    };
    refused("table export made out --layout deepseek", &["made", "bf16", "no scales"]);
    refused("table export made out --weights a --scale b", &["made", "bf16", "no scales"]);
    refused("table export made out --shards 0", &["--shards is 0"]);
    refused("table export made out --shards 9089", &["9088 rows", "9089"]);
    refused("table export made no/out", &["no", "folder"]);
    refused("table export made out --layout gguf", &["gguf", "deepseek"]);
}

#[test]
fn interrupted_work_leaves_nothing() {
    let workshop = Workshop::with_corpus();
    // Too much to be done before the signal comes.
    let line = format!("table create big {ORIGIN} --rows 4000000 --width 256 --deviation 1");
    let before = workshop.list(".");
    let child = workshop.start(&line);
    wait_until("the file to begin", || workshop.list(".") != before);
    workshop.shell(&format!("kill -INT {}", child.id()));
    let outcome = Outcome::of(child.wait_with_output().unwrap());
    outcome.expect(INTERRUPTED, &["interrupted"]);
    assert_eq!(workshop.list("."), before);
}

#[test]
fn a_full_disk_leaves_nothing() {
    let workshop = with_table("f32");
    let before = workshop.list(".");
    for line in [
        &format!("table create big {ORIGIN} --rows 90000 --width 64"),
        "table convert made out --format bf16",
        "table export made out.safetensors --weights w",
        "table export made out --weights w",
    ] {
        let limited = format!("trap '' XFSZ; ulimit -f 100; exec \"$ENGRAM\" {line}");
        workshop.shell(&limited).expect(1, &["File too large", "byte"]);
        assert_eq!(workshop.list("."), before, "{line}");
    }
}

#[test]
fn the_use_of_rows_is_told() {
    let workshop = Workshop::prepared();
    let line = "table stats data/train --config config.toml --tokenizer tokenizer.json";
    let report = json(&workshop.ok(&format!("{line} --json --svg rates.svg")));
    assert!(workshop.read("rates.svg").starts_with("<svg"));
    let number = |value: &Value| value.as_f64().unwrap();
    let tokens = number(&report["tokens"]);
    assert_eq!(number(&report["lookups"]), 4.0 * tokens);
    assert_eq!(report["sample"], 1.0);
    let orders = report["orders"].as_array().unwrap();
    assert_eq!(orders.len(), 2);
    for order in orders {
        assert_eq!(number(&order["reuse"]), tokens / number(&order["n_grams"]));
        for head in order["heads"].as_array().unwrap() {
            // Hundreds of n-grams on some five hundred rows fall as chance would have it.
            let (used, expected) = (number(&head["used"]), number(&head["expected_used"]));
            assert!((used / expected - 1.0).abs() < 0.15, "{head}");
            assert!(used <= number(&head["rows"]));
        }
        let hot = order["hot"].as_array().unwrap();
        assert_eq!(hot.len(), 10);
        assert!(hot.iter().all(|hot| number(&hot["lookups"]) >= number(&hot["own"])));
        assert!(hot[0]["text"].as_str().is_some_and(|text| !text.is_empty()));
    }
    let rates = report["hit_rates"].as_array().unwrap();
    let last = number(&rates.last().unwrap()["all"]);
    assert!((last - (1.0 - number(&report["first_lookups"]))).abs() < 1e-9, "all rows fit");
    assert!(rates.is_sorted_by_key(|rate| (number(&rate["all"]) * 1e9) as u64));

    // The corpus as text is the same corpus.
    let text = workshop.ok(&format!("{line} --hot 2"));
    assert!(text.contains("hottest 3-grams") && !text.contains("4-grams"), "{text}");
    let whole = "data prepare corpus.jsonl --tokenizer tokenizer.json --hold-out 0 --out whole";
    workshop.ok(whole);
    let options = "--config config.toml --tokenizer tokenizer.json --json";
    let of_shards = workshop.ok(&format!("table stats whole/train {options}"));
    assert_eq!(of_shards, workshop.ok(&format!("table stats --text corpus.jsonl {options}")));
    let few = json(&workshop.ok(&format!("table stats --text corpus.jsonl {options} --tokens 100")));
    assert_eq!(few["tokens"], 100);

    workshop.fails("table stats data/train", INPUT, &["--config", "--checkpoint"]);
    workshop.fails(&format!("{line} --sample 0"), INPUT, &["--sample is 0"]);
    workshop.fails(&format!("{line} --tokens 0"), INPUT, &["no tokens"]);
    workshop.ok("tokenizer train corpus.jsonl --vocabulary 300 --out small.json");
    let other = "table stats data/train --config config.toml --tokenizer small.json";
    workshop.fails(other, INPUT, &["data/train", "tokenizer"]);
}

#[test]
fn tiers_are_measured() {
    let workshop = with_table("fp8e4m3");
    for tier in ["ram", "mapped", "direct", "direct --queue threads --depth 3", "direct --row-cache 1MiB"] {
        for ids in ["--batch 7", "--batch 5000 --zipf 1.1 --threads 2"] {
            let line = format!("table bench made --tier {tier} {ids} --seconds 0.05 --json");
            let report = json(&workshop.ok(&line));
            let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report}"));
            assert!(number("requests") >= 1.0);
            assert!(0.0 < number("p50_us") && number("p50_us") <= number("p95_us"));
            assert!(number("p95_us") <= number("p99_us") && number("p99_us") <= number("longest_us"));
            let batch = if ids.contains("5000") { 5000.0 } else { 7.0 };
            assert_eq!(number("rows_per_request"), batch);
            assert!(number("rows_per_second") > 0.0);
            assert_eq!(report["hit_rate"].is_number(), tier.contains("cache"), "{report}");
        }
    }
    let shortest = json(&workshop.ok("table bench made --cold --seconds 1e-9 --json"));
    assert_eq!(shortest["requests"], 1);
    let text = workshop.ok("table bench made --cold --seconds 0.05");
    assert!(text.contains("mapped file, cold") && text.contains("99th percentile"), "{text}");

    workshop.fails("table bench nowhere", INPUT, &["nowhere"]);
    workshop.fails("table bench made --row-cache 10B", INPUT, &["cache"]);
    workshop.fails("table bench made --row-cache much", INPUT, &["--row-cache"]);
    workshop.fails("table bench made --tier direct --depth 0", INPUT, &["depth"]);
    workshop.fails("table bench made --tier redis", INPUT, &["--node"]);
    workshop.fails("table bench made --tier ram --resident 1MiB", INPUT, &["--tier mapped"]);
    workshop.fails("table bench made --resident 1KiB", INPUT, &["at least 1 MiB"]);
    workshop.ok("table bench made --resident 1MiB --seconds 0.1");
    workshop.fails("table bench made --node redis://127.0.0.1:1", INPUT, &["--tier redis"]);
    let gone = "--node redis://127.0.0.1:1 --row-timeout 0.5";
    workshop.fails(&format!("table bench made --tier redis {gone}"), MACHINE, &["127.0.0.1:1"]);
    workshop.fails(&format!("table serve-redis-load made {gone}"), MACHINE, &["127.0.0.1:1"]);
    workshop.fails("table serve-redis-load made", INPUT, &["--node"]);
    workshop.fails("table bench made --batch 0", INPUT, &["--batch"]);
    workshop.fails("table bench made --seconds 0", INPUT, &["--seconds is 0"]);
    workshop.fails("table bench made --zipf=-1", INPUT, &["--zipf is -1"]);
    workshop.fails("table bench made --data data/valid", INPUT, &["--config"]);
}

#[test]
fn real_ids_are_those_of_the_tables_addressing() {
    let workshop = Workshop::prepared();
    let addressing = "--config config.toml --tokenizer tokenizer.json";
    workshop.ok(&format!("table create made {addressing}"));
    let line = |tokens: u32| {
        format!("table bench made --data data/valid {addressing} --tokens {tokens} --seconds 0.05 --json")
    };
    for tokens in [1, 50] {
        let report = json(&workshop.ok(&line(tokens)));
        assert_eq!(report["rows_per_request"], f64::from(4 * tokens));
    }
    workshop.fails(&line(10_000_000), INPUT, &["data/valid", "tokens"]);
    workshop.ok(&format!("table create other {ORIGIN} --rows 5000 --width 8"));
    let other = format!("table bench other --data data/valid {addressing}");
    workshop.fails(&other, INPUT, &["other", "addressing", "0707070707"]);
}

#[test]
fn a_plan_says_what_fits_where() {
    let workshop = with_table("f32");
    let plan = json(&workshop.ok("table plan --preset v41 --ram 128GiB --disk-reads 100000 --json"));
    assert_eq!(
        (&plan["tables"][0]["rows"], &plan["tables"][1]["rows"]),
        (&384_006_168.into(), &384_016_682.into())
    );
    assert_eq!((&plan["rows_per_token"], &plan["bytes_per_token"]), (&48.into(), &(48 * 264).into()));
    let fits = |plan: &Value| -> Vec<(String, bool)> {
        let tiers = plan["tiers"].as_array().unwrap();
        tiers
            .iter()
            .map(|tier| (tier["tier"].as_str().unwrap().into(), tier["fits"].as_bool().unwrap()))
            .collect()
    };
    // 188.8 GiB.
    assert_eq!(fits(&plan), [("ram".into(), false), ("mapped".into(), true), ("direct".into(), true)]);
    let large = json(&workshop.ok("table plan --preset v41 --ram 200GiB --gpu-memory 80GiB --json"));
    assert_eq!(fits(&large), [("GPU (at least as RAM)".into(), false), ("ram".into(), true)]);
    let qwen = json(&workshop.ok("table plan --preset qwen --ram 1GiB --json"));
    assert_eq!((&qwen["rows_per_token"], &qwen["bytes_per_token"]), (&16.into(), &(16 * 320).into()));

    let text = workshop.ok("table plan --preset demo --ram 1GiB --probe made");
    assert!(text.contains("limit of") && text.contains("/dev/shm"), "{text}");
    workshop.write(
        "stats.json",
        r#"{"hit_rates": [{"bytes": 65536, "all": 0.5}, {"bytes": 131072, "all": 0.51},
        {"bytes": 1048576, "all": 0.9}, {"bytes": 99999999999999, "all": 1.0}]}"#,
    );
    let cached = json(&workshop.ok("table plan --preset demo --ram 1GiB --stats stats.json --json"));
    let sizes: Vec<_> =
        cached["caches"].as_array().unwrap().iter().map(|cache| cache["bytes"].clone()).collect();
    assert_eq!(sizes, [65536, 1_048_576]);
    workshop.fails("table plan", INPUT, &["--preset", "--config"]);
    workshop.fails("table plan --preset v41 --disk-reads 0", INPUT, &["--disk-reads is 0"]);
    workshop.fails("table plan --preset v41 --prompt 0", INPUT, &["--prompt is 0"]);
    workshop.write("stats.json", "{}");
    workshop.fails("table plan --preset v41 --stats stats.json", INPUT, &["stats.json", "hit_rates"]);
}

#[test]
fn edits_live_in_overlays() {
    let workshop = with_table("f32");
    // Another table of which all rows differ is as large as an overlay can be.
    workshop.ok(&format!("table create edited {ORIGIN} --rows 9088 --width 160 --deviation 0.02 --seed 4"));
    let info = json(&workshop.ok("overlay create edits --table made --edited edited --json"));
    assert_eq!((&info["changed"], &info["rows"], &info["layer"]), (&9088.into(), &9088.into(), &1.into()));
    assert_eq!(info["below"], json(&workshop.ok("table info made --json"))["content"]);
    assert_eq!(info["file_bytes"], std::fs::metadata(workshop.path("edits")).unwrap().len());
    assert!(workshop.ok("overlay info edits").contains("9088 of 9088"));
    workshop.ok("overlay merge merged --table made --below edits");
    assert!(same(&workshop, "merged", "edited"));

    // Two changes are taken back; on top of that overlay, the two are the difference.
    let fewer = json(&workshop.ok("overlay drop edits fewer --rows 17 4711 --json"));
    assert_eq!(fewer["changed"], 9086);
    let rest = json(&workshop.ok("overlay create rest --table made --below fewer --edited edited --json"));
    assert_eq!((&rest["ids"], &rest["below"]), (&serde_json::json!([17, 4711]), &fewer["content"]));
    let diff = json(&workshop.ok("overlay diff rest --table made --below fewer --rows 1 --json"));
    assert_eq!((&diff["changed"], diff["rows"].as_array().unwrap().len()), (&2.into(), 1));
    assert!(diff["rows"][0]["rms"].as_f64().unwrap() > 0.0);
    assert!(workshop.ok("overlay diff rest --table made --below fewer").contains("4711"));
    workshop.ok("overlay merge again --table made --below fewer rest");
    assert!(same(&workshop, "again", "edited"));

    workshop.fails("overlay create none --table edited --edited edited", INPUT, &["nothing to keep"]);
    workshop.fails("overlay merge out --table made", INPUT, &["--below"]);
    workshop.fails("overlay merge out --table edited --below edits", INPUT, &["edits", "made for"]);
    workshop.fails("overlay drop fewer out --rows 17", INPUT, &["does not change row 17"]);
    workshop.fails("overlay info made", INPUT, &["made", "ENGRAMOV"]);
    workshop.fails("overlay create edits --table made --edited edited", INPUT, &["already exists"]);
    assert!(!workshop.path("none").exists() && !workshop.path("out").exists());
}

#[test]
fn a_cluster_serves_a_loaded_table() {
    if Command::new("redis-server").arg("--version").output().is_err() {
        // Past the harness, which shows what a test prints only where it fails.
        let said = b"SKIPPED: redis-server is not installed, so that tables in a cluster are not tested\n";
        return std::io::Write::write_all(&mut std::io::stderr(), said).unwrap();
    }
    let workshop = with_table("fp8e4m3");
    let cluster = Cluster::start(17_400);
    let node = &cluster.node;
    workshop.fails(&format!("table bench made --tier redis --node {node}"), MACHINE, &["holds no"]);
    let text = workshop.ok(&format!("table serve-redis-load made --node {node}"));
    assert!(text.contains("are in the cluster"), "{text}");
    let line = format!("table bench made --tier redis --node {node} --batch 64 --seconds 0.2 --json");
    let report = json(&workshop.ok(&line));
    assert_eq!(report["rows_per_request"], 64.0);
    assert!(report["device_reads_per_second"].is_null());

    // Another table of the same name leaves the first one's rows, which can be seen and removed; then all can.
    workshop
        .ok(&format!("table create other {ORIGIN} --rows 9088 --width 160 --format fp8e4m3 --deviation 0.1"));
    workshop.ok(&format!("table serve-redis-load other --node {node}"));
    let remove = format!("table serve-redis-remove {ORIGIN} --node {node} --json");
    let states = |text: &str| -> Vec<(bool, bool)> {
        let contents = json(text);
        let flag = |content: &Value, name: &str| content[name].as_bool().unwrap();
        contents.as_array().unwrap().iter().map(|own| (flag(own, "offered"), flag(own, "removed"))).collect()
    };
    assert_eq!(states(&workshop.ok(&remove)), [(true, false), (false, false)]);
    let text = workshop.ok(&remove.replace(" --json", ""));
    assert!(text.contains("offered") && text.contains("superseded"), "{text}");
    let none = format!("{remove} --content {}", "ab".repeat(32));
    workshop.fails(&none, INPUT, &["holds no rows", "abab"]);
    assert_eq!(states(&workshop.ok(&format!("{remove} --superseded"))), [(true, false), (false, true)]);
    workshop.ok(&format!("table bench other --tier redis --node {node} --batch 64 --seconds 0.2"));
    assert_eq!(states(&workshop.ok(&format!("{remove} --all"))), [(true, true)]);
    assert_eq!(workshop.ok(&remove), "[]\n");
    workshop.fails(&format!("table bench other --tier redis --node {node}"), MACHINE, &["holds no"]);
}

/// Three masters and three replicas that live as long as this does.
struct Cluster {
    folder: tempfile::TempDir,
    node: String,
}

const CLUSTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/redis-cluster");

impl Cluster {
    fn start(first_port: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut start = Command::new(CLUSTER);
        start.arg("start").arg(folder.path()).arg(first_port.to_string());
        let started = start.output().unwrap();
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        Self { folder, node: format!("redis://127.0.0.1:{first_port}") }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = Command::new(CLUSTER).arg("stop").arg(self.folder.path()).status();
    }
}
