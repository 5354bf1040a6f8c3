//! What cannot be done is refused: with what is wrong, where, what to do, and nothing half-written.

mod common;

use std::io::Read;
use std::io::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{CONFIG, Outcome, Workshop, wait_until};

const INPUT: i32 = 2;
const MACHINE: i32 = 1;
const INTERRUPTED: i32 = 130;

#[test]
fn usage() {
    let workshop = Workshop::with_corpus();
    workshop.fails("trian", INPUT, &["trian", "train"]);
    workshop.fails("train config.toml", INPUT, &["--out"]);
    workshop.fails("train config.toml --out run --device tpu", INPUT, &["tpu", "cpu", "cuda"]);
    workshop.fails("rows --tokenizer tokenizer.json text", INPUT, &["--config"]);
    assert_eq!(workshop.run("").status, Some(INPUT));
}

#[test]
fn missing_files() {
    let workshop = Workshop::prepared();
    workshop.fails("train nowhere.toml --out run", INPUT, &["nowhere.toml", "No such file"]);
    workshop.fails("params nowhere.toml", INPUT, &["nowhere.toml"]);
    workshop.fails("tokenizer train nowhere.txt --vocabulary 300 --out t.json", INPUT, &["nowhere.txt"]);
    workshop.fails("data prepare corpus.jsonl --tokenizer nowhere.json --out d", INPUT, &["nowhere.json"]);
    workshop.fails("eval loss nowhere data/valid", INPUT, &["nowhere", "no complete checkpoint"]);
    workshop.fails("generate nowhere --prompt a", INPUT, &["nowhere", "no complete checkpoint"]);
    workshop.fails("train config.toml --out run --resume", INPUT, &["run", "no complete checkpoint"]);
    workshop.write("moved.toml", CONFIG.replace("data/train", "elsewhere/train"));
    workshop.fails("train moved.toml --out run", INPUT, &["elsewhere/train"]);
    assert_eq!(workshop.list("."), ["config.toml", "corpus.jsonl", "data", "moved.toml", "tokenizer.json"]);
}

#[test]
fn malformed_files() {
    let workshop = Workshop::prepared();
    workshop.write("broken.json", "{\"version\": ");
    let rows = "rows --config config.toml --tokenizer broken.json text";
    workshop.fails(rows, INPUT, &["broken.json", "tokenizer.json"]);
    workshop.write("broken.jsonl", "{\"text\": \"good\"}\n{\"text\": \"bad\n");
    let train = "tokenizer train broken.jsonl --vocabulary 300 --out t.json";
    workshop.fails(train, INPUT, &["broken.jsonl", "line 2"]);
    workshop.write("other.jsonl", "{\"texts\": \"good\"}\n");
    let train = "tokenizer train other.jsonl --vocabulary 300 --out t.json";
    workshop.fails(train, INPUT, &["other.jsonl", "line 1", "text"]);
    workshop.write("notes.docx", "words");
    let train = "tokenizer train notes.docx --vocabulary 300 --out t.json";
    workshop.fails(train, INPUT, &["notes.docx", "unknown format"]);
    workshop.write("cut.jsonl.zst", &zstd::encode_all(&b"{\"text\": \"words words\"}"[..], 3).unwrap()[..18]);
    let train = "tokenizer train cut.jsonl.zst --vocabulary 300 --out t.json";
    workshop.fails(train, INPUT, &["cut.jsonl.zst", "cut off"]);
    assert!(!workshop.path("t.json").exists());
}

#[test]
fn a_wrong_key_or_value_is_named_with_its_line() {
    let workshop = Workshop::prepared();
    let line = |part: &str| CONFIG[..CONFIG.find(part).unwrap()].matches('\n').count() + 1;
    let refuse = |from: &str, to: &str, words: &[&str]| {
        workshop.write("wrong.toml", CONFIG.replace(from, to));
        let place = format!("wrong.toml:{}", line(from));
        let words: Vec<&str> = words.iter().copied().chain([place.as_str()]).collect();
        workshop.fails("train wrong.toml --out run", INPUT, &words);
    };
    refuse("evaluate_tokens", "evaluate_tokes", &["evaluate_tokes", "evaluate_tokens"]);
    refuse("width = 48", "width = \"wide\"", &["wide", "expected"]);
    refuse("active = 2", "active = 5", &["model.experts.active", "4 routed"]);
    refuse("rotary_width = 4", "rotary_width = 5", &["model.attention.rotary_width", "even"]);
    refuse("layers = [1]", "layers = [2]", &["model.memory.layers", "block 2"]);
    refuse("heads = 2\nlatent", "heads = \nlatent", &[]);
    refuse("steps = 12", "steps = 0", &["train.steps"]);
    let yarn = |keys: &str| format!("yarn = {{ {keys} }}\nrotary_width = 4");
    let refuse_yarn = |keys: &str, words: &[&str]| refuse("rotary_width = 4", &yarn(keys), words);
    refuse_yarn("original_context = 16, scale = 0.5", &["model.attention.yarn.scale", "at least 1"]);
    refuse_yarn("original_context = 16, alpha = 40.0", &["model.attention.yarn.beta", "`alpha`"]);
    refuse_yarn("original_context = 0", &["model.attention.yarn.original_context"]);
    let short = CONFIG.replace("rotary_width = 4", &yarn("original_context = 16, scale = 1.5"));
    workshop.write("wrong.toml", short);
    let words = ["model.context", "raise `model.attention.yarn.scale`"];
    workshop.fails("train wrong.toml --out run", INPUT, &words);
    assert!(!workshop.path("run").exists());
    workshop.fails("train config.toml --out run --steps 0", INPUT, &["steps"]);
    workshop.fails("train config.toml --out run --steps 3", INPUT, &["warmup = 4", "3 steps"]);
}

#[test]
fn parts_that_do_not_fit_each_other() {
    let workshop = Workshop::trained();
    workshop.ok("tokenizer train corpus.jsonl --vocabulary 300 --out small.json");
    workshop.ok("data prepare corpus.jsonl --tokenizer small.json --hold-out 0.2 --out small");

    // Shards of another tokenizer than the checkpoint's, or than the configuration's.
    workshop.fails("eval loss run small/valid", INPUT, &["small/valid", "tokenizer"]);
    workshop.write("small.toml", CONFIG.replace("data/", "small/"));
    workshop.fails("train small.toml --out other", INPUT, &["small/train", "tokenizer"]);
    // Another tokenizer than the model's size.
    workshop.write("small.toml", CONFIG.replace("data/", "small/").replace("tokenizer.json", "small.json"));
    workshop.fails("train small.toml --out other", INPUT, &["300", "320", "model.vocabulary"]);
    // A tokenizer put in the checkpoint's place.
    let checkpoint = "run/checkpoints/step-00000012";
    std::fs::copy(workshop.path("small.json"), workshop.path(&format!("{checkpoint}/tokenizer.json")))
        .unwrap();
    workshop.fails("generate run --prompt a", INPUT, &["tokenizer.json", "damaged"]);
    // Another model in the run's folder.
    let earlier = "run/checkpoints/step-00000006";
    std::fs::remove_dir_all(workshop.path(checkpoint)).unwrap();
    workshop.write("wide.toml", CONFIG.replace("width = 48", "width = 64"));
    workshop.fails("train wide.toml --out run --resume", INPUT, &["run", "[model]"]);
    workshop.fails("train config.toml --out run", INPUT, &["run", "--resume"]);
    assert!(workshop.path(earlier).exists());
}

#[test]
fn options_that_cannot_be() {
    let workshop = Workshop::trained();
    for (option, words) in [
        ("--temperature -1", ["temperature", "0 or above"]),
        ("--top-p 1.5", ["top-p", "at most at 1"]),
        ("--top-k 0", ["top-k", "1 or more"]),
    ] {
        let line = format!("generate run --prompt a {}", option.replacen(' ', "=", 1));
        workshop.fails(&line, INPUT, &words);
    }
    workshop.fails("inspect gates run words --stream 2", INPUT, &["--stream 2", "2"]);
    let long = "word ".repeat(60);
    workshop.run_arguments(["inspect", "gates", "run", &long]).expect(INPUT, &["context", "32"]);
    workshop.run_arguments(["inspect", "gates", "run", ""]).expect(INPUT, &["empty"]);
    workshop.fails(
        "tokenizer train corpus.jsonl --vocabulary 100 --out t.json",
        INPUT,
        &["vocabulary", "258"],
    );
    let prepare = "data prepare corpus.jsonl --tokenizer tokenizer.json --hold-out 1.5 --out d";
    workshop.fails(prepare, INPUT, &["hold_out", "1.5"]);
    workshop.fails(
        "data prepare corpus.jsonl --tokenizer tokenizer.json --out data",
        INPUT,
        &["already exists"],
    );
    workshop.fails(
        "tokenizer train corpus.jsonl --vocabulary 300 --out tokenizer.json",
        INPUT,
        &["already exists"],
    );
    #[cfg(not(feature = "cuda"))]
    workshop.fails("train config.toml --out gpu --device cuda", INPUT, &["cuda", "--features cuda"]);
}

#[test]
fn memory_is_asked_of_a_model_without_one() {
    let workshop = Workshop::prepared();
    let (before, rest) = CONFIG.split_once("[model.memory]").unwrap();
    let plain = format!("{before}{}", &rest[rest.find("[data]").unwrap()..]);
    workshop.write("plain.toml", plain);
    workshop.ok("train plain.toml --out plain");
    workshop.fails("inspect gates plain words", INPUT, &["no memory"]);
    let rows = "rows --tokenizer tokenizer.json --config plain.toml words";
    workshop.fails(rows, INPUT, &["plain.toml", "no memory"]);
}

#[test]
fn an_empty_corpus() {
    let workshop = Workshop::prepared();
    std::fs::create_dir(workshop.path("nothing")).unwrap();
    workshop.write("empty.txt", "");
    for corpus in ["nothing", "empty.txt"] {
        let train = format!("tokenizer train {corpus} --vocabulary 300 --out t.json");
        workshop.fails(&train, INPUT, &["empty", corpus]);
        let prepare = format!("data prepare {corpus} --tokenizer tokenizer.json --out d");
        workshop.fails(&prepare, INPUT, &["empty", corpus]);
    }
    assert!(!workshop.path("t.json").exists() && !workshop.path("d").exists());
    assert!(!workshop.list(".").iter().any(|name| name.starts_with('.')), "{:?}", workshop.list("."));
}

#[test]
fn invalid_utf8_is_named_with_its_offset() {
    let workshop = Workshop::prepared();
    workshop.write("latin1.txt", b"a na\xefve text");
    workshop.fails(
        "tokenizer train latin1.txt --vocabulary 300 --out t.json",
        INPUT,
        &["latin1.txt", "byte 4"],
    );
    let prepare = "data prepare latin1.txt --tokenizer tokenizer.json --out d";
    workshop.fails(prepare, INPUT, &["latin1.txt", "byte 4"]);
    assert!(!workshop.path("t.json").exists() && !workshop.path("d").exists());
    let rows = "\"$ENGRAM\" rows --tokenizer tokenizer.json --config config.toml < latin1.txt";
    workshop.shell(rows).expect(INPUT, &["standard input", "byte 4"]);
}

#[test]
fn a_damaged_checkpoint_is_refused() {
    let workshop = Workshop::trained();
    let folder = "run/checkpoints/step-00000012";
    let files = workshop.list(folder);
    assert!(files.len() >= 7, "{files:?}");
    for file in &files {
        let path = format!("{folder}/{file}");
        let whole = std::fs::read(workshop.path(&path)).unwrap();
        let check = |damage: &str| {
            for line in ["eval loss run data/valid", "train config.toml --out run --resume --steps 13"] {
                let outcome = workshop.run(line).expect(INPUT, &[]);
                // A changed checksum in the manifest looks like a change of the file it belongs to.
                let named = outcome.stderr.contains(file.as_str()) || file == "manifest.json";
                assert!(named && outcome.stderr.contains(folder), "{damage} {file}: {}", outcome.stderr);
            }
        };
        let mut flipped = whole.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        workshop.write(&path, &flipped);
        check("a flipped bit in");
        workshop.write(&path, &whole[..whole.len() - 1]);
        check("a missing byte of");
        if file != "manifest.json" {
            std::fs::remove_file(workshop.path(&path)).unwrap();
            check("the missing");
        }
        workshop.write(&path, &whole);
    }
    workshop.ok("eval loss run data/valid");
}

#[test]
fn damaged_shards_are_refused() {
    let workshop = Workshop::prepared();
    let path = "data/train/00000.tokens";
    let whole = std::fs::read(workshop.path(path)).unwrap();
    workshop.write(path, &whole[..whole.len() - 8]);
    workshop.fails("train config.toml --out run", INPUT, &["00000.tokens", "cut off or damaged"]);
    workshop.write(path, b"words");
    workshop.fails("train config.toml --out run", INPUT, &["00000.tokens"]);
}

#[test]
fn a_full_disk() {
    let workshop = Workshop::prepared();
    workshop
        .shell("\"$ENGRAM\" params config.toml > /dev/full")
        .expect(MACHINE, &["standard output", "No space"]);

    // A limit on the size of files stands in for the disk's: the system refuses to write in the same way.
    let limited = |blocks: u32, line: &str| {
        workshop.shell(&format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$ENGRAM\" {line}"))
    };
    let train = "tokenizer train corpus.jsonl --vocabulary 310 --out t.json";
    limited(1, train).expect(MACHINE, &["t.json", "File too large"]);
    let prepare = "data prepare corpus.jsonl --tokenizer tokenizer.json --out d";
    limited(1, prepare).expect(MACHINE, &["File too large"]);
    limited(8, "train config.toml --out run").expect(MACHINE, &["run", "File too large"]);
    assert!(!workshop.path("t.json").exists() && !workshop.path("d").exists());
    let visible = |name: &String| !name.starts_with('.');
    assert_eq!(workshop.list("run/checkpoints").iter().filter(|name| visible(name)).count(), 0);
    // With room again, the same command works.
    workshop.ok("train config.toml --out run");

    limited(8, "train config.toml --out run --resume --steps 13").expect(MACHINE, &["File too large"]);
    workshop.ok("eval loss run data/valid");
    workshop.ok("train config.toml --out run --resume --steps 13");
}

#[test]
fn a_full_file_system() {
    let workshop = Workshop::prepared();
    let mount = "mkdir small && mount -t tmpfs -o size=256k tmpfs small";
    if workshop.shell(mount).status != Some(0) {
        // Written past the test harness, which hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED: a_full_file_system needs the right to mount a tmpfs");
        return;
    }
    let outcome = workshop.run("train config.toml --out small/run");
    let left = workshop.list("small/run/checkpoints");
    workshop.shell("umount -l small");
    outcome.expect(MACHINE, &["small/run", "No space left"]);
    assert!(left.iter().all(|name| name.starts_with('.')), "{left:?}");
}

#[test]
fn a_reader_that_has_read_enough() {
    let workshop = Workshop::prepared();
    let rows = "\"$ENGRAM\" rows --tokenizer tokenizer.json --config config.toml";
    let outcome = workshop.shell(&format!("(cat corpus.jsonl | {rows}; echo $? > status) | head -n 1"));
    assert_eq!(outcome.stdout.lines().count(), 1);
    assert_eq!(outcome.stderr, "", "quietly");
    assert_eq!(workshop.read("status"), "0\n");
}

#[test]
fn an_interrupted_run_is_saved_and_goes_on() {
    let workshop = Workshop::prepared();
    workshop.write("long.toml", CONFIG.replace("steps = 12", "steps = 100000"));
    let child = workshop.start("train long.toml --out run");
    let steps = || match std::fs::read_to_string(workshop.path("run/metrics.jsonl")) {
        Ok(text) => text.lines().count(),
        Err(_) => 0,
    };
    wait_until("the first steps", || steps() > 10);
    workshop.shell(&format!("kill -INT {}", child.id()));
    let outcome = Outcome::of(child.wait_with_output().unwrap());
    let resume = "engram train long.toml --out run --resume";
    let outcome = outcome.expect(INTERRUPTED, &["interrupted at step", "saved", resume]);
    assert!(!outcome.stderr.contains("panicked"));
    let metrics = workshop.metrics("run");
    let step = metrics.last().unwrap()["step"].as_u64().unwrap();
    let newest = workshop.list("run/checkpoints").pop().unwrap();
    assert_eq!(newest, format!("step-{step:08}"), "the checkpoint is of the last step");

    workshop.ok(&format!("train long.toml --out run --resume --steps {}", step + 2));
    assert_eq!(workshop.metrics("run").last().unwrap()["step"], step + 2);
}

#[test]
fn an_interrupted_preparation_leaves_nothing() {
    let workshop = Workshop::prepared();
    workshop.write("pipe.txt", "");
    // Interrupted from the start: the signal comes while it waits for a corpus that never ends.
    workshop.shell(
        "rm pipe.txt; yes 'Ada Lovelace wrote to the Milky Way about numbers.' | head -c 40000000 > pipe.txt",
    );
    let mut command = workshop.command("tokenizer train pipe.txt --vocabulary 300 --out t.json".split(' '));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(150));
    workshop.shell(&format!("kill -INT {}", child.id()));
    let outcome = Outcome::of(child.wait_with_output().unwrap());
    outcome.expect(INTERRUPTED, &["interrupted"]);
    assert!(!workshop.path("t.json").exists());
}

/// Options of a command that take a number or a size, by its help.
fn numeric_options(workshop: &Workshop, command: &str) -> Vec<String> {
    let help = workshop.ok(&format!("{command} --help"));
    let option = |line: &str| {
        let name = line.split_whitespace().find(|word| word.starts_with("--"))?;
        let value = line.split_once('<')?.1.split_once('>')?.0;
        ["N", "S", "SIZE", "SEED", "P", "T", "K", "R", "SHARE", "BYTES", "MICROSECONDS"]
            .contains(&value)
            .then(|| name.to_owned())
    };
    help.lines().filter(|line| line.trim_start().starts_with('-')).filter_map(option).collect()
}

/// Whatever number an option is given, a command works, or says what is wrong.
#[test]
fn no_number_makes_a_command_panic() {
    let workshop = Workshop::trained();
    let identity = "07".repeat(32);
    let made =
        format!("table create made --identity {identity} --layer 1 --rows 640 --width 16 --format f32");
    workshop.ok(&made);
    let commands = [
        ("table bench", "made --seconds=0.01"),
        ("table plan", "--config config.toml"),
        ("tokenizer train", "corpus.jsonl --out t.json"),
        ("data prepare", "corpus.jsonl --tokenizer tokenizer.json --out d"),
        ("generate", "run --prompt a --max-tokens=1"),
    ];
    for (command, rest) in commands {
        let options = numeric_options(&workshop, command);
        assert!(!options.is_empty(), "{command}");
        for option in &options {
            for value in ["18446744073709551615", "4294967296", "1e300", "nan", "-1", "0", "1e-300", "15EiB"]
            {
                let others = rest.split(' ').filter(|other| !other.starts_with(&format!("{option}=")));
                let line: Vec<&str> = command.split(' ').chain(others).collect();
                let mut child = workshop
                    .command(line.iter().copied().chain([&format!("{option}={value}")[..]]))
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap();
                // What works on for longer has taken the number.
                let patience = Instant::now() + Duration::from_secs(2);
                let status = loop {
                    match child.try_wait().unwrap() {
                        Some(status) => break status.code(),
                        None if Instant::now() > patience => {
                            child.kill().unwrap();
                            child.wait().unwrap();
                            break Some(0);
                        }
                        None => std::thread::sleep(Duration::from_millis(2)),
                    }
                };
                let mut said = String::new();
                child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
                assert!(
                    matches!(status, Some(0 | INPUT | MACHINE)) && !said.contains("panicked"),
                    "{command} {option}={value}: {status:?}\n{said}"
                );
            }
        }
    }
}
