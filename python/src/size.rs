//! Numbers of bytes, as people write them.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Bytes: an integer, or a text such as "64MiB" or "1.5 GB".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl<'a, 'py> FromPyObject<'a, 'py> for Size {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = object.extract::<u64>() {
            return Ok(Self(bytes));
        }
        let text: String = object.extract().map_err(|_| {
            PyTypeError::new_err("a number of bytes is an integer, or a text such as \"1GiB\"")
        })?;
        parse(&text).map(Self).ok_or_else(|| {
            PyValueError::new_err(format!(
                "{text:?} is not a number of bytes: write 1073741824, \"1GiB\" or \"1.5 GB\""
            ))
        })
    }
}

fn parse(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().ok()?;
    let unit = match unit.trim() {
        "" | "B" => 1u64,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    let bytes = number * unit as f64;
    (bytes.is_finite() && bytes < 2f64.powi(63)).then_some(bytes as u64)
}
