//! Reads GGUF files, ggml's container: metadata, then tensors (its specification is part of ggml, version 3).

use std::collections::HashMap;
use std::path::Path;

use engram_kernels::BlockFormat;

use crate::error::{Error, Result};
use crate::mapped_file::MappedFile;
use crate::weight::Weight;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    /// Stays in the file: lists of bytes or tokens are long.
    Array(Array),
}

/// A list that stays in the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array {
    kind: u32,
    count: usize,
    /// Where its first value starts.
    start: usize,
}

/// Where a tensor lies in the file.
#[derive(Debug, Clone)]
struct TensorPlace {
    /// Outermost first.
    shape: Vec<usize>,
    /// ggml's number of its type.
    kind: u32,
    start: usize,
}

/// A GGUF file, mapped.
#[derive(Debug)]
pub(crate) struct Gguf {
    file: MappedFile,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorPlace>,
    /// Tensors that are listed, by what they need: the file is cut short where it has fewer bytes.
    cut: Option<String>,
}

/// ggml's names of the types that are not known here.
const UNKNOWN_TYPES: [(u32, &str); 23] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl Gguf {
    /// Opens a file and reads its metadata. Tensors of types that are not known are refused where they are taken, so that
    /// the architecture can be looked at first.
    ///
    /// # Errors
    /// A file that cannot be read, or is not GGUF.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let mut reader = Reader { path, bytes: file.bytes(), at: 0 };
        let (metadata, tensors) = reader.header()?;
        let mut gguf = Self { file, metadata, tensors, cut: None };
        gguf.cut = gguf.cut_short();
        Ok(gguf)
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file, mapped.
    pub(crate) fn file(&self) -> &MappedFile {
        &self.file
    }

    /// All its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    /// Refuses a file with fewer bytes than its tensors need.
    pub(crate) fn check_length(&self) -> Result<()> {
        self.cut.as_ref().map_or(Ok(()), |problem| Err(self.error(problem)))
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

    /// A tensor's shape, outermost first.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| &place.shape[..])
    }

    /// A tensor where it lies.
    ///
    /// # Errors
    /// When it is missing, of a type that is not known, has rows that are not whole blocks, or ends behind the file.
    pub(crate) fn weight(&self, name: &str) -> Result<Weight> {
        let place = self.tensors.get(name).ok_or_else(|| self.error(format!("no tensor `{name}`")))?;
        let format = BlockFormat::from_ggml(place.kind).ok_or_else(|| {
            let known: Vec<&str> = BlockFormat::ALL.iter().map(|format| format.name()).collect();
            let (kind, known) = (type_name(place.kind), known.join(", "));
            self.error(format!("tensor `{name}` is of type {kind}, which is not known; known are {known}"))
        })?;
        let inputs = place.shape.last().copied().unwrap_or(1);
        if !inputs.is_multiple_of(format.block_values()) {
            let (kind, block) = (format.name(), format.block_values());
            let problem = format!(
                "tensor `{name}` of type {kind} has rows of {inputs}, which are not whole blocks of {block}"
            );
            return Err(self.error(problem));
        }
        let range = format.bytes(place.shape.iter().product()).ok().and_then(|bytes| {
            let end = place.start.checked_add(bytes)?;
            (end <= self.bytes().len()).then_some(place.start..end)
        });
        let range = range.ok_or_else(|| {
            self.error(
                self.cut.clone().unwrap_or_else(|| format!("cut short: tensor `{name}` is incomplete")),
            )
        })?;
        Ok(Weight::mapped(&self.file, range, format, place.shape.clone()))
    }

    /// A tensor's shape, outermost first, and its values.
    pub(crate) fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let weight = self.weight(name)?;
        Ok((weight.shape().to_vec(), weight.values()))
    }

    /// Keys of the metadata.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A value, if the file has it.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A whole number that must be there.
    pub(crate) fn integer(&self, key: &str) -> Result<usize> {
        let value = match self.there(key)? {
            Value::Unsigned(value) => usize::try_from(*value).ok(),
            Value::Signed(value) => usize::try_from(*value).ok(),
            _ => None,
        };
        value.ok_or_else(|| self.error(format!("metadata `{key}` is not a whole number")))
    }

    /// A number that must be there.
    pub(crate) fn float(&self, key: &str) -> Result<f64> {
        match self.there(key)? {
            Value::Float(value) => Ok(*value),
            Value::Unsigned(value) => Ok(*value as f64),
            Value::Signed(value) => Ok(*value as f64),
            _ => Err(self.error(format!("metadata `{key}` is not a number"))),
        }
    }

    /// A truth value that must be there.
    pub(crate) fn bool(&self, key: &str) -> Result<bool> {
        match self.there(key)? {
            Value::Bool(value) => Ok(*value),
            _ => Err(self.error(format!("metadata `{key}` is neither true nor false"))),
        }
    }

    /// A text that must be there.
    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        match self.there(key)? {
            Value::Text(text) => Ok(text),
            _ => Err(self.error(format!("metadata `{key}` is not a text"))),
        }
    }

    /// A list of texts that must be there.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let not_texts = || self.error(format!("metadata `{key}` is not a list of texts"));
        let array = self.array(key)?.filter(|array| array.kind == TEXT).ok_or_else(not_texts)?;
        let mut reader = Reader { path: self.path(), bytes: self.bytes(), at: array.start };
        (0..array.count).map(|_| reader.borrowed_text()).collect()
    }

    /// A list of numbers that must be there.
    pub(crate) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let not_numbers = || self.error(format!("metadata `{key}` is not a list of numbers"));
        let array = self.array(key)?.filter(|array| !matches!(array.kind, TEXT | ARRAY));
        let array = array.ok_or_else(not_numbers)?;
        let mut reader = Reader { path: self.path(), bytes: self.bytes(), at: array.start };
        let number = |_| match reader.value(array.kind, DEEPEST)? {
            Value::Unsigned(value) => Ok(value as f64),
            Value::Signed(value) => Ok(value as f64),
            Value::Float(value) => Ok(value),
            Value::Bool(value) => Ok(f64::from(u8::from(value))),
            Value::Text(_) | Value::Array(_) => Err(not_numbers()),
        };
        (0..array.count).map(number).collect()
    }

    /// An error about this file.
    pub(crate) fn error(&self, problem: impl std::fmt::Display) -> Error {
        Error::model(self.path(), problem)
    }

    fn there(&self, key: &str) -> Result<&Value> {
        self.value(key).ok_or_else(|| self.error(format!("metadata `{key}` is missing")))
    }

    fn array(&self, key: &str) -> Result<Option<&Array>> {
        Ok(match self.there(key)? {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    /// What is missing of a file that has fewer bytes than its tensors need.
    fn cut_short(&self) -> Option<String> {
        let end = |place: &TensorPlace| {
            let format = BlockFormat::from_ggml(place.kind)?;
            let bytes = format.bytes(place.shape.iter().product()).ok()?;
            place.start.checked_add(bytes)
        };
        let ends = self.tensors.iter().filter_map(|(name, place)| Some((end(place)?, place.start, name)));
        let has = self.bytes().len();
        let beyond: Vec<_> = ends.filter(|(end, _, _)| *end > has).collect();
        let needed = beyond.iter().map(|(end, _, _)| end).max()?;
        let (_, _, first) = beyond.iter().min_by_key(|(_, start, _)| start)?;
        let missing = needed - has;
        Some(format!(
            "cut short: it has {has} bytes, its tensors need {needed}: {missing} are missing, from tensor `{first}` on; \
             download it again"
        ))
    }
}

impl Value {
    /// Whether it says nothing: 0, false, or nothing at all.
    pub(crate) fn is_neutral(&self) -> bool {
        match self {
            Self::Unsigned(value) => *value == 0,
            Self::Signed(value) => *value == 0,
            Self::Float(value) => *value == 0.0,
            Self::Bool(value) => !value,
            Self::Text(text) => text.is_empty() || text == "none",
            Self::Array(array) => array.count == 0,
        }
    }
}

fn type_name(number: u32) -> String {
    match UNKNOWN_TYPES.iter().find(|(known, _)| *known == number) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("{number} of ggml"),
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
/// Most sizes of a tensor.
const MOST_SIZES: u32 = 4;
/// The number that stands for a text, and for a list.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

impl<'a> Reader<'a> {
    fn header(&mut self) -> Result<Header> {
        if self.take(4)? != b"GGUF" {
            return Err(Error::model(self.path, "not a GGUF file: it does not begin with GGUF"));
        }
        let version = self.u32()?;
        if version.swap_bytes() <= 3 && version > 3 {
            return Err(self.error("the file is big-endian, which is not known"));
        }
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
        let mut infos: HashMap<String, TensorPlace> = HashMap::new();
        for _ in 0..tensors {
            let (name, place) = self.tensor()?;
            if infos.insert(name.clone(), place).is_some() {
                return Err(self.error(&format!("tensor `{name}` is listed twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            Some(Value::Unsigned(alignment)) if *alignment > 0 => usize::try_from(*alignment).ok(),
            Some(_) => None,
            None => Some(32),
        };
        let data = alignment.and_then(|alignment| self.at.checked_next_multiple_of(alignment));
        let wrong =
            || Error::model(self.path, "metadata `general.alignment` is not a usable number of bytes");
        let data = data.ok_or_else(wrong)?;
        for (name, place) in &mut infos {
            place.start = data.checked_add(place.start).ok_or_else(|| {
                Error::model(self.path, format!("the place of tensor `{name}` is beyond any file"))
            })?;
        }
        Ok((metadata, infos))
    }

    fn tensor(&mut self) -> Result<(String, TensorPlace)> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > MOST_SIZES {
            return Err(self
                .error(&format!("tensor `{name}` has {dimensions} sizes; at most {MOST_SIZES} are known")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64()?);
        }
        shape.reverse();
        let (kind, start) = (self.u32()?, self.u64()?);
        let shape: Option<Vec<usize>> = shape.into_iter().map(|size| usize::try_from(size).ok()).collect();
        let place = shape.zip(usize::try_from(start).ok()).and_then(|(shape, start)| {
            // No file is so large: what is computed from sizes later does not overflow.
            let count = shape.iter().try_fold(1_usize, |count, &size| count.checked_mul(size))?;
            (count < 1 << 56 && !shape.contains(&0)).then_some(TensorPlace { shape, kind, start })
        });
        let place =
            place.ok_or_else(|| self.error(&format!("the shape of tensor `{name}` is not possible")))?;
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
            TEXT => Value::Text(self.text()?),
            ARRAY if depth < DEEPEST => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let count = usize::try_from(count).unwrap_or(usize::MAX);
                let start = self.at;
                self.skip(kind, count, depth + 1)?;
                Value::Array(Array { kind, count, start })
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.number()?)),
            12 => Value::Float(f64::from_le_bytes(self.number()?)),
            _ => return Err(self.error(&format!("a metadata value of unknown type {kind}"))),
        })
    }

    /// Goes past `count` values of a list.
    fn skip(&mut self, kind: u32, count: usize, depth: usize) -> Result<()> {
        let bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            TEXT => {
                for _ in 0..count {
                    self.borrowed_text()?;
                }
                return Ok(());
            }
            _ => {
                for _ in 0..count {
                    self.value(kind, depth)?;
                }
                return Ok(());
            }
        };
        self.take(count.saturating_mul(bytes)).map(|_| ())
    }

    fn text(&mut self) -> Result<String> {
        self.borrowed_text().map(str::to_owned)
    }

    fn borrowed_text(&mut self) -> Result<&'a str> {
        let length = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| self.error("a text that is not UTF-8"))
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

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or_else(|| {
            let (has, at) = (self.bytes.len(), self.at);
            let problem = format!(
                "cut short: its {has} bytes end within the header, which needs {count} more after byte {at}; \
                 download it again"
            );
            Error::model(self.path, problem)
        })?;
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
        assert!(gguf.integer("t").unwrap_err().to_string().contains("`t` is not a whole number"));
        assert!(gguf.text("u").unwrap_err().to_string().contains("metadata `u` is missing"));
        assert!(gguf.tensor("three").unwrap_err().to_string().contains("no tensor `three`"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = small();
        // The last tensor's own bytes end before its padding.
        for length in 0..whole.len() - 28 {
            let error = open(&whole[..length]).and_then(|gguf| gguf.check_length()).unwrap_err().to_string();
            assert!(error.contains("cut short") || length == 0, "{length}: {error}");
            assert!(length == 0 || error.contains(&format!("{length} bytes")), "{length}: {error}");
        }
        assert!(open(b"GGML0000").unwrap_err().to_string().contains("not a GGUF file"));
        let big_endian = [b"GGUF", &3_u32.to_be_bytes()[..], &[0; 16]].concat();
        assert!(open(&big_endian).unwrap_err().to_string().contains("big-endian"));
    }

    #[test]
    fn a_type_that_is_not_known_is_named_where_the_tensor_is_taken() {
        let gguf = open(&Writer::default().tensor("t", &[256], 16, &[0; 66]).bytes()).unwrap();
        let error = gguf.weight("t").unwrap_err().to_string();
        assert!(error.contains("tensor `t` is of type IQ2_XXS"), "{error}");
        let gguf = open(&Writer::default().tensor("t", &[8, 48], 8, &[0; 408]).bytes()).unwrap();
        let error = gguf.weight("t").unwrap_err().to_string();
        assert!(error.contains("rows of 48, which are not whole blocks of 32"), "{error}");
    }

    #[test]
    fn lists_stay_in_the_file() {
        let bytes = vec![7; 100_000];
        let mut writer = Writer::default();
        writer.bytes_list("bytes", &bytes).integers("numbers", &[1, -2]);
        let gguf = open(&writer.bytes()).unwrap();
        assert!(matches!(gguf.value("bytes"), Some(Value::Array(Array { count: 100_000, .. }))));
        assert_eq!(gguf.numbers("bytes").unwrap(), vec![7.0; 100_000]);
        assert_eq!(gguf.numbers("numbers").unwrap(), [1.0, -2.0]);
        assert!(gguf.texts("numbers").unwrap_err().to_string().contains("is not a list of texts"));
    }

    proptest::proptest! {
        /// Whatever the bytes, an answer or an error: never a panic, and no memory beyond the file's own size.
        #[test]
        fn any_change_is_read_or_refused(at in 0_usize..400, byte: u8, more in proptest::collection::vec(0_u8.., 0..40)) {
            let mut bytes = small();
            let at = at % bytes.len();
            bytes[at] = byte;
            let to = bytes.len().min(at + more.len());
            bytes[at..to].copy_from_slice(&more[..to - at]);
            if let Ok(gguf) = open(&bytes) {
                let _ = gguf.check_length();
                for name in gguf.names() {
                    let _ = gguf.tensor(name);
                }
                for (key, _) in gguf.keys() {
                    let _ = (gguf.texts(key), gguf.numbers(key), gguf.integer(key), gguf.float(key));
                }
            }
        }
    }
}
