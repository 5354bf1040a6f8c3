//! Files that are written whole or not at all.

use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Result, StoreError};
use crate::positioned::write_all_at;

/// A file under a temporary name in the folder of its path. [`persist`](Self::persist) puts it in place;
/// dropped before, it is deleted, and `path` is what it was.
#[derive(Debug)]
pub(crate) struct NewFile {
    path: PathBuf,
    temporary: NamedTempFile,
}

impl NewFile {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".table-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the process's mask
        let folder = folder(path);
        let temporary = builder.tempfile_in(folder).map_err(StoreError::io(folder, "create a file", 0))?;
        Ok(Self { path: path.to_owned(), temporary })
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(self.temporary.as_file(), bytes, offset)
            .map_err(StoreError::io(&self.path, "write", offset))
    }

    /// Flushes the file to disk and renames it to its path.
    pub(crate) fn persist(self) -> Result<()> {
        let Self { path, temporary } = self;
        temporary.as_file().sync_all().map_err(StoreError::io(&path, "flush the file to disk", 0))?;
        temporary
            .persist(&path)
            .map_err(|refused| StoreError::io(&path, "put the file in place", 0)(refused.error))?;
        // The new name reaches the disk with its folder. Only Unix lets a folder be flushed.
        #[cfg(unix)]
        {
            let folder = folder(&path);
            std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(StoreError::io(
                folder,
                "flush the folder to disk",
                0,
            ))?;
        }
        Ok(())
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
