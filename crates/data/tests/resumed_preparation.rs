//! A preparation that is interrupted and repeated ends in the bytes of an uninterrupted one.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use engram_data::{
    Corpus, Error, PrepareOptions, PrepareSummary, TokenShards, Tokenizer, TokenizerTraining, prepare,
};
use proptest::prelude::*;
use tempfile::TempDir;

/// Text of documents of very different lengths.
fn texts(seed: usize) -> Vec<String> {
    (0..60)
        .map(|number| {
            let repeats = [1, 3, 200, 7][(number * 7 + seed) % 4];
            format!("Document {number} of {seed}: the whale, the né whale!\n").repeat(repeats)
        })
        .collect()
}

fn lines(texts: &[String]) -> Vec<u8> {
    texts
        .iter()
        .flat_map(|text| (serde_json::json!({ "text": text }).to_string() + "\n").into_bytes())
        .collect()
}

/// A folder with a corpus of several files.
fn corpus_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("a.jsonl", &lines(&texts(0)));
    write("b.txt", texts(1).concat().as_bytes());
    write("c.jsonl.zst", &zstd::encode_all(lines(&texts(2)).as_slice(), 3).unwrap());
    write("d.jsonl", b"{\"text\": \"\"}\n{\"text\": null}\n");
    write("e.jsonl", &lines(&texts(3)));
    folder
}

fn open(folder: &Path) -> Corpus {
    Corpus::open(&[folder]).unwrap().with_damage(engram_data::OnDamage { replace: false, skip: true })
}

fn tokenizer() -> &'static Tokenizer {
    static ONCE: OnceLock<Tokenizer> = OnceLock::new();
    ONCE.get_or_init(|| {
        let folder = corpus_folder();
        let options = TokenizerTraining { vocabulary: 290, byte_budget: 1 << 20 };
        Tokenizer::train(&open(folder.path()), &options, &mut |_| ControlFlow::Continue(())).unwrap()
    })
}

/// Every file below a folder, by name.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    found.push((path.strip_prefix(folder).unwrap().to_owned(), std::fs::read(&path).unwrap()))
                }
            }
        }
    }
    found.sort();
    found
}

/// One attempt that is interrupted at the given report of progress. Also returns where it began.
fn attempt(
    corpus: &Corpus,
    out: &Path,
    options: &PrepareOptions,
    reports: usize,
) -> (Result<PrepareSummary, Error>, u64) {
    let (mut left, mut resumed) = (reports, 0);
    let outcome = prepare(corpus, tokenizer(), out, options, &mut |progress| {
        resumed = progress.resumed;
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    (outcome, resumed)
}

/// Attempts with these interruptions and a last one without. Returns its summary, and how many attempts resumed.
fn prepare_in_parts(
    corpus: &Corpus,
    out: &Path,
    options: &PrepareOptions,
    parts: &[usize],
) -> (PrepareSummary, usize) {
    let mut count = 0;
    for reports in parts.iter().copied().chain([usize::MAX]) {
        let (outcome, resumed) = attempt(corpus, out, options, reports);
        count += usize::from(resumed > 0);
        match outcome {
            Ok(summary) => return (summary, count),
            Err(Error::Interrupted) => assert!(!hidden(out).exists()),
            Err(Error::Paused { cause, .. }) => {
                assert!(matches!(*cause, Error::Interrupted));
                assert!(!out.exists() && hidden(out).exists());
            }
            Err(other) => panic!("{other}"),
        }
    }
    unreachable!("the last attempt is not interrupted")
}

fn hidden(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap().to_str().unwrap();
    out.with_file_name(format!(".preparing-{name}"))
}

/// An unfinished preparation of `corpus` with a state.
fn unfinished(corpus: &Corpus, out: &Path, options: &PrepareOptions) {
    let (outcome, _) = attempt(corpus, out, options, 12);
    assert!(matches!(outcome, Err(Error::Paused { .. })), "{outcome:?}");
}

fn small() -> PrepareOptions {
    PrepareOptions { hold_out: 0.2, shard_tokens: 3000, checkpoint_bytes: 4000 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn interruptions_do_not_change_the_bytes(
        parts in proptest::collection::vec(1..30usize, 1..12),
        checkpoint_bytes in 1..40_000u64,
        shard_tokens in 200..20_000u64,
        hold_out in prop_oneof![Just(0.0), Just(1e-9), Just(0.2)],
    ) {
        let (folder, outputs) = (corpus_folder(), tempfile::tempdir().unwrap());
        let options = PrepareOptions { hold_out, shard_tokens, checkpoint_bytes };
        let (whole, out) = (outputs.path().join("whole"), outputs.path().join("parts"));
        let corpus = open(folder.path());
        let uninterrupted = PrepareOptions { checkpoint_bytes: 1 << 30, ..options.clone() };
        let summary = prepare(&corpus, tokenizer(), &whole, &uninterrupted, &mut |_| ControlFlow::Continue(()));
        let (in_parts, _) = prepare_in_parts(&corpus, &out, &options, &parts);
        prop_assert_eq!(in_parts, summary.unwrap());
        prop_assert!(files(&out) == files(&whole), "the bytes differ");
        prop_assert_eq!(std::fs::read_dir(outputs.path()).unwrap().count(), 2);
        let shards = |out: &Path| TokenShards::open(&out.join("train")).unwrap();
        shards(&out).verify().unwrap();
        prop_assert_eq!(shards(&out).identity(), shards(&whole).identity());
    }
}

#[test]
fn every_attempt_starts_where_the_one_before_ended() {
    let (folder, outputs) = (corpus_folder(), tempfile::tempdir().unwrap());
    let (_, resumed) =
        prepare_in_parts(&open(folder.path()), &outputs.path().join("data"), &small(), &[9, 12, 12, 12, 12]);
    assert!(resumed >= 4, "only {resumed} attempts resumed");
}

#[test]
fn inputs_that_changed_are_refused_by_name() {
    let (folder, outputs) = (corpus_folder(), tempfile::tempdir().unwrap());
    let out = outputs.path().join("data");
    unfinished(&open(folder.path()), &out, &small());
    let kept = files(&hidden(&out));
    let refused = |expected: &[&str]| {
        let (outcome, _) = attempt(&open(folder.path()), &out, &small(), usize::MAX);
        let error = outcome.unwrap_err();
        let message = error.to_string();
        assert!(error.is_input() && expected.iter().all(|part| message.contains(part)), "{message}");
        assert!(message.contains(".preparing-data") && files(&hidden(&out)) == kept, "{message}");
    };
    let path = folder.path().join("e.jsonl");
    let before = std::fs::read(&path).unwrap();
    let time = std::fs::metadata(&path).unwrap().modified().unwrap();
    let set_time =
        |time: SystemTime| std::fs::File::options().write(true).open(&path).unwrap().set_modified(time);
    std::fs::write(&path, [&before[..], b"{\"text\": \"more\"}\n"].concat()).unwrap();
    refused(&["e.jsonl: has changed", "bytes, and has"]);
    std::fs::write(&path, &before).unwrap();
    set_time(time + Duration::from_secs(1)).unwrap();
    refused(&["e.jsonl: has changed", "written again"]);
    std::fs::remove_file(&path).unwrap();
    refused(&["other settings", "has ", "e.jsonl, and the new one does not"]);
    std::fs::write(&path, &before).unwrap();
    set_time(time).unwrap();
    std::fs::write(folder.path().join("f.txt"), "new").unwrap();
    refused(&["other settings", "f.txt, and the new one does"]);
    std::fs::remove_file(folder.path().join("f.txt")).unwrap();
    // As it was, it resumes.
    let (outcome, resumed) = attempt(&open(folder.path()), &out, &small(), usize::MAX);
    assert!(outcome.is_ok() && resumed > 0);
}

#[test]
fn other_settings_are_refused_by_name() {
    let (folder, outputs) = (corpus_folder(), tempfile::tempdir().unwrap());
    let out = outputs.path().join("data");
    let corpus = || open(folder.path());
    unfinished(&corpus(), &out, &small());
    let refused = |corpus: Corpus, options: &PrepareOptions, expected: &str| {
        let (outcome, _) = attempt(&corpus, &out, options, usize::MAX);
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("remove this folder"), "{message}");
    };
    refused(corpus(), &PrepareOptions { hold_out: 0.3, ..small() }, "hold_out was 0.2, and is 0.3 now");
    refused(corpus(), &PrepareOptions { shard_tokens: 1, ..small() }, "shard_tokens was 3000, and is 1 now");
    refused(corpus().with_field("body"), &small(), r#"field was "text", and is "body" now"#);
    refused(corpus().with_damage(Default::default()), &small(), "skip was true, and is false now");
    let json = String::from_utf8(tokenizer().json().to_vec()).unwrap() + "\n";
    let other = Tokenizer::from_json(json.as_bytes(), "other", None).unwrap();
    let outcome = prepare(&corpus(), &other, &out, &small(), &mut |_| ControlFlow::Continue(()));
    let message = outcome.unwrap_err().to_string();
    assert!(message.contains(&format!("and is \"{}\" now", other.hash())), "{message}");
    // The interval between checkpoints may differ.
    let (outcome, resumed) =
        attempt(&corpus(), &out, &PrepareOptions { checkpoint_bytes: 9000, ..small() }, usize::MAX);
    assert!(outcome.is_ok() && resumed > 0);
}

#[test]
fn damaged_output_is_refused_by_name() {
    let (folder, outputs) = (corpus_folder(), tempfile::tempdir().unwrap());
    let out = outputs.path().join("data");
    unfinished(&open(folder.path()), &out, &PrepareOptions { shard_tokens: 1 << 20, ..small() });
    let (_, whole): (Vec<_>, Vec<_>) = files(&hidden(&out)).into_iter().unzip();
    let names = ["output/train/00000.tokens", "train-documents.0", "state.json", "request.json"];
    for name in names {
        let path = hidden(&out).join(name);
        let before = std::fs::read(&path).unwrap();
        let mut changed = before.clone();
        changed[if name.ends_with("tokens") { 200 } else { 0 }] ^= 1;
        for bytes in [&changed[..], &before[..before.len() / 8]] {
            std::fs::write(&path, bytes).unwrap();
            let options = PrepareOptions { shard_tokens: 1 << 20, ..small() };
            let (outcome, _) = attempt(&open(folder.path()), &out, &options, usize::MAX);
            let message = outcome.unwrap_err().to_string();
            assert!(
                message.contains("cannot resume") && message.contains("remove the folder"),
                "{name}: {message}"
            );
            std::fs::write(&path, &before).unwrap();
        }
    }
    assert_eq!(files(&hidden(&out)).into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>(), whole);
}

#[test]
fn errors_of_the_input_leave_nothing_to_resume() {
    let (folder, outputs) = (corpus_folder(), tempfile::tempdir().unwrap());
    let out = outputs.path().join("data");
    let corpus = open(folder.path()).with_damage(Default::default());
    let (outcome, _) = attempt(&corpus, &out, &small(), usize::MAX);
    assert!(outcome.unwrap_err().to_string().contains("d.jsonl: line 2"));
    assert_eq!(std::fs::read_dir(outputs.path()).unwrap().count(), 0);
}
