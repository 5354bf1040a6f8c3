//! Checkpoints: folders that are whole or not there.
//!
//! A checkpoint `step-00001000` holds everything that training needs to go on as if it had never stopped:
//!
//! | file | what |
//! |---|---|
//! | `run.toml` | the configuration |
//! | `tokenizer.json` | the tokenizer |
//! | `tokenizer_config.json` | its chat template, where there is one |
//! | `model.safetensors` | weights, f32, by name |
//! | `optimizer.safetensors` | state of Muon and Adam, by name and moment |
//! | `memory.layerL.table` | rows of memory layer L and their optimiser's state |
//! | `state.json` | step, position in the data, tokens seen |
//! | `manifest.json` | size and BLAKE3 hash of each file above |
//!
//! A model that was trained elsewhere has no state of training: its checkpoint ends with the weights.
//!
//! It is written under another name, flushed to disk, and renamed when complete. The newest ones are kept; an older
//! one is removed only after the new one stands.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use engram_data::folder_of;

use crate::error::{Error, Result};
use crate::tensor::HostTensor;

/// Version of the folder's layout.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "step-";
const UNFINISHED: &str = ".unfinished-";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, FileSum>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSum {
    bytes: u64,
    blake3: String,
}

/// A checkpoint being written. One that is dropped before it stands is removed.
#[derive(Debug)]
pub struct CheckpointWriter {
    /// Where the finished checkpoint will stand.
    target: PathBuf,
    folder: PathBuf,
}

impl CheckpointWriter {
    /// Begins the checkpoint of `step` in `folder`, which is made if it is not there. What an interrupted attempt
    /// left is removed.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn begin(folder: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
        for path in entries(folder)? {
            if name_of(&path).starts_with(UNFINISHED) {
                fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
            }
        }
        Self::at(&folder.join(step_name(step)))
    }

    /// Begins the checkpoint `target`, in a folder that is there; for one that is no step of a run. What an interrupted
    /// attempt left is removed.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn at(target: &Path) -> Result<Self> {
        let unfinished = target.with_file_name(format!("{UNFINISHED}{}", name_of(target)));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(Error::file("remove", &unfinished))?;
        }
        fs::create_dir(&unfinished).map_err(Error::file("create", &unfinished))?;
        Ok(Self { target: target.to_owned(), folder: unfinished })
    }

    /// The folder to write files into, for parts that write themselves.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn file(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, contents).map_err(Error::file("write", &path))
    }

    /// Writes tensors as `name`, in the safetensors format.
    ///
    /// # Errors
    /// When a value is not finite: a checkpoint that cannot be used must not take the place of one that can. When the
    /// file system refuses.
    pub fn tensors(&self, name: &str, tensors: &BTreeMap<String, HostTensor>) -> Result<()> {
        let path = self.folder.join(name);
        for (tensor, HostTensor { values, .. }) in tensors {
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let (tensor, value) = (tensor.clone(), values[at]);
                return Err(Error::NotFinite { path, tensor, at, value });
            }
        }
        let views: BTreeMap<&str, TensorView<'_>> = tensors
            .iter()
            .map(|(name, tensor)| {
                let bytes = bytemuck::cast_slice(&tensor.values);
                let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes);
                view.map(|view| (name.as_str(), view)).map_err(|error| Error::model(&path, error))
            })
            .collect::<Result<_>>()?;
        // What the library writes only its owner may read; it gets the permissions of any new file.
        let new = fs::File::create(&path).and_then(|file| file.metadata());
        let permissions = new.map_err(Error::file("write", &path))?.permissions();
        safetensors::serialize_to_file(views, None, &path).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => Error::file("write", &path)(error),
            other => Error::model(&path, other),
        })?;
        fs::set_permissions(&path, permissions).map_err(Error::file("write", &path))
    }

    /// Puts the checkpoint of a step in place, in that of an earlier one of the same step, and removes all but the `keep`
    /// newest ones beside it.
    ///
    /// # Errors
    /// When the file system refuses; earlier checkpoints of other steps are then as they were.
    pub fn finish(self, keep: usize) -> Result<PathBuf> {
        self.seal()?;
        if self.target.exists() {
            // The same step again, after a resume from an earlier one: the new one is as good, and complete.
            fs::remove_dir_all(&self.target).map_err(Error::file("replace", &self.target))?;
        }
        let target = self.stand()?;
        for old in list(folder_of(&target))?.into_iter().rev().skip(keep.max(1)) {
            fs::remove_dir_all(&old).map_err(Error::file("remove", &old))?;
        }
        Ok(target)
    }

    /// Puts the checkpoint in place, where nothing may stand.
    ///
    /// # Errors
    /// When something stands there, or the file system refuses; all is then as it was.
    pub fn place(self) -> Result<PathBuf> {
        if self.target.symlink_metadata().is_ok() {
            return Err(Error::file("put a checkpoint in place", &self.target)(
                ErrorKind::AlreadyExists.into(),
            ));
        }
        self.seal()?;
        self.stand()
    }

    /// As [`place`](Self::place), for a folder of another kind: without the list of its files.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub(crate) fn place_bare(self) -> Result<PathBuf> {
        if self.target.symlink_metadata().is_ok() {
            return Err(Error::file("put a folder in place", &self.target)(ErrorKind::AlreadyExists.into()));
        }
        flush_all(&self.folder)?;
        self.stand()
    }

    /// Hashes and flushes every file, and lists them.
    fn seal(&self) -> Result<()> {
        let mut files = BTreeMap::new();
        for path in entries(&self.folder)? {
            files.insert(name_of(&path), sum_and_flush(&path)?);
        }
        let manifest = serde_json::to_string_pretty(&Manifest { format: FORMAT, files });
        let manifest = manifest.map_err(|error| Error::model(&self.folder, error))?;
        let path = self.folder.join(MANIFEST);
        let mut file = File::create(&path).map_err(Error::file("create", &path))?;
        file.write_all(manifest.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(Error::file("write", &path))?;
        flush_folder(&self.folder)
    }

    fn stand(&self) -> Result<PathBuf> {
        fs::rename(&self.folder, &self.target).map_err(Error::file("put in place", &self.target))?;
        flush_folder(folder_of(&self.target))?;
        Ok(self.target.clone())
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        // Nothing is there of a checkpoint that stands; what cannot be removed now is when the next one begins.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A complete checkpoint, verified.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
}

impl Checkpoint {
    /// Opens and verifies `path`: a checkpoint, or a folder of checkpoints, whose newest is taken.
    ///
    /// # Errors
    /// When there is none, or any of its files is missing, truncated or changed.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = if path.join(MANIFEST).is_file() {
            path.to_owned()
        } else {
            let inside = path.join("checkpoints");
            let place = if inside.is_dir() { &inside } else { path };
            let newest = if place.is_dir() { list(place)?.pop() } else { None };
            newest.ok_or_else(|| Error::NoCheckpoint { path: path.to_owned() })?
        };
        let checkpoint = Self { folder };
        checkpoint.verify()?;
        Ok(checkpoint)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What tells this checkpoint from others: blake3 of the list of its files and their sums.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn identity(&self) -> Result<String> {
        Ok(blake3::hash(self.text(MANIFEST)?.as_bytes()).to_hex().to_string())
    }

    /// Reads a text file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn text(&self, name: &str) -> Result<String> {
        let path = self.folder.join(name);
        fs::read_to_string(&path).map_err(Error::file("read", &path))
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// When it cannot be read, or holds something else.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let path = self.folder.join(name);
        serde_json::from_str(&self.text(name)?).map_err(|error| Error::model(&path, error))
    }

    /// Reads tensors, which must be f32.
    ///
    /// # Errors
    /// When the file cannot be read, or holds something else.
    pub fn tensors(&self, name: &str) -> Result<BTreeMap<String, HostTensor>> {
        let path = self.folder.join(name);
        let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| Error::model(&path, error))?;
        let host = |(name, view): (String, TensorView<'_>)| {
            if view.dtype() != Dtype::F32 {
                return Err(Error::model(&path, format!("`{name}` is {:?}, not F32", view.dtype())));
            }
            let values = bytemuck::pod_collect_to_vec(view.data());
            Ok((name, HostTensor { shape: view.shape().to_vec(), values }))
        };
        tensors.tensors().into_iter().map(host).collect()
    }

    fn verify(&self) -> Result<()> {
        let path = self.folder.join(MANIFEST);
        let manifest: Manifest = self.json(MANIFEST)?;
        if manifest.format != FORMAT {
            let problem = format!("its format is {}, this program reads {FORMAT}", manifest.format);
            return Err(Error::model(&path, problem));
        }
        for (name, expected) in &manifest.files {
            let path = self.folder.join(name);
            let found = sum(&path)?;
            if found.bytes != expected.bytes {
                let problem = format!("{} bytes, of which {} are there", expected.bytes, found.bytes);
                return Err(Error::Damaged { path, problem });
            }
            if found != *expected {
                return Err(Error::Damaged { path, problem: "its contents have changed".into() });
            }
        }
        Ok(())
    }
}

/// The checkpoints in `folder`, oldest first.
///
/// # Errors
/// When the folder cannot be read.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = entries(folder)?;
    found.retain(|path| name_of(path).starts_with(PREFIX) && path.join(MANIFEST).is_file());
    // Steps are written with eight digits at least, and more are also longer.
    found.sort_by_key(|path| (name_of(path).len(), name_of(path)));
    Ok(found)
}

fn step_name(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = fs::read_dir(folder).map_err(Error::file("read", folder))?;
    read.map(|entry| entry.map(|entry| entry.path()).map_err(Error::file("read", folder))).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn sum(path: &Path) -> Result<FileSum> {
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut buffer).map_err(Error::file("read", path))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        bytes += count as u64;
    }
    Ok(FileSum { bytes, blake3: hasher.finalize().to_hex().to_string() })
}

fn sum_and_flush(path: &Path) -> Result<FileSum> {
    let sum = sum(path)?;
    // Windows flushes only what is open for writing.
    let file = File::options().read(true).write(true).open(path);
    file.and_then(|file| file.sync_all()).map_err(Error::file("flush", path))?;
    Ok(sum)
}

/// Flushes every file in a folder, and in those inside it.
fn flush_all(folder: &Path) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() {
            flush_all(&path)?;
        } else {
            sum_and_flush(&path)?;
        }
    }
    flush_folder(folder)
}

/// Makes the names in a folder durable. Only Unix lets a folder be flushed; elsewhere nothing is done.
fn flush_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder).and_then(|file| file.sync_all()).map_err(Error::file("flush", folder))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_is_replaced_by_the_same_step_alone() {
        let folder = tempfile::tempdir().unwrap();
        let write = |contents: &[u8]| {
            let writer = CheckpointWriter::begin(folder.path(), 3).unwrap();
            writer.file("state.json", contents).unwrap();
            writer
        };
        let step = write(b"one").finish(1).unwrap();
        assert_eq!(write(b"two").finish(1).unwrap(), step);
        assert_eq!(Checkpoint::open(&step).unwrap().text("state.json").unwrap(), "two");

        let error = write(b"three").place().unwrap_err().to_string();
        assert!(error.contains("step-00000003: cannot put a checkpoint in place"), "{error}");
        let of_others = folder.path().join("mine");
        fs::write(&of_others, "mine").unwrap();
        assert!(CheckpointWriter::at(&of_others).unwrap().place().is_err());
        assert_eq!(fs::read_to_string(&of_others).unwrap(), "mine");
        assert_eq!(Checkpoint::open(&step).unwrap().text("state.json").unwrap(), "two");
        assert_eq!(entries(folder.path()).unwrap().len(), 2, "nothing unfinished is left");
    }

    #[test]
    fn one_that_is_given_up_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let writer = CheckpointWriter::at(&folder.path().join("model")).unwrap();
        assert!(writer.file("missing/model.safetensors", b"").is_err());
        assert_eq!(entries(folder.path()).unwrap().len(), 1);
        drop(writer);
        assert!(entries(folder.path()).unwrap().is_empty());
    }
}
