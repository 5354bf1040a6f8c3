//! Files and folders that appear whole or not at all.

use std::io::{self, Write};
use std::path::Path;

use tempfile::{NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Writes a temporary file in the same folder, flushes it to disk, and renames it.
///
/// # Errors
/// When the file system fails. An existing file is then unchanged.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = folder_of(path);
    let mut file = new_file(folder, "").map_err(Error::write(path))?;
    file.write_all(bytes).map_err(Error::write(path))?;
    file.as_file().sync_all().map_err(Error::write(path))?;
    file.persist(path).map_err(|error| Error::write(path)(error.error))?;
    sync_folder(folder)
}

/// A temporary file in `folder`, removed unless it is renamed. Its temporary name ends in `ending`.
///
/// # Errors
/// When the file system fails.
pub fn new_file(folder: &Path, ending: &str) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-").suffix(ending);
    // By default only the owner can read temporary files. Use ordinary permissions, to which the umask applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

/// A temporary folder in `folder`, removed unless it is renamed. Its temporary name begins with `prefix`.
///
/// # Errors
/// When the file system fails.
pub fn new_folder(folder: &Path, prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(folder)
}

/// The parent folder of a path.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Flushes a folder, which makes its names durable. Does nothing on systems other than Unix.
///
/// # Errors
/// When the file system fails.
pub fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::write(folder))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}
