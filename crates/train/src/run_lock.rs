//! A run's folder belongs to one process at a time.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// The lock on a run's folder. The system takes it back when the process ends, however it ends; the file stays.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    const NAME: &str = "run.lock";

    /// Takes the lock of `folder`, which is there, and writes into it who has it.
    ///
    /// A file system without locks has none to take: two trainings are then not told from one.
    ///
    /// # Errors
    /// When another process has it, or the file system refuses.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(Self::NAME);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = file.map_err(Error::file("lock", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Windows lets nobody else read what is locked.
                let _ = file.read_to_string(&mut holder);
                let holder = if holder.is_empty() { "another process".to_owned() } else { holder };
                return Err(Error::RunLocked { path: folder.to_owned(), holder });
            }
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(Error::file("lock", &path)(error)),
        }
        let host = sysinfo::System::host_name().unwrap_or_else(|| "this machine".to_owned());
        let holder = format!("process {} on {host}", std::process::id());
        let written = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(holder.as_bytes()));
        written.map_err(Error::file("lock", &path))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunLock::take(folder.path()).unwrap();
        let refused = RunLock::take(folder.path()).unwrap_err();
        assert!(refused.is_input());
        let message = refused.to_string();
        assert!(message.contains(&format!("process {} on ", std::process::id())), "{message}");
        assert!(message.starts_with(&folder.path().display().to_string()), "{message}");
        drop(first);
        RunLock::take(folder.path()).unwrap();
    }
}
