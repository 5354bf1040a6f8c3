//! A model's first weights, and hashes of files: what the twin shares with the Rust trainer.

use std::io::Read;
use std::path::PathBuf;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use crate::array::{Array, Dtype, ValuesMut};

/// Fills `out` (float32, any shape) with the normal values that the Rust model begins with: a function of `seed` and
/// the weight's `name` alone.
///
/// Raises `TypeError`, `ValueError` for a wrong array or a deviation that is not finite and above 0.
#[pyfunction]
pub(crate) fn initial_values(
    py: Python<'_>,
    seed: u64,
    name: &str,
    deviation: f32,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let mut array = Array::of("out", out)?;
    let ValuesMut::F32(values) = array.values_mut(Dtype::F32)? else {
        return Err(PyValueError::new_err("`out` must hold float32"));
    };
    let wrong =
        || PyValueError::new_err(format!("`deviation` is {deviation}, but must be finite and above 0"));
    if !(deviation > 0.0 && deviation.is_finite()) {
        return Err(wrong());
    }
    let normal = Normal::new(0.0, deviation).map_err(|_| wrong())?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(b".").update(name.as_bytes());
    let mut random = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    py.detach(|| values.iter_mut().for_each(|value| *value = normal.sample(&mut random)));
    Ok(())
}

/// BLAKE3 of bytes (uint8 of any shape), 64 hexadecimal digits. `context`: derives a key for that context instead.
///
/// Raises `TypeError` unless they are bytes.
#[pyfunction]
#[pyo3(signature = (data, context=None))]
pub(crate) fn blake3_of(py: Python<'_>, data: &Bound<'_, PyAny>, context: Option<&str>) -> PyResult<String> {
    let array = Array::of("data", data)?;
    let bytes = array.bytes()?;
    let mut hasher = context.map_or_else(blake3::Hasher::new, blake3::Hasher::new_derive_key);
    py.detach(|| hasher.update(bytes));
    Ok(hasher.finalize().to_hex().to_string())
}

/// BLAKE3 of the file at `path`, 64 hexadecimal digits.
///
/// Raises `OSError` if it cannot be read.
#[pyfunction]
pub(crate) fn blake3_of_file(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let hash = || -> std::io::Result<blake3::Hash> {
        let mut file = std::fs::File::open(&path)?;
        let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finalize()),
                count => hasher.update(&buffer[..count]),
            };
        }
    };
    let found =
        py.detach(hash).map_err(|error| PyOSError::new_err(format!("{}: {error}", path.display())))?;
    Ok(found.to_hex().to_string())
}
