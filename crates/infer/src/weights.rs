//! Weights of a trained model, laid out for decoding.

use burn::module::Param;
use burn::tensor::Tensor;
use engram_kernels::{PackedMatrix, WeightFormat};
use engram_model::Linear;

/// Values of a weight.
pub(crate) fn values<const D: usize>(weight: &Param<Tensor<D>>) -> Vec<f32> {
    let tensor = weight.val();
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    tensor.into_data().try_into_vec().expect("weights are f32")
}

/// Packs a linear map.
pub(crate) fn pack(linear: &Linear, format: WeightFormat) -> PackedMatrix {
    let [inputs, outputs] = linear.weight.dims();
    PackedMatrix::new(&values(&linear.weight), inputs, outputs, format)
}

/// `[rows, columns]` to `[columns, rows]`.
pub(crate) fn transpose(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| data[row * columns + column])).collect()
}
