//! A temporary folder for output, beside its final place. It is renamed when it is complete, and removed otherwise.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::files::{folder_of, new_folder, sync_folder};

/// A folder under a temporary name. Dropping it before [`stand`](Self::stand) removes it. A killed process leaves it
/// behind, unlocked; the next process that makes one in the same place removes it.
#[derive(Debug)]
pub(crate) struct WorkFolder {
    temporary: TempDir,
    lock: File,
    place: PathBuf,
}

impl WorkFolder {
    const PREFIX: &str = ".preparing-";
    const LOCK: &str = "lock";

    /// A temporary folder for the final path `place`.
    ///
    /// # Errors
    /// When the file system fails.
    pub(crate) fn new(place: &Path) -> Result<Self> {
        let parent = folder_of(place);
        std::fs::create_dir_all(parent).map_err(Error::write(parent))?;
        remove_abandoned(parent);
        let temporary = new_folder(parent, Self::PREFIX).map_err(Error::write(place))?;
        let lock = File::create(temporary.path().join(Self::LOCK)).map_err(Error::write(place))?;
        // A file system without locks. Then no process takes the folder for abandoned, either.
        let _ = lock.try_lock();
        Ok(Self { temporary, lock, place: place.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Moves the complete folder to its final path, which must not exist.
    ///
    /// # Errors
    /// When the path exists, or the file system fails.
    pub(crate) fn stand(self) -> Result<()> {
        let Self { temporary, lock, place } = self;
        drop(lock);
        let lock = temporary.path().join(Self::LOCK);
        std::fs::remove_file(&lock).map_err(Error::write(&lock))?;
        sync_folder(temporary.path())?;
        std::fs::rename(temporary.path(), &place).map_err(|error| match place.symlink_metadata() {
            Ok(_) => Error::Exists { path: place.clone() },
            Err(_) => Error::write(&place)(error),
        })?;
        // The folder has its final name now, so there is nothing to remove.
        let _ = temporary.keep();
        sync_folder(folder_of(&place))
    }
}

/// Removes the folders that killed processes left in `parent`: those that nobody locks. Ignores those that it cannot
/// remove.
fn remove_abandoned(parent: &Path) {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let named =
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(WorkFolder::PREFIX));
        // A folder without a lock was just created, or belongs to another program.
        let Some(lock) = named.then(|| File::open(path.join(WorkFolder::LOCK)).ok()).flatten() else {
            continue;
        };
        match lock.try_lock() {
            Ok(()) => _ = std::fs::remove_dir_all(&path),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn it_stands_or_goes_away() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("new/data");
        drop(WorkFolder::new(&place).unwrap());
        assert!(names(&parent.path().join("new")).is_empty());
        let work = WorkFolder::new(&place).unwrap();
        std::fs::write(work.path().join("a"), "1").unwrap();
        work.stand().unwrap();
        assert_eq!(
            (names(place.parent().unwrap()), names(&place)),
            (vec!["data".to_owned()], vec!["a".to_owned()])
        );

        let other = WorkFolder::new(&place).unwrap();
        assert!(matches!(other.stand(), Err(Error::Exists { .. })));
        assert_eq!(names(&place), ["a"]);
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_another_works_on_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("data");
        let killed = WorkFolder::new(&place).unwrap();
        let left = killed.path().to_owned();
        let WorkFolder { temporary, lock, .. } = killed;
        let _ = temporary.keep();
        drop(lock);
        let foreign = parent.path().join(".preparing-by-another-program");
        std::fs::create_dir(&foreign).unwrap();
        let working = WorkFolder::new(&parent.path().join("other")).unwrap();
        assert!(!left.exists());
        let _third = WorkFolder::new(&place).unwrap();
        assert!(working.path().exists() && foreign.exists());
    }
}
