//! Files and folders that appear whole or not at all.

use std::io::{self, Write};
use std::path::Path;

use tempfile::{NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Writes a file under another name in the same folder, and gives it its own when it is safely on disk.
///
/// # Errors
/// When the file system refuses; what stood under the name before is unchanged.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = folder_of(path);
    let mut file = new_file(folder, "").map_err(Error::write(path))?;
    file.write_all(bytes).map_err(Error::write(path))?;
    file.as_file().sync_all().map_err(Error::write(path))?;
    file.persist(path).map_err(|error| Error::write(path)(error.error))?;
    sync_folder(folder)
}

/// A file in `folder` that goes away unless it is given a name. Its temporary name ends in `ending`.
///
/// # Errors
/// When the file system refuses.
pub fn new_file(folder: &Path, ending: &str) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".writing-").suffix(ending);
    // Temporary files are the owner's alone; this one becomes an ordinary file, to which the umask applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

/// A folder in `folder` that goes away unless it is given a name. Its temporary name begins with `prefix`.
///
/// # Errors
/// When the file system refuses.
pub fn new_folder(folder: &Path, prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(folder)
}

/// The folder that a path's last name stands in.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in a folder durable. Only Unix lets a folder be flushed; elsewhere nothing is done.
///
/// # Errors
/// When the file system refuses.
pub fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::write(folder))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}
