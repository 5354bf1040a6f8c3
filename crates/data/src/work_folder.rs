//! A folder for unfinished output beside its final place. A killed process leaves it, and the next one resumes in it.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::{folder_of, sync_folder, write_file};

/// The folder `.preparing-NAME` beside the final path `NAME`.
///
/// ```text
/// .preparing-NAME/lock       locked while a process works here
/// .preparing-NAME/output/    becomes NAME
/// .preparing-NAME/state.json what to resume from; none before the first checkpoint
/// .preparing-NAME/…          what the state refers to
/// ```
///
/// Dropping it removes it, unless there is a state.
#[derive(Debug)]
pub(crate) struct WorkFolder {
    path: PathBuf,
    place: PathBuf,
    /// Held until the folder is gone, so that no other process takes it for abandoned.
    _lock: File,
}

impl WorkFolder {
    const PREFIX: &str = ".preparing-";
    const LOCK: &str = "lock";
    const OUTPUT: &str = "output";
    const STATE: &str = "state.json";

    /// The folder for the final path `place`, which must not exist: a new one, or the one that a killed process left.
    ///
    /// A file system without locks does not keep two processes apart.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Busy`] if another process works here, or when the file system fails.
    pub(crate) fn claim(place: &Path) -> Result<Self> {
        let exists = || Err(Error::Exists { path: place.to_owned() });
        let parent = folder_of(place);
        let Some(name) = place.file_name() else { return exists() };
        if place.symlink_metadata().is_ok() {
            return exists();
        }
        let mut hidden = OsString::from(Self::PREFIX);
        hidden.push(name);
        let path = parent.join(hidden);
        let lock = loop {
            std::fs::create_dir_all(&path).map_err(Error::write(&path))?;
            if let Some(lock) = lock_file(&path.join(Self::LOCK))? {
                break lock;
            }
        };
        let work = Self { path, place: place.to_owned(), _lock: lock };
        // Another process may have finished its work between the first look and the lock.
        if place.symlink_metadata().is_ok() { exists() } else { Ok(work) }
    }

    /// The folder itself, for what must outlive a kill but is not output.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that becomes the final one.
    pub(crate) fn output(&self) -> PathBuf {
        self.path.join(Self::OUTPUT)
    }

    fn state_file(&self) -> PathBuf {
        self.path.join(Self::STATE)
    }

    /// Whether there is something to resume.
    pub(crate) fn has_state(&self) -> bool {
        // A state without output is that of a finished preparation: it was killed while it removed this folder.
        self.state_file().exists() && self.output().exists()
    }

    /// The state of a killed process.
    ///
    /// # Errors
    /// When the file system fails.
    pub(crate) fn state(&self) -> Result<Option<Vec<u8>>> {
        if !self.has_state() {
            return Ok(None);
        }
        let path = self.state_file();
        std::fs::read(&path).map(Some).map_err(Error::read(&path))
    }

    /// Replaces the state, which must refer only to what is already flushed.
    ///
    /// # Errors
    /// When the file system fails. The earlier state is then unchanged.
    pub(crate) fn save_state(&self, state: &[u8]) -> Result<()> {
        write_file(&self.state_file(), state)
    }

    /// Removes everything that an earlier process left, the state first.
    ///
    /// # Errors
    /// When the file system fails.
    pub(crate) fn clear(&self) -> Result<()> {
        remove_file(&self.state_file())?;
        for entry in std::fs::read_dir(&self.path).map_err(Error::read(&self.path))? {
            let path = entry.map_err(Error::read(&self.path))?.path();
            if path.file_name().is_some_and(|name| name == Self::LOCK) {
                continue;
            }
            let kind = path.symlink_metadata().map_err(Error::read(&path))?;
            match kind.is_dir() {
                true => std::fs::remove_dir_all(&path).map_err(Error::write(&path))?,
                false => remove_file(&path)?,
            }
        }
        std::fs::create_dir_all(self.output()).map_err(Error::write(&self.output()))
    }

    /// Moves the complete output to its final path, which must not exist, and removes the folder.
    ///
    /// # Errors
    /// When the path exists, or the file system fails.
    pub(crate) fn stand(self) -> Result<()> {
        let output = self.output();
        sync_folder(&output)?;
        let place = &self.place;
        // `rename` would replace an empty folder.
        if place.symlink_metadata().is_ok() {
            return Err(Error::Exists { path: place.clone() });
        }
        std::fs::rename(&output, place).map_err(|error| match place.symlink_metadata() {
            Ok(_) => Error::Exists { path: place.clone() },
            Err(_) => Error::write(place)(error),
        })?;
        sync_folder(folder_of(place))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        if !self.has_state() {
            // What remains is cleared by the next preparation in this place.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write(path)(error)),
        _ => Ok(()),
    }
}

/// Creates and locks a file. None if another process removed it in the meantime.
fn lock_file(path: &Path) -> Result<Option<File>> {
    let mut options = File::options();
    let file = match options.write(true).create(true).truncate(false).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::write(path)(error)),
    };
    match file.try_lock() {
        Ok(()) | Err(TryLockError::Error(_)) => Ok(is_at(&file, path).then_some(file)),
        Err(TryLockError::WouldBlock) => Err(Error::Busy { path: folder_of(path).to_owned() }),
    }
}

/// Whether `file` is still the one that `path` names.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |data: std::io::Result<std::fs::Metadata>| data.map(|data| (data.dev(), data.ino())).ok();
    id(file.metadata()) == id(path.metadata())
}

/// Whether `file` is still the one that `path` names. Here, a file that is open keeps its name.
#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    fn started(place: &Path) -> WorkFolder {
        let work = WorkFolder::claim(place).unwrap();
        work.clear().unwrap();
        work
    }

    #[test]
    fn it_stands_or_goes_away() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("new/data");
        drop(started(&place));
        assert!(names(&parent.path().join("new")).is_empty());
        let work = started(&place);
        std::fs::write(work.output().join("a"), "1").unwrap();
        work.save_state(b"not needed any more").unwrap();
        work.stand().unwrap();
        assert_eq!((names(place.parent().unwrap()), names(&place)), (vec!["data".into()], vec!["a".into()]));
        assert!(matches!(WorkFolder::claim(&place), Err(Error::Exists { .. })));
        assert!(matches!(WorkFolder::claim(Path::new("..")), Err(Error::Exists { .. })));
    }

    #[test]
    fn a_place_that_was_taken_meanwhile_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("data");
        let work = started(&place);
        std::fs::create_dir(&place).unwrap();
        assert!(matches!(work.stand(), Err(Error::Exists { .. })));
        assert_eq!(names(parent.path()), ["data"]);
        assert!(names(&place).is_empty());
    }

    #[test]
    fn a_state_keeps_it_for_the_next_process() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("data");
        let work = started(&place);
        std::fs::write(work.output().join("a"), "1").unwrap();
        work.save_state(b"one").unwrap();
        assert!(matches!(WorkFolder::claim(&place), Err(Error::Busy { .. })));
        let other = started(&parent.path().join("other"));
        drop(work);
        let work = WorkFolder::claim(&place).unwrap();
        assert_eq!((work.state().unwrap(), names(&work.output())), (Some(b"one".to_vec()), vec!["a".into()]));
        work.clear().unwrap();
        assert!(work.state().unwrap().is_none() && names(&work.output()).is_empty());
        assert!(other.output().exists());
        drop(work);
        assert_eq!(names(parent.path()), [".preparing-other"]);
    }

    #[test]
    fn a_folder_without_state_and_one_without_output_begin_anew() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("data");
        let left = parent.path().join(".preparing-data");
        std::fs::create_dir_all(left.join("output/train")).unwrap();
        assert!(started(&place).state().unwrap().is_none());
        // Killed after its output was renamed, before the folder was removed.
        std::fs::create_dir_all(&left).unwrap();
        std::fs::write(left.join("state.json"), "one").unwrap();
        let work = started(&place);
        assert!(work.state().unwrap().is_none());
        drop(work);
        assert!(names(parent.path()).is_empty());
    }
}
