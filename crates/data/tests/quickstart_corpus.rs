//! Checks the statements of `data/README.md` about the quickstart's corpus.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use engram_data::Corpus;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data").join(format!("quickstart.{name}.jsonl.zst"))
}

fn field(name: &str, field: &str) -> Vec<String> {
    let corpus = Corpus::open(&[file(name)]).unwrap().with_field(field);
    corpus.documents().collect::<Result<_, _>>().unwrap()
}

#[test]
fn the_files_are_as_stated() {
    for (name, documents, bytes) in [("train", 494, 9_469_583), ("valid", 20, 304_144)] {
        let corpus = Corpus::open(&[file(name)]).unwrap();
        assert_eq!(corpus.documents().count(), documents, "{name}");
        assert_eq!(corpus.text_bytes().unwrap(), bytes, "{name}");
        assert!(field(name, "license").iter().all(|license| license == "public domain"));
    }
    let stored = |name| std::fs::metadata(file(name)).unwrap().len();
    assert!(stored("train") + stored("valid") < 4_000_000);
}

#[test]
fn no_held_out_document_is_among_the_others() {
    let titled = |name| {
        let titles = field(name, "source").into_iter().zip(field(name, "title"));
        titles.collect::<BTreeSet<_>>()
    };
    let texts = |name| field(name, "text").into_iter().collect::<BTreeSet<_>>();
    assert!(titled("train").is_disjoint(&titled("valid")));
    assert!(texts("train").is_disjoint(&texts("valid")));
    assert_eq!((texts("train").len(), texts("valid").len()), (494, 20));
}
