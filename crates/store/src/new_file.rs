//! Files that are written whole or not at all, and reading and writing at an offset.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Result, StoreError};

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
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(StoreError::io(
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

/// Fills `bytes` from `offset` on, without moving a position that other threads might share.
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < bytes.len() {
            match std::os::windows::fs::FileExt::seek_read(file, &mut bytes[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        Ok(())
    }
}

fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, bytes, offset);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < bytes.len() {
            done += std::os::windows::fs::FileExt::seek_write(file, &bytes[done..], offset + done as u64)?;
        }
        Ok(())
    }
}

/// What is reported while a table is written, read or checked. Whoever it is reported to says whether to go
/// on: [`ControlFlow::Break`] ends the work with [`StoreError::Interrupted`], and what was being written is
/// gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// How much is done: rows, or bytes where a whole file is checked.
    pub done: u64,
    /// How much there is to do.
    pub total: u64,
}

/// Reports progress, and fails if that is answered with a wish to stop.
pub(crate) fn go_on(progress: &mut dyn FnMut(Progress) -> ControlFlow<()>, reached: Progress) -> Result<()> {
    match progress(reached) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(StoreError::Interrupted),
    }
}
