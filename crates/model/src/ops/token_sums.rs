//! Weights that all tokens see. Their gradients are sums over all tokens, for which a GPU has one thread per column, or one
//! product of few tiles: tens of thousands of additions in a row on a device that lies idle. So tokens come in parts,
//! each of which is summed by itself, and then the parts are.

use burn::tensor::Tensor;

/// In how many equal parts `tokens` are summed: the largest power of two that divides them, up to `most`.
pub(super) fn parts(tokens: usize, most: usize) -> usize {
    1 << tokens.trailing_zeros().min(most.ilog2())
}

/// `weight`, `[·]`, once for every token, `[tokens, ·]`.
pub(super) fn for_every_token(weight: Tensor<1>, tokens: usize) -> Tensor<2> {
    let width = weight.dims()[0];
    let parts = parts(tokens, 256);
    let weight = weight.reshape([1, 1, width]).expand([parts, 1, width]);
    weight.expand([parts, tokens / parts, width]).reshape([tokens, width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::values;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn a_weight_gets_the_sum_over_all_tokens_in_any_number_of_parts() {
        let device = Device::flex().autodiff();
        for tokens in [1, 3, 6, 512, 1536] {
            let weight = Tensor::<1>::from_data(TensorData::new(vec![2.0_f32, 5.0], [2]), &device);
            let weight = weight.require_grad();
            // Whole numbers, so that sums are exact in any order.
            let factors: Vec<f32> = (0..2 * tokens).map(|i| (i * 7 % 31) as f32).collect();
            let factor = Tensor::from_data(TensorData::new(factors.clone(), [tokens, 2]), &device);
            let every = for_every_token(weight.clone(), tokens);
            let gradients = (every.clone() * factor).sum().backward();
            let sum = |column: usize| factors.iter().skip(column).step_by(2).sum::<f32>();
            assert_eq!(values(every.inner()), [2.0, 5.0].repeat(tokens));
            assert_eq!(values(weight.grad(&gradients).unwrap()), [sum(0), sum(1)]);
        }
    }
}
