//! Files that appear whole or not at all.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use engram_data::{folder_of, new_file as hidden};
use engram_eval::figure::png;
use tempfile::NamedTempFile;

use crate::failure::refuse;
use crate::note::note;

/// Writes `text` to a temporary file beside `path`, then renames it.
pub(crate) fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    write_bytes(path, text.as_bytes())
}

/// Writes a figure into a folder, which is created: `name.svg`, and `name.png` with the same picture.
pub(crate) fn write_figure(folder: &Path, name: &str, svg: &str) -> anyhow::Result<()> {
    let picture = png(svg).map_err(|problem| anyhow::anyhow!("figure {name}: {problem}"))?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for (ending, bytes) in [("svg", svg.as_bytes()), ("png", &picture)] {
        let path = folder.join(format!("{name}.{ending}"));
        write_bytes(&path, bytes)?;
        note(format_args!("wrote {}", path.display()));
    }
    Ok(())
}

/// Removes the files of a figure if they exist.
pub(crate) fn remove_figure(folder: &Path, name: &str) -> anyhow::Result<()> {
    for ending in ["svg", "png"] {
        let path = folder.join(format!("{name}.{ending}"));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn write_bytes(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if path.exists() && !path.is_file() {
        // Devices and pipes are written directly.
        return std::fs::write(path, bytes);
    }
    let mut file = hidden(folder_of(path), "")?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map(|_| ()).map_err(|error| error.error)
}

/// A temporary file in `folder`, removed unless it is renamed.
pub(crate) fn new_file(folder: &Path, ending: &str) -> anyhow::Result<NamedTempFile> {
    hidden(folder, ending).with_context(|| format!("cannot write to {}", folder.display()))
}

/// Refuses an output that exists, or whose folder does not, before any work is done.
pub(crate) fn refuse_unwritable(out: &Path) -> anyhow::Result<()> {
    if out.symlink_metadata().is_ok() {
        return refuse(format!("{} already exists; remove it or choose another name", out.display()));
    }
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => refuse(format!(
            "{}: the folder {} does not exist; create it first",
            out.display(),
            folder.display()
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::write_file;

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("page.html");
        for text in ["a longer text", "short"] {
            write_file(&path, text).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_file(&folder.path().join("missing/page.html"), "").is_err());
    }
}
