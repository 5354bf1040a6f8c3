//! A model from outside, and the checkpoint that is made of it: the same answers.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use burn::tensor::Device;
use engram_data::Begin;
use engram_eval::tasks::{Request, Scorer};
use engram_import::testing::{CONFIG, gguf, set_begin, set_head, tiny};
use engram_import::{LlamaState, OutsideModel};
use engram_kernels::Segment;
use engram_train::Trained;

/// The model, its checkpoint, and the folder that this is in.
fn imported(change: impl Fn(&mut OutsideModel)) -> (OutsideModel, Trained, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let [mut one, mut other] = [(); 2].map(|()| tiny(CONFIG.context, 3));
    change(&mut one);
    change(&mut other);
    let template = one.chat_template().map(str::to_owned);
    let path = other.save_checkpoint(&folder.path().join("model"), template.as_deref()).unwrap();
    let trained = Trained::open(&path, &Device::flex()).unwrap();
    (one, trained, folder)
}

fn sentence() -> Vec<u32> {
    (0..CONFIG.context as u32).map(|at| at * 37 % 256).collect()
}

/// Logits after every token, `[tokens, vocabulary]`.
fn outside_logits(model: &OutsideModel, tokens: &[u32]) -> Vec<f32> {
    let positions: Vec<usize> = (0..tokens.len()).collect();
    let whole = [Segment { seen: Vec::new(), rows: 0..tokens.len() }];
    let llama = model.llama();
    llama.logits(&llama.hidden(tokens, &positions, &whole, &mut LlamaState::default()))
}

fn logits(model: &Trained, tokens: &[u32]) -> Vec<f32> {
    let last = model.states(tokens).unwrap().pop().unwrap();
    model.lens(last).into_data().try_into_vec().unwrap()
}

fn largest_difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[test]
fn the_checkpoint_computes_what_the_model_did() {
    let (outside, trained, _folder) = imported(|_| ());
    assert_eq!(trained.config().model.attention.key_heads(), CONFIG.key_heads);
    let (expected, found) = (outside_logits(&outside, &sentence()), logits(&trained, &sentence()));
    let difference = largest_difference(&found, &expected);
    assert!(difference < 1e-4, "{difference}");
    assert!(expected.iter().any(|logit| logit.abs() > 0.1));
}

#[test]
fn a_head_of_its_own_comes_along() {
    let head: Vec<f32> = (0..CONFIG.width * CONFIG.vocabulary).map(|at| (at as f32 * 0.7).sin()).collect();
    let (outside, trained, _folder) = imported(|model| {
        set_head(model, &head);
    });
    assert!(!trained.config().model.tied_head);
    let (expected, found) = (outside_logits(&outside, &sentence()), logits(&trained, &sentence()));
    assert!(largest_difference(&found, &expected) < 1e-4);
}

#[test]
fn texts_begin_and_end_as_before() {
    for begin in [Begin::Always(7), Begin::IfEmpty(7), Begin::IfEmpty(256)] {
        let (outside, trained, _folder) = imported(|model| set_begin(model, begin));
        assert_eq!((Scorer::begin(&outside), Scorer::begin(&trained)), (begin, begin));
        assert_eq!(trained.tokenizer().end_of_text(), outside.tokenizer().end_of_text());
        assert_eq!(trained.tokenizer().json(), outside.tokenizer().json());
        assert_eq!(Scorer::context(&outside), Scorer::context(&trained));
    }
}

#[test]
fn answers_are_the_same() {
    let (outside, trained, _folder) = imported(|_| ());
    let tokens = sentence();
    let requests: Vec<Request> = [(1, 4), (5, 6), (9, 20)]
        .map(|(from, to)| Request::new(&tokens[..from], &tokens[from..to]).unwrap())
        .into();
    let batch: Vec<&Request> = requests.iter().collect();
    let (expected, found) = (outside.score(&batch).unwrap(), trained.score(&batch).unwrap());
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found.log_probability - expected.log_probability).abs() < 1e-4);
        assert_eq!(found.likeliest, expected.likeliest);
    }
    let prompts = [&tokens[..3], &tokens[10..14]];
    let proceed = |model: &dyn Scorer| model.proceed(&prompts, 9, &mut |_, _| false).unwrap();
    assert_eq!(proceed(&trained), proceed(&outside));
}

#[test]
fn a_folder_is_there_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let beside = folder.path().join("step-00000001");
    for name in ["step-00000001", "step-00000002"] {
        tiny(CONFIG.context, 1).save_checkpoint(&folder.path().join(name), None).unwrap();
    }
    assert!(beside.is_dir(), "what stands beside it is not its own");
    assert!(!beside.join("tokenizer_config.json").exists());
    let error = tiny(CONFIG.context, 1).save_checkpoint(&beside, None).unwrap_err().to_string();
    assert!(error.contains("step-00000001: cannot put a checkpoint in place"), "{error}");
    assert!(Trained::open(&beside, &Device::flex()).is_ok(), "it is as it was");
    let missing = folder.path().join("missing/model");
    assert!(tiny(CONFIG.context, 1).save_checkpoint(&missing, None).is_err());
    assert_eq!(folder.path().read_dir().unwrap().count(), 2);
}

#[test]
fn a_chat_template_keeps_its_names() {
    let place = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    let mut file = gguf(CONFIG.context, 1);
    file.text("tokenizer.chat_template", "{{ eos_token }}").integer("tokenizer.ggml.bos_token_id", 33);
    std::fs::write(place.path(), file.bytes()).unwrap();
    let model = OutsideModel::open(place.path()).unwrap();
    let found: serde_json::Value = serde_json::from_str(model.chat_template().unwrap()).unwrap();
    let begin = model.tokenizer().inner().id_to_token(33);
    let expected = serde_json::json!({
        "chat_template": "{{ eos_token }}", "eos_token": "<|endoftext|>", "bos_token": begin,
    });
    assert_eq!(found, expected);
    assert!(tiny(CONFIG.context, 1).chat_template().is_none());
}
