//! A folder with a small corpus, its tokenizer and shards, and the command to be run in it.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its part; a panic is a failure")]

use std::ffi::OsStr;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A model that takes milliseconds a step, with everything a model can have.
pub(crate) const CONFIG: &str = r#"
[model]
vocabulary = 320
width = 32
blocks = 2
context = 32

[model.attention]
kind = "latent"
heads = 2
latent_rank = 16
content_width = 8
rotary_width = 4
value_width = 8

[model.feed_forward]
width = 48

[model.experts]
first_block = 1
routed = 4
active = 2
width = 16
shared_width = 16

[model.hyper_connections]
streams = 2

[model.memory]
layers = [1]
max_order = 3
heads = 2
row_width = 8
rows_per_head = [500, 500]
pad_id = 1

[data]
train = "data/train"
valid = "data/valid"
tokenizer = "tokenizer.json"

[train]
steps = 12
batch = 2
evaluate_every = 6
evaluate_tokens = 200
checkpoint_every = 6

[train.schedule]
warmup = 4
decay = { cosine = { floor = 0.1 } }
"#;

/// The result of a run of the command.
pub(crate) struct Outcome {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A folder of its own, gone with the test.
pub(crate) struct Workshop {
    folder: TempDir,
}

impl Workshop {
    /// With `corpus.jsonl` alone.
    pub(crate) fn with_corpus() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("corpus.jsonl"), corpus()).unwrap();
        Self { folder }
    }

    /// With `tokenizer.json`, `data/` and `config.toml`, too.
    pub(crate) fn prepared() -> Self {
        let workshop = Self::with_corpus();
        workshop.ok("tokenizer train corpus.jsonl --vocabulary 320 --out tokenizer.json");
        workshop.ok("data prepare corpus.jsonl --tokenizer tokenizer.json --hold-out 0.2 --out data");
        workshop.write("config.toml", CONFIG);
        workshop
    }

    /// With a run of the configuration in `run/`, too.
    pub(crate) fn trained() -> Self {
        let workshop = Self::prepared();
        workshop.ok("train config.toml --out run");
        workshop
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), contents).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Names in a folder, sorted.
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The command with these arguments, in the folder.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_engram"));
        command.args(arguments).current_dir(self.folder.path()).env_remove("NO_COLOR").stdin(Stdio::null());
        command
    }

    /// Runs it with arguments separated by blanks.
    pub(crate) fn run(&self, line: &str) -> Outcome {
        self.run_arguments(line.split_whitespace())
    }

    pub(crate) fn run_arguments<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
        Outcome::of(self.command(arguments).output().unwrap())
    }

    /// Runs a shell line in the folder; `$ENGRAM` is the command.
    pub(crate) fn shell(&self, line: &str) -> Outcome {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).env("ENGRAM", env!("CARGO_BIN_EXE_engram")).stdin(Stdio::null());
        Outcome::of(shell.current_dir(self.folder.path()).output().unwrap())
    }

    /// Runs it and expects success; returns what it printed.
    #[track_caller]
    pub(crate) fn ok(&self, line: &str) -> String {
        let outcome = self.run(line);
        assert_eq!(outcome.status, Some(0), "{line}\n{}", outcome.stderr);
        outcome.stdout
    }

    #[track_caller]
    pub(crate) fn ok_arguments<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> String {
        let outcome = self.run_arguments(arguments);
        assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
        outcome.stdout
    }

    /// Runs it and expects this exit status and these words in its message.
    #[track_caller]
    pub(crate) fn fails(&self, line: &str, status: i32, words: &[&str]) -> Outcome {
        self.run(line).expect(status, words)
    }

    /// Starts it and does not wait.
    pub(crate) fn start(&self, line: &str) -> Child {
        let mut command = self.command(line.split_whitespace());
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The metrics of a run but for their times, a JSON value a line.
    pub(crate) fn metrics(&self, run: &str) -> Vec<serde_json::Value> {
        let metric = |line| {
            let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
            value.as_object_mut().unwrap().remove("seconds");
            value
        };
        self.read(&format!("{run}/metrics.jsonl")).lines().map(metric).collect()
    }
}

impl Outcome {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub(crate) fn expect(self, status: i32, words: &[&str]) -> Self {
        assert_eq!(self.status, Some(status), "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.contains("error: ") || status == 0, "no message: {}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }
}

/// Waits until `done`, at most a minute.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Documents of phrases that repeat, so that there is something to learn and to remember.
fn corpus() -> String {
    const WHO: [&str; 6] =
        ["Ada Lovelace", "the old captain", "Queen Anne", "my neighbour", "Isaac Newton", "the Milky Way"];
    const DID: [&str; 6] = ["spoke of", "dreamt about", "sailed to", "wrote to", "laughed at", "painted"];
    const WHAT: [&str; 6] =
        ["the far islands", "a naïve idea", "New York", "the long winter", "numbers", "the Café Royal"];
    let mut random = Random(7);
    let mut lines = String::new();
    for document in 0..80 {
        let mut text = format!("Letter {document}.");
        for _ in 0..12 {
            let mut pick = |list: &[&'static str; 6]| list[random.below(6) as usize];
            write!(text, " {} {} {}.", pick(&WHO), pick(&DID), pick(&WHAT)).unwrap();
        }
        writeln!(lines, "{}", serde_json::json!({ "text": text })).unwrap();
    }
    lines
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// What a command printed, as JSON.
pub(crate) fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}
