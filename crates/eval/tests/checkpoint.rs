//! A checkpoint of Engram, with memory and experts, asked through the interface of every model.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use burn::tensor::Device;
use engram_config::RunConfig;
use engram_data::{Corpus, PrepareOptions, Tokenizer, TokenizerTraining, prepare};
use engram_eval::tasks::{Likelihood, ModelScorer, Request, Scorer, TargetScore};
use engram_import::Model;
use engram_infer::{Decoder, Dtype, MemoryTables, Offline, RowTiers};
use engram_store::{PrefetchOptions, RowSource, Table, TableHeader};
use engram_train::{Trained, Trainer};
use proptest::prelude::*;

const CONFIG: &str = r#"
[model]
vocabulary = 320
width = 32
blocks = 2
context = 24

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

[model.memory]
layers = [1]
max_order = 3
heads = 2
row_width = 8
rows_per_head = [500, 500]
pad_id = 1

[data]
train = "data/train"
valid = "data/train"
tokenizer = "tokenizer.json"

[train]
steps = 3
batch = 2
evaluate_every = 3
evaluate_tokens = 40
checkpoint_every = 3

[train.schedule]
warmup = 1
decay = { cosine = { floor = 0.1 } }
"#;

/// A model after three steps, when its symmetry is broken.
fn train(folder: &Path) -> Trained {
    let text = folder.join("text.txt");
    std::fs::write(&text, "Some of them sailed to the far islands, and others wrote letters. ".repeat(60))
        .unwrap();
    let corpus = Corpus::open(&[&text]).unwrap();
    let training = TokenizerTraining { vocabulary: 290, ..Default::default() };
    let tokenizer = Tokenizer::train(&corpus, &training, &mut |_| Continue(())).unwrap();
    tokenizer.save(&folder.join("tokenizer.json")).unwrap();
    let options = PrepareOptions::default();
    prepare(&corpus, &tokenizer, &folder.join("data"), &options, &mut |_| Continue(())).unwrap();
    let config = CONFIG.replace("vocabulary = 320", &format!("vocabulary = {}", tokenizer.vocabulary()));
    std::fs::write(folder.join("run.toml"), config).unwrap();
    let config = RunConfig::load(&folder.join("run.toml")).unwrap();
    let run = folder.join("run");
    let mut trainer = Trainer::new(config, &run, &Device::flex()).unwrap();
    (0..3).for_each(|_| {
        trainer.step().unwrap();
    });
    trainer.save().unwrap();
    Trained::open(&run, &Device::flex()).unwrap()
}

fn model() -> &'static Trained {
    static MODEL: OnceLock<Trained> = OnceLock::new();
    MODEL.get_or_init(|| train(tempfile::tempdir().unwrap().keep().as_path()))
}

/// The checkpoint as a scorer.
fn scorer() -> ModelScorer {
    let checkpoint = Model::open(model().folder()).unwrap();
    let config = &checkpoint.config().model;
    let decoder = Decoder::new(config, checkpoint.weights(), Dtype::F32).unwrap();
    let memory = config.memory.as_ref().unwrap();
    let tables = MemoryTables::open(memory, checkpoint.tokenizer().inner(), model().folder()).unwrap();
    let table = |path: &std::path::PathBuf| -> Arc<dyn RowSource> {
        Arc::new(Table::open(path, &TableHeader::read(path).unwrap().origin).unwrap())
    };
    let sources = tables.files().iter().map(table).collect();
    let rows = RowTiers::new(tables.addressing().clone(), sources, &PrefetchOptions::default()).unwrap();
    let offline = Offline::new(decoder, Some(rows), 1 << 20, 2).unwrap();
    let identity = checkpoint.identity().unwrap();
    ModelScorer::new(offline, checkpoint.tokenizer().clone(), checkpoint.begin(), identity)
}

/// The likelihood by its definition: logits after every context, one at a time.
fn by_definition(context: &[u32], continuation: &[u32]) -> Likelihood {
    let token = |index: usize| {
        let logits = model().next_logits(&[context, &continuation[..index]].concat()).unwrap();
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let own = logits[continuation[index] as usize];
        let log_probability = (f64::from(own) - total.ln()) as f32;
        TargetScore { log_probability, likeliest: logits.iter().all(|&logit| logit <= own) }
    };
    Likelihood::of(&(0..continuation.len()).map(token).collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn scores_are_the_definitions_in_any_company(
        texts in proptest::collection::vec((proptest::collection::vec(2_u32..40, 1..12), proptest::collection::vec(2_u32..40, 1..6)), 1..6),
        again: bool,
    ) {
        let mut texts = texts;
        if again {
            // The tokens of another request, and a beginning of them.
            let (context, continuation) = texts[0].clone();
            texts.push((context.clone(), continuation.iter().map(|token| token + 1).collect()));
            texts.push((context, vec![7]));
        }
        let requests: Vec<Request> = texts.iter().map(|(c, e)| Request::new(c, e).unwrap()).collect();
        let scores = scorer().score(&requests.iter().collect::<Vec<_>>()).unwrap();
        for ((context, continuation), found) in texts.iter().zip(scores) {
            let (found, expected) = (Likelihood::of(&found), by_definition(context, continuation));
            prop_assert!((found.log_probability - expected.log_probability).abs() < 1e-4, "{found:?} {expected:?}");
            prop_assert_eq!(found.greedy, expected.greedy);
        }
    }
}

#[test]
fn continuations_are_the_likeliest_tokens() {
    let scorer = scorer();
    assert_eq!(scorer.identity(), model().identity());
    let prompts = [scorer.encode("Some of").unwrap(), scorer.encode("letters").unwrap()];
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let texts = scorer.proceed(&prompts, 4, &mut |_, _| false).unwrap();
    for (prompt, text) in prompts.iter().zip(texts) {
        assert!(text.is_empty() || by_definition(prompt, &text).greedy);
    }
}
