//! Tables as published: from and to the safetensors files of DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::checkpoint::{Checkpoint, INDEX_NAME, Tensor};
use crate::error::{Result, StoreError};
use crate::float16::{bf16_to_f32, f16_to_f32, f32_to_bf16};
use crate::new_file::NewFile;
use crate::origin::{ContentHash, TableOrigin};
use crate::progress::{Progress, report};
use crate::row_format::{RowFormat, TableScale, VALUES_PER_SCALE};
use crate::table_file::TableHeader;
use crate::table_reader::TableReader;
use crate::table_writer::TableWriter;

/// The tensors of a checkpoint that make up one table: rows in one tensor or in several, one after another,
/// and perhaps scales.
///
/// | weights | scale | [`RowFormat`] |
/// |---|---|---|
/// | F32, BF16, F16 \[rows, width\] | none | `f32`, `bf16`, `f16` |
/// | F8_E4M3 \[rows, width\] | F8_E8M0 \[rows, ⌈width/32⌉\] | `fp8e4m3` |
/// | F8_E4M3 \[rows, width\] | one value, BF16, F16 or F32 | `fp8e4m3:SCALE` |
///
/// The fields may name any other tensors of these shapes, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableTensors {
    /// The tensors of values, in the order of their rows.
    pub weights: Vec<String>,
    /// The tensor of scales.
    pub scale: Option<String>,
}

impl TableTensors {
    /// DeepSeek-V4.1-Flash's names for the table of `layer` (from 0; it has them in 1 and 14):
    /// `layers.L.engram.embed.weight`, F8_E4M3 \[rows, 256\], and `.scale`, F8_E8M0 \[rows, 8\].
    pub fn deepseek(layer: u64) -> Self {
        let name = |part| format!("layers.{layer}.engram.embed.{part}");
        Self { weights: vec![name("weight")], scale: Some(name("scale")) }
    }

    /// Qwen3.8-Flash-Next's names for the table of `layer` (from 0; it has one in 1), whose rows are split
    /// evenly over `shards` (128 in what was published): `….ngram_embedding.shard_K.weight`, \[rows, 160\],
    /// BF16; or F8_E4M3, with one scale for all in `….ngram_embedding.weight_scale` (`scaled`).
    pub fn qwen(layer: u64, shards: usize, scaled: bool) -> Self {
        let name = |part: &str| {
            format!("model.language_model.layers.{layer}.ple.ple_embedding.ngram_embedding.{part}")
        };
        let weights = (0..shards).map(|shard| name(&format!("shard_{shard}.weight"))).collect();
        Self { weights, scale: scaled.then(|| name("weight_scale")) }
    }

    /// The table of `layer` in `checkpoint`, in whichever published layout it is.
    ///
    /// # Errors
    /// If there is none, or a shard is missing from it.
    pub fn find(checkpoint: &Checkpoint, layer: u64) -> Result<Self> {
        let deepseek = Self::deepseek(layer);
        if checkpoint.contains(&deepseek.weights[0]) {
            return Ok(deepseek);
        }
        let first = Self::qwen(layer, 1, true);
        let prefix = first.weights[0].trim_end_matches("0.weight");
        let shards = checkpoint.names().filter(|name| name.starts_with(prefix)).count();
        let scaled = first.scale.is_some_and(|scale| checkpoint.contains(&scale));
        let qwen = Self::qwen(layer, shards, scaled);
        let missing = qwen.weights.iter().find(|name| !checkpoint.contains(name));
        let problem = match missing {
            None if shards > 0 => return Ok(qwen),
            Some(name) => format!("it has {shards} shards of the table of layer {layer}, but not {name}"),
            None => format!(
                "it has no table of layer {layer}: neither {} nor {}; name its tensors",
                deepseek.weights[0], first.weights[0]
            ),
        };
        Err(StoreError::not_a_checkpoint(checkpoint.path(), 0, problem))
    }
}

impl TableTensors {
    /// What a table of these tensors would say about itself; `origin` is taken as it is.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape or type than its table needs, or its file is malformed.
    pub fn header(&self, checkpoint: &mut Checkpoint, origin: TableOrigin) -> Result<TableHeader> {
        let Found { format, rows, width, .. } = Found::in_checkpoint(checkpoint, self)?;
        Ok(TableHeader { rows, width, format, origin, training: None })
    }
}

/// Bytes of rows that are moved at a time.
const BYTES_AT_A_TIME: u64 = 4 << 20;

/// Reads a table from `checkpoint` into the table file `target`, values and scales byte for byte; scales come
/// to lie behind their row's values. Streams: memory does not depend on the table's size. Progress is in rows.
///
/// `origin` says which addressing placed the rows: the checkpoint does not.
///
/// # Errors
/// If a tensor is missing or has another shape or type than its table needs, a file is truncated or malformed,
/// or the file system refuses `target`, which then is as it was.
pub fn import(
    checkpoint: &mut Checkpoint,
    tensors: &TableTensors,
    origin: TableOrigin,
    target: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<ContentHash> {
    let Found { weights, scales, format, rows: total, width } = Found::in_checkpoint(checkpoint, tensors)?;
    let mut target = TableWriter::create(target, total, width, format, origin)?;
    let (weight_bytes, row_bytes) = (weight_bytes(format, width), format.bytes_per_row(width));
    let scale_bytes = row_bytes - weight_bytes;
    let at_a_time = (BYTES_AT_A_TIME / row_bytes as u64).max(1);
    let (mut codes, mut exponents, mut encoded) = (Vec::new(), Vec::new(), Vec::new());
    for weight in &weights {
        let rows = weight.shape[0];
        for first in (0..rows).step_by(at_a_time as usize) {
            let count = at_a_time.min(rows - first) as usize;
            codes.resize(count * weight_bytes, 0);
            checkpoint.read(weight, first * weight_bytes as u64, &mut codes)?;
            if let Some(scales) = &scales {
                exponents.resize(count * scale_bytes, 0);
                checkpoint.read(scales, target.rows_written() * scale_bytes as u64, &mut exponents)?;
                encoded.clear();
                for (codes, scales) in codes.chunks(weight_bytes).zip(exponents.chunks(scale_bytes)) {
                    encoded.extend_from_slice(codes);
                    encoded.extend_from_slice(scales);
                }
                target.push_encoded(&encoded)?;
            } else {
                target.push_encoded(&codes)?;
            }
            report(progress, Progress { done: target.rows_written(), total })?;
        }
    }
    target.finish()
}

/// Bytes of a row's values, without scales.
fn weight_bytes(format: RowFormat, width: usize) -> usize {
    match format {
        RowFormat::Fp8E4m3 => width,
        _ => format.bytes_per_row(width),
    }
}

/// A table's tensors in a checkpoint, whose shapes and types fit together.
struct Found {
    weights: Vec<Tensor>,
    /// Scales per row.
    scales: Option<Tensor>,
    format: RowFormat,
    rows: u64,
    width: usize,
}

impl Found {
    fn in_checkpoint(checkpoint: &mut Checkpoint, tensors: &TableTensors) -> Result<Self> {
        let weights: Vec<Tensor> =
            tensors.weights.iter().map(|name| checkpoint.tensor(name)).collect::<Result<_>>()?;
        let Some(first) = weights.first() else {
            return Err(StoreError::setting("tensors of weights", 0, "at least one"));
        };
        let &[_, width] = first.shape.as_slice() else {
            return Err(refuse(first, "rows and values make two dimensions"));
        };
        let (dtype, mut rows) = (first.dtype, 0u64);
        for weight in &weights {
            match weight.shape.as_slice() {
                &[own, same] if same == width && weight.dtype == dtype => rows = rows.saturating_add(own),
                _ => {
                    let wanted = format!("{} before it is {dtype:?} [rows, {width}]", first.name);
                    return Err(refuse(weight, &wanted));
                }
            }
        }
        let scale = tensors.scale.as_ref().map(|name| checkpoint.tensor(name)).transpose()?;
        let (format, scales) = match (dtype, scale) {
            (Dtype::F32, None) => (RowFormat::F32, None),
            (Dtype::BF16, None) => (RowFormat::Bf16, None),
            (Dtype::F16, None) => (RowFormat::F16, None),
            (Dtype::F8_E4M3, Some(scale)) if scale.dtype == Dtype::F8_E8M0 => {
                if scale.shape != [rows, width.div_ceil(VALUES_PER_SCALE as u64)] {
                    let wanted =
                        format!("weights of [{rows}, {width}] need one scale per row and 32 values of it");
                    return Err(refuse(&scale, &wanted));
                }
                (RowFormat::Fp8E4m3, Some(scale))
            }
            (Dtype::F8_E4M3, Some(scale)) => {
                (RowFormat::Fp8E4m3OneScale(one_scale(checkpoint, &scale)?), None)
            }
            (Dtype::F8_E4M3, None) => return Err(refuse(first, "eight-bit weights need a tensor of scales")),
            (_, Some(scale)) => return Err(refuse(&scale, &format!("weights of {dtype:?} have no scale"))),
            _ => return Err(refuse(first, "F32, BF16, F16 and F8_E4M3 can be imported")),
        };
        let width = usize::try_from(width).map_err(|_| refuse(first, "rows must fit this machine"))?;
        // A table's own limits on rows and width are checked when it is created.
        Ok(Self { weights, scales, format, rows, width })
    }
}

/// The only value of a tensor.
fn one_scale(checkpoint: &Checkpoint, tensor: &Tensor) -> Result<TableScale> {
    if tensor.shape.iter().any(|&length| length != 1) {
        return Err(refuse(tensor, "the scale of a whole table is one value"));
    }
    let mut bytes = [0; 4];
    let scale = match tensor.dtype {
        Dtype::F32 => {
            checkpoint.read(tensor, 0, &mut bytes)?;
            f32::from_le_bytes(bytes)
        }
        Dtype::BF16 | Dtype::F16 => {
            checkpoint.read(tensor, 0, &mut bytes[..2])?;
            let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
            if tensor.dtype == Dtype::BF16 { bf16_to_f32(bits) } else { f16_to_f32(bits) }
        }
        _ => return Err(refuse(tensor, "scales are F8_E8M0 per 32 values, or one BF16, F16 or F32")),
    };
    TableScale::new(scale).map_err(|error| refuse(tensor, &error.to_string()))
}

fn refuse(tensor: &Tensor, wanted: &str) -> StoreError {
    let Tensor { name, dtype, shape, path, offset, .. } = tensor;
    StoreError::not_a_checkpoint(path, *offset, format!("{name} is {dtype:?} {shape:?}, but {wanted}"))
}

/// Writes the table file `source` as the tensors `tensors`, values and scales byte for byte; rows are split
/// evenly over several weights. Streams, and checks every block on the way. Progress is in rows.
///
/// `target` is a `.safetensors` file, or a folder, which gets files of at most `file_bytes` (but at least one
/// tensor) and, when all are in place, their index. A table's one scale is written as BF16 where that is exact
/// (as published), else as F32.
///
/// # Errors
/// If `source` cannot be read, is damaged, or has a format that safetensors has not (convert it first); if
/// `tensors` do not fit the format; or if the file system refuses `target`.
pub fn export(
    source: impl AsRef<Path>,
    tensors: &TableTensors,
    target: impl AsRef<Path>,
    file_bytes: u64,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let (mut source, target) = (TableReader::open(source)?, target.as_ref());
    let header = source.header().clone();
    let (format, width) = (header.format, header.width);
    let planned = plan(&header, tensors, source.path())?;
    let index = target.is_dir();
    let files = Files::create(planned, target, if index { file_bytes } else { u64::MAX })?;

    let (weight_bytes, row_bytes) = (weight_bytes(format, width), format.bytes_per_row(width));
    let rows_per_weight = header.rows.div_ceil(tensors.weights.len() as u64);
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    while let Some((mut first, mut rows)) = source.next()? {
        while !rows.is_empty() {
            let (weight, within) = (first / rows_per_weight, first % rows_per_weight);
            let count = (rows_per_weight - within).min((rows.len() / row_bytes) as u64);
            let (now, later) = rows.split_at(count as usize * row_bytes);
            let name = &tensors.weights[weight as usize];
            if weight_bytes == row_bytes {
                files.write(name, within * weight_bytes as u64, now)?;
            } else {
                codes.clear();
                scales.clear();
                for row in now.chunks(row_bytes) {
                    codes.extend_from_slice(&row[..weight_bytes]);
                    scales.extend_from_slice(&row[weight_bytes..]);
                }
                files.write(name, within * weight_bytes as u64, &codes)?;
                if let Some(name) = &tensors.scale {
                    files.write(name, first * (row_bytes - weight_bytes) as u64, &scales)?;
                }
            }
            (first, rows) = (first + count, later);
        }
        report(progress, Progress { done: first, total: header.rows })?;
    }
    if let (RowFormat::Fp8E4m3OneScale(scale), Some(name)) = (format, &tensors.scale) {
        let bytes = scale.get().to_le_bytes();
        files.write(name, 0, if is_bf16(scale) { &bytes[2..] } else { &bytes })?;
    }
    files.persist(index.then_some(target))
}

fn is_bf16(scale: TableScale) -> bool {
    bf16_to_f32(f32_to_bf16(scale.get())) == scale.get()
}

/// A tensor to be written: its name, type and shape.
type Planned = (String, Dtype, Vec<usize>);

/// The tensors that a table becomes.
fn plan(header: &TableHeader, tensors: &TableTensors, path: &Path) -> Result<Vec<Planned>> {
    let &TableHeader { rows, width, format, .. } = header;
    let refuse = |problem: String| Err(StoreError::not_a_table(path, 12, problem));
    let (dtype, scale) = match format {
        RowFormat::F32 => (Dtype::F32, None),
        RowFormat::Bf16 => (Dtype::BF16, None),
        RowFormat::F16 => (Dtype::F16, None),
        RowFormat::Fp8E4m3 => {
            (Dtype::F8_E4M3, Some((Dtype::F8_E8M0, vec![rows as usize, width.div_ceil(VALUES_PER_SCALE)])))
        }
        RowFormat::Fp8E4m3OneScale(scale) => {
            (Dtype::F8_E4M3, Some((if is_bf16(scale) { Dtype::BF16 } else { Dtype::F32 }, vec![1])))
        }
        RowFormat::Int8 | RowFormat::Int4 => {
            return refuse(format!("safetensors has no tensors like rows of {format}; convert it first"));
        }
    };
    let count = tensors.weights.len() as u64;
    let per_weight = rows.div_ceil(count.max(1));
    if count == 0 || per_weight * (count - 1) >= rows {
        return refuse(format!("its {rows} rows cannot be split evenly over {count} tensors"));
    }
    let own = |i: u64| (rows - i * per_weight).min(per_weight) as usize;
    let mut planned: Vec<Planned> =
        (0..).zip(&tensors.weights).map(|(i, name)| (name.clone(), dtype, vec![own(i), width])).collect();
    match (scale, &tensors.scale) {
        (Some((dtype, shape)), Some(name)) => planned.push((name.clone(), dtype, shape)),
        (None, None) => {}
        (Some(_), None) => return refuse(format!("rows of {format} have scales; name a tensor for them")),
        (None, Some(name)) => return refuse(format!("rows of {format} have no scales to put into {name}")),
    }
    Ok(planned)
}

/// safetensors files that are being written, and where in them each tensor begins.
struct Files {
    files: Vec<NewFile>,
    places: HashMap<String, (usize, u64)>,
    /// For the index.
    names: Vec<String>,
    bytes: u64,
}

impl Files {
    /// Creates the files for `planned`: one at `target`, or several in it, of at most `file_bytes`.
    fn create(planned: Vec<Planned>, target: &Path, file_bytes: u64) -> Result<Self> {
        let size = |(_, dtype, shape): &Planned| {
            shape.iter().map(|&length| length as u64).product::<u64>() * dtype.bitsize() as u64 / 8
        };
        let (mut groups, mut room): (Vec<Vec<Planned>>, u64) = (Vec::new(), 0);
        let mut bytes = 0;
        for tensor in planned {
            let own = size(&tensor);
            bytes += own;
            match groups.last_mut() {
                Some(group) if own <= room => {
                    group.push(tensor);
                    room -= own;
                }
                _ => {
                    room = file_bytes.saturating_sub(own);
                    groups.push(vec![tensor]);
                }
            }
        }
        let count = groups.len();
        let mut made = Self { files: Vec::new(), places: HashMap::new(), names: Vec::new(), bytes };
        for (number, mut group) in groups.into_iter().enumerate() {
            let name = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
            let path = if target.is_dir() { target.join(&name) } else { target.to_owned() };
            let file = NewFile::create(&path)?;
            // In the order in which the safetensors library writes tensors.
            group.sort_by(|a, b| (Reverse(a.1), &a.0).cmp(&(Reverse(b.1), &b.0)));
            let mut end = 0;
            let mut infos = Vec::new();
            for tensor in group {
                let start = end;
                end += size(&tensor) as usize;
                let (name, dtype, shape) = tensor;
                made.places.insert(name.clone(), (number, start as u64));
                infos.push((name, TensorInfo { dtype, shape, data_offsets: (start, end) }));
            }
            let text = header_text(infos, &path)?;
            file.write_all_at(&(text.len() as u64).to_le_bytes(), 0)?;
            file.write_all_at(&text, 8)?;
            let data = 8 + text.len() as u64;
            made.places.values_mut().filter(|place| place.0 == number).for_each(|place| place.1 += data);
            made.files.push(file);
            made.names.push(name);
        }
        Ok(made)
    }

    fn write(&self, tensor: &str, start: u64, bytes: &[u8]) -> Result<()> {
        let (file, offset) = self.places[tensor];
        self.files[file].write_all_at(bytes, offset + start)
    }

    /// Puts the files in place, and last, in a folder, their index.
    fn persist(self, folder: Option<&Path>) -> Result<()> {
        let Self { files, places, names, bytes } = self;
        files.into_iter().try_for_each(NewFile::persist)?;
        let Some(folder) = folder else { return Ok(()) };
        let weight_map: BTreeMap<_, _> =
            places.iter().map(|(tensor, place)| (tensor, &names[place.0])).collect();
        let index = serde_json::json!({ "metadata": { "total_size": bytes }, "weight_map": weight_map });
        let index_file = NewFile::create(&folder.join(INDEX_NAME))?;
        index_file.write_all_at(format!("{index:#}\n").as_bytes(), 0)?;
        index_file.persist()
    }
}

/// A header's JSON, padded to whole words with spaces.
fn header_text(infos: Vec<(String, TensorInfo)>, path: &Path) -> Result<Vec<u8>> {
    let failed = |problem: String| StoreError::not_a_checkpoint(path, 8, problem);
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(metadata), infos).map_err(|error| failed(error.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| failed(error.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}
