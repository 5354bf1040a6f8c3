//! The folder of a run in progress belongs to one process: two of the same command would write into each other's state.

use std::path::{Path, PathBuf};

use anyhow::Context;
use engram_train::RunLock;

/// The file in the folder that is locked.
const LOCK: &str = "run.lock";

/// The folder of a run in progress, taken for this process. Dropped, it takes away a folder in which nothing was saved.
#[derive(Debug)]
pub(crate) struct WorkLock {
    work: PathBuf,
    lock: Option<RunLock>,
}

/// Whether `work` holds anything of a run: a lock alone is nothing.
pub(crate) fn holds_a_run(work: &Path) -> bool {
    std::fs::read_dir(work)
        .is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|entry| entry.file_name() != LOCK)))
}

impl WorkLock {
    /// Makes the folder `work`, and takes it.
    pub(crate) fn take(work: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(work).with_context(|| format!("cannot create {}", work.display()))?;
        Ok(Self { work: work.to_owned(), lock: Some(RunLock::take(work)?) })
    }
}

impl Drop for WorkLock {
    fn drop(&mut self) {
        if !holds_a_run(&self.work) {
            let _ = std::fs::remove_file(self.work.join(LOCK));
            let _ = std::fs::remove_dir(&self.work);
        }
        self.lock = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_belongs_to_one_and_leaves_nothing_empty_behind() {
        let place = tempfile::tempdir().unwrap();
        let work = place.path().join("out.grafting");
        let first = WorkLock::take(&work).unwrap();
        assert!(!holds_a_run(&work));
        let refused = WorkLock::take(&work).unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(first);
        assert!(!work.exists());
        let second = WorkLock::take(&work).unwrap();
        std::fs::write(work.join("state"), "saved").unwrap();
        drop(second);
        assert!(holds_a_run(&work));
        WorkLock::take(&work).unwrap();
    }
}
