//! Gathering into other people's arrays.

use engram_store::{RowSource, StoreError};
use pyo3::prelude::*;

use crate::array::{Array, ValuesMut};
use crate::error::store;
use crate::table::rows_room;

/// Rows decoded at a time where they are not wanted as f32.
const ROWS_AT_A_TIME: usize = 1024;

/// `ids` `[...]` to floats `[..., width]`.
pub(crate) fn gather<'py>(
    py: Python<'py>,
    source: &dyn RowSource,
    ids: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
    dtype: Option<&str>,
) -> PyResult<Bound<'py, PyAny>> {
    let ids = Array::of("ids", ids)?;
    let width = source.width();
    let (mut array, result, dtype) = rows_room(py, out, &ids.shape, width, dtype)?;
    array.check_apart(&ids)?;
    let list = ids.row_ids()?;
    let values = array.values_mut(dtype)?;
    py.detach(|| gather_into(source, list, values)).map_err(store)?;
    Ok(result)
}

/// The same without Python.
pub(crate) fn gather_into(source: &dyn RowSource, ids: &[u64], out: ValuesMut<'_>) -> Result<(), StoreError> {
    match out {
        ValuesMut::F32(out) => source.gather(ids, out),
        ValuesMut::F16(out) => gather_rounded(source, ids, out),
        ValuesMut::Bf16(out) => gather_rounded(source, ids, out),
    }
}

/// 16-bit floats, rounded to nearest even.
trait Rounded: Copy {
    fn round(values: &[f32], out: &mut [Self]);
}

impl Rounded for half::f16 {
    fn round(values: &[f32], out: &mut [Self]) {
        half::slice::HalfFloatSliceExt::convert_from_f32_slice(out, values);
    }
}

impl Rounded for half::bf16 {
    fn round(values: &[f32], out: &mut [Self]) {
        half::slice::HalfFloatSliceExt::convert_from_f32_slice(out, values);
    }
}

fn gather_rounded<T: Rounded>(source: &dyn RowSource, ids: &[u64], out: &mut [T]) -> Result<(), StoreError> {
    let width = source.width();
    let mut values = vec![0.0; ids.len().min(ROWS_AT_A_TIME) * width];
    // All rows are on their way, and all ids are known to be rows, before the first is written.
    source.prefetch(ids)?;
    for (ids, out) in ids.chunks(ROWS_AT_A_TIME).zip(out.chunks_mut(ROWS_AT_A_TIME * width)) {
        let values = &mut values[..ids.len() * width];
        source.gather(ids, values)?;
        T::round(values, out);
    }
    Ok(())
}

/// `ids` `[...]` to stored bytes `[..., row_bytes]`.
pub(crate) fn lookup_into(
    py: Python<'_>,
    source: &dyn RowSource,
    ids: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let ids = Array::of("ids", ids)?;
    let mut array = Array::of("out", out)?;
    array.check_shape(&[&ids.shape[..], &[source.bytes_per_row()]].concat())?;
    array.check_apart(&ids)?;
    let (list, bytes) = (ids.row_ids()?, array.bytes_mut()?);
    py.detach(|| source.read(list, bytes)).map_err(store)
}
