//! A file of weights, mapped into memory.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A file that is read where it lies: its pages are loaded when they are looked at, and dropped when memory is short.
#[derive(Debug, Clone)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

/// How Git LFS begins the file that stands for one it has not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// When it cannot be read, is empty, or is the pointer that Git LFS leaves in place of a file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read(path))?;
        if file.metadata().map_err(Error::read(path))?.len() == 0 {
            return Err(Error::model(path, "the file is empty: download it again"));
        }
        // SAFETY: the map is only read, as bytes, and every offset into it is checked. As with any mapped file, nobody
        // may shorten it meanwhile.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::read(path))?;
        if map.starts_with(LFS_POINTER) {
            let problem = "this is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`";
            return Err(Error::model(path, problem));
        }
        Ok(Self { path: path.to_owned(), map: Arc::new(map) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(crate) fn map(&self) -> &Arc<Mmap> {
        &self.map
    }

    /// Adds the file's contents to a hash. They are read, not looked at in the map: a map's pages count as memory in
    /// use.
    pub(crate) fn hash(&self, hasher: &mut blake3::Hasher) -> Result<()> {
        let mut file = File::open(&self.path).map_err(Error::read(&self.path))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(Error::read(&self.path))? {
                0 => return Ok(()),
                count => hasher.update(&buffer[..count]),
            };
        }
    }
}
