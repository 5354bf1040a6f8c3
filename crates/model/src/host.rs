//! Between a device and the host: values read, ids and masks written.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// The values of a tensor, on the host.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("an f32 tensor")
}

/// A tensor without its graph, whether or not it has one.
pub(crate) trait InnerOrSelf {
    /// The tensor outside of autodiff.
    fn inner_or_self(self) -> Self;
}

impl<const D: usize> InnerOrSelf for Tensor<D> {
    fn inner_or_self(self) -> Self {
        if self.is_autodiff() { self.inner() } else { self }
    }
}

/// Ids, `[count]`, on `device`.
pub(crate) fn int(values: &[u32], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// 1 where a value is true, else 0, `[count, 1]`.
pub(crate) fn column(values: &[bool], device: &Device) -> Tensor<2> {
    let values: Vec<f32> = values.iter().map(|&value| f32::from(u8::from(value))).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count, 1]), device)
}

/// `weight` as it goes with `of`: without its graph where `of` has none.
pub(crate) fn like<const D: usize, const E: usize>(of: &Tensor<D>, weight: Tensor<E>) -> Tensor<E> {
    if of.is_autodiff() { weight } else { weight.inner_or_self() }
}
