//! A small corpus, prepared, and a small model with every part to train on it.
#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(unreachable_pub, reason = "shared by several test files")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::ControlFlow::Continue;
use std::path::Path;

use burn::tensor::Device;
use engram_config::RunConfig;
use engram_data::{Corpus, PrepareOptions, Tokenizer, TokenizerTraining, prepare};
use engram_train::Trainer;

const CONFIG: &str = r#"
[model]
vocabulary = 0
width = 16
blocks = 2
context = 16

[model.attention]
kind = "latent"
heads = 2
latent_rank = 8
content_width = 4
rotary_width = 4
value_width = 4

[model.feed_forward]
width = 24

[model.experts]
first_block = 1
routed = 4
active = 2
width = 8
shared_width = 8

[model.hyper_connections]
streams = 2

[model.memory]
layers = [1]
max_order = 3
heads = 2
row_width = 4
rows_per_head = [50, 50]
pad_id = 1

[data]
train = "data/train"
valid = "data/train"
tokenizer = "tokenizer.json"

[train]
steps = 40
batch = 64
schedule = { warmup = 5, decay = "constant" }
"#;

/// Everything that a run needs, in a folder that goes with it.
pub struct Workshop(tempfile::TempDir);

impl Workshop {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text.txt");
        let sentence = |n: u32| {
            let pick = |words: &[&str], salt: u32| words[(n * salt % 31) as usize % words.len()].to_owned();
            let who = pick(&["The captain", "A miller", "Their cook", "The old king"], 7);
            let what = pick(&["sailed to", "wrote of", "walked around", "forgot", "painted"], 11);
            let whom = pick(&["the far islands", "a mill", "the harbour", "his garden"], 13);
            format!("{who} {what} {whom}, and {n} others did. ")
        };
        std::fs::write(&text, (0..2400).map(sentence).collect::<String>()).unwrap();
        let corpus = Corpus::open(&[&text]).unwrap();
        let training = TokenizerTraining { vocabulary: 290, ..Default::default() };
        let tokenizer = Tokenizer::train(&corpus, &training, &mut |_| Continue(())).unwrap();
        tokenizer.save(&folder.path().join("tokenizer.json")).unwrap();
        let options = PrepareOptions::default();
        prepare(&corpus, &tokenizer, &folder.path().join("data"), &options, &mut |_| Continue(())).unwrap();
        let config = CONFIG.replace("vocabulary = 0", &format!("vocabulary = {}", tokenizer.vocabulary()));
        std::fs::write(folder.path().join("base.toml"), config).unwrap();
        Self(folder)
    }

    /// As [`new`](Self::new), for a model that is smooth everywhere: its feed-forwards are all dense, and its gate takes no
    /// root.
    pub fn smooth() -> Self {
        let workshop = Self::new();
        let path = workshop.path().join("base.toml");
        let base = std::fs::read_to_string(&path).unwrap();
        let (before, experts) = base.split_once("[model.experts]").unwrap();
        let (_, after) = experts.split_once("[model.hyper_connections]").unwrap();
        let after = after.replace("[model.memory]\n", "[model.memory]\ngate_form = \"sigmoid\"\n");
        std::fs::write(&path, format!("{before}[model.hyper_connections]{after}")).unwrap();
        workshop
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The configuration with `lines` under `[train]`, and `tables` behind.
    pub fn config(&self, lines: &str, tables: &str) -> Result<RunConfig, engram_config::Error> {
        let base = std::fs::read_to_string(self.path().join("base.toml")).unwrap();
        let text = base.replace("[train]\n", &format!("[train]\n{lines}\n")) + tables;
        let path = self.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        RunConfig::load(&path)
    }

    /// A new run of that configuration in the folder `run`.
    pub fn trainer(&self, run: &str, lines: &str, tables: &str) -> Trainer {
        let config = self.config(lines, tables).unwrap();
        Trainer::new(config, &self.path().join(run), &Device::flex()).unwrap()
    }
}
