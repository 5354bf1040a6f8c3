//! A study's folder: the study that it holds, and the process that uses it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::arm::Kind;
use crate::error::{Error, Result};
use crate::plan::Plan;

/// A folder of one study, locked by this process until it is dropped.
#[derive(Debug)]
pub struct StudyFolder {
    path: PathBuf,
    /// The lock, which the system releases when the process ends in any way.
    _lock: File,
}

/// `study.json`: the study of the folder's results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Label {
    study: Kind,
    /// Fingerprints of its arms, by name.
    arms: BTreeMap<String, String>,
}

impl Label {
    fn of(plan: &Plan) -> Self {
        let names = plan.arms.iter().map(|arm| arm.name.clone());
        Self { study: plan.kind, arms: names.zip(plan.fingerprints.iter().cloned()).collect() }
    }
}

impl StudyFolder {
    /// Opens `path` for `plan`: a folder of the same study, which is resumed, or a new one.
    ///
    /// # Errors
    /// When it holds another study or something else, or another process uses it.
    pub fn open(path: &Path, plan: &Plan) -> Result<Self> {
        Self::check(path, plan)?;
        fs::create_dir_all(path).map_err(Error::file("create", path))?;
        let lock_path = path.join("study.lock");
        let lock = File::create(&lock_path).map_err(Error::file("create", &lock_path))?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => refused(path, "another process uses this study"),
            fs::TryLockError::Error(source) => Error::file("lock", &lock_path)(source),
        })?;
        let text = serde_json::to_string_pretty(&Label::of(plan)).expect("a label is representable as JSON");
        let folder = Self { path: path.to_owned(), _lock: lock };
        folder.write("study.json", text.as_bytes())?;
        Ok(folder)
    }

    /// Checks that `path` could be opened for `plan`; changes nothing.
    ///
    /// # Errors
    /// When it holds another study or something else.
    pub fn check(path: &Path, plan: &Plan) -> Result<()> {
        let label = path.join("study.json");
        let text = match fs::read_to_string(&label) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return check_empty(path),
            text => text.map_err(Error::file("read", &label))?,
        };
        let found: Label = serde_json::from_str(&text)
            .map_err(|error| refused(path, &format!("its study.json: {error}")))?;
        if found.study != plan.kind {
            return Err(refused(path, &format!("holds a study of {}", found.study.name())));
        }
        let plan = Label::of(plan);
        let other = found.arms.iter().find(|(name, fingerprint)| plan.arms.get(*name) != Some(fingerprint));
        if let Some((name, _)) = other {
            let problem = format!(
                "holds a study of other arms, rates or data: its arm `{name}` is not one of these \
                 (seeds and arms may be added)"
            );
            return Err(refused(path, &problem));
        }
        Ok(())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the run `id`.
    pub fn run(&self, id: &str) -> PathBuf {
        self.path.join("runs").join(id)
    }

    /// Writes one of its files through a temporary file.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let folder = path.parent().unwrap_or(&self.path);
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut file = engram_data::new_file(folder, "")?;
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(Error::file("write", &path))
    }
}

/// Accepts only what an interrupted study can leave before it writes its label.
fn check_empty(path: &Path) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::file("read", path))?,
    };
    for entry in entries {
        let name = entry.map_err(Error::file("read", path))?.file_name();
        let name = name.to_string_lossy();
        if name != "study.lock" && !name.starts_with(".writing-") {
            return Err(refused(path, &format!("is not a study's folder: it holds `{name}`")));
        }
    }
    Ok(())
}

fn refused(path: &Path, problem: &str) -> Error {
    Error::Folder { path: path.to_owned(), problem: problem.to_owned() }
}
