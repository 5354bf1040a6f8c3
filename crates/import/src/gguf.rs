//! GGUF files (ggml): metadata and tensors in one file, little-endian, versions 2 and 3.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::block_format::BlockFormat;
use crate::error::{Error, Result};

/// A GGUF file, mapped.
#[derive(Debug)]
pub(crate) struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorPlace>,
}

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

#[derive(Debug, Clone)]
struct TensorPlace {
    /// Outermost first: the reverse of the file's order.
    shape: Vec<usize>,
    format: BlockFormat,
    /// In the file.
    start: usize,
    bytes: usize,
}

impl Gguf {
    /// Maps a file and reads its metadata.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read(path))?;
        // SAFETY: the map is only read. A file that another process shortens meanwhile ends this one with a signal,
        // as any mapped model file does; nothing in memory depends on the bytes staying as they were checked, since
        // every offset is bounds-checked against the map when it is used.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::read(path))?;
        let mut reader = Reader { path, bytes: &map, at: 0 };
        let (metadata, tensors) = reader.header()?;
        Ok(Self { path: path.to_owned(), map, metadata, tensors })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Names of its tensors, in order.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Whether there is such a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor's shape, outermost first, and its values.
    pub(crate) fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let place = self.tensors.get(name).ok_or_else(|| self.error(format!("no tensor `{name}`")))?;
        let data = &self.map[place.start..place.start + place.bytes];
        Ok((place.shape.clone(), place.format.decode(data)))
    }

    /// A value, if the file has it.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A whole number that must be there.
    pub(crate) fn integer(&self, key: &str) -> Result<usize> {
        let value = match self.value(key) {
            Some(Value::Unsigned(value)) => usize::try_from(*value).ok(),
            Some(Value::Signed(value)) => usize::try_from(*value).ok(),
            _ => None,
        };
        value.ok_or_else(|| self.error(format!("metadata `{key}` is no whole number")))
    }

    /// A number that must be there.
    pub(crate) fn float(&self, key: &str) -> Result<f64> {
        match self.value(key) {
            Some(Value::Float(value)) => Ok(*value),
            _ => Err(self.error(format!("metadata `{key}` is no number"))),
        }
    }

    /// A text that must be there.
    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        match self.value(key) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(self.error(format!("metadata `{key}` is no text"))),
        }
    }

    /// A list of texts that must be there.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let Some(Value::Array(values)) = self.value(key) else {
            return Err(self.error(format!("metadata `{key}` is no list")));
        };
        let texts = values.iter().map(|value| match value {
            Value::Text(text) => Ok(text.as_str()),
            _ => Err(self.error(format!("metadata `{key}` is no list of texts"))),
        });
        texts.collect()
    }

    /// An error about this file.
    pub(crate) fn error(&self, problem: impl std::fmt::Display) -> Error {
        Error::model(&self.path, problem)
    }
}

type Header = (HashMap<String, Value>, HashMap<String, TensorPlace>);

/// Reads from the start of a file.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

/// Deepest nesting of arrays that is read.
const DEEPEST: usize = 4;

impl Reader<'_> {
    fn header(&mut self) -> Result<Header> {
        if self.take(4)? != b"GGUF" {
            return Err(Error::model(self.path, "not a GGUF file: it does not begin with GGUF"));
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(self.error(&format!("GGUF version {version}; 2 and 3 are known")));
        }
        let (tensors, pairs) = (self.u64()?, self.u64()?);
        let mut metadata = HashMap::new();
        for _ in 0..pairs {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            metadata.insert(key, value);
        }
        let mut infos = Vec::new();
        for _ in 0..tensors {
            infos.push(self.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Unsigned(alignment)) if *alignment > 0 => *alignment as usize,
            Some(_) => {
                return Err(Error::model(self.path, "metadata `general.alignment` is no positive number"));
            }
            None => 32,
        };
        let data = self.at.next_multiple_of(alignment);
        let place = |(name, mut place): (String, TensorPlace)| {
            let end = data.checked_add(place.start).and_then(|start| {
                place.start = start;
                start.checked_add(place.bytes)
            });
            match end {
                Some(end) if end <= self.bytes.len() => Ok((name, place)),
                _ => Err(Error::model(
                    self.path,
                    format!("cut off: tensor `{name}` ends behind the file's end"),
                )),
            }
        };
        let tensors = infos.into_iter().map(place).collect::<Result<_>>()?;
        Ok((metadata, tensors))
    }

    fn tensor(&mut self) -> Result<(String, TensorPlace)> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let (number, start) = (self.u32()?, self.u64()?);
        let format = BlockFormat::of_ggml(number).ok_or_else(|| {
            let known = "f32, f16, bf16, Q4_0, Q4_1 and Q8_0 are known";
            Error::model(self.path, format!("tensor `{name}` is of ggml type {number}; {known}"))
        })?;
        let shape: Option<Vec<usize>> = shape.into_iter().map(|size| usize::try_from(size).ok()).collect();
        let place = shape.and_then(|shape| {
            let count = shape.iter().try_fold(1_usize, |count, &size| count.checked_mul(size))?;
            let (bytes, start) = (format.bytes(count)?, usize::try_from(start).ok()?);
            Some(TensorPlace { shape, format, start, bytes })
        });
        let place = place.ok_or_else(|| self.error(&format!("the shape of tensor `{name}` cannot be")))?;
        Ok((name, place))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(self.number::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.number()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.number()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.number()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.number()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.number()?).into()),
            7 => Value::Bool(self.number::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < DEEPEST => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1)?);
                }
                Value::Array(values)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.number()?)),
            12 => Value::Float(f64::from_le_bytes(self.number()?)),
            _ => return Err(self.error(&format!("a metadata value of unknown type {kind}"))),
        })
    }

    fn text(&mut self) -> Result<String> {
        let length = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.error("a text that is not UTF-8"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.number()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.number()?))
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let taken =
            taken.ok_or_else(|| Error::model(self.path, "cut off: the file ends within its header"))?;
        self.at += count;
        Ok(taken)
    }

    fn error(&self, problem: &str) -> Error {
        Error::model(self.path, format!("at byte {}: {problem}", self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf_writer::Writer;

    fn open(bytes: &[u8]) -> Result<Gguf> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Gguf::open(file.path())
    }

    fn small() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.integer("n", 7).text("t", "x").texts("list", &["a".into(), "b".into()]).float("f", 0.5);
        let data: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        writer.tensor("one", &[2, 3], 0, &data).tensor("two", &[2], 1, &[0; 4]);
        writer.bytes()
    }

    #[test]
    fn metadata_and_tensors() {
        let gguf = open(&small()).unwrap();
        assert_eq!(gguf.integer("n").unwrap(), 7);
        assert_eq!((gguf.text("t").unwrap(), gguf.float("f").unwrap()), ("x", 0.5));
        assert_eq!(gguf.texts("list").unwrap(), ["a", "b"]);
        assert_eq!(gguf.tensor("one").unwrap(), (vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        assert_eq!(gguf.tensor("two").unwrap(), (vec![2], vec![0.0, 0.0]));
        assert!(gguf.integer("t").unwrap_err().to_string().contains("`t` is no whole number"));
        assert!(gguf.tensor("three").unwrap_err().to_string().contains("no tensor `three`"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = small();
        for length in 0..whole.len() - 28 {
            let error = open(&whole[..length]).unwrap_err().to_string();
            assert!(error.contains("cut off") || length == 0, "{length}: {error}");
        }
        assert!(open(b"GGML0000").unwrap_err().to_string().contains("not a GGUF file"));
        let unknown = Writer::default().tensor("t", &[256], 14, &[0; 210]).bytes();
        assert!(open(&unknown).unwrap_err().to_string().contains("tensor `t` is of ggml type 14"));
    }
}
