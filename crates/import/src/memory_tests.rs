//! Adapters and overlays: what is read back, and what is refused by which message.

use std::fs;
use std::path::{Path, PathBuf};

use engram_config::{MemoryConfig, MemoryForm};

use crate::adapter::{Adapter, AdapterRows, AdapterWriter};
use crate::model::Model;
use crate::overlay::Overlay;
use crate::stacked_memory::StackedMemory;
use crate::testing::{CONFIG, memory, memory_weights, write_adapter, write_gguf, write_overlay};

struct Folder {
    place: tempfile::TempDir,
    base: Model,
}

impl Folder {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let base = Model::open(&write_gguf(place.path(), 1)).unwrap();
        Self { place, base }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn adapter(&self, name: &str, memory: &MemoryConfig, seed: u64) -> Adapter {
        let path = write_adapter(&self.path(name), &self.base, memory, seed);
        Adapter::open(&path, &self.base).unwrap()
    }

    fn overlay(&self, name: &str, adapter: &Adapter, text: &str) -> PathBuf {
        write_overlay(&self.path(name), &self.base, adapter, text, 1)
    }
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn an_adapter_is_what_was_written() {
    let folder = Folder::new();
    for form in [MemoryForm::Paper, MemoryForm::V41, MemoryForm::Added] {
        let memory = memory(form);
        let adapter = folder.adapter(&format!("{form:?}"), &memory, 2);
        assert_eq!((adapter.memory(), adapter.rows()), (&memory, AdapterRows::Zero));
        assert_eq!(adapter.table(1), None);
        let weights = memory_weights(&memory, CONFIG.width, 2);
        assert_eq!(adapter.weights().iter().count(), weights.len());
        for (name, weight) in adapter.weights().iter() {
            assert_eq!(
                (weight.shape(), weight.values()),
                (&weights[name].shape[..], weights[name].values.clone())
            );
        }
        let config = adapter.config(&folder.base);
        assert_eq!(config.memory, Some(memory));
        config.validate().unwrap();
    }
}

#[test]
fn identities_tell_memories_apart() {
    let folder = Folder::new();
    let paper = memory(MemoryForm::Paper);
    let one = folder.adapter("one", &paper, 2);
    assert_eq!(one.identity(), folder.adapter("same", &paper, 2).identity());
    assert_ne!(one.identity(), folder.adapter("weights", &paper, 3).identity());
    let seed = MemoryConfig { seed: 8, ..paper.clone() };
    assert_ne!(one.identity(), folder.adapter("addressing", &seed, 2).identity());
    let kernel = MemoryConfig { convolution: Some(false), ..paper };
    let writer =
        AdapterWriter::begin(&folder.path("plain"), &folder.base, &kernel, AdapterRows::Zero).unwrap();
    writer.weights(&memory_weights(&kernel, CONFIG.width, 2)).unwrap();
    let plain = Adapter::open(&writer.place().unwrap(), &folder.base).unwrap();
    assert_ne!(one.identity(), plain.identity());
}

#[test]
fn another_base_is_refused_with_both_names() {
    let folder = Folder::new();
    let adapter = folder.adapter("adapter", &memory(MemoryForm::V41), 2);
    let overlay = folder.overlay("overlay", &adapter, "a fact");
    let elsewhere = tempfile::tempdir().unwrap();
    let other = elsewhere.path().join("other.gguf");
    fs::rename(write_gguf(elsewhere.path(), 9), &other).unwrap();
    let other = Model::open(&other).unwrap();
    for refused in [
        Adapter::open(adapter.folder(), &other).unwrap_err(),
        Overlay::open(&overlay, &other).unwrap_err(),
        StackedMemory::open(&other, None, &[overlay]).unwrap_err(),
    ] {
        let message = refused.to_string();
        let (made, found) = (folder.base.identity().unwrap(), other.identity().unwrap());
        for part in ["was made for base.gguf", &made[..12], "but the model is other.gguf", &found[..12]] {
            assert!(message.contains(part), "{part} in {message}");
        }
        assert!(refused.is_input());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let folder = Folder::new();
    let adapter = folder.adapter("adapter", &memory(MemoryForm::V41), 2);
    let about = adapter.folder().join("adapter.toml");
    let original = fs::read_to_string(&about).unwrap();
    let line = |key: &str| original.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    let zeros = "0".repeat(64);
    for (from, to, expected) in [
        (line("format"), "format = 2".to_owned(), "its format is 2, this program reads 1"),
        (
            line("tokenizer"),
            format!("tokenizer = \"{zeros}\""),
            "the tokenizer 000000000000 of base.gguf, but",
        ),
        (line("addressing"), format!("addressing = \"{zeros}\""), "the addressing 000000000000, but"),
        (
            line("layers"),
            "layers = [2]".into(),
            "adapter.toml:10: `memory.layers`: names block 2, but the 2 blocks",
        ),
        (line("layers"), "layers = [0]".into(), "but the memory has the addressing"),
        (line("seed"), "seed = 9".into(), "but the memory has the addressing"),
        (line("form "), "form = \"over_encoding\"".into(), "`memory.form`: must be"),
        (line("rows "), "rows = \"zero\"\nlora = 1".into(), "adapter.toml:7: unknown field `lora`"),
        (line("rows "), "rows = \"tables\"".into(), "memory.layer1.table"),
    ] {
        replace(&about, &from, &to);
        let message = Adapter::open(adapter.folder(), &folder.base).unwrap_err().to_string();
        assert!(message.contains(expected), "{to}: {message}");
        fs::write(&about, &original).unwrap();
    }
    Adapter::open(adapter.folder(), &folder.base).unwrap();
}

#[test]
fn weights_of_other_blocks_are_refused() {
    let folder = Folder::new();
    let v41 = memory(MemoryForm::V41);
    let writer = AdapterWriter::begin(&folder.path("other"), &folder.base, &v41, AdapterRows::Zero).unwrap();
    let wrong = MemoryConfig { layers: vec![0], ..v41 };
    let message = writer.weights(&memory_weights(&wrong, CONFIG.width, 1)).unwrap_err().to_string();
    assert!(
        message.contains("`blocks.0.memory.norms.query` is not of a memory in the blocks [1]"),
        "{message}"
    );
    drop(writer);
    assert!(!folder.path("other").exists());
}

#[test]
fn overlays_lie_on_the_memory_that_they_were_made_for() {
    let folder = Folder::new();
    let v41 = memory(MemoryForm::V41);
    let (one, other) = (folder.adapter("one", &v41, 2), folder.adapter("other", &v41, 3));
    let (first, second) =
        (folder.overlay("first", &one, "a fact"), folder.overlay("second", &one, "another"));
    let foreign = folder.overlay("foreign", &other, "a fact");
    let open = |adapter: Option<&Adapter>, overlays: &[&PathBuf]| {
        let overlays: Vec<PathBuf> = overlays.iter().map(|path| (*path).clone()).collect();
        StackedMemory::open(&folder.base, adapter.map(Adapter::folder), &overlays)
    };
    assert!(open(None, &[]).unwrap().is_none());
    assert!(open(Some(&one), &[]).unwrap().unwrap().overlays().is_empty());
    for adapter in [None, Some(&one)] {
        let stack = open(adapter, &[&first, &second]).unwrap().unwrap();
        assert_eq!(stack.adapter().unwrap().identity(), one.identity());
        assert_eq!(stack.overlays().len(), 2);
        assert!(
            stack.overlays().iter().all(|overlay| overlay.file(1).is_some() && overlay.file(0).is_none())
        );
        let message = open(adapter, &[&first, &foreign]).unwrap_err().to_string();
        for part in ["foreign/overlay.toml", &other.identity()[..12], &one.identity()[..12]] {
            assert!(message.contains(part), "{part} in {message}");
        }
    }
    fs::remove_dir_all(first.join("adapter")).unwrap();
    let message = open(None, &[&first]).unwrap_err().to_string();
    assert!(message.contains("which it does not bring with it"), "{message}");
    assert!(open(Some(&one), &[&first]).unwrap().is_some());
}
