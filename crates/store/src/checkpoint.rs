//! Tensors in safetensors files, found by name.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

use crate::error::{Result, StoreError};
use crate::positioned::read_exact_at;

/// The name that the index of a checkpoint in several files has.
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";

/// No published header is near this size; safetensors' own readers refuse more.
const LARGEST_HEADER: u64 = 100_000_000;

/// A checkpoint of one or several safetensors files, of which headers are read and tensors are not.
///
/// Files are opened when a tensor of theirs is asked for, so that those with the tables suffice.
#[derive(Debug)]
pub struct Checkpoint {
    /// The file or folder that was opened.
    path: PathBuf,
    /// Tensor names, and the place in `files` of the file that has each.
    names: BTreeMap<String, usize>,
    files: Vec<CheckpointFile>,
}

#[derive(Debug)]
struct CheckpointFile {
    path: PathBuf,
    opened: Option<OpenFile>,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    header: Header,
}

/// A safetensors file's header.
#[derive(Debug)]
pub(crate) struct Header {
    metadata: Metadata,
    /// Where the tensors' bytes begin in the file.
    data: u64,
}

/// A tensor's place.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) path: PathBuf,
    /// Its first byte in the file.
    pub(crate) offset: u64,
    file: usize,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a `.safetensors.index.json` that names several, or a folder with either.
    ///
    /// # Errors
    /// If there is none, or what is there is malformed (named with file and offset).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let index = path.join(INDEX_NAME);
            let single = path.join("model.safetensors");
            return match (index.exists(), single.exists()) {
                (true, _) => Self::indexed(&index),
                (false, true) => Self::single(&single),
                (false, false) => {
                    let problem = format!("the folder has neither {INDEX_NAME} nor model.safetensors");
                    Err(StoreError::not_a_checkpoint(path, 0, problem))
                }
            };
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            Self::indexed(path)
        } else {
            Self::single(path)
        }
    }

    fn single(path: &Path) -> Result<Self> {
        let opened = OpenFile::open(path)?;
        let names = opened.header.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        let files = vec![CheckpointFile { path: path.to_owned(), opened: Some(opened) }];
        Ok(Self { path: path.to_owned(), names, files })
    }

    fn indexed(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(StoreError::io(path, "read the checkpoint's index", 0))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut places = HashMap::new();
        let (mut names, mut files) = (BTreeMap::new(), Vec::new());
        for (name, file) in parse_index(&text, path)? {
            let place = *places.entry(file).or_insert_with_key(|file| {
                files.push(CheckpointFile { path: folder.join(file), opened: None });
                files.len() - 1
            });
            names.insert(name, place);
        }
        Ok(Self { path: path.to_owned(), names, files })
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Finds a tensor, opening its file.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let Some(&place) = self.names.get(name) else {
            let problem = format!("there is no tensor {name}; see which names the checkpoint has");
            return Err(StoreError::not_a_checkpoint(&self.path, 0, problem));
        };
        let CheckpointFile { path, opened } = &mut self.files[place];
        let opened = match opened {
            Some(opened) => opened,
            none => none.insert(OpenFile::open(path)?),
        };
        let Header { metadata, data } = &opened.header;
        let Some(TensorInfo { dtype, shape, data_offsets }) = metadata.info(name) else {
            let problem = format!("it has no tensor {name}, which the index says it has");
            return Err(StoreError::not_a_checkpoint(path, 8, problem));
        };
        Ok(Tensor {
            name: name.to_owned(),
            dtype: *dtype,
            shape: shape.iter().map(|&length| length as u64).collect(),
            path: path.clone(),
            offset: data + data_offsets.0 as u64,
            file: place,
        })
    }

    /// Reads bytes of a tensor that [`tensor`](Self::tensor) found, from its byte `start` on.
    pub(crate) fn read(&self, tensor: &Tensor, start: u64, bytes: &mut [u8]) -> Result<()> {
        let CheckpointFile { path, opened } = &self.files[tensor.file];
        let offset = tensor.offset + start;
        let read = opened.as_ref().map_or(Err(std::io::ErrorKind::NotFound.into()), |opened| {
            read_exact_at(&opened.file, bytes, offset)
        });
        read.map_err(StoreError::io(path, "read a tensor", offset))
    }
}

impl OpenFile {
    fn open(path: &Path) -> Result<Self> {
        let read = |offset| StoreError::io(path, "read the checkpoint", offset);
        let file = File::open(path).map_err(StoreError::io(path, "open the checkpoint", 0))?;
        let length = file.metadata().map_err(read(0))?.len();
        let mut size = [0; 8];
        if length < 8 {
            return Err(StoreError::not_a_checkpoint(path, length, "it ends before its header"));
        }
        read_exact_at(&file, &mut size, 0).map_err(read(0))?;
        let size = u64::from_le_bytes(size);
        if size > LARGEST_HEADER.min(length - 8) {
            let problem = format!(
                "a header of {size} bytes in a file of {length}: truncated, or no safetensors file at all"
            );
            return Err(StoreError::not_a_checkpoint(path, 0, problem));
        }
        let mut text = vec![0; size as usize];
        read_exact_at(&file, &mut text, 8).map_err(read(8))?;
        Ok(Self { file, header: Header::parse(&text, length, path)? })
    }
}

impl Header {
    /// The header with the JSON `text`, which begins at byte 8 of a file of `length` bytes.
    pub(crate) fn parse(text: &[u8], length: u64, path: &Path) -> Result<Self> {
        let problem = |problem: String| StoreError::not_a_checkpoint(path, 8, problem);
        let metadata: Metadata = serde_json::from_slice(text)
            .map_err(|error| problem(format!("its header is malformed: {error}")))?;
        let data = 8 + text.len() as u64;
        let promised = (metadata.data_len() as u64).checked_add(data);
        if promised != Some(length) {
            let promised = promised.map_or("more than any file has".into(), |bytes| format!("{bytes} bytes"));
            return Err(problem(format!("its header promises {promised}, but the file has {length} bytes")));
        }
        Ok(Self { metadata, data })
    }
}

/// Tensor names and the files that have them.
pub(crate) fn parse_index(text: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let refuse = |problem: String| Err(StoreError::not_a_checkpoint(path, 0, problem));
    let index: Index = match serde_json::from_slice(text) {
        Ok(index) => index,
        Err(error) => return refuse(format!("the index is malformed: {error}")),
    };
    // A name with folders in it could lead anywhere.
    let plain = |file: &&String| {
        let mut parts = Path::new(file).components();
        matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == file.as_str())
    };
    match index.weight_map.values().find(|file| !plain(file)) {
        Some(file) => refuse(format!("the index names the file {file:?}, which is not beside it")),
        None => Ok(index.weight_map),
    }
}
