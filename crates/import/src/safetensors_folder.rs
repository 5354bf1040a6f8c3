//! A folder of safetensors, as Hugging Face's library writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use engram_kernels::BlockFormat;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::mapped_file::MappedFile;
use crate::weight::Weight;

/// A folder with its files of weights, mapped.
#[derive(Debug)]
pub(crate) struct SafetensorsFolder {
    folder: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    range: Range<usize>,
    kind: Dtype,
    shape: Vec<usize>,
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFolder {
    /// Maps the files of `folder` that count: those of the index, where there is one; otherwise `model.safetensors`, or
    /// all `model*.safetensors`.
    ///
    /// # Errors
    /// Files that are missing, incomplete, or hold the same tensor twice: named.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        match read_if_there(&index)? {
            Some(text) => Self::by_index(folder, &index, &text),
            None => {
                let mut this =
                    Self { folder: folder.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
                for path in files_without_index(folder)? {
                    this.add(&path, None)?;
                }
                Ok(this)
            }
        }
    }

    /// One file alone.
    ///
    /// # Errors
    /// When it is missing or incomplete.
    pub(crate) fn of_file(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(path).to_owned();
        let mut this = Self { folder, files: Vec::new(), tensors: BTreeMap::new() };
        this.add(path, None)?;
        Ok(this)
    }

    fn by_index(folder: &Path, index: &Path, text: &str) -> Result<Self> {
        let Index { weight_map } = serde_json::from_str(text).map_err(|error| Error::model(index, error))?;
        let mut by_file: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (tensor, file) in &weight_map {
            by_file.entry(file).or_default().insert(tensor);
        }
        let mut this = Self { folder: folder.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        for (file, tensors) in by_file {
            if Path::new(file).file_name().is_none_or(|name| name != file) {
                return Err(Error::model(
                    index,
                    format!("`{file}` is not the name of a file in this folder"),
                ));
            }
            let path = folder.join(file);
            if !path.exists() {
                let first = tensors.first().copied().unwrap_or_default();
                let problem = format!(
                    "the file is missing; the index has {} tensors in it, `{first}` first; download it",
                    tensors.len()
                );
                return Err(Error::model(&path, problem));
            }
            this.add(&path, Some(&tensors))?;
        }
        Ok(this)
    }

    /// Adds the tensors of a file: those named, or all.
    fn add(&mut self, path: &Path, named: Option<&BTreeSet<&str>>) -> Result<()> {
        let file = MappedFile::open(path)?;
        let place = self.files.len();
        let found = tensors(&file)?;
        if let Some(missing) = named.and_then(|named| named.iter().find(|name| !found.contains_key(**name))) {
            return Err(Error::model(
                path,
                format!("no tensor `{missing}`, which the index has in this file"),
            ));
        }
        for (name, (range, kind, shape)) in found {
            if named.is_some_and(|named| !named.contains(name.as_str())) {
                continue;
            }
            if self.tensors.contains_key(&name) {
                return Err(Error::model(
                    path,
                    format!("tensor `{name}` is also in another file of this folder"),
                ));
            }
            self.tensors.insert(name, Place { file: place, range, kind, shape });
        }
        self.files.push(file);
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// The files that count.
    pub(crate) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        self.tensors.keys().cloned().collect()
    }

    /// A tensor's shape, outermost first.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| &place.shape[..])
    }

    /// A tensor where it lies.
    ///
    /// # Errors
    /// When it is missing, or of a type that is not known.
    pub(crate) fn weight(&self, name: &str) -> Result<Weight> {
        let Some(place) = self.tensors.get(name) else {
            return Err(Error::model(&self.folder, format!("no tensor `{name}`")));
        };
        let file = &self.files[place.file];
        let format = match place.kind {
            Dtype::F32 => BlockFormat::F32,
            Dtype::F16 => BlockFormat::F16,
            Dtype::BF16 => BlockFormat::BF16,
            kind => {
                let problem = format!("tensor `{name}` is of type {kind:?}; F32, F16 and BF16 are known");
                return Err(Error::model(file.path(), problem));
            }
        };
        Ok(Weight::mapped(file, place.range.clone(), format, place.shape.clone()))
    }
}

/// The files of a folder without an index.
fn files_without_index(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join(SINGLE);
    if single.exists() {
        return Ok(vec![single]);
    }
    let mut names: Vec<String> = Vec::new();
    for entry in folder.read_dir().map_err(Error::read(folder))? {
        let name = entry.map_err(Error::read(folder))?.file_name();
        names.extend(name.into_string());
    }
    names.sort();
    let models: Vec<&String> =
        names.iter().filter(|name| name.starts_with("model") && name.ends_with(".safetensors")).collect();
    if let Some(missing) = missing_part(&models) {
        return Err(Error::model(
            &folder.join(missing),
            "the file is missing, others of its series are there; download it",
        ));
    }
    if models.is_empty() {
        let other = names.iter().find(|name| name.ends_with(".safetensors") || name.ends_with(".bin"));
        let problem = match other {
            Some(other) => format!("no {SINGLE} here; {other} is not read"),
            None => format!("no {SINGLE} here"),
        };
        return Err(Error::model(folder, problem));
    }
    Ok(models.into_iter().map(|name| folder.join(name)).collect())
}

/// The first name of the series `model-00001-of-00003.safetensors` that is not there.
fn missing_part(names: &[&String]) -> Option<String> {
    let count = names.iter().find_map(|name| {
        let (_, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        count.parse::<usize>().ok().filter(|count| *count < 100_000)
    })?;
    let wanted = |part: usize| format!("model-{part:05}-of-{count:05}.safetensors");
    (1..=count).map(wanted).find(|wanted| !names.contains(&wanted))
}

type Found = BTreeMap<String, (Range<usize>, Dtype, Vec<usize>)>;

/// The tensors of a file, by what its header says.
fn tensors(file: &MappedFile) -> Result<Found> {
    let bytes = file.bytes();
    let cut = |needed: usize| {
        let (has, missing) = (bytes.len(), needed.saturating_sub(bytes.len()));
        let problem = format!(
            "cut short: it has {has} bytes and needs {needed}: {missing} are missing; download it again"
        );
        Error::model(file.path(), problem)
    };
    let Some(length) = bytes.first_chunk::<8>() else { return Err(cut(8)) };
    let header = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX).saturating_add(8);
    if header > bytes.len() {
        // A file of something else has any number here.
        let looks_right = bytes.get(8).is_none_or(|first| *first == b'{') && header < 1 << 30;
        let problem = "not a safetensors file: it does not begin with the length of a header";
        return Err(if looks_right { cut(header) } else { Error::model(file.path(), problem) });
    }
    // The library says only that a length is wrong: by how much, the user wants to know.
    if let Some(end) = data_end(&bytes[8..header]).and_then(|end| end.checked_add(header)) {
        if end > bytes.len() {
            return Err(cut(end));
        }
        if end < bytes.len() {
            let problem =
                format!("{} bytes lie behind the last tensor: the file is damaged", bytes.len() - end);
            return Err(Error::model(file.path(), problem));
        }
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| Error::model(file.path(), format!("its header is damaged: {error}")))?;
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (start, end) = info.data_offsets;
        (name, (header + start..header + end, info.dtype, info.shape.clone()))
    };
    Ok(metadata.tensors().into_iter().map(place).collect())
}

/// Where the data of the last tensor end, counted from the end of the header.
fn data_end(header: &[u8]) -> Option<usize> {
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).ok()?;
    let end = |info: &Value| usize::try_from(info.get("data_offsets")?.get(1)?.as_u64()?).ok();
    header.values().filter_map(end).max()
}

/// A text file, where it is there, without the byte-order mark with which some editors begin one.
///
/// # Errors
/// When it is there and cannot be read.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.starts_with("version https://git-lfs.github.com/spec/") => Err(Error::model(
            path,
            "this is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
        )),
        Ok(mut text) => {
            if text.starts_with('\u{feff}') {
                text.drain(..'\u{feff}'.len_utf8());
            }
            Ok(Some(text))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::read(path)(error)),
    }
}

/// A JSON file, where it is there.
///
/// # Errors
/// When it is there and cannot be read, or is not JSON.
pub(crate) fn json_if_there(path: &Path) -> Result<Option<Value>> {
    let text = read_if_there(path)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| Error::model(path, error))).transpose()
}
