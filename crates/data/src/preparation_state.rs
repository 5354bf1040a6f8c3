//! What an unfinished preparation stores, so that the next process resumes it.
//!
//! The request says what is prepared from what. Only a preparation with an equal request may resume, because the result
//! must be that of an uninterrupted one. The progress is the last checkpoint: the place in the corpus, and the length
//! and hash of every shard up to there. Output after the last checkpoint is dropped and made again.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::corpus::{Corpus, FileStamp, Position};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// What is prepared from what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    files: Vec<FileStamp>,
    /// Everything else, by the names that messages give.
    settings: BTreeMap<String, String>,
}

/// How far a preparation came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    pub(crate) position: Position,
    /// Stored bytes of the corpus before the position.
    pub(crate) bytes_read: u64,
    pub(crate) empty_documents: u64,
    /// The share that is held out. It differs from the requested one in a second pass.
    #[serde(with = "bits")]
    pub(crate) share: f64,
    /// The documents' smallest and largest value of the hash that decides the split.
    #[serde(with = "pair_of_bits")]
    pub(crate) places: Option<(f64, f64)>,
    pub(crate) train: SplitProgress,
    pub(crate) valid: SplitProgress,
}

/// The shards of a split.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SplitProgress {
    /// Shards that are complete but for their headers.
    pub(crate) done: Vec<ShardProgress>,
    /// The shard that is being written.
    pub(crate) open: Option<ShardProgress>,
}

/// A shard, or its part before a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShardProgress {
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
    pub(crate) text_bytes: u64,
    /// blake3 of everything after the header; for an open shard, of its tokens followed by the entries of its
    /// documents.
    pub(crate) hash: [u8; 32],
}

impl Request {
    /// The name of its file in the work folder. It is written once, before the first checkpoint.
    pub(crate) const FILE: &str = "request.json";

    /// The request for these files with this tokenizer and these options.
    ///
    /// # Errors
    /// A file that is gone.
    pub(crate) fn of(corpus: &Corpus, tokenizer: &Tokenizer, options: &impl Serialize) -> Result<Self> {
        let (field, on_damage) = corpus.reading();
        let mut settings = Map::new();
        // Another version may make other tokens of the same text.
        settings.insert("version of this program".to_owned(), env!("CARGO_PKG_VERSION").into());
        settings.insert("field".to_owned(), field.into());
        settings.insert("tokenizer".to_owned(), tokenizer.hash().to_string().into());
        settings.insert("end of text".to_owned(), tokenizer.end_of_text().into());
        let options = [serde_json::to_value(on_damage), serde_json::to_value(options)];
        for more in options.into_iter().map(|options| options.expect("options have names for keys")) {
            settings.extend(more.as_object().cloned().unwrap_or_default());
        }
        // As text, because numbers may not come back from JSON with the same bits.
        let settings = settings.into_iter().map(|(name, value)| (name, value.to_string())).collect();
        Ok(Self { files: corpus.stamps()?, settings })
    }

    /// Checks that this request, whose preparation is unfinished in `folder`, is `new`.
    ///
    /// # Errors
    /// [`Error::ChangedInput`] or [`Error::OtherPreparation`] with the first difference.
    fn check(&self, new: &Self, folder: &Path) -> Result<()> {
        let other = |what| Err(Error::OtherPreparation { folder: folder.to_owned(), what });
        for (name, now) in &new.settings {
            let before = self.settings.get(name).map_or("unknown", String::as_str);
            if before != now {
                return other(format!("{name} was {before}, and is {now} now"));
            }
        }
        if let Some((name, before)) = self.settings.iter().find(|(name, _)| !new.settings.contains_key(*name))
        {
            return other(format!("{name} was {before}, and is unknown now"));
        }
        for (before, now) in self.files.iter().zip(&new.files) {
            if before.path != now.path {
                return other(format!("its corpus has {} where the new one has {}", before.path, now.path));
            }
            if before != now {
                let what = match (before.bytes, now.bytes) {
                    (before, now) if before != now => format!("it had {before} bytes, and has {now} now"),
                    _ => "it was written again".to_owned(),
                };
                let path = now.path.clone().into();
                return Err(Error::ChangedInput { path, folder: folder.to_owned(), what });
            }
        }
        match (self.files.get(new.files.len()), new.files.get(self.files.len())) {
            (None, None) => Ok(()),
            (Some(file), _) => other(format!("its corpus has {}, and the new one does not", file.path)),
            (_, Some(file)) => other(format!("its corpus does not have {}, and the new one does", file.path)),
        }
    }
}

/// The bytes of a request or a progress as a file.
pub(crate) fn to_json(what: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(what).expect("its keys are names")
}

/// Reads the progress that an earlier process stored in `folder`, if its request is `request`.
///
/// # Errors
/// Damaged files, and another request.
pub(crate) fn resumed(
    stored_request: &[u8],
    stored_progress: &[u8],
    request: &Request,
    folder: &Path,
) -> Result<Progress> {
    let stored: Request = read(stored_request, &folder.join(Request::FILE), folder)?;
    stored.check(request, folder)?;
    read(stored_progress, &folder.join("state.json"), folder)
}

fn read<T: for<'de> Deserialize<'de>>(json: &[u8], path: &Path, folder: &Path) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| Error::DamagedState {
        path: path.to_owned(),
        folder: folder.to_owned(),
        reason: error.to_string(),
    })
}

impl SplitProgress {
    /// All shards.
    pub(crate) fn shards(&self) -> impl Iterator<Item = &ShardProgress> {
        self.done.iter().chain(&self.open)
    }
}

/// A number as its bits: decimal digits may not give the same one back.
mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(number: &f64, to: S) -> Result<S::Ok, S::Error> {
        number.to_bits().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        u64::deserialize(from).map(f64::from_bits)
    }
}

/// A pair of numbers as their bits.
mod pair_of_bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(pair: &Option<(f64, f64)>, to: S) -> Result<S::Ok, S::Error> {
        pair.map(|(one, other)| (one.to_bits(), other.to_bits())).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<(f64, f64)>, D::Error> {
        let pair = Option::<(u64, u64)>::deserialize(from)?;
        Ok(pair.map(|(one, other)| (f64::from_bits(one), f64::from_bits(other))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn request(files: &[(&str, u64, &str)], settings: Value) -> Request {
        let stamp = |(path, bytes, version): &(&str, u64, &str)| FileStamp {
            path: (*path).to_owned(),
            bytes: *bytes,
            version: (*version).to_owned(),
        };
        let settings = settings.as_object().unwrap().iter();
        let settings = settings.map(|(name, value)| (name.clone(), value.to_string())).collect();
        Request { files: files.iter().map(stamp).collect(), settings }
    }

    fn progress(numbers: [u64; 4], share: f64, places: Option<(f64, f64)>, hash: [u8; 32]) -> Progress {
        let [tokens, documents, text_bytes, bytes_read] = numbers;
        let shard = ShardProgress { tokens, documents, text_bytes, hash };
        let split = SplitProgress { done: vec![shard.clone()], open: Some(shard) };
        Progress {
            position: Position::default(),
            bytes_read,
            empty_documents: documents,
            share,
            places,
            train: split,
            valid: SplitProgress::default(),
        }
    }

    #[test]
    fn what_differs_is_named() {
        let settings = json!({"field": "text", "hold_out": 0.01});
        let first = request(&[("/a", 3, "1"), ("/b", 4, "1")], settings.clone());
        let refused = |files: &[(&str, u64, &str)], settings: Value| {
            first.check(&request(files, settings), Path::new(".preparing-data")).unwrap_err().to_string()
        };
        let same = [("/a", 3, "1"), ("/b", 4, "1")];
        first.check(&request(&same, settings.clone()), Path::new("x")).unwrap();
        let cases = [
            (&same[..], json!({"field": "body", "hold_out": 0.01}), r#"field was "text", and is "body" now"#),
            (&same, json!({"field": "text", "hold_out": 0.02}), "hold_out was 0.01, and is 0.02 now"),
            (&same, json!({"field": "text"}), "hold_out was 0.01, and is unknown now"),
            (&same, json!({"field": "text", "hold_out": 0.01, "new": 1}), "new was unknown, and is 1 now"),
            (&same[..1], settings.clone(), "its corpus has /b, and the new one does not"),
            (&[same[0], same[1], ("/c", 1, "1")], settings.clone(), "does not have /c, and the new one does"),
            (&[same[0], ("/c", 4, "1")], settings.clone(), "its corpus has /b where the new one has /c"),
        ];
        for (files, settings, expected) in cases {
            let message = refused(files, settings);
            assert!(message.starts_with(".preparing-data: holds an unfinished preparation"), "{message}");
            assert!(message.contains(expected) && message.contains("remove this folder"), "{message}");
        }
        let message = refused(&[same[0], ("/b", 5, "2")], settings.clone());
        assert!(message.starts_with("/b: has changed") && message.contains("it had 4 bytes, and has 5 now"));
        let message = refused(&[("/a", 3, "2"), same[1]], settings);
        assert!(message.starts_with("/a: has changed") && message.contains("it was written again"));
    }

    #[test]
    fn damaged_states_are_refused_and_named() {
        let request = request(&[], json!({}));
        let whole = [to_json(&request), to_json(&progress([1; 4], 0.1, Some((0.1, 0.3)), [7; 32]))];
        let read = |stored: [&[u8]; 2]| resumed(stored[0], stored[1], &request, Path::new("folder"));
        read([&whole[0], &whole[1]]).unwrap();
        for end in 0..whole[1].len() {
            let message = read([&whole[0], &whole[1][..end]]).unwrap_err().to_string();
            assert!(message.starts_with("folder/state.json: cannot resume: "), "{message}");
        }
        for end in 0..whole[0].len() {
            let message = read([&whole[0][..end], &whole[1]]).unwrap_err().to_string();
            assert!(message.starts_with("folder/request.json: cannot resume: "), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_state_comes_back_from_its_bytes(
            numbers: [u64; 4],
            share in 0.0..1.0f64,
            places in proptest::option::of((0.0..1.0f64, 0.0..1.0f64)),
            hash: [u8; 32],
            path in "\\PC{1,20}",
        ) {
            let request = request(&[(&path, numbers[0], &path)], json!({"hold_out": share, "name": path}));
            let progress = progress(numbers, share, places, hash);
            let stored = [to_json(&request), to_json(&progress)];
            let read = resumed(&stored[0], &stored[1], &request, Path::new("folder")).unwrap();
            prop_assert_eq!(read, progress);
        }
    }
}
