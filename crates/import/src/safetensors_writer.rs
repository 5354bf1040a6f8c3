//! Writes safetensors tensor by tensor: one is in memory at a time, and an interrupt is heard between two.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Map, json};

use crate::error::{Error, Result};

/// A tensor in f32 to be written.
pub(crate) struct Written<'a> {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Its values, row after row.
    pub(crate) values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

/// Writes `tensors` to a new file. `progress` hears how many of them are written, and may end it.
///
/// # Errors
/// When the file system refuses, or `progress` breaks: [`Error::Interrupted`].
pub(crate) fn write(
    path: &Path,
    tensors: &[Written<'_>],
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += 4 * tensor.shape.iter().product::<usize>();
        let info = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), info);
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // Data begin at a multiple of 8: a reader may look at them where they lie.
    header.resize(header.len().next_multiple_of(8), b' ');
    let failed = || Error::file("write", path);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed())?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed())?;
    file.write_all(&header).map_err(failed())?;
    for (done, tensor) in tensors.iter().enumerate() {
        if progress(done, tensors.len()).is_break() {
            return Err(Error::Interrupted);
        }
        let values = (tensor.values)();
        debug_assert_eq!(values.len(), tensor.shape.iter().product::<usize>());
        file.write_all(bytemuck::cast_slice(&values)).map_err(failed())?;
    }
    file.flush().map_err(failed())
}
